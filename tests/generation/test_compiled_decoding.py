import shutil

import pytest
import torch

from sheepop.config import ModelConfig
from sheepop.generation.compiled_decoding import CompiledDecoder
from sheepop.generation.engine import CAPACITY_STEP, decode_for, generate_cached
from sheepop.generation.generate import generate_naive
from sheepop.generation.sampling import SamplingSettings
from sheepop.models.kv_cache import KVCache
from sheepop.models.quantization import quantize
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import ConfigError

SIZES = {
    "vocab_size": 23,
    "d_model": 16,
    "num_layers": 2,
    "num_heads": 4,
    "d_ff": 24,
    "max_seq_len": 20,
    "init_std": 0.4,
}
FAMILIES = {
    "modern": {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "num_kv_heads": 2},
    "all that looks back": {
        "sliding_window": 3,
        "attention_sinks": 2,
        "ngram_order": 3,
        "ngram_entries": 31,
        "conv_width": 4,
        "copy_width": 8,
        "positions": "learned",
    },
    "quantized": {"d_model": 64, "d_ff": 64, "bias": True},
}


def model_of(family):
    torch.manual_seed(1)
    model = TransformerModel(ModelConfig(**SIZES | FAMILIES[family])).eval()
    return quantize(model, "int8") if family == "quantized" else model


@pytest.mark.usefixtures("compiler")
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_step_writes_what_the_model_writes(family, capsys):
    model = model_of(family)
    decode = CompiledDecoder(model)
    request = {"max_new_tokens": 14, "seed": 3, "num_samples": 2}
    for temperature in (0.0, 1.0):  # and past the full context, where all begins anew
        settings, prompt = SamplingSettings(temperature), [3, 1, 4, 1, 5, 9, 2, 6]
        compiled = generate_cached(model, prompt, settings, decode=decode, **request)
        assert compiled == generate_naive(model, prompt, settings, **request)
    assert capsys.readouterr().err.count("compiled the step of a token in") == 1  # one capacity

    atol = 1e-4 if family == "quantized" else 1e-5  # 1.6e-5 was seen without AVX-512
    slow, fast = (KVCache(model.config, 2, capacity=20) for _ in range(2))
    with torch.inference_mode():
        for step in range(9):
            token_ids = torch.randint(0, 23, (2, 3 if step == 0 else 1), generator=torch.Generator().manual_seed(step))
            expected = model(token_ids, cache=slow, last_only=True)
            torch.testing.assert_close(decode(token_ids, fast), expected, rtol=1e-4, atol=atol)


def test_few_capacities_serve_all_texts(monkeypatch):
    model, capacities = model_of("modern"), []
    model.config.max_seq_len = 3 * CAPACITY_STEP
    monkeypatch.setattr(
        "sheepop.generation.engine.KVCache", lambda config, rows, capacity, **rest: capacities.append(capacity) or 1 / 0
    )
    for length in (1, CAPACITY_STEP - 1, CAPACITY_STEP, 10 * CAPACITY_STEP):
        with pytest.raises(ZeroDivisionError):
            generate_cached(model, [3], SamplingSettings(), max_new_tokens=length, seed=0)
    assert capacities == [CAPACITY_STEP, CAPACITY_STEP, 2 * CAPACITY_STEP, 3 * CAPACITY_STEP]


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"--compile was asked for, but there is no C\+\+ compiler"):
        decode_for(model_of("modern"), compiles=True)
