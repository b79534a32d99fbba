"""Evaluate a formula as it is printed: sums, cases and indices, in float64, over arrays of real numbers.

An equation's left side says what is computed. Where that is `A[t, s]`, the right side is evaluated for every t and s at
once: an index is an array along an axis of its own, and each sum adds an axis, which it then sums away. Where it is a
matrix, the right side has products of matrices. Where it is a plain symbol, it is worked out element by element.
"""

import math
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import numpy as np
import sympy
from numpy.typing import ArrayLike, NDArray

from sheepop.learn.functions import Applied, ArgMax, Indicator, Kept, Nearest, Silu, Softmax, Stacked

Numbers = NDArray[Any]
Part = Callable[..., Numbers]

CELLS_AT_ONCE = 2**22  # terms of a sum that are in memory at one time: 32 MiB, a few times over

FUNCTIONS: dict[Any, Callable[[Numbers], Numbers]] = {
    sympy.exp: np.exp,
    sympy.log: np.log,
    sympy.sin: np.sin,
    sympy.cos: np.cos,
    sympy.tanh: np.tanh,
    sympy.Abs: np.abs,
    sympy.floor: np.floor,
    Nearest: np.rint,
    Silu: lambda numbers: numbers / (1 + np.exp(-numbers)),
    Indicator: lambda condition: condition.astype(np.float64),
    sympy.erf: np.vectorize(math.erf, otypes=[float]),
}
JOINTS: dict[Any, Callable[[Numbers, Numbers], Numbers]] = {
    sympy.Add: np.add,
    sympy.Mul: np.multiply,
    sympy.Max: np.maximum,
    sympy.Min: np.minimum,
    sympy.Mod: np.mod,
    sympy.And: np.logical_and,
    sympy.Or: np.logical_or,
    sympy.Eq: np.equal,
    sympy.Ne: np.not_equal,
    sympy.Lt: np.less,
    sympy.Le: np.less_equal,
    sympy.Gt: np.greater,
    sympy.Ge: np.greater_equal,
    sympy.MatAdd: np.add,
    sympy.MatMul: lambda left, right: left @ right if left.ndim and right.ndim else left * right,
    sympy.HadamardProduct: np.multiply,
}


def evaluate(
    equation: sympy.Eq, values: Mapping[str, ArrayLike | Part], shape: tuple[int, ...] | None = None
) -> Numbers:
    """Return what the right side of an equation comes to, for every index of its left side.

    Args:
        equation: as in `learn/formulas.py`.
        values: an array for each array and matrix, a number (or an array, element by element) for each other symbol,
            and what can be called for each function, by their names. Sizes follow from the shapes of the arrays where
            they can.
        shape: of the left side, where the sizes do not all follow from the values.

    Returns:
        float64, of the shape of the left side.

    Raises:
        KeyError: a symbol has no value.
        ValueError: arrays do not fit each other.
    """
    parts = {name: value for name, value in values.items() if callable(value)}
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in values.items() if name not in parts}
    left = equation.lhs
    shapes = {name: value.shape for name, value in arrays.items()}
    if shape is not None and not left.is_Symbol:
        shapes[name_of(left.base if isinstance(left, sympy.Indexed) else left)] = shape
    known = {**sizes_of(equation, shapes), **{name: value for name, value in arrays.items() if value.ndim == 0}}
    if not isinstance(left, sympy.Indexed):
        return Evaluation(arrays, known, parts).value(equation.rhs)
    lengths = [int(Evaluation(arrays, known).value(size)) for size in left.base.shape]
    grids = np.meshgrid(*[np.arange(length) for length in lengths], indexing="ij")
    indices = {index: grid for index, grid in zip(left.indices, grids, strict=True) if index.is_Symbol}
    found = Evaluation(arrays, known, parts, indices, len(lengths)).value(equation.rhs)
    return np.broadcast_to(found, lengths)


def sizes_of(equation: sympy.Eq, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Numbers]:
    """Return the sizes that the equation names, from the shapes of its arrays.

    Raises:
        ValueError: two arrays disagree, or one has another number of axes.
    """
    sizes: dict[str, Numbers] = {}
    for array in equation.atoms(sympy.IndexedBase, sympy.MatrixSymbol):
        name = name_of(array)
        if name not in shapes or array.shape is None:
            continue
        if len(array.shape) != len(shapes[name]):
            raise ValueError(f"{name} has the shape {shapes[name]}, but the formula has {array.shape}")
        for size, length in zip(array.shape, shapes[name], strict=True):
            if size.is_Symbol and sizes.setdefault(size.name, np.asarray(float(length))) != length:
                raise ValueError(f"the size {size} is {sizes[size.name]:.0f}, but {name} has {shapes[name]}")
    return sizes


