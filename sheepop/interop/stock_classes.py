"""The classes of `transformers` that our models are instances of: GPT-2, GPT-NeoX, Llama and Qwen3.

Each says what it cannot express, its settings for ours and ours for its, and where each weight goes. Names, layouts and
defaults are those of `transformers` 5 (and 4, where they differ); formulas are compared by running it in the tests.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sheepop.config import ModelConfig
from sheepop.interop.moves import Move, interleaved, linear, parted, reordered, same, transposed
from sheepop.models.positions import LLAMA3_FAST_TURNS, LLAMA3_SLOW_TURNS
from sheepop.utils.errors import CheckpointError

Settings = dict[str, Any]
K = TypeVar("K", bound="Kind")

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu", "relu_squared": "relu2"}
GATES = {"swiglu": "silu", "geglu": "gelu"}
# Other names of the same functions, as files have them.
SAME_ACTIVATION = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}


@dataclass(frozen=True)
class StockClass:
    """A class of `transformers` and how to it and back.

    Attributes:
        name: of the class.
        model_types: `model_type` of its `config.json`; the first is what we write.
        misfits: the settings of a model that it cannot express, each with the reason.
        settings_for: its settings for ours, without those that are common to all.
        settings_from: our settings (of section `model`) for its; unknown behaviour is a `CheckpointError`.
        moves: where each weight goes.
    """

    name: str
    model_types: tuple[str, ...]
    misfits: Callable[[ModelConfig], dict[str, str]]
    settings_for: Callable[[ModelConfig], Settings]
    settings_from: Callable[[Mapping[str, Any]], Settings]
    moves: Callable[[ModelConfig], list[Move]]


def only(model: ModelConfig, **allowed: tuple[object, ...]) -> dict[str, str]:
    """Return what is said of each setting that has none of its allowed values."""
    problems = {}
    for key, values in allowed.items():
        value = getattr(model, key)
        if value not in values:
            problems[f"model.{key}"] = f"{shown(value)}, not {' or '.join(map(shown, values))}"
    return problems


def shown(value: object) -> str:
    """Return a value as a settings file has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def heads_fill_the_width(model: ModelConfig) -> dict[str, str]:
    """Return what is said where heads are not equal parts of the width, which older classes take for granted."""
    if model.num_heads * model.head_dim == model.d_model:
        return {}
    return {"model.head_dim": f"{model.head_dim}, not d_model / num_heads"}


def need(theirs: Mapping[str, Any], key: str, *allowed: object) -> None:
    """Refuse a setting that changes what the model computes and that ours has no word for.

    Raises:
        CheckpointError: it has another value; an absent one has the first.
    """
    if theirs.get(key, allowed[0]) not in allowed:
        raise CheckpointError(
            f"The model's setting {key} is {shown(theirs[key])}, which sheepop cannot express (only "
            f"{' or '.join(map(shown, allowed))})."
        )


def number(theirs: Mapping[str, Any], key: str, otherwise: object = None) -> Any:
    """Return a setting that has to be there.

    Raises:
        CheckpointError: it is not, and there is no other value.
    """
    value = theirs.get(key)
    value = otherwise if value is None else value
    if value is None:
        raise CheckpointError(f"The model's settings lack {key}.")
    return value


def activation_from(name: object, known: Mapping[str, str]) -> str:
    """Return our name of an activation function of theirs.

    Raises:
        CheckpointError: we have none such.
    """
    for ours, theirs in known.items():
        if SAME_ACTIVATION.get(str(name), name) == theirs:
            return ours
    raise CheckpointError(f"The model's activation function {name} is unknown; known are {', '.join(known.values())}.")


# Rotary positions.

MADE_FOR_A_LENGTH = ("yarn", "llama3")
# What we have no settings for, and what it has to be, or is where it is not said.
FIXED: dict[str, Settings] = {
    "yarn": {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "truncate": True},
    "llama3": {"low_freq_factor": LLAMA3_SLOW_TURNS, "high_freq_factor": LLAMA3_FAST_TURNS},
}


