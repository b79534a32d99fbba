"""GGUF files there and back, compared with the library's own reader, and by running llama.cpp where it is installed."""

import importlib.util
import json
import random
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sheepop.data.tokenizer import Tokenizer
from sheepop.interop.convert import export_model, import_model
from sheepop.interop.gguf import prove, prove_with_llama_cpp, write_gguf
from sheepop.interop.gguf_file import MOST_STRINGS, TENSOR_TYPES, GgufFile
from sheepop.interop.llama_cpp_engine import llama_cpp
from sheepop.models.pretrained import load_pretrained, resolve_checkpoint
from sheepop.utils.errors import CheckpointError, ConfigError

gguf = pytest.importorskip("gguf")

VOCAB_SIZE = 283
HAS_LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None
PROOF = "proved with llama.cpp" if HAS_LLAMA_CPP else "read back it is the same; llama-cpp-python is not installed"


def own_logits(folder, token_ids):
    with torch.inference_mode():
        return load_pretrained(folder)(token_ids)


def ids():
    return torch.randint(0, VOCAB_SIZE, (2, 23), generator=torch.Generator().manual_seed(1))


def change(path, *, without=(), fields=(), tensors=()):
    """Write a file again with other values and tensors."""
    stored = GgufFile(path)
    values = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in stored.fields.items()}
    architecture = dict(fields).get("general.architecture", values.pop("general.architecture"))
    values |= {key: value for key, value in dict(fields).items() if key != "general.architecture"}
    everything = dict(stored) | dict(tensors)
    for key in without:
        values.pop(key, None)
        everything.pop(key, None)
    write_gguf(path, architecture, values, everything, "f32")


GPT2 = {"positions": "learned", "activation": "gelu_tanh"}
NEOX = {"activation": "gelu_tanh"}
LLAMA = {"qk_norm": False}
EXPRESSIBLE = [
    ("gpt2", "classic", GPT2 | {"bias": True}),
    ("gpt2", "classic", GPT2 | {"tie_weights": False}),
    ("gpt2", "classic", GPT2 | {"positions": "sinusoidal", "bias": True}),
    ("gpt2", "classic", GPT2 | {"positions": "none"}),
    ("gptneox", "classic", NEOX),
    ("gptneox", "classic", NEOX | {"bias": True, "tie_weights": False, "parallel_residual": True}),
    ("gptneox", "classic", NEOX | {"rotary_dim": 4, "parallel_residual": True}),
    ("gptneox", "classic", NEOX | {"rope_scaling": "linear", "rope_scaling_factor": 2.0}),
    ("llama", "modern", LLAMA),
    ("llama", "modern", LLAMA | {"bias": True, "num_kv_heads": 1}),
    ("llama", "modern", LLAMA | {"head_dim": 14, "tie_weights": False, "rope_theta": 500.0}),
    ("llama", "modern", LLAMA | {"rope_scaling": "yarn", "rope_scaling_factor": 5.75}),
    ("llama", "modern", LLAMA | {"rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_trained_len": 7}),
    ("llama", "modern", LLAMA | {"rope_scaling": "llama3", "rope_scaling_factor": 4.0, "rope_trained_len": 8}),
    ("llama", "modern", LLAMA | {"rope_scaling": "ntk", "rope_scaling_factor": 3.0}),
    ("qwen3", "modern", {}),
    ("qwen3", "modern", {"head_dim": 6, "num_kv_heads": 4, "tie_weights": False}),
]


@pytest.mark.parametrize(("name", "preset", "settings"), EXPRESSIBLE, ids=str)
def test_what_llama_cpp_can_express_goes_there_and_comes_back(tmp_path, checkpoint, name, preset, settings, capfd):
    folder = checkpoint(preset, **settings)
    export_model(folder, tmp_path / "model.gguf", file_format="gguf")
    assert GgufFile(tmp_path / "model.gguf").fields["general.architecture"] == name
    assert PROOF in capfd.readouterr().err
    import_model(tmp_path / "model.gguf", tmp_path / "back", tokenizer=None)
    token_ids = ids()
    torch.testing.assert_close(
        own_logits(tmp_path / "back", token_ids), own_logits(folder, token_ids), rtol=1e-5, atol=1e-5
    )
    assert Tokenizer.load(tmp_path / "back").fingerprint == Tokenizer.load(folder).fingerprint
    before, after = (load_pretrained(path).config for path in (folder, tmp_path / "back"))
    if settings.get("positions") != "sinusoidal":
        assert after.tie_weights == before.tie_weights
    if "rope_scaling" not in settings:
        assert after.rope_theta == before.rope_theta


