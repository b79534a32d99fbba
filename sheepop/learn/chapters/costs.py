"""Costs: what a model takes before it is built."""

from collections.abc import Callable
from typing import Any

import numpy as np
import sympy

from sheepop.config import ModelConfig
from sheepop.learn.formula import Formula, Meaning, Value
from sheepop.learn.notation import KV_HEADS, B, C, D, F, H, L, T, V, equals, plus, ratio, times
from sheepop.learn.trace import Trace
from sheepop.models.kv_cache import KVCache
from sheepop.models.sizing import (
    CONVOLUTIONS,
    TOKEN_BYTES,
    count_parameters,
    forward_flops_per_token,
    kv_cache_bytes,
    most_keys,
    ngram_table_sizes,
)

BYTES, NUMBERS, FLOPS = sympy.symbols(r"M N \mathrm{FLOPs}")
WIDTH, HEADS, ROWS, MATRICES, VECTORS, BIASED, NORMED, STREAMS, WINDOW = sympy.symbols("b a R m n b q s W")
COPY_WIDTH, COPIES = sympy.symbols("u z")


def cached_streams(config: ModelConfig) -> int:
    """Return how many numbers of the stream's width a layer keeps of a token, beside keys and values."""
    return CONVOLUTIONS if config.conv_width > 1 else 0


# Symbols that follow from a model's settings.
OF_SETTINGS: dict[str, tuple[str, Callable[[ModelConfig], float]]] = {
    "L": ("layers", lambda config: config.num_layers),
    "D": ("width of the stream", lambda config: config.d_model),
    "H": ("heads", lambda config: config.num_heads),
    "H_{KV}": ("heads of keys and values", lambda config: config.num_kv_heads),
    "C": ("width of a head", lambda config: config.head_dim),
    "F": ("width inside the feed-forward", lambda config: config.d_ff),
    "V": ("entries of the vocabulary", lambda config: config.vocab_size),
    "a": ("tables of the vocabulary: 1 where the head is tied to the embedding, else 2", lambda c: 2 - c.tie_weights),
    "R": (
        "rows of other tables: learned positions, groups of tokens, and weights of short convolutions",
        lambda config: (
            sum(ngram_table_sizes(config))
            + (config.max_seq_len if config.positions == "learned" else 0)
            + config.num_layers * CONVOLUTIONS * (config.conv_width - 1)
        ),
    ),
    "m": ("matrices of the feed-forward: 3 with a gated activation, else 2", lambda config: 2 + config.is_gated),
    "n": (
        "vectors of a norm: 2 for a layer norm with shift, else 1",
        lambda config: 2 if config.norm == "layernorm" and config.bias else 1,
    ),
    "s": ("what a layer's short convolutions read: 2 streams, 0 without them", cached_streams),
    "b": ("1 where linear layers have biases, else 0", lambda config: int(config.bias)),
    "u": ("width of what a head that copies finds tokens by, 0 without one", lambda config: config.copy_width),
    "z": ("1 where the head copies, else 0", lambda config: int(config.copy_width > 0)),
    "q": ("1 where queries and keys are normalised, else 0", lambda config: int(config.qk_norm)),
}


def from_settings(*names: str) -> dict[str, Meaning]:
    """Return the meanings of symbols that follow from the settings of a run's model."""

    def meaning(name: str) -> Meaning:
        text, value = OF_SETTINGS[name]
        return Meaning(text, value=lambda run, _: value(run.model.config))

    return {name: meaning(name) for name in names}


def values_of(config: ModelConfig, *names: str) -> dict[str, Value]:
    """Return the values of such symbols."""
    return {name: OF_SETTINGS[name][1](config) for name in names}


