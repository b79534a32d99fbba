"""Embedding: how a token becomes numbers, and how its place is told."""

import math

import numpy as np
import sympy
import torch

from sheepop.config import ModelConfig
from sheepop.learn.formula import Formula, Meaning
from sheepop.learn.notation import C, D, H, T, V, array, c, cases, equals, h, j, plus, ratio, t, times
from sheepop.learn.parts import only, random_run, sample_run
from sheepop.learn.trace import Trace
from sheepop.models.positions import apply_rotary, rotary_frequencies, rotary_table, sinusoidal_table
from sheepop.models.quantized_layers import QuantizedEmbedding

TOKENS, TABLE, TOKEN = array("x", T), array("E", V, D), array("X", T, D)
SUM, GROUPS, PLACE = array("Y", T, D), array("N", T, D), array("P", T, D)
VECTORS, TURNED, ANGLES = array("X", H, T, C), array("Y", H, T, C), array("omega", C / 2)
A = sympy.Symbol("a")
EVEN = sympy.Eq(sympy.Mod(c, 2), 0)


def table(run: Trace, _layer: int) -> torch.Tensor:
    """Return the table of token embeddings, (V, D)."""
    embedding = run.model.token_embedding
    return embedding.matrix.weight if isinstance(embedding, QuantizedEmbedding) else embedding.weight


def part_or_zero(point: str) -> Meaning:
    """Return the meaning of a part of the sum, which is 0 where the model has none."""
    texts = {
        "ngram_embedding": "embedding of the last few tokens together, 0 where the model has none",
        "position_embedding": "embedding of the place, 0 where positions are rotary or none",
    }
    return Meaning(
        texts[point],
        value=lambda run, _: run[point] if point in run else torch.zeros_like(run["token_embedding"]),
    )


def angles(run: Trace, _layer: int) -> torch.Tensor:
    """Return what each pair of a head turns per place, (C/2,); 0 for those that stay."""
    found, still = rotary_frequencies(run.model.config)[0], run.model.config.head_dim // 2
    return torch.nn.functional.pad(found, (0, still - len(found)))


def turned(run: Trace, layer: int) -> torch.Tensor:
    """Return queries and keys behind the rotation, (H, T, C)."""
    return torch.cat([run[f"blocks.{layer}.attention.{name}"] for name in ("query", "key")])


def not_plainly_rotary(config: ModelConfig) -> str | None:
    """Say why a model does not rotate, or does more than rotate."""
    if config.rope_scaling == "yarn":
        return "its model.rope_scaling is 'yarn', which makes vectors longer as well as turning them"
    return only("positions", "rotary")(config)