@pytest.mark.parametrize("encoding", ["f16", "q8_0"])
@pytest.mark.parametrize(("preset", "settings"), [("modern", {}), ("classic", GPT2 | {"bias": True})])
def test_rounded_weights_stay_near(tmp_path, checkpoint, preset, settings, encoding, capfd):
    sizes = {"d_model": 96, "d_ff": 128, "num_heads": 3, "num_kv_heads": 3}
    folder = checkpoint(preset, **settings | sizes)
    export_model(folder, tmp_path / "model.gguf", file_format="gguf", encoding=encoding)
    assert PROOF in capfd.readouterr().err
    stored = GgufFile(tmp_path / "model.gguf")
    kinds = {tensor.kind for tensor in stored.encoded.values() if len(tensor.shape) > 1}
    assert kinds == {encoding.upper()} | ({"F32"} if "position_embd.weight" in stored else set())
    assert all(tensor.kind == "F32" for tensor in stored.encoded.values() if len(tensor.shape) == 1)
    import_model(tmp_path / "model.gguf", tmp_path / "back", tokenizer=None)
    expected, found = own_logits(folder, ids()), own_logits(tmp_path / "back", ids())
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_factors_of_llama_3_are_known_without_their_trained_context_and_others_are_refused(tmp_path, checkpoint):
    folder = checkpoint(
        "modern",
        **LLAMA | {"rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_trained_len": 128, "max_seq_len": 2048},
    )
    path = tmp_path / "model.gguf"
    export_model(folder, path, file_format="gguf")
    change(path, without=["llama.rope.scaling.original_context_length"])
    import_model(path, tmp_path / "back", tokenizer=None)
    config = load_pretrained(tmp_path / "back").config
    assert (config.rope_scaling, config.rope_scaling_factor) == ("llama3", 8.0)
    torch.testing.assert_close(own_logits(tmp_path / "back", ids()), own_logits(folder, ids()), rtol=1e-5, atol=1e-5)
    divisors = GgufFile(path)["rope_freqs.weight"]
    for others in (divisors + 0.1, divisors[:-1], torch.zeros_like(divisors), divisors * torch.nan):
        change(path, tensors={"rope_freqs.weight": others})
        with pytest.raises(CheckpointError, match="its own factors"):
            import_model(path, tmp_path / "other", tokenizer=None)


def test_rows_that_fill_no_blocks_are_in_fp16(tmp_path, checkpoint):
    export_model(checkpoint("modern"), tmp_path / "model.gguf", file_format="gguf", encoding="q8_0")
    stored = GgufFile(tmp_path / "model.gguf")
    assert stored.encoded["token_embd.weight"].kind == "F16"


INEXPRESSIBLE = [
    ("modern", {"ngram_order": 3}, r"model\.ngram_order is 3"),
    ("modern", {"conv_width": 4}, r"model\.conv_width is 4"),
    ("modern", {"copy_width": 8}, r"model\.copy_width is 8.*model\.copy_width 0 to export"),
    ("classic", {}, r"for gptneox model\.activation is gelu, not gelu_tanh"),
    ("classic", GPT2 | {"activation": "relu"}, r"for gpt2 model\.activation is relu, not gelu_tanh"),
    ("classic", NEOX | {"qk_norm": True}, r"for gptneox model\.qk_norm is true, not false"),
    ("modern", {"positions": "none"}, r"model\.positions is none, not rotary"),
    ("modern", {"sliding_window": 5}, r"for qwen3 model\.sliding_window is 5, not 0"),
    ("modern", {"sliding_window": 5, "attention_sinks": 2}, r"for qwen3 .*model\.attention_sinks is 2, not 0"),
    ("modern", LLAMA | {"activation": "geglu"}, r"for llama model\.activation is geglu, not swiglu"),
    ("modern", {"rotary_dim": 4}, r"model\.rotary_dim is 4, not head_dim"),
    ("modern", LLAMA | {"rope_scaling": "yarn", "rope_scaling_factor": 4.0}, r"is 4, no divisor of max_seq_len"),
    ("modern", {"rope_scaling": "llama3", "rope_scaling_factor": 5.75}, r"for qwen3 model\.rope_scaling is llama3"),
    ("modern", LLAMA | {"rope_scaling": "llama3", "rope_scaling_factor": 4.0}, r"is 4, no divisor of max_seq_len"),
    ("classic", GPT2 | {"num_kv_heads": 2}, r"for gpt2 model\.num_kv_heads is 2, not 4"),
]