def random_config(random: np.random.Generator) -> ModelConfig:
    """Return settings of any kind and size."""

    def one_of(*choices: Any) -> Any:
        return choices[int(random.integers(len(choices)))]

    groups, shared = int(random.integers(1, 5)), int(random.integers(1, 4))
    window, sinks = one_of((0, 0), (7, 0), (7, 4))
    return ModelConfig(
        vocab_size=int(random.integers(50, 9000)),
        d_model=int(random.integers(8, 300)),
        num_layers=int(random.integers(1, 9)),
        num_heads=groups * shared,
        num_kv_heads=groups,
        head_dim=2 * int(random.integers(2, 40)),
        d_ff=int(random.integers(10, 999)),
        max_seq_len=int(random.integers(16, 999)),
        activation=one_of("gelu", "swiglu"),
        norm=one_of("layernorm", "rmsnorm"),
        bias=one_of(True, False),
        tie_weights=one_of(True, False),
        positions=one_of("rotary", "learned", "none"),
        ngram_order=one_of(1, 3),
        conv_width=one_of(1, 4),
        copy_width=one_of(0, 6),
        qk_norm=one_of(True, False),
        sliding_window=window,
        attention_sinks=sinks,
    )


def sample_cache(random: np.random.Generator) -> tuple[dict[str, Value], int]:
    """Return the settings of a cache, and its bytes."""
    config, batch, length, width = random_config(random), *(int(number) for number in random.integers(1, 99, 3))
    return values_of(config, *CACHE) | {"B": batch, "T": length, "b": width}, kv_cache_bytes(
        config, batch, length, bytes_per_number=width
    )


def sample_count(random: np.random.Generator) -> tuple[dict[str, Value], int]:
    """Return the settings of a model, and its parameters."""
    config = random_config(random)
    return values_of(config, *COUNT), count_parameters(config).total


def sample_flops(random: np.random.Generator) -> tuple[dict[str, Value], float]:
    """Return the settings of a model, and the operations of a token."""
    config, context = random_config(random), int(random.integers(1, 99))
    sight = {"T": context, "W": most_keys(config, context)}
    return values_of(config, *WORK) | sight, forward_flops_per_token(config, context)


def allocated(run: Trace, _layer: int) -> int:
    """Return the bytes of a cache that holds a run's tokens."""
    model = run.model
    cache = KVCache(model.config, 1, len(run.token_ids), dtype=model.dtype)
    remembered = (*cache.keys, *cache.values, *cache.inputs, cache.copy_keys, cache.token_ids)
    return sum(tensor.numel() * tensor.element_size() for tensor in remembered)


def missing_where_quantized(config: ModelConfig) -> str | None:
    """Say why the weights of a model cannot be counted."""
    if config.quantization == "none":
        return None
    return f"its model.quantization is '{config.quantization}': it has rounded numbers in the place of parameters"


CACHE = ("L", "H_{KV}", "C", "s", "D", "u", "z")
COUNT = ("L", "D", "H", "H_{KV}", "C", "F", "V", "a", "R", "m", "n", "b", "q", "u")
WORK = ("L", "D", "H", "H_{KV}", "C", "F", "V", "m", "u")
PLACES = Meaning("tokens of the text", value=lambda run, _: len(run.token_ids))

