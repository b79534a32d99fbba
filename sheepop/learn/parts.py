"""A model's own parts as formulas have them: weights as arrays, layers as functions; and small random models."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sheepop.config import ModelConfig
from sheepop.learn.evaluation import Part
from sheepop.learn.formula import Meaning, Value
from sheepop.learn.trace import Trace, trace
from sheepop.models.blocks import Context, TransformerBlock
from sheepop.models.transformer import TransformerModel, inference

SMALL: dict[str, Any] = {
    "vocab_size": 19,
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "d_ff": 20,
    "max_seq_len": 11,
    "layer_norm_eps": 1e-3,  # large enough to be seen in a comparison
}


def random_run(random: np.random.Generator, **settings: Any) -> Trace:
    """Return a run of a small random model over seven random tokens, in float64, so that long sums do not round."""
    model = TransformerModel(ModelConfig(**SMALL | settings)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = random.normal(0.5 * (parameter.dim() == 1), 0.3, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(drawn))
    return trace(model, random.integers(model.config.vocab_size, size=7).tolist())


def sample_run(
    meanings: Mapping[str, Meaning], left: str, **settings: Any
) -> Callable[[np.random.Generator], tuple[dict[str, Value], NDArray[np.float64]]]:
    """Return what draws the values of symbols from a run of a random model of these settings; `left` is its result."""

    def sample(random: np.random.Generator) -> tuple[dict[str, Value], NDArray[np.float64]]:
        seen = random_run(random, **settings)
        layer = int(random.integers(seen.model.config.num_layers))
        values: dict[str, Value] = {name: meaning.of(seen, layer) for name, meaning in meanings.items()}
        return values, cast("NDArray[np.float64]", values.pop(left))

    return sample


def block_of(run: Trace, layer: int) -> TransformerBlock:
    """Return the block that a run passed."""
    block = run.model.blocks[layer]
    assert isinstance(block, TransformerBlock)
    return block


def bias_of(layer: nn.Module) -> Tensor:
    """Return the bias of a linear layer or a norm; zeros where it has none."""
    bias, weight = getattr(layer, "bias", None), layer.weight
    assert isinstance(weight, Tensor)
    return torch.zeros(len(weight)) if bias is None else bias


def part_of(run: Trace, compute: Callable[[Tensor], Tensor]) -> Part:
    """Return a part of the model, which maps (1, T, D), as a function of arrays (T, D)."""

    def part(inside: NDArray[np.float64]) -> NDArray[np.float64]:
        given = torch.from_numpy(np.ascontiguousarray(inside)).to(run.model.device, run.model.dtype)
        with inference(run.model):
            made = compute(given[None])[0]
        return made.double().cpu().numpy()

    return part


def context_of(run: Trace) -> Context:
    """Return what the layers of a run shared, with a tap, so that attention goes by its reference as in the trace."""
    seen: list[Context] = []

    def keep(_block: nn.Module, inputs: tuple[Tensor, Context]) -> None:
        seen.append(inputs[1])

    handle = block_of(run, 0).register_forward_pre_hook(keep)
    try:
        with inference(run.model):
            run.model(run.token_ids[None].to(run.model.device))
    finally:
        handle.remove()
    return replace(seen[0], tap=lambda _, tensor: tensor)


def only(setting: str, value: object) -> Callable[[ModelConfig], str | None]:
    """Return what says why a model with another value of this setting has no such part."""

    def named(value: object) -> str:
        return f"'{value}'" if isinstance(value, str) else str(value).lower()  # as a file has it

    def missing(config: ModelConfig) -> str | None:
        found = getattr(config, setting)
        return None if found == value else f"its model.{setting} is {named(found)}, not {named(value)}"

    return missing
