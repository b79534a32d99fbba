import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from website.formulas import draw_formulas


@pytest.mark.parametrize(
    ("latex", "elements"),
    [
        (r"\sum_{t=1}^{N} x_t^2", ["munderover", "msubsup"]),
        (r"\frac{\partial L}{\sqrt{d_k}}", ["mfrac", "msqrt", "msub"]),
        (r"\begin{cases} 0 & s \le t \\ -\infty & \text{otherwise} \end{cases}", ["mtable", "mtr", "mtd", "mtext"]),
        (r"\begin{pmatrix} a & b \\ c & d \end{pmatrix}", ["mtable"]),
        (r"\begin{aligned} a &= b \\ &= c \end{aligned}", ["mtable"]),
        (r"\operatorname{softmax}(z)_i = \operatorname*{arg\,max}_j z_j", ["munder"]),
    ],
)
def test_latex_becomes_mathml(latex: str, elements: list[str]) -> None:
    page, problems = draw_formulas(f'<p>a</p><div class="arithmatex">\\[\n{html.escape(latex)}\n\\]</div><p>b</p>')
    assert problems == []
    assert page.startswith('<p>a</p><div class="formula"><math display="block"')
    assert page.endswith("</math></div><p>b</p>")
    assert all(f"<{element}" in page for element in elements)
    assert html.escape(latex, quote=False) in page  # it can be copied


def test_punctuation_stays_with_its_formula() -> None:
    page, _ = draw_formulas('<span class="arithmatex">\\(x\\)</span>), <span class="arithmatex">\\(y\\)</span> b')
    assert "</math>),</span> <span" in page
    assert page.endswith("</math></span> b")


def test_a_formula_in_a_line_is_no_block_and_neighbours_stay_apart() -> None:
    page, problems = draw_formulas(
        '<span class="arithmatex">\\(x_{&lt;t}\\)</span> and <span class="arithmatex">\\(y\\)</span>'
    )
    assert problems == []
    assert len(re.findall('<span class="formula"><math', page)) == 2
    assert "block" not in page
    assert "</span> and <span" in page


@pytest.mark.parametrize("latex", [r"\frc{1}{2}", r"\frac{1", "x_1_2", r"\begin{cases} a", "a & b"])
def test_what_cannot_be_read_is_named_and_left(latex: str) -> None:
    given_page = f'<span class="arithmatex">\\({html.escape(latex)}\\)</span>'
    page, problems = draw_formulas(given_page)
    assert page == given_page
    assert len(problems) == 1
    assert repr(latex) in problems[0]


@given(st.text(alphabet="ab<>&\\()[]{}$ \n", max_size=30))
def test_other_text_is_left_alone(text: str) -> None:
    page = f"<p>{html.escape(text)}</p><code>\\(x\\)</code>"
    assert draw_formulas(page) == (page, [])