FORMULAS = (
    Formula(
        name="kv_cache_bytes",
        title="Memory of the key/value cache",
        equation=equals(
            BYTES,
            times(
                B,
                T,
                plus(
                    times(WIDTH, plus(times(L, plus(times(2, KV_HEADS, C), times(STREAMS, D))), COPY_WIDTH)),
                    times(TOKEN_BYTES, COPIES),
                ),
            ),
        ),
        meanings={
            "M": Meaning(
                "bytes of all keys and values, of what short convolutions read, and of what can be copied",
                value=allocated,
            ),
            **from_settings(*CACHE),
            "B": Meaning("texts at a time; 1 where a run is shown", value=lambda _, __: 1),
            "T": PLACES,
            "b": Meaning("bytes of a number", value=lambda run, _: run.model.dtype.itemsize),
        },
        code="sheepop.models.sizing:kv_cache_bytes",
        line="numbers = 2 * config.num_kv_heads * config.head_dim",
        kids="""
            While a story is written, every word so far keeps its name tag and its parcel ready on a shelf. Two things a
            word, on every floor of the house: the longer the story, the longer the shelf.
        """,
        scientists="""
            One key and one value of C numbers for each layer, key/value head and token; short convolutions keep two
            streams of D beside them, and a head that copies a key and the token. It grows with the length of the text,
            unlike the weights, and at long contexts can outweigh them; grouped heads shrink it by H over H_KV.
        """,
        pitfalls="""
            Counting query heads instead of key/value heads; forgetting that keys and values are two; a cache for the
            longest context where most texts are short.
        """,
        source="Pope et al. 2022, Efficiently Scaling Transformer Inference; Ainslie et al. 2023, GQA",
        sample=sample_cache,
    ),
    Formula(
        name="parameter_count",
        title="Number of parameters",
        equation=equals(
            NUMBERS,
            plus(
                times(D, plus(times(HEADS, V), ROWS, times(2, COPY_WIDTH))),
                times(L, plus(times(2, D, C, plus(H, KV_HEADS)), times(MATRICES, D, F))),
                times(VECTORS, D, plus(times(2, L), 1)),
                times(2, NORMED, L, C),
                times(
                    BIASED,
                    L,
                    plus(times(C, plus(H, times(2, KV_HEADS))), times(plus(MATRICES, -1), F), times(2, D)),
                ),
            ),
        ),
        meanings={
            "N": Meaning(
                "parameters: all numbers that are learned",
                value=lambda run, _: sum(parameter.numel() for parameter in run.model.parameters()),
            ),
            **from_settings(*COUNT),
        },
        code="sheepop.models.sizing:count_parameters",
        line="return ParameterCounts(",
        kids="""
            Count the knobs on a huge machine: so many for each word, and so many for each floor, each floor like the
            others. Training means to turn every single one of them until the machine says sensible things.
        """,
        scientists="""
            Tables, and the projections of a head that copies; those of attention and feed-forward in every layer; norms
            of queries and keys, and of the stream; biases. With H = H_KV, HC = D and F = 4D a layer has close to 12D²,
            and the tables matter less the deeper and wider a model is.
        """,
        pitfalls="""
            Counting a tied head twice; leaving out the third matrix of a gated feed-forward; comparing models of equal
            size when one of them has most of its parameters in its vocabulary.
        """,
        source="Kaplan et al. 2020, Scaling Laws for Neural Language Models, table 1, with all small parts",
        sample=sample_count,
        missing=missing_where_quantized,
    ),
    Formula(
        name="forward_flops",
        title="Operations of a token",
        equation=equals(
            FLOPS,
            plus(
                times(
                    2,
                    D,
                    plus(times(L, plus(times(2, C, plus(H, KV_HEADS)), times(MATRICES, F))), V, times(2, COPY_WIDTH)),
                ),
                times(4, L, H, C, ratio(times(WINDOW, plus(times(2, T), 1, -WINDOW)), times(2, T))),
                times(COPY_WIDTH, plus(T, -1)),
            ),
        ),
        meanings={
            FLOPS.name: Meaning(
                "floating-point operations of one token's forward pass, on the average over a text",
                value=lambda run, _: forward_flops_per_token(run.model.config, len(run.token_ids)),
            ),
            **from_settings(*WORK),
            "T": PLACES,
            "W": Meaning(
                "tokens that one sees at the most: those of its window and the sinks, T without a window",
                value=lambda run, _: most_keys(run.model.config, len(run.token_ids)),
            ),
        },
        code="sheepop.models.sizing:forward_flops_per_token",
        line="return 2.0 * weights + 4.0 * L * H * C * keys_seen",
        kids="""
            How many sums must be done on paper to guess one word? Two for each knob, a multiplication and an addition,
            and some more to look at each word that came before.
        """,
        scientists="""
            Twice the weights that multiply, plus scores and mixing over the keys that a token sees, without a window
            (T + 1)/2 of them on the average; a head that copies scores all before a token. Norms, softmax and
            activations are left out, being of lower order. Training costs three times as much, since the backward pass
            has two products for each one here.
        """,
        pitfalls="""
            Counting a multiplication and an addition as one; counting the embedding, which is a look-up; forgetting the
            head, which is most of a small model with a large vocabulary.
        """,
        source="Kaplan et al. 2020, Scaling Laws for Neural Language Models, table 1",
        sample=sample_flops,
    ),
)