@pytest.mark.parametrize(("preset", "settings", "message"), INEXPRESSIBLE, ids=str)
def test_what_llama_cpp_cannot_express_is_refused_with_the_setting(tmp_path, checkpoint, preset, settings, message):
    with pytest.raises(CheckpointError, match=message):
        export_model(checkpoint(preset, **settings), tmp_path / "model.gguf", file_format="gguf")
    assert list(tmp_path.glob("*.gguf*")) == list(tmp_path.glob(".*")) == []


def test_an_export_that_is_not_the_same_is_found(tmp_path, checkpoint, tokenizer):
    folder = checkpoint("modern")
    path = tmp_path / "model.gguf"
    export_model(folder, path, file_format="gguf")
    weight = GgufFile(path)["blk.1.attn_k_norm.weight"]
    weight[2] += 0.5
    change(path, tensors={"blk.1.attn_k_norm.weight": weight})
    with pytest.raises(CheckpointError, match=r"its weight blocks\.1\.attention\.key_norm\.weight differs"):
        prove(path, load_pretrained(folder), tokenizer, "f32")
    export_model(folder, tmp_path / "other.gguf", file_format="gguf")
    other = Tokenizer.train("bpe", ["dogs and nothing but dogs"] * 3, vocab_size=270)
    with pytest.raises(CheckpointError, match="its tokenizer gives other tokens"):
        prove(tmp_path / "other.gguf", load_pretrained(folder), other, "f32")


def test_what_is_asked_for_has_to_exist(tmp_path, checkpoint):
    folder = checkpoint("modern")
    with pytest.raises(ConfigError, match=r"cannot be stored as 'q2'. Choose f32, f16, q8_0"):
        export_model(folder, tmp_path / "model.gguf", file_format="gguf", encoding="q2")
    with pytest.raises(ConfigError, match="are for --format gguf"):
        export_model(folder, tmp_path / "hf", file_format="hf", encoding="f16")
    export_model(folder, tmp_path / "model.gguf", file_format="gguf")
    with pytest.raises(ConfigError, match="There is something at"):
        export_model(folder, tmp_path / "model.gguf", file_format="gguf")


# Reading.


def test_a_file_is_read_as_the_library_reads_it(tmp_path, checkpoint):
    path = tmp_path / "model.gguf"
    export_model(checkpoint("classic", **NEOX), path, file_format="gguf", encoding="f16")
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    for key, value in ours.fields.items():
        assert fields.pop(key) == (value.tolist() if isinstance(value, np.ndarray) else value)
    assert not fields
    assert set(ours) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        assert np.array_equal(ours[tensor.name].numpy(), expected)
        assert ours.encoded[tensor.name].kind == tensor.tensor_type.name


