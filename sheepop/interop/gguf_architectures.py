"""The models that llama.cpp computes and we do too: what each can express, its settings, where each weight goes.

Names, layouts and what follows where a file is silent are those of llama.cpp (`llama-arch.cpp`, `models/*.cpp`). Its
`llama` turns neighbouring numbers of a head together as we do, the others halves as `transformers` does. Its GELU is
the approximation by tanh everywhere.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sheepop.config import ModelConfig
from sheepop.interop.gguf_file import GgufFile
from sheepop.interop.huggingface import with_learned_positions
from sheepop.interop.moves import Move, linear, parted, reordered, same
from sheepop.interop.stock_classes import (
    MADE_FOR_A_LENGTH,
    gpt2_misfits,
    kind_for,
    llama_misfits,
    need,
    neox_misfits,
    number,
    only,
    qwen3_misfits,
    rope_for,
    rope_from,
    whole,
)
from sheepop.models.positions import rotary_frequencies
from sheepop.utils.errors import CheckpointError


@dataclass(frozen=True)
class Architecture:
    """A kind of model that llama.cpp computes.

    Attributes:
        name: `general.architecture`.
        misfits: the settings of a model that it cannot express, each with the reason.
        family: our settings that all its models share.
        turns_halves: whether rotary positions turn numbers i and i + R/2 together, not neighbours.
        is_fused: whether queries, keys and values are one matrix.
        has_head: whether a tied head is written too.
        has_rope_divisors: whether its files say by what each rotary frequency is divided, for Llama 3's scaling.
    """

    name: str
    misfits: Callable[[ModelConfig], dict[str, str]]
    family: dict[str, Any]
    turns_halves: bool = True
    is_fused: bool = False
    has_head: bool = False
    has_rope_divisors: bool = False


def and_only(
    misfits: Callable[[ModelConfig], dict[str, str]], **allowed: tuple[object, ...]
) -> Callable[[ModelConfig], dict[str, str]]:
    """Return the misfits of a stock class and those of further settings."""
    return lambda model: misfits(model) | only(model, **allowed) | uneven_length(model)


def uneven_length(model: ModelConfig) -> dict[str, str]:
    """Return what is said where a trained context is not a whole number of tokens, as a file must have it."""
    if model.rope_scaling not in MADE_FOR_A_LENGTH or float(model.trained_seq_len).is_integer():
        return {}
    return {"model.rope_scaling_factor": f"{model.rope_scaling_factor:g}, no divisor of max_seq_len"}


ROPE_DIVISORS = "rope_freqs.weight"
RMS = {"norm": "rmsnorm", "activation": "swiglu", "positions": "rotary", "qk_norm": False}
LAYER = {"norm": "layernorm", "activation": "gelu_tanh", "positions": "rotary", "qk_norm": False}
GATED = {"activation": ("swiglu",), "sliding_window": (0,)}
NOT_AS_LLAMA3 = {
    "rope_scaling": ("none", "linear", "ntk", "yarn")
}  # whose factors llama.cpp reads for its `llama` alone
PLAIN = {"activation": ("gelu_tanh",)} | NOT_AS_LLAMA3
ARCHITECTURES = (
    Architecture(
        "gpt2", and_only(gpt2_misfits, **PLAIN), LAYER | {"positions": "learned"}, turns_halves=False, is_fused=True
    ),
    Architecture("gptneox", and_only(neox_misfits, **PLAIN), LAYER, is_fused=True, has_head=True),
    Architecture("llama", and_only(llama_misfits, **GATED), RMS, turns_halves=False, has_rope_divisors=True),
    Architecture("qwen3", and_only(qwen3_misfits, **GATED, **NOT_AS_LLAMA3), RMS | {"qk_norm": True}),
)
IMPORTED = (*ARCHITECTURES, Architecture("qwen2", ARCHITECTURES[2].misfits, RMS))
# What a file may say of its architecture without that we would miss something.
KNOWN_FIELDS = {
    *("vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "tensor_data_layout"),
    *(f"attention.{key}" for key in ("head_count", "head_count_kv", "key_length", "value_length", "causal")),
    *(f"attention.{key}" for key in ("layer_norm_epsilon", "layer_norm_rms_epsilon", "sliding_window")),
    *(f"rope.{key}" for key in ("dimension_count", "freq_base", "scaling.type", "scaling.factor")),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
    *("use_parallel_residual", "expert_count", "expert_used_count"),
}


def as_architecture(
    settings: ModelConfig, weights: Mapping[str, Tensor]
) -> tuple[Architecture, ModelConfig, dict[str, Tensor]]:
    """Return an architecture, and the model as an instance of it.

    Raises:
        CheckpointError: there is none such.
    """
    learned, moved = with_learned_positions(settings, weights)
    if ARCHITECTURES[0].misfits(learned):
        learned, moved = settings, dict(weights)
    architecture = kind_for(learned, ARCHITECTURES, "architecture of llama.cpp")
    if architecture.has_head:
        moved.setdefault("head.weight", moved["token_embedding.weight"])
        learned = learned.model_copy(update={"tie_weights": False})
    return architecture, learned, moved


def settings_from(architecture: Architecture, file: GgufFile) -> dict[str, Any]:
    """Return our settings of a model for those of its header.

    Raises:
        CheckpointError: they ask for what we do not have.
    """
    prefix = f"{architecture.name}."
    fields = {key.removeprefix(prefix): value for key, value in file.fields.items() if key.startswith(prefix)}
    strange = sorted(fields.keys() - KNOWN_FIELDS)
    if strange:
        raise CheckpointError(f"The model has the setting {prefix}{strange[0]}, which sheepop cannot express.")
    need(fields, "attention.causal", True)
    need(fields, "expert_count", 0)
    width, heads = number(fields, "embedding_length"), number(fields, "attention.head_count")
    head_dim = number(fields, "attention.key_length", width // heads)
    need({"attention.value_length": head_dim} | fields, "attention.value_length", head_dim)
    embedding, head = file.encoded.get("token_embd.weight"), file.encoded.get("output.weight")
    epsilon = "layer_norm_rms_epsilon" if architecture.family["norm"] == "rmsnorm" else "layer_norm_epsilon"
    settings = architecture.family | {
        "vocab_size": embedding.shape[0] if embedding else None,
        "tie_weights": head is None or (embedding is not None and np.array_equal(head.rows, embedding.rows)),
        "d_model": width,
        "num_layers": number(fields, "block_count"),
        "num_heads": heads,
        "num_kv_heads": number(fields, "attention.head_count_kv", heads),
        "head_dim": head_dim,
        "d_ff": number(fields, "feed_forward_length"),
        "max_seq_len": number(fields, "context_length"),
        "layer_norm_eps": decimal(number(fields, f"attention.{epsilon}")),
        "sliding_window": fields.get("attention.sliding_window", 0),
        "bias": any(name.endswith(".bias") for name in file),
        "dropout": 0.0,
    }
    if architecture.name == "gptneox":
        settings["parallel_residual"] = fields.get("use_parallel_residual", True)
    if settings["positions"] == "rotary":
        turned = number(fields, "rope.dimension_count", head_dim)
        settings |= rope_of(fields) | {"rotary_dim": turned if turned != head_dim else 0}
        if architecture.has_rope_divisors and ROPE_DIVISORS in file:
            trained = fields.get("rope.scaling.original_context_length")
            settings |= llama3_scaling(file[ROPE_DIVISORS].double(), settings, trained)
    return settings


def rope_divisors(model: ModelConfig) -> Tensor:
    """Return by what each pair's frequency is divided to stretch the context, (R/2,) in float64."""
    plain, _ = rotary_frequencies(model.model_copy(update={"rope_scaling": "none"}))
    return plain / rotary_frequencies(model)[0]