def name_of(array: Any) -> str:
    """Return the name of an array or a matrix of a formula."""
    return str(array.label.name if isinstance(array, sympy.IndexedBase) else array.name)


class Evaluation:
    """Values of expressions where the symbols have values; `indices` are arrays with `axes` axes."""

    def __init__(
        self,
        arrays: Mapping[str, Numbers],
        known: Mapping[str, Numbers],
        parts: Mapping[str, Part] | None = None,
        indices: Mapping[Any, Numbers] | None = None,
        axes: int = 0,
    ) -> None:
        self.arrays, self.known, self.parts, self.indices, self.axes = arrays, known, parts or {}, indices or {}, axes

    def value(self, expression: Any) -> Numbers:
        """Return the value of an expression: with the axes of the indices, or one that broadcasts to them."""
        if expression in self.indices:
            return self.indices[expression]
        if expression.is_Symbol:
            return self.known[expression.name] if expression.name in self.known else self.arrays[expression.name]
        if isinstance(expression, sympy.MatrixSymbol):
            return self.arrays[expression.name]
        if expression.is_number:
            return np.asarray(float(expression))
        if isinstance(expression, sympy.Indexed):
            return self.element(expression)
        if isinstance(expression, sympy.Sum):
            return self.sum(expression)
        if isinstance(expression, ArgMax):
            body, index, size = expression.args
            found = self.along(index, np.arange(int(self.value(size)))).value(body)
            return np.asarray(np.where(np.isnan(found), -np.inf, found).argmax(axis=-1))
        if isinstance(expression, Applied):
            return self.parts[expression.args[0].name](self.value(expression.args[1]))
        if isinstance(expression, Stacked):
            function, inside, count = expression.args
            return reduce(
                lambda found, number: self.parts[function.name](found, number),
                range(int(self.value(count))),
                self.value(inside),
            )
        if isinstance(expression, sympy.Piecewise):
            found = np.asarray(np.nan)
            with np.errstate(all="ignore"):  # a branch is worked out where it is not meant as well
                for branch, condition in reversed(expression.args):
                    found = np.where(self.value(condition), self.value(branch), found)
            return found
        if expression in (sympy.true, sympy.false):
            return np.asarray(bool(expression))
        parts = [self.value(part) for part in expression.args]
        kind = expression.func
        if kind in JOINTS:
            return reduce(JOINTS[kind], parts)
        if kind in (sympy.Pow, sympy.MatPow):
            return self.power(expression, *parts)
        if kind is Kept:
            return parts[0]
        if kind is sympy.Transpose:
            return parts[0].T
        if kind is Softmax:
            powers = np.exp(parts[0] - parts[0].max(axis=-1, keepdims=True))
            return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
        return FUNCTIONS[kind](parts[0])

    def element(self, expression: sympy.Indexed) -> Numbers:
        """Return elements of an array; one that lies outside of it is not a number."""
        array = self.arrays[name_of(expression.base)]
        places = [np.asarray(self.value(index)).astype(np.int64) for index in expression.indices]
        inside = [(place >= 0) & (place < length) for place, length in zip(places, array.shape, strict=True)]
        found = array[tuple(np.where(here, place, 0) for here, place in zip(inside, places, strict=True))]
        return np.asarray(np.where(np.logical_and.reduce(np.broadcast_arrays(*inside)), found, np.nan))

    def sum(self, expression: sympy.Sum) -> Numbers:
        """Return a sum, whose bounds may depend on the other indices; sympy has sums within each other as one."""
        body, *inner, (index, *bounds) = expression.args
        body = sympy.Sum(body, *inner) if inner else body
        lowest, highest = (np.asarray(self.value(bound)) for bound in bounds)
        terms = np.arange(int(lowest.min()), int(highest.max()) + 1)
        cells = math.prod(np.broadcast_shapes(*(grid.shape for grid in self.indices.values())))
        total = np.zeros(())
        for some in np.array_split(terms, max(1, cells * len(terms) // CELLS_AT_ONCE)):
            is_meant = (some >= lowest[..., None]) & (some <= highest[..., None])
            total = total + np.where(is_meant, self.along(index, some).value(body), 0.0).sum(axis=-1)
        return total

    def along(self, index: Any, terms: Numbers) -> "Evaluation":
        """Return the evaluation in which an index takes these values, along an axis behind the others."""
        indices = {outer: grid[..., None] for outer, grid in self.indices.items()}
        indices[index] = terms.reshape((1,) * self.axes + (-1,))
        return Evaluation(self.arrays, self.known, self.parts, indices, self.axes + 1)

    def power(self, expression: Any, base: Numbers, exponent: Numbers) -> Numbers:
        """Return a power, of numbers or of a square matrix."""
        if getattr(expression.base, "is_Matrix", False):
            return np.linalg.matrix_power(base, int(exponent))
        return np.asarray(np.power(base, exponent))
