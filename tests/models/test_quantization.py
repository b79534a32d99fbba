import hashlib
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.cli import main
from sheepop.config import Config, ModelConfig
from sheepop.data.tokenizer import Tokenizer
from sheepop.interop.imported import write_imported
from sheepop.models import pretrained
from sheepop.models.pretrained import load_pretrained, read_model, save_weights, stored_weights
from sheepop.models.quantization import quantize
from sheepop.models.quantized_layers import GROUP, KERNELS_FROM, LARGEST, PAIR, QuantizedLinear
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import ConfigError
from sheepop.utils.files import write_json

BITS: list[Literal["int8", "int4"]] = ["int8", "int4"]


def tiny(**changes: object) -> TransformerModel:
    torch.manual_seed(5)
    sizes = {"vocab_size": 41, "d_model": 64, "num_layers": 2, "num_heads": 4, "d_ff": 192, "max_seq_len": 12}
    return TransformerModel(ModelConfig.model_validate({**sizes, "init_std": 0.1, **changes})).eval()


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    shift=st.sampled_from([0.0, 3.0, -5.0]),
    seed=st.integers(0, 10**6),
)
def test_rounding_errs_by_half_a_step_in_8_bits_and_by_less_than_plain_rounding_in_4(
    rows: int, groups: int, scale: float, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = scale * (torch.randn(rows, groups * PAIR, generator=generator) + shift)
    eight = QuantizedLinear(groups * PAIR, rows, bias=False, quantization="int8")
    eight.fill(weight, None)
    step = weight.abs().amax(1, keepdim=True) / LARGEST
    assert ((eight.weight - weight).abs() <= step * 0.501).all()
    four = QuantizedLinear(groups * PAIR, rows, bias=False, quantization="int4")
    four.fill(weight, None)
    grouped = weight.unflatten(1, (-1, GROUP))
    step = (grouped.amax(-1) - grouped.amin(-1)) / 15
    plain = (step[..., None] / 2).square().sum() * GROUP  # the most that rounding to the whole range can err
    assert (four.weight - weight).square().sum() <= plain * 1.001 + scale**2 * 1e-9


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("weight", [torch.zeros(3, PAIR), torch.full((3, PAIR), 2.5)])
def test_constant_weights_survive(bits: Literal["int8", "int4"], weight: torch.Tensor) -> None:
    layer = QuantizedLinear(PAIR, 3, bias=False, quantization=bits)
    layer.fill(weight, None)
    torch.testing.assert_close(layer.weight, weight)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("changes", [{}, {"bias": True, "tie_weights": False}, {"ngram_order": 2, "norm": "rmsnorm"}])
def test_the_model_stays_near_and_is_smaller(bits: Literal["int8", "int4"], changes: dict[str, object]) -> None:
    model = tiny(**changes)
    quantized = quantize(model, bits)
    token_ids = torch.randint(0, 41, (2, 12))
    with torch.no_grad():
        before, after = model(token_ids), quantized(token_ids)
        loss = quantized(token_ids, targets=token_ids)
    error = ((after - before).square().mean() / before.var()).sqrt()
    assert 0 < error < {"int8": 0.02, "int4": 0.3}[bits]
    expected = torch.nn.functional.cross_entropy(after.flatten(0, 1), token_ids.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    sizes = [
        sum(tensor.nbytes for name, tensor in stored_weights(either).items() if not name.startswith("ngram"))
        for either in (model, quantized)
    ]
    assert sizes[1] < sizes[0] * {"int8": 0.5, "int4": 0.4}[bits]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, bits: Literal["int8", "int4"], tied: bool) -> None:
    quantized = quantize(tiny(tie_weights=tied, bias=True), bits)
    write_json(tmp_path / "config.json", Config(model=quantized.config).model_dump())
    save_weights(stored_weights(quantized), quantized.config, tmp_path / "model.safetensors")
    loaded = load_pretrained(tmp_path)
    token_ids = torch.randint(0, 41, (2, 12))
    with torch.no_grad():
        assert torch.equal(loaded(token_ids), quantized(token_ids))


def cubes_as_weights(rows: int, inputs: int) -> torch.Tensor:
    """Return weights (O, I) of all sizes, most of them small, that are the same everywhere."""
    numbers = np.arange(rows * inputs, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    return torch.from_numpy(((numbers / 2**32 - 0.5) ** 3).astype(np.float32).reshape(rows, inputs))


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("int8", "c3216e97e96dd27d9084cac4a847b15662ee5952858dfaca384d5f1cfeb2c408"),
        ("int4", "5aa8862d94fa1b1a570232c689d2f50ee24b8158dba60bd9c9db440845dd7402"),
    ],
)
def test_rounded_weights_are_those_of_earlier_versions(bits: Literal["int8", "int4"], expected: str) -> None:
    layer = QuantizedLinear(512, 600, bias=False, quantization=bits)
    layer.fill(cubes_as_weights(600, 512), None)
    content = b"".join(buffer.view(torch.uint8).numpy().tobytes() for buffer in layer.buffers())
    assert hashlib.sha256(content).hexdigest() == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-3, 1.0, 1e4, 1e18, 1e19, 1e30])
