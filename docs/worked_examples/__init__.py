"""Worked examples: each chapter's formulas with the numbers of a real model, which is trained while the site is built.

Training takes seconds; the same machine gives the same numbers, another one rounds otherwise. Each example asserts what
it claims. `fill_examples` puts them into a page; in the repository a page says what will stand there (`announcement`).
"""

from places import fill, names_in

from worked_examples import learning, reading, thinking, writing
from worked_examples.run import example_run

# By name: what stands there, and what makes it of the run.
EXAMPLES = reading.EXAMPLES | thinking.EXAMPLES | learning.EXAMPLES | writing.EXAMPLES


def fill_examples(page: str) -> str:
    """Return a page with its examples computed; the model is trained at the first call, if the page has any.

    Raises:
        KeyError: a place names no example.
        AssertionError: an example's numbers are not as it says.
    """
    if not names_in(page, "example"):
        return page
    return fill(page, {"example": lambda name: EXAMPLES[name][1](example_run())})


def announcement(name: str) -> str:
    """Return what stands in the place of an example in the repository."""
    return f"> *With the numbers of a real model, in the site (`make docs`):* {EXAMPLES[name][0]}."
