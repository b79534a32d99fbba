import pytest
import sympy

from sheepop.learn.formulas import FORMULAS
from sheepop.learn.functions import Applied
from sheepop.learn.notation import (
    T,
    V,
    array,
    latex,
    mathml,
    matrix_sum,
    mean,
    over,
    plus,
    ratio,
    t,
    times,
    u,
)

X = array("X", T)


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("token_embedding", r"X_{t, j} = E_{x_{t}, j}"),
        ("query_projection", r"Q_{h, t, c} = b^{Q}_{h C + c} + \sum_{i=0}^{D - 1} W^{Q}_{h C + c, i} X_{t, i}"),
        (
            "attention_scores",
            r"E_{h, t, s} = \frac{\sum_{c=0}^{C - 1} Q_{h, t, c} K_{\lfloor h / G \rfloor, s, c}}{\sqrt{C}}",
        ),
        (
            "attention_weights",
            r"A_{h, t, s} = \frac{e^{E_{h, t, s} + M_{t, s}}}{\sum_{r=0}^{S - 1} e^{E_{h, t, r} + M_{t, r}}}",
        ),
        ("attention", r"O = \mathrm{softmax}\left(\frac{Q K^{\top}}{\sqrt{C}} + M\right) V"),
        ("feed_forward", r"y = W_{2} \phi\left(W_{1} x + b_{1}\right) + b_{2}"),
        ("swiglu", r"a = \mathrm{SiLU}\left(W_{1} x + b_{1}\right) \odot \left(W_{3} x + b_{3}\right)"),
        (
            "rms_norm",
            r"Y_{t, j} = \gamma_{j} \frac{X_{t, j}}{\sqrt{\frac{1}{D} \sum_{i=0}^{D - 1} X_{t, i}^{2} + \epsilon}}",
        ),
        ("temperature_softmax", r"P_{v} = \frac{e^{Z_{v} / \tau}}{\sum_{u=0}^{V - 1} e^{Z_{u} / \tau}}"),
        (
            "adamw_update",
            r"\theta_{n} = \left(1 - \eta \lambda\right) \theta_{n-1} - "
            r"\eta \frac{\hat{m}_n}{\sqrt{\hat{v}_n} + \epsilon}",
        ),
        ("muon_orthogonalization", r"Y = a X + b X X^{\top} X + c \left(X X^{\top}\right)^{2} X"),
    ],
)
def test_formulas_are_printed_as_an_author_would_write_them(name: str, printed: str) -> None:
    assert FORMULAS[name].latex == printed


def test_what_is_written_keeps_its_order() -> None:
    a, b = sympy.symbols("a b")
    assert latex(plus(b, a, -1)) == "b + a - 1"
    assert latex(times(b, a)) == "b a"
    assert latex(ratio(b, plus(b, a))) == r"\frac{b}{b + a}"
    assert latex(mean(X[t], t, T)) == r"\frac{1}{T} \sum_{t=0}^{T - 1} X_{t}"
    assert latex(over(over(plus(X[t], b), u, V), t, T)) == (
        r"\sum_{t=0}^{T - 1} \sum_{u=0}^{V - 1} \left(X_{t} + b\right)"
    )


def test_matrices_keep_their_order_and_their_signs() -> None:
    last, first = sympy.MatrixSymbol("Z", T, T), sympy.MatrixSymbol("A", T, T)
    assert latex(matrix_sum(last, -first)) == "Z - A"
    assert latex(Applied(sympy.Symbol("Norm_2"), last)) == r"\mathrm{Norm}_{2}\left(Z\right)"
    assert latex(Applied(sympy.Symbol("phi"), last)) == r"\phi\left(Z\right)"
    assert latex(sympy.Symbol("NewtonSchulz")) == r"\mathrm{NewtonSchulz}"


def test_mathml_stands_in_a_line_or_by_itself() -> None:
    assert 'display="block"' in mathml(X[t])
    assert 'display="block"' not in mathml(X[t], display=False)
