"""The feed-forward: what a place makes of what it has gathered, on its own."""

from collections.abc import Callable
from typing import Any

import numpy as np
import sympy
import torch
from numpy.typing import NDArray
from torch import nn

from sheepop.learn.evaluation import Part
from sheepop.learn.formula import Formula, Meaning
from sheepop.learn.functions import Applied, Silu
from sheepop.learn.notation import D, F, equals, matrix_product, matrix_sum, plus, ratio, root, times
from sheepop.learn.parts import bias_of, block_of, only, part_of, sample_run
from sheepop.learn.trace import Trace
from sheepop.models.blocks import ACTIVATIONS, FeedForward

INNER = sympy.Symbol("I", integer=True, positive=True)
U, BENT = sympy.Symbol("u"), sympy.Symbol("a")


def column(name: str, rows: Any) -> sympy.MatrixSymbol:
    """Return a vector; evaluated with one column for each place."""
    return sympy.MatrixSymbol(name, rows, 1)


def weight(name: str, rows: Any, columns: Any) -> sympy.MatrixSymbol:
    """Return a weight."""
    return sympy.MatrixSymbol(name, rows, columns)


def columns_of(point: str) -> Callable[[Trace, int], torch.Tensor]:
    """Return what gives a point's tensor with one column for each place."""
    return lambda run, layer: run[point.format(layer=layer)].T


def layer_of(name: str, letter: str, half: int | None = None) -> Callable[[Trace, int], torch.Tensor]:
    """Return what gives weight `W` or bias `b` (as a column) of a projection, or half 0 or 1 of its rows."""

    def numbers(run: Trace, layer: int) -> torch.Tensor:
        linear = getattr(block_of(run, layer).feed_forward, name)
        found: torch.Tensor = linear.weight if letter == "W" else bias_of(linear)[:, None]
        return found if half is None else found.chunk(2)[half]

    return numbers


def activation_of(run: Trace, _layer: int) -> Part:
    """Return what the feed-forward does between its projections, as a function of columns."""
    alone = FeedForward(run.model.config)
    alone.input = alone.output = nn.Identity()  # type: ignore[assignment]
    part = part_of(run, alone)

    def bend(inside: NDArray[np.float64]) -> NDArray[np.float64]:
        return part(inside.T).T

    return bend


