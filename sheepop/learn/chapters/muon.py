"""Muon: momentum whose matrices are made orthogonal before they move the weights."""

from typing import Any

import numpy as np
import sympy
import torch
from numpy.typing import NDArray

from sheepop.learn.formula import Formula, Meaning
from sheepop.learn.functions import Applied
from sheepop.learn.notation import C, equals, matrix_product, matrix_sum, plus, root, times
from sheepop.training.muon import COEFFICIENTS, Muon, newton_schulz, orthogonalize

RATE, DECAY, MU = sympy.symbols("eta lambda mu")
LINEAR, CUBIC, QUINTIC = sympy.symbols("a b c")
ROWS = sympy.Symbol("R", integer=True, positive=True)


def matrix(name: str) -> sympy.MatrixSymbol:
    """Return a matrix of the size of a weight."""
    return sympy.MatrixSymbol(name, ROWS, C)


TEXTS = {
    "eta": "learning rate",
    "lambda": "weight decay",
    "mu": "share of the momentum that is kept",
    "R": "rows of the weight",
    "C": "columns of the weight",
    "B_n": "running sum of gradients",
    "B_{n-1}": "the same one step before, 0 at first",
    "G_n": "gradient of the loss by the weight, a matrix",
    "W_n": "the weight after the step",
    "W_{n-1}": "the weight before it",
    "NewtonSchulz": "division by the Frobenius norm, and five rounds of the iteration",
    "X": "a matrix whose singular values are at most 1, with R no larger than C",
    "Y": "the same with its singular values nearer to 1",
    "a": f"{COEFFICIENTS[0]}",
    "b": f"{COEFFICIENTS[1]}",
    "c": f"{COEFFICIENTS[2]}",
}


def meanings(*names: str) -> dict[str, Meaning]:
    """Return the meanings of these symbols."""
    return {name: Meaning(TEXTS[name]) for name in names}


