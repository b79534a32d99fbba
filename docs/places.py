"""Marked places of hand-written pages: what stands between `<!-- KIND: NAME -->` and `<!-- end of KIND -->` is made.

`formula` has all that is to be said of a formula, `equation` only the equation with its letters; both come from
`sheepop/learn/formulas.py` and are written into the page by `docs/generate.py`. An `example` has numbers of a model
that is trained while the site is built, so that the page in the repository only says what will stand there.
"""

import re
from collections.abc import Callable, Mapping

Make = Callable[[str], str]
PLACE = re.compile(r"<!-- (formula|equation|example): (\w+) -->\n(.*?)<!-- end of \1 -->\n", re.DOTALL)
SUMMARY = re.compile(r"<!-- formulas: summary -->\n.*?<!-- end of formulas -->\n", re.DOTALL)


def fill(page: str, makers: Mapping[str, Make]) -> str:
    """Return a page whose places of these kinds are filled; other places stay as they are."""

    def filled(place: re.Match[str]) -> str:
        kind, name, _ = place.groups()
        if kind not in makers:
            return place[0]
        return f"<!-- {kind}: {name} -->\n\n{makers[kind](name).strip()}\n\n<!-- end of {kind} -->\n"

    return PLACE.sub(filled, page)


def names_in(page: str, kind: str) -> list[str]:
    """Return the names of a page's places of this kind."""
    return [name for found, name, _ in PLACE.findall(page) if found == kind]


def outside_of_places(page: str) -> str:
    """Return what of a page is written by hand; the table of all formulas has marks of its own (`generate.py`)."""
    return SUMMARY.sub("", PLACE.sub("", page))


def fill_from_code(page: str, name: str) -> str:
    """Return a page as it should be in the repository; `name` is its path below docs/, such as `chapters/loss.md`."""
    if not PLACE.search(page):
        return page
    from formula_places import equation_text, formula_text
    from worked_examples import announcement

    up = "../" * name.count("/")
    return fill(
        page,
        {"formula": formula_text, "equation": lambda formula: equation_text(formula, up), "example": announcement},
    )