def raw_tensor(kind, rows, blocks):
    """Return random bytes of a type whose numbers are finite, and the type."""
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    content = np.random.default_rng(0).integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    halves = {"F16": [0], "BF16": [0], "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}
    for at in halves.get(kind.name, [2]):  # scales and fp16 numbers below 2
        content[..., at + 1] &= 0x3F
    return content.reshape(rows, -1), kind, block


def by_hand(kind, block):
    """Return the numbers of one block of a type, as ggml's documentation describes it."""
    half = struct.unpack_from("<e", block)[0]
    if kind == "Q8_0":
        return [half * value for value in struct.unpack_from("<32b", block, 2)]
    packed = block[4:20] if kind == "Q4_1" else block[2:18]
    quarters = [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]
    if kind == "Q4_1":
        return [half * value + struct.unpack_from("<e", block, 2)[0] for value in quarters]
    return [half * (value - 8) for value in quarters]


@pytest.mark.parametrize("kind", TENSOR_TYPES)
def test_every_type_of_tensor(tmp_path, kind):
    content, number, block = raw_tensor(kind, 3, 2)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("x.weight", content, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GgufFile(tmp_path / "model.gguf")["x.weight"]
    assert found.shape == (3, 2 * block)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), gguf.dequantize(content, number))
    if kind in ("Q8_0", "Q4_0", "Q4_1"):
        first = by_hand(kind, content[1, : content.shape[1] // 2].tobytes())
        np.testing.assert_allclose(found[1, :block].numpy(), first, rtol=1e-6, atol=1e-7)


def test_a_type_that_we_do_not_know_is_named(tmp_path):
    content, number, _ = raw_tensor("Q5_K", 3, 1)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("x.weight", content, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"x\.weight has the type Q5_K, .* known are F32, F16, BF16, Q8_0"):
        import_model(tmp_path / "model.gguf", tmp_path / "back", tokenizer=None)


def test_qwen2_and_what_mistral_says(tmp_path, checkpoint):
    """Qwen2 is Llama with halves turned and biases of queries, keys and values alone."""
    folder = checkpoint("modern", **LLAMA)
    path = tmp_path / "model.gguf"
    export_model(folder, path, file_format="gguf")
    change(path, fields={"llama.attention.sliding_window": 5, "llama.rope.scaling.factor": 1.0})
    import_model(path, tmp_path / "mistral", tokenizer=None)
    assert load_pretrained(tmp_path / "mistral").config.sliding_window == 5

    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    sizes = {"hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = transformers.Qwen2Config(
        vocab_size=VOCAB_SIZE, intermediate_size=44, max_position_embeddings=23, **sizes
    )
    theirs = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(2):
        parts = {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.o_proj": "attn_output",
        }
        parts |= {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"}
        parts |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
        names |= {f"model.layers.{layer}.{theirs}": f"blk.{layer}.{ours}" for theirs, ours in parts.items()}
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        stem, _, kind = name.rpartition(".")
        tensors[f"{names[stem]}.{kind}"] = tensor
    stored = GgufFile(path)
    fields = {
        key.replace("llama.", "qwen2."): value for key, value in stored.fields.items() if key != "general.architecture"
    }
    fields = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in fields.items()}
    fields |= {"qwen2.attention.sliding_window": 0, "qwen2.attention.layer_norm_rms_epsilon": settings.rms_norm_eps}
    write_gguf(path, "qwen2", fields, tensors, "f32")
    import_model(path, tmp_path / "qwen2", tokenizer=None)
    with torch.inference_mode():
        expected = theirs(ids()).logits
    torch.testing.assert_close(own_logits(tmp_path / "qwen2", ids()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fields": {"general.architecture": "gemma"}},
            "a 'gemma', which .* known are gpt2, gptneox, llama, qwen3, qwen2",
        ),
        ({"fields": {"split.count": 3}}, "one of several parts"),
        ({"fields": {"qwen3.expert_count": 8}}, "setting expert_count is 8"),
        ({"fields": {"qwen3.logit_scale": 0.5}}, r"the setting qwen3\.logit_scale, which sheepop cannot express"),
        ({"fields": {"qwen3.attention.value_length": 8}}, r"setting attention\.value_length is 8"),
        ({"fields": {"qwen3.rope.scaling.type": "longrope", "qwen3.rope.scaling.factor": 4.0}}, "scaled by 'longrope'"),
        ({"fields": {"qwen3.embedding_length": 48}}, "does not fit its own settings"),
        ({"fields": {"qwen3.embedding_length": "wide"}}, "is not the settings of a model"),
        ({"fields": {"qwen3.block_count": 3}}, r"lacks the weight blk\.2\."),
        ({"fields": {"qwen3.block_count": 2**31}}, "does not fit its own weights"),
        ({"without": ["qwen3.context_length"]}, "lack context_length"),
        ({"without": ["token_embd.weight"]}, "vocab_size"),
        ({"without": ["blk.1.ffn_up.weight"]}, r"lacks the weight blk\.1\.ffn_up\.weight"),
        ({"tensors": {"rope_freqs.weight": torch.ones(5)}}, r"no place: rope_freqs\.weight"),
    ],
    ids=str,
)
def test_what_cannot_be_imported_is_named_and_leaves_nothing(tmp_path, checkpoint, changes, message):
    path = tmp_path / "model.gguf"
    export_model(checkpoint("modern"), path, file_format="gguf")
    change(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        import_model(path, tmp_path / "back", tokenizer=None)
    assert not (tmp_path / "back").exists()


# Damaged files.


def parts_of(content):
    """Return where the numbers of a header are: counts, lengths, types; by finding the header's end."""
    return range(4, content.index(b"token_embd.weight") + 4000)


def mutations(good, count):
    """Yield damaged files: cut off, with other bytes, with absurd numbers where a number may be, parts repeated."""
    numbers = random.Random(9)
    header = parts_of(good)
    absurd = [0, 1, 2**31 - 1, 2**32, 2**63, 2**64 - 1, 10**12, len(good), len(good) * 8]
    for number in range(count):
        content = bytearray(good)
        way = number % 5
        if way == 0:
            del content[numbers.randrange(len(content)) :]
        elif way in (1, 2):
            for _ in range(numbers.randint(1, 4)):
                content[numbers.choice(header)] = numbers.randrange(256)
        elif way == 3:
            at = numbers.choice((8, 16, numbers.choice(header)))
            content[at : at + 8] = struct.pack("<Q", numbers.choice(absurd))
        else:
            at, size = numbers.choice(header), numbers.randrange(1, 300)
            content[at:at] = content[at : at + size]
        yield bytes(content)


def test_damaged_files_are_one_kind_of_error(tmp_path, checkpoint):
    """400 mutations, each read within a second."""
    path = tmp_path / "model.gguf"
    export_model(checkpoint("modern"), path, file_format="gguf")
    refused = 0
    for number, content in enumerate(mutations(path.read_bytes(), 400)):
        damaged = tmp_path / "damaged.gguf"
        damaged.write_bytes(content)
        begin = time.process_time()
        try:
            import_model(damaged, tmp_path / f"back{number}", tokenizer=None)
        except CheckpointError:
            refused += 1
            assert not list(tmp_path.glob(f"*back{number}*"))
        else:
            Tokenizer.load(tmp_path / f"back{number}").encode("the sheep")
        assert time.process_time() - begin < 1
    assert refused > 200


MEASURE = """
import pathlib, sys
from sheepop.interop.gguf import import_gguf
from sheepop.utils.errors import CheckpointError
from sheepop.utils.memory import forget_peak, peak_resident_bytes, resident_bytes
import gguf
forget_peak()
before = resident_bytes()
try:
    import_gguf(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
except CheckpointError as error:
    print(peak_resident_bytes() - before, error)
"""


def header(num_tensors, num_fields, *parts):
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_fields) + b"".join(parts)


def text(string):
    return struct.pack("<Q", len(string)) + string.encode()


LARGE = 40_000_000
GREEDY_FILES = {
    "a list of too many strings": lambda: header(0, 1, text("x"), struct.pack("<IIQ", 9, 8, LARGE // 8), bytes(LARGE)),
    "a list of as many strings as may be": lambda: header(
        0, 1, text("x"), struct.pack("<IIQ", 9, 8, MOST_STRINGS), *(text(f"{n:07}") for n in range(MOST_STRINGS))
    ),
    "a list of lists": lambda: header(0, 1, text("x"), struct.pack("<IIQ", 9, 9, 10**12), bytes(1000)),
    "a list without end": lambda: header(0, 1, text("x"), struct.pack("<IIQ", 9, 0, 2**63), bytes(1000)),
    "as many fields as fit": lambda: header(
        0, 10**6, *(text(f"{n:06}") + struct.pack("<IB", 0, 1) for n in range(10**6))
    ),
    "tensors one over the other": lambda: header(
        2000, 0, *(text(f"{n:06}") + struct.pack("<IQIQ", 1, 2**20, 0, 0) for n in range(2000)), bytes(2**22 + 99)
    ),
    "an array of numbers": lambda: header(0, 1, text("x"), struct.pack("<IIQ", 9, 0, LARGE), bytes(LARGE)),
}


@pytest.mark.parametrize("kind", GREEDY_FILES)
def test_no_file_takes_more_memory_than_its_size_and_200_megabytes(tmp_path, kind):
    path = tmp_path / "model.gguf"
    path.write_bytes(GREEDY_FILES[kind]())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, path, tmp_path / "back"], capture_output=True, text=True, check=True
    )
    grown = int(done.stdout.split()[0])
    assert grown < path.stat().st_size + 200e6
    assert not (tmp_path / "back").exists()


# Tokenizers.


def file_with(tmp_path, checkpoint, fields, without=()):
    """Return a file whose tokenizer has other fields."""
    path = tmp_path / "model.gguf"
    export_model(checkpoint("modern", vocab_size=300), path, file_format="gguf")
    change(path, fields={f"tokenizer.ggml.{key}": value for key, value in fields.items()}, without=without)
    return path


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_our_tokenizers_go_there_and_come_back(tmp_path, checkpoint, kind, capfd):
    folder = checkpoint("modern")
    (folder / "manifest.json").unlink()  # its sums are those of the other tokenizer
    ours = Tokenizer.train(kind, ["The sheep sees the dog.\n", "naïve"] * 4, vocab_size=270 if kind == "bpe" else 15)
    ours.save(folder / "tokenizer.json")
    export_model(folder, tmp_path / "model.gguf", file_format="gguf")
    assert PROOF in capfd.readouterr().err
    import_model(tmp_path / "model.gguf", tmp_path / "back", tokenizer=None)
    found = Tokenizer.load(tmp_path / "back")
    assert found.kind == kind
    for string in ("The sheep", "<|endoftext|> é → 🐑\n", "  [PAD270] <0x41>\0"):
        assert found.encode(string) == ours.encode(string)
        assert found.decode(found.encode(string)) == string
    assert (found.start_ids, found.end_of_text_id) == (ours.start_ids, ours.end_of_text_id)


@pytest.mark.skipif(not HAS_LLAMA_CPP, reason="needs llama-cpp-python")
@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_llama_cpp_reads_the_same_tokens_in_any_text(tmp_path, checkpoint, kind):
    folder = checkpoint("modern", vocab_size=300)
    (folder / "manifest.json").unlink()
    ours = Tokenizer.train(
        kind, ["The sheep sees the dog: 12 345.\n", "naïve 中文"] * 4, vocab_size=300 if kind == "bpe" else 20
    )
    ours.save(folder / "tokenizer.json")
    path = tmp_path / "model.gguf"
    export_model(folder, path, file_format="gguf")
    numbers = random.Random(2)
    alphabet = "The sheep's  \n\r\t12é中🐑<|endoftext|>0x41\u3000\u0301!?"
    with llama_cpp(path, context=23, batch=1, threads=1) as (tokens_of, _):
        for _ in range(200):
            string = "".join(numbers.choice(alphabet) for _ in range(numbers.randrange(1, 30)))
            assert tokens_of(string) == [*ours.start_ids, *ours.encode(string)], string


@pytest.mark.skipif(not HAS_LLAMA_CPP, reason="needs llama-cpp-python")
def test_a_file_that_ends_llama_cpp_does_not_end_us(tmp_path, checkpoint, tokenizer):
    folder, path = checkpoint("modern"), tmp_path / "model.gguf"
    export_model(folder, path, file_format="gguf")
    change(path, without=["blk.1.ffn_up.weight"])
    with pytest.raises(CheckpointError, match=r"llama\.cpp does not load the exported file"):
        prove_with_llama_cpp(path, load_pretrained(folder), tokenizer, "f32")


def test_characters_without_a_space_and_with_one_that_looks_like_it(tmp_path, checkpoint):
    folder = checkpoint("modern")
    (folder / "manifest.json").unlink()
    ours = Tokenizer.train("char", ["abc"], vocab_size=4)
    ours.save(folder / "tokenizer.json")
    export_model(folder, tmp_path / "model.gguf", file_format="gguf")
    import_model(tmp_path / "model.gguf", tmp_path / "back", tokenizer=None)
    assert Tokenizer.load(tmp_path / "back").encode("a b\nc") == ours.encode("a b\nc")

    Tokenizer.train("char", ["ab▁"], vocab_size=4).save(folder / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"U\+2581"):
        export_model(folder, tmp_path / "other.gguf", file_format="gguf")


def test_words_are_refused(tmp_path, checkpoint):
    folder = checkpoint("modern")
    (folder / "manifest.json").unlink()
    Tokenizer.train("word", ["the sheep"], vocab_size=6).save(folder / "tokenizer.json")
    with pytest.raises(
        CheckpointError, match=r"has no word tokenizers. Train the model with data\.tokenizer bpe or char"
    ):
        export_model(folder, tmp_path / "model.gguf", file_format="gguf")


def test_holes_in_the_vocabulary_stay_holes(tmp_path, checkpoint, tokenizer):
    """The model has more entries than its tokenizer; the rest are there by other names, and unused."""
    path = file_with(tmp_path, checkpoint, {})
    fields = GgufFile(path).fields
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD299]"
    assert fields["tokenizer.ggml.token_type"].tolist()[-17:] == [5] * 17
    import_model(path, tmp_path / "back", tokenizer=None)
    found = Tokenizer.load(tmp_path / "back")
    assert found.fingerprint == tokenizer.fingerprint
    assert found.encode("[PAD299]") == tokenizer.encode("[PAD299]")

    types = fields["tokenizer.ggml.token_type"].tolist()
    types[-1] = 4  # one that is never cut
    change(path, fields={"tokenizer.ggml.token_type": types})
    import_model(path, tmp_path / "user", tokenizer=None)
    found = Tokenizer.load(tmp_path / "user")
    assert found.encode("the [PAD299]!") == [*tokenizer.encode("the "), 299, *tokenizer.encode("!")]
    assert found.decode([299]) == "[PAD299]"
    export_model(tmp_path / "user", tmp_path / "again.gguf", file_format="gguf")
    assert GgufFile(tmp_path / "again.gguf").fields["tokenizer.ggml.token_type"].tolist() == types