def sample_token_embedding(random: np.random.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return tokens and a table, and what the model looks up."""
    run = random_run(random)
    return {"x": run.token_ids, "E": table(run, 0)}, run["token_embedding"]


def sample_rotation(random: np.random.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return random vectors (H, T, C) at places 0 to T - 1, and the same turned."""
    config = ModelConfig(d_model=30, num_heads=3, rotary_dim=6)
    vectors = torch.from_numpy(random.standard_normal((3, 7, 10))).float()
    frequencies = rotary_frequencies(config)[0]
    values = {"X": vectors, "omega": torch.nn.functional.pad(frequencies, (0, 2))}
    return values, apply_rotary(vectors, rotary_table(config, 7))


def sample_sinusoidal(random: np.random.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the table of as many places as chance has it."""
    return {}, sinusoidal_table(int(random.integers(2, 50)), 2 * int(random.integers(1, 12)))


EMBEDDING_SUM = {
    "Y": Meaning("what the first block reads", "embedding"),
    "X": Meaning("embedding of the token", "token_embedding"),
    "N": part_or_zero("ngram_embedding"),
    "P": part_or_zero("position_embedding"),
    "a": Meaning(
        "scale: the root of D with sinusoidal positions, else 1",
        value=lambda run, _: math.sqrt(run.model.config.d_model) if run.model.config.positions == "sinusoidal" else 1.0,
    ),
}

FORMULAS = (
    Formula(
        name="token_embedding",
        title="Token embedding",
        equation=equals(TOKEN[t, j], TABLE[TOKENS[t], j]),
        meanings={
            "X": Meaning("embedding of the token at each place", "token_embedding"),
            "E": Meaning("table with a row for each entry of the vocabulary", value=table),
            "x": Meaning("the text's tokens, as numbers", value=lambda run, _: run.token_ids),
        },
        code="sheepop.models.transformer:TransformerModel.embed",
        line='tap("token_embedding"',
        kids="""
            Every word piece has a drawer with its own set of coloured beads. Reading a text means to open one drawer
            after the other and to lay the beads in a row. What is in the drawers, the model finds out by itself.
        """,
        scientists="""
            A look-up, which is the product of a one-hot vector with the table, at no cost. Rows that are used alike
            come to lie close to each other, since the same gradients pull at them; rows of tokens that never occur
            stay as they were drawn, but for the decay and, with a tied head, for what the head's gradient does.
        """,
        pitfalls="""
            Reading a text with another tokenizer than the one of training: every number then opens the wrong drawer,
            and no error is raised.
        """,
        source="Bengio et al. 2003, A Neural Probabilistic Language Model; tied with the head: Press and Wolf 2017",
        sample=sample_token_embedding,
    ),
    Formula(
        name="embedding_sum",
        title="Token and place together",
        equation=equals(SUM[t, j], plus(times(A, plus(TOKEN[t, j], GROUPS[t, j])), PLACE[t, j])),
        meanings=EMBEDDING_SUM,
        code="sheepop.models.transformer:TransformerModel.embed",
        line="return embedded * math.sqrt(self.config.d_model)",
        kids="""
            Each word piece comes with a sticker that says whether it is the first, the second or the tenth in the row.
            Word and sticker are mixed into one paint, and the model learns to see both in the colour.
        """,
        scientists="""
            Attention without positions sees a set, so the place has to be in the vectors or, with rotary positions, in
            the scores. A sum suffices, because in D dimensions tokens and places can take nearly orthogonal subspaces.
            Sinusoidal waves have size 1 where embeddings are drawn small, hence the root of D.
        """,
        pitfalls="""
            Leaving the root of D out, so that the waves drown the tokens; counting places from 1 in one part of a
            program and from 0 in another.
        """,
        source="Vaswani et al. 2017, Attention Is All You Need, sections 3.4 and 3.5; groups: Pagnoni et al. 2024",
        sample=sample_run(EMBEDDING_SUM, "Y", positions="sinusoidal", ngram_order=3, ngram_entries=50),
    ),
    Formula(
        name="sinusoidal_encoding",
        title="Sinusoidal positions",
        equation=equals(
            PLACE[t, j],
            cases(
                (sympy.sin(ratio(t, sympy.Pow(10000, j / D, evaluate=False))), sympy.Eq(sympy.Mod(j, 2), 0)),
                otherwise=sympy.cos(ratio(t, sympy.Pow(10000, (j - 1) / D, evaluate=False))),
            ),
        ),
        meanings={"P": Meaning("embedding of each place", "position_embedding")},
        code="sheepop.models.positions:sinusoidal_table",
        line="angles.sin(), angles.cos()",
        kids="""
            Think of a shelf of clocks: the first hand goes round in about six words, the next ones take longer and
            longer, the last creeps. Where all the hands stand together tells which word it is.
        """,
        scientists="""
            Pairs of sine and cosine with wavelengths from 2π towards 20000π in geometric steps. The encoding of place
            t + k is a rotation of that of t which depends on k alone, so that a linear map can learn to look k places
            back. Nothing is learned, and any length has its encoding.
        """,
        pitfalls="""
            All sines first and then all cosines instead of one beside the other: either is fine, but weights of one do
            not fit the other.
        """,
        source="Vaswani et al. 2017, Attention Is All You Need, section 3.5",
        sample=sample_sinusoidal,
        missing=only("positions", "sinusoidal"),
    ),
    Formula(
        name="rotary_encoding",
        title="Rotary positions",
        equation=equals(
            TURNED[h, t, c],
            cases(
                (
                    plus(
                        times(VECTORS[h, t, c], sympy.cos(times(t, ANGLES[sympy.floor(c / 2)]))),
                        -times(VECTORS[h, t, plus(c, 1)], sympy.sin(times(t, ANGLES[sympy.floor(c / 2)]))),
                    ),
                    EVEN,
                ),
                otherwise=plus(
                    times(VECTORS[h, t, c - 1], sympy.sin(times(t, ANGLES[sympy.floor(c / 2)]))),
                    times(VECTORS[h, t, c], sympy.cos(times(t, ANGLES[sympy.floor(c / 2)]))),
                ),
            ),
        ),
        meanings={
            "Y": Meaning("the same, turned", value=turned),
            "X": Meaning(
                "queries and keys of all heads, before they are turned",
                value=lambda run, layer: run[f"blocks.{layer}.attention.before_rotary"].transpose(0, 1),
            ),
            "omega": Meaning(
                "angle that pair i turns per place: base to the power of -2i/C, less where positions are stretched, 0 "
                "for pairs that stay",
                value=angles,
            ),
        },
        code="sheepop.models.positions:turn",
        line="rotations.conj() if back else rotations",
        kids="""
            Every word carries small arrows, and each step along the line turns them a bit further, some fast, some
            slowly. Two words compare their arrows: the angle between them tells how far apart they stand, wherever in
            the line that is.
        """,
        scientists="""
            Neighbours 2i and 2i + 1 make a plane, turned by t times its frequency. The inner product of a query at t
            and a key at s then depends on the places through t - s alone, lengths stay, and the values are not touched.
        """,
        pitfalls="""
            There are two layouts, pairs (2i, 2i + 1) and pairs (i, i + C/2): weights of one read by the other give
            fluent nonsense. A new token's place has to be counted from the start of the text, not of the call.
        """,
        source="Su et al. 2021, RoFormer, section 3.2",
        sample=sample_rotation,
        missing=not_plainly_rotary,
    ),
)
