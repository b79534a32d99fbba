import copy
import subprocess
import sys
from functools import partial
from typing import Literal

import pytest
import torch

from sheepop.config import ModelConfig
from sheepop.generation.engine import decoder_for, generate_cached
from sheepop.generation.generate import generate_naive
from sheepop.generation.sampling import SamplingSettings
from sheepop.models.kv_cache import KVCache
from sheepop.models.quantization import quantize
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import CheckpointError

pytest.importorskip("numba")
from sheepop.generation.fast_decoding import FastDecoder
from sheepop.generation.vector_integers import HAS_INTEGERS

FAMILIES: dict[str, dict[str, object]] = {
    "classic": {},
    "modern": {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "num_kv_heads": 2, "tie_weights": False},
    "learned, biases": {"positions": "learned", "bias": True, "activation": "gelu_tanh"},
    "sinusoidal": {"positions": "sinusoidal", "activation": "relu"},
    "no positions": {"positions": "none", "activation": "silu"},
    "sliding window": {"sliding_window": 5, "activation": "relu_squared"},
    "sinks": {"sliding_window": 5, "attention_sinks": 3, "num_kv_heads": 2},
    "GPT-NeoX": {"parallel_residual": True, "rotary_dim": 6, "bias": True},
    "convolutions": {"conv_width": 4, "norm": "rmsnorm", "num_kv_heads": 2},
    "parallel convolutions": {"conv_width": 3, "parallel_residual": True},
    "copying": {"copy_width": 8, "sliding_window": 3},
    "groups of tokens": {"ngram_order": 3, "ngram_entries": 57, "activation": "geglu"},
    "stretched": {"rope_scaling": "yarn", "rope_scaling_factor": 2.0},
}


def tiny(**changes: object) -> TransformerModel:
    torch.manual_seed(11)
    sizes = {"vocab_size": 31, "d_model": 64, "num_layers": 3, "num_heads": 4, "d_ff": 128, "max_seq_len": 18}
    model = TransformerModel(ModelConfig.model_validate({**sizes, "init_std": 0.2, "dropout": 0.3, **changes}))
    for name, parameter in model.named_parameters():  # norms and biases that are all alike would hide a mistake
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    return model.eval()


@pytest.mark.parametrize("num_rows", [1, 5, 19])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compute_what_the_model_computes(
    family: str, quantization: Literal["none", "int8", "int4"], num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(**FAMILIES[family])
    if quantization != "none":
        model = quantize(model, quantization)
    rounds_inputs = HAS_INTEGERS and quantization != "none"
    for has_integers, tolerance in [(False, 2e-5), *([(True, 4e-3)] if rounds_inputs else [])]:
        monkeypatch.setattr("sheepop.generation.fast_decoding.HAS_INTEGERS", has_integers)
        decoder = FastDecoder(model)
        token_ids = torch.randint(0, 31, (num_rows, 17))
        slow, fast = (KVCache(model.config, num_rows, capacity=18) for _ in range(2))
        close = partial(torch.testing.assert_close, rtol=1e-4, atol=tolerance)
        with torch.inference_mode():
            close(decoder(token_ids[:, :6], fast), model(token_ids[:, :6], cache=slow, last_only=True))
            for at in range(6, 17):
                newest = token_ids[:, at : at + 1]
                close(decoder(newest, fast), model(newest, cache=slow))
        for kept in ("keys", "values"):
            found, wanted = (torch.stack(getattr(cache, kept))[..., :17, :] for cache in (fast, slow))
            close(found, wanted)
        close(fast.copy_keys, slow.copy_keys)


@pytest.mark.parametrize("family", ["modern", "sinks"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_are_those_of_naive_generation_far_beyond_the_context(temperature: float, family: str) -> None:
    model = tiny(**FAMILIES[family])
    request = {"max_new_tokens": 40, "seed": 9, "num_samples": 2}
    naive = generate_naive(model, [3, 1, 4], SamplingSettings(temperature), **request)  # type: ignore[arg-type]
    decode = FastDecoder(model)
    cached = generate_cached(model, [3, 1, 4], SamplingSettings(temperature), decode=decode, **request)  # type: ignore[arg-type]
    assert cached == naive


def test_the_number_of_threads_stays_what_it_was() -> None:
    # numba's first parallel region sets that of all of OpenMP, and with it PyTorch's: sums would then end otherwise.
    script = """
import torch
torch.set_num_threads(1)
from sheepop.config import ModelConfig
from sheepop.generation.fast_decoding import FastDecoder
from sheepop.models.kv_cache import KVCache
from sheepop.models.transformer import TransformerModel
config = ModelConfig(vocab_size=31, d_model=24, num_layers=1, num_heads=4, max_seq_len=8)
with torch.inference_mode():
    FastDecoder(TransformerModel(config).eval())(torch.zeros((1, 1), dtype=torch.int64), KVCache(config, 1, 1))
print(torch.get_num_threads())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_scores_that_are_not_finite_are_noticed() -> None:
    model = tiny()
    with torch.no_grad():
        model.blocks[1].feed_forward.output.weight[3, 5] = torch.nan  # type: ignore[union-attr, index]
    with pytest.raises(CheckpointError, match="finite"):
        generate_cached(model, [3], SamplingSettings(), max_new_tokens=3, seed=0, decode=FastDecoder(model))


def test_the_model_itself_decodes_where_the_kernels_cannot_or_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoder_for(tiny()) is None
    assert isinstance(decoder_for(quantize(tiny(), "int8")), FastDecoder)
    monkeypatch.setattr("sheepop.generation.engine.LITTLE_WORK", 0)
    assert isinstance(decoder_for(tiny()), FastDecoder)
    assert decoder_for(copy.deepcopy(tiny()).double()) is None
    assert decoder_for(tiny(attention="reference")) is None
