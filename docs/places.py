"""Marked places of hand-written pages: what stands between `<!-- KIND: NAME -->` and `<!-- end of KIND -->` is made.

`formula` has all that is to be said of a formula, `equation` only the equation with its letters; both come from
`sheepop/learn/formulas.py` and are written into the page by `docs/generate.py`. An `example` has numbers of a model
that is trained while the site is built, so that the page in the repository only says what will stand there.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

Make = Callable[[str], str]
PLACE = re.compile(r"<!-- (formula|equation|example): (\w+) -->\n(.*?)<!-- end of \1 -->\n", re.DOTALL)


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
    """Return what of a page is written by hand."""
    return PLACE.sub("", page)


def pages_with_places(folder: Path) -> dict[str, Callable[[], str]]:
    """Return the hand-written pages with places below `folder`: their names, and what makes each as it should be."""
    from formula_places import equation_text, formula_text
    from worked_examples import announcement

    found = {}
    for path in sorted(folder.rglob("*.md")):
        page = path.read_text(encoding="utf-8")
        if not PLACE.search(page):
            continue
        up = "../" * len(path.relative_to(folder).parents[:-1])
        makers: dict[str, Make] = {
            "formula": formula_text,
            "equation": lambda name, up=up: equation_text(name, up),  # type: ignore[misc]
            "example": announcement,
        }
        found[path.relative_to(folder).as_posix()] = lambda page=page, makers=makers: fill(page, makers)  # type: ignore[misc]
    return found