def llama3_scaling(divisors: Tensor, settings: Mapping[str, Any], trained: int | None) -> dict[str, Any]:
    """Return our settings of the scaling that divides frequencies so.

    A file says by what each frequency is divided, but usually not for which trained context that was worked out. It is
    a power of two in all models that there are.

    Raises:
        CheckpointError: no scaling of Llama 3's kind divides so.
    """
    for length in [trained] if trained else [2**power for power in range(7, 21)]:
        found: dict[str, Any] = {
            "rope_scaling": "llama3",
            "rope_scaling_factor": round(float(divisors.max()), 4),
            "rope_trained_len": length,
        }
        if found["rope_scaling_factor"] > 1:
            expected = rope_divisors(ModelConfig(**{**settings, **found}))
            if expected.shape == divisors.shape and torch.allclose(expected, divisors, rtol=1e-4):
                return found
    raise CheckpointError(
        f"The model divides its rotary frequencies by its own factors ({ROPE_DIVISORS}), which are not those of "
        "Llama 3; sheepop cannot express them."
    )


def rope_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return our rotary settings.

    Raises:
        CheckpointError: a kind of scaling that we do not have.
    """
    factor, length = fields.get("rope.scaling.factor", 0.0), number(fields, "context_length")
    kind = fields.get("rope.scaling.type", "linear")
    rope = {"rope_theta": decimal(fields.get("rope.freq_base", 10000.0)), "factor": decimal(factor)}
    trained = fields.get("rope.scaling.original_context_length", length if kind == "yarn" else None)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        kind = "default"
    elif trained is not None:
        rope["original_max_position_embeddings"] = trained
    return rope_from({"rope_parameters": rope | {"rope_type": kind}, "max_position_embeddings": length})


def decimal(value: Any) -> float:
    """Return a number of 32 bits as it was written, with as few digits as tell it from its neighbours."""
    return float(str(np.float32(value)))


def moves_of(architecture: Architecture, model: ModelConfig) -> list[Move]:
    """Return where each weight goes."""
    H, K, C = model.num_heads, model.num_kv_heads, model.head_dim

    def turned(move: Move, num_heads: int) -> Move:
        return reordered(move, model, num_heads) if architecture.turns_halves else move

    moves = [
        same("token_embedding.weight", "token_embd.weight"),
        same("position_embedding.weight", "position_embd.weight"),
        *linear(same, "final_norm", "output_norm"),
        same("head.weight", "output.weight"),
    ]
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}", f"blk.{layer}"
        projection, inner = f"{ours}.attention.query_key_value", f"{ours}.feed_forward.input"
        if architecture.is_fused:
            projections = linear(same, projection, f"{theirs}.attn_qkv")
        else:
            parts = tuple(f"{theirs}.attn_{part}" for part in "qkv")
            projections = linear(parted, projection, parts, (H * C, K * C, K * C))
        moves += [turned(move, H + K) for move in projections]
        if model.is_gated:
            moves += linear(parted, inner, (f"{theirs}.ffn_gate", f"{theirs}.ffn_up"), (model.d_ff, model.d_ff))
        else:
            moves += linear(same, inner, f"{theirs}.ffn_up")
        moves += linear(same, f"{ours}.attention_norm", f"{theirs}.attn_norm")
        moves += linear(same, f"{ours}.attention.output", f"{theirs}.attn_output")
        moves += linear(same, f"{ours}.feed_forward_norm", f"{theirs}.ffn_norm")
        moves += linear(same, f"{ours}.feed_forward.output", f"{theirs}.ffn_down")
        if model.qk_norm:
            for kind, letter in (("query", "q"), ("key", "k")):
                norm = same(f"{ours}.attention.{kind}_norm.weight", f"{theirs}.attn_{letter}_norm.weight")
                moves.append(turned(norm, 1))
    # Where norms have biases, llama.cpp wants all others too.
    has_biases = model.bias or model.norm == "layernorm"
    return moves if has_biases else [move for move in moves if not move.ours.endswith(".bias")]


def fields_for(architecture: Architecture, model: ModelConfig) -> dict[str, Any]:
    """Return what a header says of a model."""
    epsilon = "layer_norm_rms_epsilon" if model.norm == "rmsnorm" else "layer_norm_epsilon"
    fields: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "context_length": model.max_seq_len,
        "embedding_length": model.d_model,
        "block_count": model.num_layers,
        "feed_forward_length": model.d_ff,
        "attention.head_count": model.num_heads,
        "attention.head_count_kv": model.num_kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        f"attention.{epsilon}": model.layer_norm_eps,
    }
    if architecture.name == "gptneox":
        fields["use_parallel_residual"] = model.parallel_residual
    if model.positions == "rotary":
        rope = rope_for(model)["rope_parameters"]
        fields |= {"rope.dimension_count": model.turned_dim, "rope.freq_base": rope["rope_theta"]}
        if rope["rope_type"] in ("linear", "yarn"):
            fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
        if rope["rope_type"] in MADE_FOR_A_LENGTH:
            fields["rope.scaling.original_context_length"] = whole(model.trained_seq_len)
    return {f"{architecture.name}.{key}": value for key, value in fields.items()}