def rope_for(model: ModelConfig) -> Settings:
    """Return the rotary settings of `transformers` 5, and where they are simple those of 4."""
    theta = model.rope_theta
    scaling: Settings = {"rope_type": "default"}
    if model.rope_scaling == "ntk":  # only another base
        theta *= model.rope_scaling_factor ** (model.turned_dim / max(model.turned_dim - 2, 1))
    elif model.rope_scaling != "none":
        scaling = {"rope_type": model.rope_scaling, "factor": model.rope_scaling_factor}
        if model.rope_scaling in MADE_FOR_A_LENGTH:
            scaling["original_max_position_embeddings"] = whole(model.trained_seq_len)
        if model.rope_scaling == "llama3":
            scaling |= {"low_freq_factor": LLAMA3_SLOW_TURNS, "high_freq_factor": LLAMA3_FAST_TURNS}
    share = {} if not model.rotary_dim else {"partial_rotary_factor": model.turned_dim / model.head_dim}
    parameters = {**scaling, "rope_theta": theta, **share}
    old = {} if scaling["rope_type"] == "default" else {"rope_scaling": parameters}
    return {"rope_parameters": parameters, "rope_theta": theta, **old}


def rope_from(theirs: Mapping[str, Any], *, theta: object = 10000.0, share: object = None) -> Settings:
    """Return our rotary settings, from those of `transformers` 5 or 4.

    Raises:
        CheckpointError: a kind of scaling that we do not have.
    """
    parameters = theirs.get("rope_parameters") or {}
    scaling = {**(theirs.get("rope_scaling") or {}), **parameters}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    settings: Settings = {
        "positions": "rotary",
        "rope_theta": float(number(scaling, "rope_theta", theirs.get("rope_theta", theta))),
    }
    share = scaling.get("partial_rotary_factor", theirs.get("partial_rotary_factor", share))
    if share is not None and float(str(share)) < 1:
        settings["rotary_dim"] = int(head_dim_of(theirs) * float(str(share)))
    if kind in ("linear", *MADE_FOR_A_LENGTH):
        for key, usual in FIXED.get(kind, {}).items():
            need(scaling, key, usual, None)
        factor = float(number(scaling, "factor"))
        settings |= {"rope_scaling": kind, "rope_scaling_factor": factor}
        trained, length = scaling.get("original_max_position_embeddings"), number(theirs, "max_position_embeddings")
        if trained == length:  # some give the trained context, some the scaled one
            settings["max_seq_len"] = round(factor * trained)
        elif kind in MADE_FOR_A_LENGTH and trained is not None and not math.isclose(trained * factor, length):
            settings["rope_trained_len"] = trained
    elif kind != "default":
        raise CheckpointError(
            f"The model's rotary positions are scaled by '{kind}'; known are linear, yarn and llama3."
        )
    return settings


def whole(value: float) -> float | int:
    """Return a number without a point where it needs none."""
    return int(value) if value == int(value) else value


