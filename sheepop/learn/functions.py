"""What formulas say that sympy has no word for: softmax, argmax, counting, rounding, and a model's own parts."""

from typing import Any

import sympy


class Same(sympy.MatrixExpr):  # type: ignore[misc]
    """A function whose result has the shape of the matrix inside."""

    name: str

    @property
    def shape(self) -> Any:
        """That of the matrix inside."""
        return self.args[0].shape

    def _latex(self, printer: Any) -> str:
        return rf"\operatorname{{{self.name}}}\left({printer._print(self.args[0])}\right)"


class Softmax(Same):
    """The softmax of each row of a matrix."""

    name = "softmax"


class Silu(Same):
    """Each number times its logistic function."""

    name = "SiLU"


class Applied(sympy.MatrixExpr):  # type: ignore[misc]
    """A function of a matrix, `Applied(Symbol("Norm"), X)`: a part of the model, whose value can be called.

    The matrix that it makes has as many rows as the one inside, or the `rows` given.
    """

    def __new__(cls, function: sympy.Symbol, inside: Any, rows: Any = None) -> "Applied":
        """Keep the number of rows among the arguments, as sympy wants."""
        made = super().__new__(cls, function, inside, sympy.sympify(inside.shape[0] if rows is None else rows))
        assert isinstance(made, Applied)
        return made

    @property
    def shape(self) -> Any:
        """That of the matrix that it makes."""
        return self.args[2], self.args[1].shape[1]

    def _latex(self, printer: Any) -> str:
        return rf"{printer._print(self.args[0])}\left({printer._print(self.args[1])}\right)"


class Stacked(sympy.MatrixExpr):  # type: ignore[misc]
    """Functions behind each other, `Stacked(Symbol("Block"), X, L)`, which are called with their number as well."""

    @property
    def shape(self) -> Any:
        """That of the matrix inside."""
        return self.args[1].shape

    def _latex(self, printer: Any) -> str:
        function, inside, count = map(printer._print, self.args)
        return rf"{function}_{{{count}}}\left(\cdots\,{function}_{{1}}\left({inside}\right)\cdots\right)"


class ArgMax(sympy.Expr):  # type: ignore[misc]
    """The index, `ArgMax(x[v], v, V)`, of 0 to V - 1 at which an expression is the largest, where it is a number."""

    def _latex(self, printer: Any) -> str:
        body, index = printer._print(self.args[0]), printer._print(self.args[1])
        body = rf"\left({body}\right)" if self.args[0].is_Add else body
        return rf"\underset{{{index}}}{{\operatorname{{argmax}}}}\; {body}"


class Indicator(sympy.Function):  # type: ignore[misc]
    """1 where a condition holds and 0 elsewhere, in the brackets of Iverson."""

    def _latex(self, printer: Any) -> str:
        return rf"\left[{printer._print(self.args[0])}\right]"


class Nearest(sympy.Function):  # type: ignore[misc]
    """The nearest whole number, the even one of two."""

    def _latex(self, printer: Any) -> str:
        return rf"\left\lfloor {printer._print(self.args[0])} \right\rceil"


class Kept(sympy.UnevaluatedExpr):  # type: ignore[misc]
    """A number that stays by itself in a product, such as the 1/N of a mean."""

    is_commutative = True