def elementwise(activation: str) -> Callable[[np.random.Generator], tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """Return what draws numbers and bends them as the model does."""

    def sample(random: np.random.Generator) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        numbers = torch.from_numpy(random.normal(0, 2, (3, 7)))
        return {"u": numbers}, ACTIVATIONS[activation](numbers)

    return sample


ELEMENTWISE = {
    "a": Meaning("what the activation makes of it", "blocks.{layer}.feed_forward.activation"),
    "u": Meaning("a number behind the first projection", "blocks.{layer}.feed_forward.input"),
}
FEED_FORWARD = {
    "y": Meaning("what a place adds to its stream", value=columns_of("blocks.{layer}.feed_forward.output")),
    "x": Meaning("what it reads: its normalised stream", value=columns_of("blocks.{layer}.feed_forward.read")),
    "W_1": Meaning("weight that widens", value=layer_of("input", "W")),
    "b_1": Meaning("bias, 0 where the model has none", value=layer_of("input", "b")),
    "phi": Meaning("the activation; a gated one multiplies one half, bent, by the other", value=activation_of),
    "W_2": Meaning("weight that narrows", value=layer_of("output", "W")),
    "b_2": Meaning("bias, 0 where the model has none", value=layer_of("output", "b")),
    "I": Meaning(
        "rows of the first weight: F, or 2F with a gated activation",
        value=lambda run, layer: block_of(run, layer).feed_forward.input.weight.shape[0],
    ),
}
SWIGLU = {
    "a": Meaning("what the second projection reads", value=columns_of("blocks.{layer}.feed_forward.activation")),
    "x": FEED_FORWARD["x"],
    "W_1": Meaning("weight of the gate", value=layer_of("input", "W", half=0)),
    "b_1": Meaning("bias of the gate, 0 where the model has none", value=layer_of("input", "b", half=0)),
    "W_3": Meaning("weight of the linear half", value=layer_of("input", "W", half=1)),
    "b_3": Meaning("bias of the linear half, 0 where the model has none", value=layer_of("input", "b", half=1)),
}
GATE = matrix_sum(matrix_product(weight("W_1", F, D), column("x", D)), column("b_1", F))
LINEAR = matrix_sum(matrix_product(weight("W_3", F, D), column("x", D)), column("b_3", F))
WIDENED = matrix_sum(matrix_product(weight("W_1", INNER, D), column("x", D)), column("b_1", INNER))
HENDRYCKS = "Hendrycks and Gimpel 2016, Gaussian Error Linear Units"

FORMULAS = (
    Formula(
        name="feed_forward",
        title="Feed-forward",
        equation=equals(
            column("y", D),
            matrix_sum(
                matrix_product(weight("W_2", D, F), Applied(sympy.Symbol("phi"), WIDENED, F)),
                column("b_2", D),
            ),
        ),
        meanings=FEED_FORWARD,
        code="sheepop.models.blocks:FeedForward.forward",
        line="self.output(tap(",
        kids="""
            An assembly line with two stations. At the first a word's few bricks are sorted into many small bins, and
            bins with the wrong bricks are pushed aside; at the second, what is left is put together again.
        """,
        scientists="""
            A network of two layers with F hidden units, the same at every place, which reads nothing of the others.
            Without the activation the two matrices would be one. It can be read as a memory: rows of the first weight
            are patterns, columns of the second what is added where they match (Geva et al. 2021).
        """,
        pitfalls="""
            Leaving the activation out, which trains, but gains nothing from the width; multiplying by a weight where
            its transpose is meant, which goes unseen where F equals D.
        """,
        source="Vaswani et al. 2017, Attention Is All You Need, section 3.3",
        sample=sample_run(FEED_FORWARD, "y", bias=True),
    ),
    Formula(
        name="gelu",
        title="GELU",
        equation=equals(BENT, times(U / 2, plus(1, sympy.erf(ratio(U, sympy.sqrt(2)))))),
        meanings=ELEMENTWISE,
        code="sheepop.models.blocks:ACTIVATIONS",
        line='"gelu": F.gelu',
        kids="""
            A door that opens by itself for big friendly numbers and stays shut for big unfriendly ones. Around zero it
            stands ajar, so that a little gets through.
        """,
        scientists="""
            The number times the probability that a standard normal variable is below it. It is smooth, comes close to
            u for large u and to 0 for very negative u, and dips to about -0.17 near u = -0.75, so that it is not
            monotonic.
        """,
        pitfalls="""
            Taking the tanh approximation for the same thing: the two differ by up to 0.0005, which a model that was
            trained with one of them can feel.
        """,
        source=HENDRYCKS,
        sample=elementwise("gelu"),
        missing=only("activation", "gelu"),
    ),
    Formula(
        name="gelu_tanh",
        title="GELU by tanh",
        equation=equals(
            BENT,
            times(
                U / 2,
                plus(
                    1,
                    sympy.tanh(times(root(ratio(2, sympy.pi)), plus(U, times(sympy.Float("0.044715"), U**3)))),
                ),
            ),
        ),
        meanings=ELEMENTWISE,
        code="sheepop.models.blocks:ACTIVATIONS",
        line='"gelu_tanh": lambda',
        kids="""
            The same door, built of simpler parts. Somebody found a hinge that moves almost like the real one and was
            quicker to make.
        """,
        scientists="""
            An approximation of GELU by functions that were fast where erf was not; the factor of the cube was fitted.
            Its error is below 0.0005 everywhere. GPT-2 was trained with it, so its weights want it still.
        """,
        pitfalls="""
            Squaring in place of cubing; the root over 2/π being forgotten, which gives a function that is nearly right.
        """,
        source=HENDRYCKS,
        sample=elementwise("gelu_tanh"),
        missing=only("activation", "gelu_tanh"),
    ),
    Formula(
        name="silu",
        title="SiLU",
        equation=equals(BENT, U / plus(1, sympy.exp(-U))),
        meanings=ELEMENTWISE,
        code="sheepop.models.blocks:ACTIVATIONS",
        line='"silu": F.silu',
        kids="""
            A slide with a small dip before the climb. Rolling in from far left you stay flat on the ground, sink a
            little, and then go up nearly in a straight line.
        """,
        scientists="""
            The number times its own logistic function, also known as Swish with β = 1. It is smooth, has its minimum of
            about -0.28 near u = -1.28, and a derivative of 1/2 at zero.
        """,
        pitfalls="""
            Computing the exponential of -u in a small type, where it overflows for very negative u; the quotient must
            then come out as 0.
        """,
        source="Elfwing et al. 2018, Sigmoid-Weighted Linear Units; Ramachandran et al. 2017, Searching for Activation "
        "Functions",
        sample=elementwise("silu"),
        missing=only("activation", "silu"),
    ),
    Formula(
        name="swiglu",
        title="SwiGLU",
        equation=equals(column("a", F), sympy.HadamardProduct(Silu(GATE), LINEAR, evaluate=False)),
        meanings=SWIGLU,
        code="sheepop.models.blocks:FeedForward.forward",
        line='self.activation(tap("feed_forward.gate"',
        kids="""
            Two rows of taps feed one row of cups. One row brings the juice, the other decides how far each tap is open,
            and a cup fills only where both agree.
        """,
        scientists="""
            One projection, through SiLU, multiplies another that stays linear, so that the layer is close to quadratic
            in its input where the gate is small. Three matrices in place of two: with F at two thirds of the usual 4D
            it has as many weights, and for the same work it usually reaches a lower loss.
        """,
        pitfalls="""
            Bending the wrong half: which rows are the gate differs between file formats, and shapes do not tell.
        """,
        source="Shazeer 2020, GLU Variants Improve Transformer",
        sample=sample_run(SWIGLU, "a", activation="swiglu", bias=True),
        missing=only("activation", "swiglu"),
    ),
)