def head_dim_of(theirs: Mapping[str, Any]) -> int:
    """Return the width of a head."""
    return int(theirs.get("head_dim") or number(theirs, "hidden_size") // number(theirs, "num_attention_heads"))


# GPT-2 (Radford et al. 2019).


def gpt2_misfits(model: ModelConfig) -> dict[str, str]:
    """GPT-2: absolute positions, LayerNorm, no gates."""
    return {
        **only(
            model,
            positions=("learned",),
            norm=("layernorm",),
            activation=tuple(ACTIVATIONS),
            num_kv_heads=(model.num_heads,),
            qk_norm=(False,),
            parallel_residual=(False,),
            sliding_window=(0,),
            attention_sinks=(0,),
        ),
        **heads_fill_the_width(model),
    }


def gpt2_settings_for(model: ModelConfig) -> Settings:
    """GPT-2's names of our settings."""
    return {
        "n_embd": model.d_model,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.d_ff,
        "n_positions": model.max_seq_len,
        "activation_function": ACTIVATIONS[model.activation],
        "layer_norm_epsilon": model.layer_norm_eps,
        "embd_pdrop": model.dropout,
        "resid_pdrop": model.dropout,
        "attn_pdrop": model.dropped_attention,
    }


def gpt2_settings_from(theirs: Mapping[str, Any]) -> Settings:
    """Our names of GPT-2's settings."""
    need(theirs, "scale_attn_weights", True)
    need(theirs, "scale_attn_by_inverse_layer_idx", False)
    need(theirs, "add_cross_attention", False)
    width = number(theirs, "n_embd")
    return {
        "d_model": width,
        "num_layers": number(theirs, "n_layer"),
        "num_heads": number(theirs, "n_head"),
        "d_ff": number(theirs, "n_inner", 4 * width),
        "max_seq_len": number(theirs, "n_positions", theirs.get("n_ctx")),
        "activation": activation_from(theirs.get("activation_function", "gelu_new"), ACTIVATIONS),
        "layer_norm_eps": theirs.get("layer_norm_epsilon", 1e-5),
        "positions": "learned",
        "bias": True,
        "dropout": float(theirs.get("resid_pdrop", 0.1)),
        "attention_dropout": float(theirs.get("attn_pdrop", 0.1)),
    }


def gpt2_moves(model: ModelConfig, matrix: Callable[[str, str], Move] = transposed) -> list[Move]:
    """GPT-2 keeps the matrices inside of blocks the other way round; nanoGPT does not."""
    moves = [
        same("token_embedding.weight", "transformer.wte.weight"),
        same("position_embedding.weight", "transformer.wpe.weight"),
        *linear(same, "final_norm", "transformer.ln_f"),
        same("head.weight", "lm_head.weight"),
    ]
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        moves += linear(same, f"{ours}.attention_norm", f"{theirs}.ln_1")
        moves += linear(matrix, f"{ours}.attention.query_key_value", f"{theirs}.attn.c_attn")
        moves += linear(matrix, f"{ours}.attention.output", f"{theirs}.attn.c_proj")
        moves += linear(same, f"{ours}.feed_forward_norm", f"{theirs}.ln_2")
        moves += linear(matrix, f"{ours}.feed_forward.input", f"{theirs}.mlp.c_fc")
        moves += linear(matrix, f"{ours}.feed_forward.output", f"{theirs}.mlp.c_proj")
    return moves


# GPT-NeoX (Black et al. 2022).


def neox_misfits(model: ModelConfig) -> dict[str, str]:
    """GPT-NeoX: rotary positions, LayerNorm, no gates."""
    return {
        **only(
            model,
            positions=("rotary",),
            norm=("layernorm",),
            activation=tuple(ACTIVATIONS),
            num_kv_heads=(model.num_heads,),
            qk_norm=(False,),
            sliding_window=(0,),
            attention_sinks=(0,),
        ),
        **heads_fill_the_width(model),
    }


def neox_settings_for(model: ModelConfig) -> Settings:
    """GPT-NeoX's names of our settings."""
    share = model.turned_dim / model.head_dim
    rope = rope_for(model)
    rope["rope_parameters"]["partial_rotary_factor"] = share
    return {
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.d_ff,
        "max_position_embeddings": model.max_seq_len,
        "hidden_act": ACTIVATIONS[model.activation],
        "layer_norm_eps": model.layer_norm_eps,
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": True,
        "hidden_dropout": model.dropout,
        "attention_dropout": model.dropped_attention,
        **rope,
        "rotary_pct": share,
        "rotary_emb_base": rope["rope_theta"],
    }


def neox_settings_from(theirs: Mapping[str, Any]) -> Settings:
    """Our names of GPT-NeoX's settings."""
    return {
        "d_model": number(theirs, "hidden_size"),
        "num_layers": number(theirs, "num_hidden_layers"),
        "num_heads": number(theirs, "num_attention_heads"),
        "d_ff": number(theirs, "intermediate_size"),
        "max_seq_len": number(theirs, "max_position_embeddings"),
        "activation": activation_from(theirs.get("hidden_act", "gelu"), ACTIVATIONS),
        "layer_norm_eps": theirs.get("layer_norm_eps", 1e-5),
        "parallel_residual": theirs.get("use_parallel_residual", True),
        "bias": True,
        "dropout": float(theirs.get("hidden_dropout", 0.0)),
        "attention_dropout": float(theirs.get("attention_dropout", 0.0)),
        **rope_from(theirs, theta=theirs.get("rotary_emb_base", 10000), share=theirs.get("rotary_pct", 0.25)),
    }


def neox_moves(model: ModelConfig) -> list[Move]:
    """GPT-NeoX keeps the queries, keys and values of a head together."""
    moves = [
        same("token_embedding.weight", "gpt_neox.embed_in.weight"),
        *linear(same, "final_norm", "gpt_neox.final_layer_norm"),
        same("head.weight", "embed_out.weight"),
    ]
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}", f"gpt_neox.layers.{layer}"
        moves += linear(same, f"{ours}.attention_norm", f"{theirs}.input_layernorm")
        moves += [
            reordered(move, model, 2 * model.num_heads)
            for move in linear(
                interleaved, f"{ours}.attention.query_key_value", f"{theirs}.attention.query_key_value", model
            )
        ]
        moves += linear(same, f"{ours}.attention.output", f"{theirs}.attention.dense")
        moves += linear(same, f"{ours}.feed_forward_norm", f"{theirs}.post_attention_layernorm")
        moves += linear(same, f"{ours}.feed_forward.input", f"{theirs}.mlp.dense_h_to_4h")
        moves += linear(same, f"{ours}.feed_forward.output", f"{theirs}.mlp.dense_4h_to_h")
    return moves