SAMPLES = ["I'LL say: don't", "12345 6789", "a\r\n\n  b \n ", "Straße ǅ x²", "!!\n\nx/y", "٣٤٥ 一二三", " \u3000 \t"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["12345", " 6789"]),
        ("smollm", ["1", "2", "3", "4", "5", " ", "6", "7", "8", "9"]),
        ("llama-bpe", ["123", "45", " ", "678", "9"]),
        ("qwen2", ["1", "2", "3", "4", "5", " ", "6", "7", "8", "9"]),
        ("tekken", ["1", "2", "3", "4", "5", " ", "6", "7", "8", "9"]),
        ("gpt-4o", ["123", "45", " ", "678", "9"]),
        ("default", ["123", "45", " ", "678", "9"]),
    ],
)
def test_how_text_is_split(tmp_path, checkpoint, pre, expected):
    path = file_with(tmp_path, checkpoint, {"pre": pre}, without=["tokenizer.ggml.add_bos_token"])
    import_model(path, tmp_path / "back", tokenizer=None)
    tokenizer = Tokenizer.load(tmp_path / "back")
    layout = json.loads((tmp_path / "back/tokenizer.json").read_text())
    import tokenizers

    splitter = tokenizers.Tokenizer.from_str(json.dumps(layout)).pre_tokenizer
    assert [piece.replace("Ġ", " ") for piece, _ in splitter.pre_tokenize_str("12345 6789")] == expected
    for sample in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(sample)) == sample
        assert [*tokenizer.cut(sample, 2)] == [sample] or pre not in ("smollm", "default")
    assert layout["model"]["ignore_merges"] == (pre in ("llama-bpe", "tekken"))


