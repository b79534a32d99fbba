"""All registered formulas in one table: the overview that the README has."""

import re
from collections.abc import Iterable, Iterator

from sheepop.learn.formula import Formula
from sheepop.learn.formulas import FORMULAS

LEAST_CHARACTERS = 60  # of what is said for kids; a shorter first sentence takes the next along


def summary_rows(formulas: Iterable[Formula] = FORMULAS.values()) -> Iterator[tuple[str, str, str, str]]:
    """Return for each formula a row of Markdown: concept, what it means for kids, formula, where in the code."""
    for formula in formulas:
        module, _, symbol = formula.code.partition(":")
        path = module.replace(".", "/") + ".py"
        where = f"[`{symbol}`]({path})"
        yield formula.title, first_sentences(formula.kids), inline(formula.latex), where


def inline(latex: str) -> str:
    r"""Return LaTeX as inline mathematics that GitHub draws inside of a table.

    Between backticks Markdown leaves it alone, but a bar would end the cell.
    """
    plain = latex.replace(r"\|", r"\Vert ").replace("|", r"\vert ")
    return f"$`{' '.join(plain.split())}`$"


def first_sentences(text: str) -> str:
    """Return the first sentences of a text, as few as make a line."""
    said = ""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        said = f"{said} {sentence}".strip()
        if len(said) >= LEAST_CHARACTERS:
            break
    return said
