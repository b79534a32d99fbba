"""Runs of all kinds of models, with sizes that are tiny and all different."""

from typing import Any

import pytest
import torch

from sheepop.config import ModelConfig
from sheepop.learn.trace import Trace, trace
from sheepop.models.quantization import quantize
from sheepop.models.transformer import TransformerModel

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 4,
    "d_ff": 44,
    "max_seq_len": 13,
    "layer_norm_eps": 1e-3,  # large enough to be seen
}
MODERN = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "num_kv_heads": 2,
    "qk_norm": True,
    "tie_weights": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "classic": {},
    "modern": MODERN,
    "window": {**MODERN, "sliding_window": 3, "bias": True},
    "sinks": {**MODERN, "sliding_window": 2, "attention_sinks": 2},
    "learned": {"positions": "learned", "activation": "gelu_tanh", "bias": True},
    "sinusoidal": {"positions": "sinusoidal", "activation": "silu", "qk_norm": True},
    "no positions": {"positions": "none", "activation": "geglu"},
    "parallel": {"parallel_residual": True, "rotary_dim": 2, "activation": "relu_squared", "head_dim": 8},
    "convolutions": {**MODERN, "conv_width": 3},
    "copying": {**MODERN, "copy_width": 6},
    "n-grams": {"ngram_order": 3, "ngram_entries": 50, "rope_scaling": "linear", "rope_scaling_factor": 2.0},
    "yarn": {"rope_scaling": "yarn", "rope_scaling_factor": 2.0, "activation": "relu"},
    "quantized": {**MODERN, "bias": True, "sliding_window": 99, "activation": "swiglu"},
}
IDS = [5, 0, 36, 7, 7, 21, 3]


def run_of(family: str) -> Trace:
    """Return a run of a random model of this family."""
    torch.manual_seed(5)
    model = TransformerModel(ModelConfig(**SIZES | FAMILIES[family]))
    for parameter in model.parameters():  # far enough from the first draw that every part matters
        torch.nn.init.normal_(parameter, mean=0.3 * (parameter.dim() == 1), std=0.3)
    return trace(quantize(model, "int8") if family == "quantized" else model, IDS)


@pytest.fixture(scope="session", name="run_of")
def _run_of():
    return run_of


@pytest.fixture(scope="session")
def runs() -> dict[str, Trace]:
    return {family: run_of(family) for family in FAMILIES}
