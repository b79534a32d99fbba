"""The heads of attention: queries, keys and values from the stream, and what the heads have read back into it."""

from collections.abc import Callable

import sympy
import torch

from sheepop.learn.formula import Formula, Meaning
from sheepop.learn.notation import KV_HEADS, C, D, H, T, array, c, equals, h, i, over, plus, t, times
from sheepop.learn.parts import bias_of, block_of, sample_run
from sheepop.learn.trace import Trace

MIXED, READ = array("O", H, T, C), array("X", T, D)
MULTI_HEAD = {
    "O": Meaning("what each head has read", "blocks.{layer}.attention.mixed"),
    "Y": Meaning("what attention adds to the stream", "blocks.{layer}.attention.output"),
    "W^O": Meaning(
        "weight that leads from the heads back into the stream",
        value=lambda run, layer: block_of(run, layer).attention.output.weight,
    ),
    "b^O": Meaning(
        "bias, 0 where the model has none", value=lambda run, layer: bias_of(block_of(run, layer).attention.output)
    ),
}
SOURCE = "Vaswani et al. 2017, Attention Is All You Need, section 3.2.2"


def projected(first: int) -> Callable[[Trace, int], torch.Tensor]:
    """Return what gives a layer's queries (0), keys (1) or values (2) as they were projected, (heads, T, C)."""

    def heads(run: Trace, layer: int) -> torch.Tensor:
        # As far down as nothing else was done to them: values to the end, the others up to their norm or rotation.
        config, at = run.model.config, starts(run)
        if first == 2:
            return run[f"blocks.{layer}.attention.value"]
        if config.qk_norm or config.positions == "rotary":
            point = "projected" if config.qk_norm else "before_rotary"
            return run[f"blocks.{layer}.attention.{point}"].transpose(0, 1)[at[first] : at[first + 1]]
        return run[f"blocks.{layer}.attention.{('query', 'key')[first]}"]

    return heads


def starts(run: Trace) -> list[int]:
    """Return the heads at which queries, keys and values begin and end among all that are projected together."""
    config = run.model.config
    heads, groups = config.num_heads, config.num_kv_heads
    return [0, heads, heads + groups, heads + 2 * groups]


def rows_of(first: int, letter: str) -> Callable[[Trace, int], torch.Tensor]:
    """Return what gives the rows of weight `W` or bias `b` which make queries (0), keys (1) or values (2)."""

    def rows(run: Trace, layer: int) -> torch.Tensor:
        linear, at = block_of(run, layer).attention.query_key_value, starts(run)
        width = run.model.config.head_dim
        numbers = linear.weight if letter == "W" else bias_of(linear)
        return numbers[at[first] * width : at[first + 1] * width]

    return rows


def projection(
    name: str, letter: str, number: int, heads: sympy.Symbol, does: str, kids: str, scientists: str, pitfalls: str
) -> Formula:
    """Return the formula of queries, keys or values."""
    weight, bias = array(f"W^{letter}", heads * C, D), array(f"b^{letter}", heads * C)
    row = plus(times(h, C), c)
    equation = equals(
        array(letter, heads, T, C)[h, t, c], plus(bias[row], over(times(weight[row, i], READ[t, i]), i, D))
    )
    meanings = {
        letter: Meaning(does, value=projected(number)),
        "X": Meaning("what attention reads: the normalised stream", "blocks.{layer}.attention.read"),
        f"W^{letter}": Meaning(f"weight that makes {name}, C rows a head", value=rows_of(number, "W")),
        f"b^{letter}": Meaning("bias, 0 where the model has none", value=rows_of(number, "b")),
    }
    return Formula(
        name=f"{name}_projection",
        title=f"{name.capitalize()} projection",
        equation=equation,
        meanings=meanings,
        code="sheepop.models.blocks:MultiHeadAttention.forward",
        line="projected = self.query_key_value(hidden)",
        kids=kids,
        scientists=scientists,
        pitfalls=pitfalls,
        source=SOURCE,
        sample=sample_run(meanings, letter, bias=True),
    )


PROJECTIONS = (
    projection(
        "query",
        "Q",
        0,
        H,
        "queries, before positions turn them: what each place asks for",
        kids="""
            Every word writes a question card: "who did it?", "which colour?". All words write theirs with the same
            stencil, laid over what they know, and so each gets a question of its own.
        """,
        scientists="""
            A linear map of the normalised stream, the same at every place, H heads of C numbers side by side. Without
            rotary positions only the product of query and key weights matters for the scores: a bilinear form of rank
            at most C for each head.
        """,
        pitfalls="""
            Cutting the result into C heads of H numbers instead of H heads of C; reading the stream before its norm.
        """,
    ),
    projection(
        "key",
        "K",
        1,
        KV_HEADS,
        "keys, before positions turn them: what each place offers",
        kids="""
            Every word also wears a name tag that says what it can tell: "I am a colour", "I am the one who runs".
            The others hold their question cards against the tags.
        """,
        scientists="""
            The counterpart of the query, from the same stream by a weight of its own, so that asking need not be
            symmetric: t may read s without s reading t. With fewer key heads than query heads (Ainslie et al. 2023)
            each serves a group, which shrinks the cache of keys in the same ratio.
        """,
        pitfalls="""
            A bias of the keys changes nothing where keys are neither turned nor normalised: it adds the same number to
            all scores of a query, which the softmax takes out.
        """,
    ),
    projection(
        "value",
        "V",
        2,
        KV_HEADS,
        "values: what is taken from each place",
        kids="""
            Behind the name tag lies a parcel: what a word hands over when somebody chooses it. Tag and parcel may
            differ, as the label on a box is not the bricks inside.
        """,
        scientists="""
            What is mixed by the attention weights; linear, so that mixing and projecting could change places. Keys
            decide where one reads and values what, which is why they have weights of their own.
        """,
        pitfalls="""
            Turning values by their positions as queries and keys are: rotary positions belong into the scores alone.
        """,
    ),
)

MULTI_HEAD_ATTENTION = Formula(
    name="multi_head_attention",
    title="Multi-head attention",
    equation=equals(
        array("Y", T, D)[t, i],
        plus(
            array("b^O", D)[i],
            over(over(times(array("W^O", D, H * C)[i, plus(times(h, C), c)], MIXED[h, t, c]), c, C), h, H),
        ),
    ),
    meanings=MULTI_HEAD,
    code="sheepop.models.blocks:MultiHeadAttention.forward",
    line="self.output(mixed)",
    kids="""
        Several helpers read the same page, each with another question in mind: who, where, when. In the end they
        lay their notes side by side, and one sums them up.
    """,
    scientists="""
        The heads' results are put behind each other, H times C numbers, and one matrix mixes them. It is the same
        as a sum over heads, each through C columns of its own, so a head writes into a subspace of the stream of at
        most C dimensions.
    """,
    pitfalls="""
        Forgetting to bring the heads next to the channels before they are laid flat, which mixes places with heads
        and gives a tensor of the right shape.
    """,
    source=SOURCE,
    sample=sample_run(MULTI_HEAD, "Y", bias=True),
)
