"""How formulas are written down: their letters, and LaTeX and MathML in the order in which an author would write.

The letters are the code's shape letters, and an index is the small letter of what it counts, from 0 as in the code:
`Q[h, t, c]` is number c of what head h asks at place t.
"""

import re
from typing import Any

import sympy
from sympy.printing.latex import LatexPrinter
from sympy.printing.precedence import PRECEDENCE

from sheepop.learn.functions import ArgMax, Kept

# What sizes count in every formula that does not say otherwise.
SIZES = {
    "B": "texts of a batch",
    "T": "places of the text",
    "S": "places that can be looked at",
    "D": "numbers of the stream",
    "H": "heads",
    "H_{KV}": "heads of keys and values",
    "C": "numbers of a head",
    "F": "numbers inside the feed-forward",
    "V": "entries of the vocabulary",
    "L": "layers",
}

# Sizes. T and S are the numbers of query and key places, which agree where a whole text is read.
B, T, S, D, H, C, F, V, L = sympy.symbols("B T S D H C F V L", integer=True, positive=True)
KV_HEADS = sympy.Symbol("H_{KV}", integer=True, positive=True)  # K in the code, which is the keys in formulas
# Indices: place t asks, places s and r answer; channels c of a head, i and j of the stream, f of the feed-forward;
# head h; tokens u and v.
t, s, r, c, i, j, f, h, u, v = sympy.symbols("t s r c i j f h u v", integer=True)


def array(name: str, *shape: Any) -> sympy.IndexedBase:
    """Return an array that is written with indices, such as `W^Q`."""
    return sympy.IndexedBase(sympy.Symbol(name), shape=shape)


def equals(left: Any, right: Any) -> sympy.Eq:
    """Return an equation that stays as it is written."""
    return sympy.Eq(left, right, evaluate=False)


def times(*factors: Any) -> sympy.Mul:
    """Return a product whose factors stay in this order."""
    return sympy.Mul(*map(sympy.sympify, factors), evaluate=False)


def plus(*terms: Any) -> sympy.Add:
    """Return a sum whose terms stay in this order."""
    return sympy.Add(*map(sympy.sympify, terms), evaluate=False)


def ratio(above: Any, below: Any) -> sympy.Mul:
    """Return a fraction that stays one."""
    return times(above, sympy.Pow(below, -1, evaluate=False))


def root(inside: Any) -> sympy.Pow:
    """Return a square root over what stays as it is written."""
    return sympy.Pow(inside, sympy.Rational(1, 2), evaluate=False)


def matrix_sum(*terms: Any) -> sympy.MatAdd:
    """Return a sum of matrices whose terms stay in this order."""
    return sympy.MatAdd(*terms)


def matrix_product(*factors: Any) -> sympy.MatMul:
    """Return a product of matrices as it is written."""
    return sympy.MatMul(*factors)


def over(body: Any, index: sympy.Symbol, size: Any) -> sympy.Sum:
    """Return the sum over all values of an index, 0 to size - 1."""
    return sympy.Sum(body, (index, 0, size - 1))


def mean(body: Any, index: sympy.Symbol, size: Any) -> sympy.Mul:
    """Return the mean over all values of an index, as one over the size times the sum."""
    return times(Kept(1 / size), over(body, index, size))


def cases(*branches: tuple[Any, Any], otherwise: Any) -> sympy.Piecewise:
    """Return the value of the first branch whose condition holds."""
    return sympy.Piecewise(*branches, (otherwise, True), evaluate=False)