@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_a_large_matrix_is_rounded_to_the_last_bit_like_small_ones(
    bits: Literal["int8", "int4"], scale: float, shift: float
) -> None:
    rows, inputs, few = 2 * (KERNELS_FROM // 448) - 1, 448, 90
    weight = scale * (torch.randn(rows, inputs, generator=torch.Generator().manual_seed(6)) + shift)
    weight[7] = weight[7, 0]
    weight[8] = 0
    weight[9] = weight[9].bfloat16().float() * 4  # many equal errors
    assert weight[:few].numel() < KERNELS_FROM <= weight.numel()  # by PyTorch's operators, and by compiled code
    large = QuantizedLinear(inputs, rows, bias=False, quantization=bits)
    large.fill(weight, None)
    for start in range(0, rows, few):
        part = weight[start : start + few]
        small = QuantizedLinear(inputs, len(part), bias=False, quantization=bits)
        small.fill(part, None)
        for found, expected in zip(large.buffers(), small.buffers(), strict=True):
            assert torch.equal(found[start : start + few], expected)


@pytest.mark.parametrize("bits", BITS)
def test_weights_that_are_no_numbers_stay_none(bits: Literal["int8", "int4"]) -> None:
    weight = torch.randn(KERNELS_FROM // 512, 512)
    weight[3, 5], weight[4, 5] = torch.nan, torch.inf
    large = QuantizedLinear(512, len(weight), bias=False, quantization=bits)
    large.fill(weight, None)
    small = QuantizedLinear(512, 5, bias=False, quantization=bits)
    small.fill(weight[:5], None)
    assert torch.equal(large.weight[:5].isnan(), small.weight.isnan())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_out_of_the_file_it_is_the_same_as_out_of_memory(
    tmp_path: Path, bits: Literal["int8", "int4"], tied: bool, dtype: torch.dtype
) -> None:
    model = tiny(tie_weights=tied, bias=True, positions="learned", ngram_order=2)
    write_json(tmp_path / "config.json", Config(model=model.config).model_dump())
    weights = {name: tensor.to(dtype) for name, tensor in stored_weights(model).items()}
    save_weights(weights, model.config, tmp_path / "model.safetensors")
    shared = read_model(tmp_path, shares_file=True)
    token_ids = torch.randint(0, 41, (2, 12))
    with torch.no_grad():
        if dtype == torch.float32:
            assert torch.equal(shared(token_ids), model(token_ids))
        found, expected = quantize(shared, bits), quantize(load_pretrained(tmp_path), bits)
        assert torch.equal(found(token_ids), expected(token_ids))
    assert all(tensor.dtype != torch.bfloat16 for name, tensor in stored_weights(found).items() if "norm" in name)


@pytest.mark.parametrize("large_file", [1, 2**24])  # from which files are compared while others are used
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_checkpoint_is_not_rounded(
    tmp_path: Path, file: str, large_file: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "LARGE_FILE", large_file)
    tokenizer = Tokenizer.train("char", ["the ewe is old"], vocab_size=64)
    model = tiny(vocab_size=tokenizer.vocab_size)
    folder = tmp_path / "model"
    write_imported(folder, model.config, stored_weights(model), tokenizer)
    content = bytearray((folder / file).read_bytes())
    content[-9] ^= 1  # a weight, or what makes the text no JSON any more or other JSON
    (folder / file).write_bytes(content)
    for words in (
        ["generate", "--checkpoint", str(folder), "--prompt", "the", "--quantize", "int8"],
        ["quantize", "--checkpoint", str(folder), "--output", str(tmp_path / "eight")],
    ):
        with pytest.raises(SystemExit) as ended:
            run_command(words)
        assert ended.value.code == 4
        assert f"damaged: {file}" in capsys.readouterr().err
    assert not (tmp_path / "eight").exists()


def test_inputs_that_fill_no_group_keep_8_bits() -> None:
    quantized = quantize(tiny(d_model=48, d_ff=192), "int4")
    layers = {name: layer.is_packed for name, layer in quantized.named_modules() if isinstance(layer, QuantizedLinear)}
    assert {name for name, is_packed in layers.items() if is_packed} == {
        f"blocks.{i}.feed_forward.output" for i in (0, 1)
    }


def test_a_quantized_model_is_not_quantized_again() -> None:
    with pytest.raises(ConfigError, match="int8"):
        quantize(quantize(tiny(), "int8"), "int4")


def test_the_command_writes_a_checkpoint_that_evaluates_and_generates_but_does_not_learn_or_leave(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the ewe is old and the dog is young. " * 40)
    tokenizer = Tokenizer.train("char", [text.read_text()], vocab_size=64)
    model = tiny(vocab_size=tokenizer.vocab_size)
    write_imported(tmp_path / "model", model.config, stored_weights(model), tokenizer)
    eight = tmp_path / "eight"
    words = ["quantize", "--checkpoint", str(tmp_path / "model"), "--output", str(eight), "--to", "int8"]
    run_command([*words, "--data", str(text)])
    assert "perplexity" in capsys.readouterr().out
    run_command(["generate", "--checkpoint", str(eight), "--prompt", "the", "--max-new-tokens", "5", "--json"])
    written = json.loads(capsys.readouterr().out)["completions"][0]["token_ids"]
    arguments = ["--checkpoint", str(tmp_path / "model"), "--prompt", "the", "--max-new-tokens", "5", "--json"]
    run_command(["generate", *arguments, "--quantize", "int8"])
    assert json.loads(capsys.readouterr().out)["completions"][0]["token_ids"] == written
    for refused in (
        ["train", "--data", str(text), "--output", str(tmp_path / "run"), "--training.init_from", str(eight)],
        ["export", "--checkpoint", str(eight), "--format", "hf", "--output", str(tmp_path / "hf")],
    ):
        with pytest.raises(SystemExit) as ended:
            run_command(refused)
        assert ended.value.code in (2, 4)
        assert "quantization" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "hf").exists()


def run_command(words: list[str]) -> None:
    try:
        main(words)
    except SystemExit as ended:
        if ended.code:
            raise
