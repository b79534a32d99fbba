"""Attention: which earlier places a place reads, and what it takes from them."""

from collections.abc import Callable, Iterable

import numpy as np
import sympy
import torch

from sheepop.learn.chapters import heads
from sheepop.learn.formula import Formula, Meaning
from sheepop.learn.functions import Softmax
from sheepop.learn.notation import (
    KV_HEADS,
    C,
    H,
    S,
    T,
    array,
    c,
    cases,
    equals,
    h,
    matrix_product,
    matrix_sum,
    over,
    plus,
    r,
    s,
    t,
    times,
)
from sheepop.models.attention import attention, visible

Q, KEY, VALUE = array("Q", H, T, C), array("K", KV_HEADS, S, C), array("V", KV_HEADS, S, C)
SCORES, WEIGHTS, MASK = array("E", H, T, S), array("A", H, T, S), array("M", T, S)
MIXED = array("O", H, T, C)
W = sympy.Symbol("W", integer=True, positive=True)
Z = sympy.Symbol("Z", integer=True, nonnegative=True)
G = sympy.Symbol("G", integer=True, positive=True)
GROUP = sympy.floor(h / G)  # the key/value head that head h reads

MEANINGS = {
    "Q": Meaning("queries: what each place asks for", "blocks.{layer}.attention.query"),
    "K": Meaning("keys: what each place offers", "blocks.{layer}.attention.key"),
    "V": Meaning("values: what is taken from it", "blocks.{layer}.attention.value"),
    "G": Meaning(
        "heads that share one head of keys and values",
        value=lambda trace, _: trace.model.config.num_heads // trace.model.config.num_kv_heads,
    ),
    "E": Meaning("scores: how well question and offer fit", "blocks.{layer}.attention.scores"),
    "M": Meaning(
        "mask: 0 where a place may look, minus infinity where not",
        value=lambda trace, layer: added_mask(trace[f"blocks.{layer}.attention.mask"]),
    ),
    "A": Meaning("weights: which share of its attention a place gives to each", "blocks.{layer}.attention.weights"),
    "O": Meaning("what each head has read", "blocks.{layer}.attention.mixed"),
}


def added_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return the mask as numbers that are added to scores."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)


def of(names: Iterable[str]) -> dict[str, Meaning]:
    """Return the meanings of these symbols."""
    return {name: MEANINGS[name] for name in names}