# Llama (Touvron et al. 2023), Mistral and Qwen2, which differ in settings alone; Qwen3 with norms of queries and keys.


def llama_misfits(model: ModelConfig) -> dict[str, str]:
    """Llama: rotary positions, RMSNorm, gates."""
    return {
        **only(
            model,
            positions=("rotary",),
            norm=("rmsnorm",),
            activation=tuple(GATES),
            qk_norm=(False,),
            parallel_residual=(False,),
            sliding_window=(0,),
            attention_sinks=(0,),
        ),
        **turns_all(model),
    }


def turns_all(model: ModelConfig) -> dict[str, str]:
    """Return what is said where rotary positions turn a part of each head alone."""
    return {} if model.turned_dim == model.head_dim else {"model.rotary_dim": f"{model.rotary_dim}, not head_dim"}


def llama_settings_for(model: ModelConfig) -> Settings:
    """Llama's names of our settings."""
    return {
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.d_ff,
        "max_position_embeddings": model.max_seq_len,
        "hidden_act": GATES[model.activation],
        "rms_norm_eps": model.layer_norm_eps,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "attention_dropout": model.dropped_attention,
        **rope_for(model),
    }


def llama_settings_from(theirs: Mapping[str, Any]) -> Settings:
    """Our names of Llama's settings."""
    heads = number(theirs, "num_attention_heads")
    window = theirs.get("sliding_window") if theirs.get("use_sliding_window", True) else None
    kinds = set(theirs.get("layer_types") or ())
    if len(kinds) > 1:
        raise CheckpointError("The model's layers are of several kinds (layer_types), which sheepop cannot express.")
    if kinds == {"full_attention"}:
        window = None
    has_bias = theirs.get("attention_bias") or theirs.get("mlp_bias") or theirs.get("model_type") == "qwen2"
    return {
        "d_model": number(theirs, "hidden_size"),
        "num_layers": number(theirs, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": number(theirs, "num_key_value_heads", heads),
        "head_dim": head_dim_of(theirs),
        "d_ff": number(theirs, "intermediate_size"),
        "max_seq_len": number(theirs, "max_position_embeddings"),
        "activation": activation_from(theirs.get("hidden_act", "silu"), GATES),
        "norm": "rmsnorm",
        "layer_norm_eps": theirs.get("rms_norm_eps", 1e-6),
        "bias": bool(has_bias),
        "sliding_window": window or 0,
        "dropout": 0.0,
        "attention_dropout": float(theirs.get("attention_dropout", 0.0)),
        "qk_norm": False,
        **rope_from(theirs),
    }


def llama_moves(model: ModelConfig) -> list[Move]:
    """Llama keeps queries, keys and values apart, and the two halves of a gated feed-forward."""
    H, K, C = model.num_heads, model.num_kv_heads, model.head_dim
    moves = [
        same("token_embedding.weight", "model.embed_tokens.weight"),
        same("final_norm.weight", "model.norm.weight"),
        same("head.weight", "lm_head.weight"),
    ]
    for layer in range(model.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        moves.append(same(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"))
        projections = tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv")
        moves += [
            reordered(move, model, H + K)
            for move in linear(parted, f"{ours}.attention.query_key_value", projections, (H * C, K * C, K * C))
        ]
        moves += linear(same, f"{ours}.attention.output", f"{theirs}.self_attn.o_proj")
        moves.append(same(f"{ours}.feed_forward_norm.weight", f"{theirs}.post_attention_layernorm.weight"))
        halves = tuple(f"{theirs}.mlp.{name}_proj" for name in ("gate", "up"))
        moves += linear(parted, f"{ours}.feed_forward.input", halves, (model.d_ff, model.d_ff))
        moves += linear(same, f"{ours}.feed_forward.output", f"{theirs}.mlp.down_proj")
    return moves if model.bias else [move for move in moves if not move.ours.endswith(".bias")]


def qwen3_misfits(model: ModelConfig) -> dict[str, str]:
    """Qwen3: as Llama, with norms of queries and keys, a window if need be, and no biases in the feed-forward."""
    return {
        **only(
            model,
            positions=("rotary",),
            norm=("rmsnorm",),
            activation=tuple(GATES),
            qk_norm=(True,),
            bias=(False,),
            parallel_residual=(False,),
            attention_sinks=(0,),
        ),
        **turns_all(model),
    }


def qwen3_settings_for(model: ModelConfig) -> Settings:
    """Qwen3's names of our settings."""
    settings = llama_settings_for(model)
    del settings["mlp_bias"]
    if model.sliding_window:
        settings |= {"use_sliding_window": True, "sliding_window": model.sliding_window, "max_window_layers": 0}
    kind = "sliding_attention" if model.sliding_window else "full_attention"
    return settings | {"layer_types": [kind] * model.num_layers}


def qwen3_settings_from(theirs: Mapping[str, Any]) -> Settings:
    """Our names of Qwen3's settings."""
    uses_window = theirs.get("use_sliding_window", False)
    return llama_settings_from({**theirs, "use_sliding_window": uses_window}) | {"qk_norm": True}


def qwen3_moves(model: ModelConfig) -> list[Move]:
    """As Llama's, with the norms of queries and keys, whose numbers are in another order too."""
    moves = llama_moves(model)
    for layer in range(model.num_layers):
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            move = same(f"blocks.{layer}.attention.{ours}.weight", f"model.layers.{layer}.self_attn.{theirs}.weight")
            moves.append(reordered(move, model, 1))
    return moves


GPT2 = StockClass("GPT2LMHeadModel", ("gpt2",), gpt2_misfits, gpt2_settings_for, gpt2_settings_from, gpt2_moves)
GPT_NEOX = StockClass(
    "GPTNeoXForCausalLM", ("gpt_neox",), neox_misfits, neox_settings_for, neox_settings_from, neox_moves
)
LLAMA = StockClass(
    "LlamaForCausalLM",
    ("llama", "mistral", "qwen2"),
    llama_misfits,
    llama_settings_for,
    llama_settings_from,
    llama_moves,
)
QWEN3 = StockClass("Qwen3ForCausalLM", ("qwen3",), qwen3_misfits, qwen3_settings_for, qwen3_settings_from, qwen3_moves)
STOCK_CLASSES = (GPT2, GPT_NEOX, LLAMA, QWEN3)


class Kind(Protocol):
    """A kind of model elsewhere: its name, and the settings that it cannot express, each with the reason."""

    @property
    def name(self) -> str:
        """What it is called there."""
        ...

    @property
    def misfits(self) -> Callable[[ModelConfig], dict[str, str]]:
        """From a model's settings, those that this kind cannot express, each with the reason."""
        ...


def stock_class_for(model: ModelConfig) -> StockClass:
    """Return the class that a model is an instance of.

    Raises:
        CheckpointError: there is none; it says what keeps the nearest one from being it.
    """
    return kind_for(model, STOCK_CLASSES, "stock class of transformers")


# The settings that only our own models have, what each is, and where it is off.
OURS_ALONE = {
    "ngram_order": ("embeddings of several tokens together", 1),
    "conv_width": ("short convolutions", 1),
    "copy_width": ("a head that copies", 0),
}


def kind_for(model: ModelConfig, kinds: Sequence[K], what: str) -> K:
    """Return the first kind that can express a model.

    Raises:
        CheckpointError: there is none; it says what keeps the nearest ones from being it.
    """
    for key, (meaning, off) in OURS_ALONE.items():
        number = getattr(model, key)
        if number > off:
            raise CheckpointError(
                f"No {what} has {meaning} (model.{key} is {number}), so this model runs in sheepop alone. Train one "
                f"with model.{key} {off} to export it."
            )
    misfits = [kind.misfits(model) for kind in kinds]
    fewest = min(map(len, misfits))
    nearest = [(kind, found) for kind, found in zip(kinds, misfits, strict=True) if len(found) == fewest]
    if not fewest:
        return nearest[0][0]
    reasons = [
        f"for {kind.name} {' and '.join(f'{key} is {reason}' for key, reason in found.items())}"
        for kind, found in nearest
    ]
    raise CheckpointError(f"No {what} can express this model: {'; '.join(reasons)}.")