def muon_run(random: np.random.Generator) -> dict[str, Any]:
    """Return what the last of some steps of Muon found and left, by the formulas' names, in float64."""
    weight, other = torch.from_numpy(random.standard_normal((3, 5))), torch.zeros(1)
    group = {"params": [weight], "lr": 0.1, "weight_decay": 0.3}
    others = {"params": [other], "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = Muon([group], [others], momentum=0.9, dtype=torch.float64)
    momentum, before = torch.zeros(3, 5), weight
    for _ in range(int(random.integers(1, 5))):
        momentum = optimizer.state[weight].get("momentum", momentum).clone()
        weight.grad, before = torch.from_numpy(random.standard_normal((3, 5))), weight.clone()
        optimizer.step()

    def orthogonal(direction: NDArray[np.float64]) -> NDArray[np.float64]:
        return orthogonalize(torch.from_numpy(direction)[None])[0].numpy()

    return {
        "B_{n-1}": momentum,
        "B_n": optimizer.state[weight]["momentum"],
        "G_n": weight.grad,
        "W_{n-1}": before,
        "W_n": weight,
        "mu": 0.9,
        "eta": 0.1,
        "lambda": 0.3,
        "NewtonSchulz": orthogonal,
    }


def sample_muon_momentum(random: np.random.Generator) -> tuple[dict[str, Any], torch.Tensor]:
    """Return gradient and sum before, and the sum after a step."""
    found = muon_run(random)
    return {name: found[name] for name in ("B_{n-1}", "G_n", "mu")}, found["B_n"]


def sample_newton_schulz(random: np.random.Generator) -> tuple[dict[str, Any], torch.Tensor]:
    """Return a wide matrix and what one round makes of it."""
    given = torch.from_numpy(random.standard_normal((3, 5)))
    given /= given.norm()
    a, b, c = COEFFICIENTS
    return {"X": given, "a": a, "b": b, "c": c}, newton_schulz(given[None])[0]


def sample_muon_update(random: np.random.Generator) -> tuple[dict[str, Any], torch.Tensor]:
    """Return a weight before and after a step, and what moves it."""
    found = muon_run(random)
    return {name: found[name] for name in MUON_UPDATE}, found["W_n"]


JORDAN = "Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks"
MUON_UPDATE = ("W_{n-1}", "B_n", "G_n", "mu", "eta", "lambda", "NewtonSchulz")

FORMULAS = (
    Formula(
        name="muon_momentum",
        title="Muon: momentum",
        equation=equals(matrix("B_n"), matrix_sum(matrix_product(MU, matrix("B_{n-1}")), matrix("G_n"))),
        meanings=meanings("B_n", "B_{n-1}", "G_n", "mu", "R", "C"),
        code="sheepop.training.muon:Muon.step",
        line='momentum = state["momentum"].mul_',
        kids="""
            A sledge on snow keeps most of its speed, and every push is added to it. Many pushes the same way make it
            fast, and pushes to and fro cancel each other.
        """,
        scientists="""
            A running sum, not a mean: under a constant gradient it grows to 1/(1 - μ) times that. Its scale does not
            matter, since the iteration that follows divides by the norm, and only the direction of the matrix is used.
        """,
        pitfalls="""
            Carrying AdamW's factor 1 - μ over to the sum alone and not to the gradient that Nesterov's step adds.
        """,
        source=JORDAN,
        sample=sample_muon_momentum,
    ),
    Formula(
        name="muon_orthogonalization",
        title="Muon: one round of Newton and Schulz",
        equation=equals(
            matrix("Y"),
            matrix_sum(
                matrix_product(LINEAR, matrix("X")),
                matrix_product(CUBIC, matrix("X"), matrix("X").T, matrix("X")),
                matrix_product(QUINTIC, sympy.MatPow(matrix_product(matrix("X"), matrix("X").T), 2), matrix("X")),
            ),
        ),
        meanings=meanings("Y", "X", "a", "b", "c", "R", "C"),
        code="sheepop.training.muon:newton_schulz",
        line="return torch.baddbmm(matrices, polynomial, matrices",
        kids="""
            A lump of dough is long in one direction and thin in the others. Each round presses the long sides and pulls
            the thin ones, until it is about as wide every way, but lies just as it lay.
        """,
        scientists="""
            An odd polynomial of a matrix acts on its singular values alone: each s becomes as + bs³ + cs⁵, while the
            singular vectors stay. The coefficients are steep at 0, so that five rounds lift small values to between
            about 0.7 and 1.2. It needs products of matrices only, no decomposition.
        """,
        pitfalls="""
            Starting with singular values above 1, where the polynomial can leave its range: divide by the norm first.
            On tall matrices it gives the same, but with the larger of the two products, so they are transposed.
        """,
        source=JORDAN,
        sample=sample_newton_schulz,
    ),
    Formula(
        name="muon_update",
        title="Muon: the step",
        equation=equals(
            matrix("W_n"),
            matrix_sum(
                matrix_product(plus(1, -times(RATE, DECAY)), matrix("W_{n-1}")),
                matrix_product(
                    times(sympy.Float("-0.2"), RATE, root(sympy.Max(ROWS, C))),
                    Applied(
                        sympy.Symbol("NewtonSchulz"),
                        matrix_sum(matrix("G_n"), matrix_product(MU, matrix("B_n"))),
                    ),
                ),
            ),
        ),
        meanings=meanings("W_n", *MUON_UPDATE, "R", "C"),
        code="sheepop.training.muon:Muon.step",
        line="piece.weight.add_(update, alpha=-piece.rate)",
        kids="""
            Imagine rowing with many oars. Usually a few strong rowers decide where the boat goes; here everybody pulls
            equally hard, and the boat moves in all the directions that anybody wanted.
        """,
        scientists="""
            The step is about the nearest orthogonal matrix to the gradient with Nesterov's momentum, which is steepest
            descent under the spectral norm. 0.2 times the root of the larger side gives its entries about the root mean
            square of AdamW's steps (Liu et al. 2025), so one rate and one decay serve both.
        """,
        pitfalls="""
            Using it for embeddings, the head, norms or biases, which belong to AdamW; making queries, keys and values
            orthogonal as one matrix, when they are three.
        """,
        source=f"{JORDAN}; size: Liu et al. 2025, Muon is Scalable for LLM Training",
        sample=sample_muon_update,
    ),
)