def run_attention(random: np.random.Generator) -> dict[str, torch.Tensor]:
    """Return random queries, keys and values, and all that the reference makes of them, by the formulas' names."""
    shapes = {"Q": (4, 6, 8), "K": (2, 6, 8), "V": (2, 6, 8)}
    seen = {name: torch.from_numpy(random.standard_normal(shape)).float() for name, shape in shapes.items()}
    tapped: dict[str, torch.Tensor] = {}

    def tap(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tapped[name] = tensor
        return tensor

    mixed = attention(*(seen[name][None] for name in "QKV"), tap=tap)
    return seen | {
        "G": torch.tensor(2),
        "E": tapped["attention.scores"][0],
        "A": tapped["attention.weights"][0],
        "M": added_mask(tapped["attention.mask"]),
        "O": mixed[0],
    }


def one_head(name: str) -> Meaning:
    """Return the meaning of a matrix of the first head alone."""
    meaning = MEANINGS[name]
    return Meaning(
        f"{meaning.text}; of one head", value=lambda trace, layer: trace[meaning.point.format(layer=layer)][0]
    )


def sample_of(
    result: str, *names: str
) -> Callable[[np.random.Generator], tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Return what draws the values `names` and gives the implementation's `result` beside them."""

    def sample(random: np.random.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        seen = run_attention(random)
        return {name: seen[name] for name in names}, seen[result]

    return sample


def sample_one_head(random: np.random.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the matrices of one head and what it reads."""
    seen = run_attention(random)
    return {"Q": seen["Q"][0], "K": seen["K"][0], "V": seen["V"][0], "M": seen["M"]}, seen["O"][0]


def sample_mask(random: np.random.Generator) -> tuple[dict[str, int], torch.Tensor]:
    """Return a window, sinks, and the mask that they make over nine places."""
    window, sinks = int(random.integers(1, 7)), int(random.integers(0, 3))
    mask = visible(9, 9, window=window, sinks=sinks, device=torch.device("cpu"))
    return {"W": window, "Z": sinks}, added_mask(mask)


ATTENTION = "sheepop.models.attention:attention"
VASWANI = "Vaswani et al. 2017, Attention Is All You Need, section 3.2.1"

FORMULAS = (
    *heads.PROJECTIONS,
    Formula(
        name="attention_scores",
        title="Attention scores",
        equation=equals(SCORES[h, t, s], over(times(Q[h, t, c], KEY[GROUP, s, c]), c, C) / sympy.sqrt(C)),
        meanings=of("QKGE"),
        code=ATTENTION,
        line='tap("attention.scores"',
        kids="""
            Every word holds up a card with a question, and every earlier word holds up a card with what it
            can tell. The better question and offer fit together, like two LEGO bricks, the higher the
            score.
        """,
        scientists="""
            The inner product of a query and a key, over the root of the head's width: components with
            variance 1 would give a product of variance C, whose softmax is so sharp that its gradient
            vanishes. With grouped heads (Ainslie et al. 2023) several query heads share one key head.
        """,
        pitfalls="""
            Dividing by the root of the model's width instead of the head's; forgetting to divide at all,
            which works at first and trains badly; pairing query heads with the wrong key heads.
        """,
        source=VASWANI,
        sample=sample_of("E", "Q", "K", "G"),
    ),
    Formula(
        name="causal_mask",
        title="Causal mask",
        equation=equals(MASK[t, s], cases((0, sympy.And(s <= t, sympy.Or(s > t - W, s < Z))), otherwise=-sympy.oo)),
        meanings=of("M")
        | {
            "W": Meaning(
                "window: how far back a place looks, itself included",
                value=lambda trace, _: trace.model.config.sliding_window or len(trace.token_ids),
            ),
            "Z": Meaning(
                "sinks: how many of the first places all see, however far they are",
                value=lambda trace, _: trace.model.config.attention_sinks,
            ),
        },
        code="sheepop.models.attention:visible",
        line="mask = key_positions <= query_positions",
        kids="""
            While you read a story aloud you cannot peek at words on the next page. The mask is the hand
            that covers them.
        """,
        scientists="""
            Minus infinity becomes a weight of exactly 0 in the softmax, so that the prediction at a place
            depends on nothing behind it, and one pass trains all places at once. A sliding window (Beltagy
            et al. 2020) hides what is far back as well, but for the sinks (Xiao et al. 2023): the first places,
            to which heads give the attention that they have no other use for.
        """,
        pitfalls="""
            Masking the weights after the softmax, so that they no longer add up to 1; being off by one, so
            that a place sees what it has to predict, which gives a loss near 0 and a model that can write
            nothing.
        """,
        source=VASWANI,
        sample=sample_mask,
    ),
    Formula(
        name="attention_weights",
        title="Attention weights",
        equation=equals(
            WEIGHTS[h, t, s],
            sympy.exp(plus(SCORES[h, t, s], MASK[t, s])) / over(sympy.exp(plus(SCORES[h, t, r], MASK[t, r])), r, S),
        ),
        meanings=of("EMA"),
        code=ATTENTION,
        line=".softmax(dim=-1)",
        kids="""
            Each word has one whole cake of attention and cuts it: a big piece for what fits well, crumbs
            for the rest. The pieces always make up the whole cake.
        """,
        scientists="""
            A softmax over the keys: positive, adding up to 1, and unchanged when the same number is added
            to all scores of a place, which is how it is computed without overflow. Only differences count: a
            score that is higher by ln 2 gets twice the weight.
        """,
        pitfalls="""
            Taking the softmax over the queries' axis; a place whose keys are all masked has 0/0.
        """,
        source=VASWANI,
        sample=sample_of("A", "E", "M"),
    ),
    Formula(
        name="attention",
        title="Scaled dot-product attention",
        equation=equals(
            sympy.MatrixSymbol("O", T, C),
            matrix_product(
                Softmax(
                    matrix_sum(
                        sympy.MatrixSymbol("Q", T, C) * sympy.MatrixSymbol("K", S, C).T / sympy.sqrt(C),
                        sympy.MatrixSymbol("M", T, S),
                    )
                ),
                sympy.MatrixSymbol("V", S, C),
            ),
        ),
        meanings={name: one_head(name) for name in "QKVO"} | of("M"),
        code=ATTENTION,
        line="@ value",
        kids="""
            A class discussion: everybody asks, listens to those whose answer fits the question, and writes
            down a mix of what they said. Whoever fits best gets the most lines in the notes.
        """,
        scientists="""
            The same as scores, weights and mixing, for the whole of one head in matrices: differentiable
            look-up in a memory whose addresses are keys and whose content is values. It costs T·S·C twice,
            and T·S numbers of memory unless a fused kernel (Dao et al. 2022) computes it in tiles.
        """,
        pitfalls="""
            Multiplying by the values' transpose; leaving the mask out in evaluation.
        """,
        source=VASWANI,
        sample=sample_one_head,
    ),
    heads.MULTI_HEAD_ATTENTION,
)