def test_ways_to_begin(tmp_path, checkpoint, tokenizer):
    end, begin = tokenizer.end_of_text_id, 3
    for number, (fields, without, start) in enumerate(
        (
            ({}, [], [end]),
            ({"add_bos_token": False}, [], []),
            ({"bos_token_id": begin}, [], [begin]),
            ({"bos_token_id": begin}, ["tokenizer.ggml.add_bos_token"], []),
            ({"bos_token_id": begin, "pre": "llama-bpe"}, ["tokenizer.ggml.add_bos_token"], [begin]),
            ({}, ["tokenizer.ggml.add_bos_token"], [end]),
            ({"eos_token_id": begin, "add_bos_token": False}, [], []),
        )
    ):
        path = file_with(tmp_path, checkpoint, fields, without)
        import_model(path, tmp_path / f"back{number}", tokenizer=None)
        found = Tokenizer.load(tmp_path / f"back{number}")
        assert found.start_ids == start
        assert found.end_of_text_id == fields.get("eos_token_id", end)
        path.unlink()


def test_pieces_with_scores(tmp_path, checkpoint, capfd):
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    pieces = ["▁", "e", "t", "h", "s", "he", "▁t", "▁the", "ep", "hee", "▁▁", "▁▁▁"]
    scores = [0.0] * len(names) + [-float(number) for number in range(len(pieces))]
    fields = {"model": "llama", "tokens": names + pieces, "token_type": types + [1] * len(pieces), "scores": scores}
    fields |= {"bos_token_id": 1, "eos_token_id": 2}
    without = ["tokenizer.ggml.merges", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"]
    path = file_with(tmp_path, checkpoint, fields, without)
    import_model(path, tmp_path / "back", tokenizer=None)
    tokenizer = Tokenizer.load(tmp_path / "back")
    assert (tokenizer.start_ids, tokenizer.end_of_text_id, tokenizer.end_of_text) == ([1], 2, "</s>")
    number = {name: place for place, name in enumerate(names + pieces)}
    expected = [number[piece] for piece in ("▁the", "▁", "s", "hee")] + [3 + ord("p")]
    assert tokenizer.encode("the sheep") == expected
    for string in ("the sheep", "é → 3\n", "  two spaces", "<s> </s>"):
        assert tokenizer.decode(tokenizer.encode(string)) == string

    export_model(tmp_path / "back", tmp_path / "again.gguf", file_format="gguf")
    assert PROOF in capfd.readouterr().err
    import_model(tmp_path / "again.gguf", tmp_path / "twice", tokenizer=None)
    assert Tokenizer.load(tmp_path / "twice").fingerprint == tokenizer.fingerprint

    change(path, fields={"tokenizer.ggml.add_space_prefix": False})
    import_model(path, tmp_path / "plain", tokenizer=None)
    assert Tokenizer.load(tmp_path / "plain").encode("the") == [number["t"], number["he"]]


@pytest.mark.parametrize(
    ("fields", "without", "message"),
    [
        ({"model": "bert"}, [], "of the kind 'bert'; known are gpt2 and llama"),
        ({"pre": "superbpe"}, [], "in the way 'superbpe', which .* known are gpt-2, .* smollm"),
        ({"token_type": [1, 2]}, [], "token_type is not a list of 300 numbers"),
        ({"tokens": ["a"] * 300}, [], "two tokens have the same name"),
        ({"tokens": [f"t{n}" for n in range(300)]}, [], "is damaged"),
        ({"tokens": ["a" * 2000] + [f"t{n}" for n in range(299)]}, [], "a token has 2000 characters"),
        ({}, ["tokenizer.ggml.tokens"], "there are no tokens"),
        ({}, ["tokenizer.ggml.merges"], "there are no merges"),
        ({"eos_token_id": 300}, [], "eos_token_id is 300, but there are 300 tokens"),
        ({"model": "llama"}, [], "there is no token for the byte"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tokenizers_that_cannot_be_used_are_said(tmp_path, checkpoint, fields, without, message, tokenizer):
    path = file_with(tmp_path, checkpoint, fields, without)
    with pytest.raises(CheckpointError, match=message):
        import_model(path, tmp_path / "back", tokenizer=None)
    assert not (tmp_path / "back").exists()
    tokenizer.save(tmp_path / "tokenizer.json")
    import_model(path, tmp_path / "back", tokenizer=tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "back").fingerprint == tokenizer.fingerprint


def test_the_commands(tmp_path, checkpoint):
    folder, path = checkpoint("modern"), tmp_path / "model.gguf"

    def run(*words):
        return subprocess.run([sys.executable, "-m", "sheepop", *map(str, words)], capture_output=True, text=True)

    done = run("export", "--checkpoint", folder, "--format", "gguf", "--weights", "q8_0", "--output", path)
    assert done.returncode == 0, done.stderr
    done = run("import", path, "--output", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    done = run("generate", "--checkpoint", tmp_path / "back", "--prompt", "The sheep", "--max-new-tokens", 3, "--json")
    assert done.returncode == 0, done.stderr
    path.write_bytes(b"GGUF")
    done = run("import", path, "--output", tmp_path / "other")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "is not a whole GGUF file" in done.stderr


def test_without_the_library_it_is_named(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"need the package gguf\. .* 'sheepop\[interop\]'"):
        export_model(checkpoint("modern"), tmp_path / "model.gguf", file_format="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_model_whose_texts_begin_with_nothing_is_evaluated_and_trained_further(tmp_path, checkpoint, tokenizer):
    path = file_with(tmp_path, checkpoint, {"add_bos_token": False})
    import_model(path, tmp_path / "back", tokenizer=None)
    (tmp_path / "more.txt").write_text("The dog sees the sheep at night.\n" * 40)

    def run(*words):
        return subprocess.run([sys.executable, "-m", "sheepop", *map(str, words)], capture_output=True, text=True)

    done = run("evaluate", "--checkpoint", tmp_path / "back", "--data", tmp_path / "more.txt", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] > 40
    words = ["--init-from", tmp_path / "back", "--output", tmp_path / "run", "--data.data_dir", tmp_path / "data"]
    done = run("train", "--data", tmp_path / "more.txt", *words, "--training.max_steps", 2, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    trained = Tokenizer.load(resolve_checkpoint(tmp_path / "run"))
    assert (trained.start_ids, trained.end_of_text_id) == ([], tokenizer.end_of_text_id)
    for prompt in ("", "The"):  # an empty one begins with the end of the one before
        done = run("generate", "--checkpoint", tmp_path / "run", "--prompt", prompt, "--max-new-tokens", 2, "--json")
        assert done.returncode == 0, done.stderr