class Printer(LatexPrinter):  # type: ignore[misc]
    """LaTeX in the order in which the formula was written."""

    def __init__(self) -> None:
        super().__init__({"order": "none", "fold_short_frac": False, "fold_frac_powers": True, "ln_notation": True})

    def _print_Symbol(self, expr: Any, style: str = "plain") -> str:  # noqa: N802
        # The names of a model's parts are words, with a number below where there are several.
        named = re.fullmatch(r"([A-Z][A-Za-z]{2,})(?:_(\d))?", expr.name)
        if not named:
            return str(super()._print_Symbol(expr, style))
        word, number = named.groups()
        return rf"\operatorname{{{word}}}" + (f"_{{{number}}}" if number else "")

    def _print_Add(self, expr: Any, order: Any = None) -> str:  # noqa: ARG002, N802
        # What was not written by hand has its number first, -1 + C, and an author writes C - 1.
        terms = list(expr.args)
        if terms[0].is_Number and terms[0].is_negative:
            terms.append(terms.pop(0))
        return str(super()._print_Add(plus(*terms)))

    def _print_ExpBase(self, expr: Any, exp: Any = None) -> str:  # noqa: N802
        if exp is not None:
            return str(super()._print_ExpBase(expr, exp))
        return f"e^{{{self.in_one_line(expr.exp)}}}"

    def _print_Pow(self, expr: Any) -> str:  # noqa: N802
        if not expr.base.is_Integer or expr.exp.is_number:
            return str(super()._print_Pow(expr))
        return f"{self._print(expr.base)}^{{{self.in_one_line(expr.exp)}}}"

    def in_one_line(self, expr: Any) -> str:
        """Return an exponent, whose fraction is too small to be read as one."""
        above, below = expr.as_numer_denom()
        if below == 1:
            return str(self._print(expr))
        return f"{self.parenthesize(above, PRECEDENCE['Mul'])} / {self._print(below)}"

    def _print_Sum(self, expr: Any) -> str:  # noqa: N802
        # The sums within each other, as they were written.
        signs = [
            rf"\sum_{{{self._print(index)}={self._print(lowest)}}}^{{{self._print(highest)}}}"
            for index, lowest, highest in reversed(expr.limits)
        ]
        body = self._print(expr.function)
        return " ".join([*signs, rf"\left({body}\right)" if expr.function.is_Add else str(body)])

    def _print_MatAdd(self, expr: Any) -> str:  # noqa: N802
        first, *others = [str(self._print(term)) for term in expr.args]
        return first + "".join(f" - {term[1:].lstrip()}" if term.startswith("-") else f" + {term}" for term in others)

    def _print_MatMul(self, expr: Any) -> str:  # noqa: N802
        # Over √C, not behind 1/√C.
        below = [factor for factor in expr.args if factor.is_Pow and factor.exp.could_extract_minus_sign()]
        if not below:
            return str(super()._print_MatMul(expr))
        above = sympy.MatMul(*[factor for factor in expr.args if factor not in below])
        return rf"\frac{{{self._print(above)}}}{{{self._print(1 / sympy.Mul(*below))}}}"

    def _print_Transpose(self, expr: Any) -> str:  # noqa: N802
        return rf"{self._print(expr.arg)}^{{\top}}"

    def _print_floor(self, expr: Any) -> str:
        return rf"\lfloor {self.in_one_line(expr.args[0])} \rfloor"

    def _print_Piecewise(self, expr: Any) -> str:  # noqa: N802
        return str(super()._print_Piecewise(expr)).replace(r"\text{for}\:", r"\text{if}\ ")

    def _print_HadamardProduct(self, expr: Any) -> str:  # noqa: N802
        return r" \odot ".join(
            rf"\left({self._print(part)}\right)" if isinstance(part, sympy.MatAdd) else str(self._print(part))
            for part in expr.args
        )

    def _print_Indexed(self, expr: Any) -> str:  # noqa: N802
        base, indices = self._print(expr.base), ", ".join(map(self._print, expr.indices))
        return f"{base}_{{{indices}}}"


def counters(equation: sympy.Eq) -> list[tuple[str, str]]:
    """Return the indices of an equation by name, each with the size that it runs up to."""
    left = equation.lhs
    pairs = []
    if isinstance(left, sympy.Indexed):
        pairs += [(index, size) for index, size in zip(left.indices, left.base.shape, strict=True) if index.is_Symbol]
    for added in equation.atoms(sympy.Sum):
        pairs += [(index, highest + 1) for index, _, highest in added.limits]
    pairs += [(index, size) for _, index, size in (best.args for best in equation.atoms(ArgMax))]
    return [(index.name, size.name) for index, size in pairs if size.is_Symbol]


def latex(expression: Any) -> str:
    r"""Return LaTeX for Markdown and notebooks. It has no `\operatorname`, which GitHub does not draw."""
    return str(Printer().doprint(expression)).replace(r"\operatorname", r"\mathrm")


def mathml(expression: Any, *, display: bool = True) -> str:
    """Return MathML, which browsers draw without any script."""
    from math_core import LatexToMathML

    return str(LatexToMathML().convert_with_local_state(latex(expression), displaystyle=display))
