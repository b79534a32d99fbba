"""Formulas as the pages have them, from `sheepop/learn/formulas.py`: equation, letters, two voices, pitfalls, source, code."""

import re

import sympy

from sheepop.learn import notation
from sheepop.learn.formula import Formula
from sheepop.learn.formulas import CHAPTERS, formula_of

# Sizes and indices, which mean the same in every formula (`notation.py`); a formula may give a letter another meaning.
LETTERS = {
    "B": "texts in a batch",
    "T": "places that ask",
    "S": "places that answer",
    "D": "width of the stream",
    "H": "heads",
    "H_{KV}": "heads of keys and values",
    "C": "width of a head",
    "F": "width inside the feed-forward",
    "V": "entries of the vocabulary",
    "L": "layers",
    "b": "a text of the batch",
    "t": "a place that asks",
    "s": "a place that answers",
    "r": "a place, to sum over all that answer",
    "c": "a number of a head",
    "i": "a number of the stream",
    "j": "a number of the stream, to sum over",
    "f": "a number inside the feed-forward",
    "h": "a head",
    "u": "an entry of the vocabulary",
    "v": "an entry of the vocabulary, to sum over",
    "l": "a layer",
}


def formula_text(name: str) -> str:
    """Return all that a chapter says of a formula."""
    formula = formula_of(name)
    file, _, line = formula.implementation()
    module, _, path = formula.code.partition(":")
    where = module.replace(".", "/") + ("/__init__" if file.stem == "__init__" else "") + ".py"
    parts = [
        f"### {formula.title}",
        equation(formula),
        legend(formula),
        f"**For kids.** {formula.kids}",
        f"**For scientists.** {formula.scientists}",
        f"**What usually goes wrong.** {formula.pitfalls}",
        f"Source: {formula.source}. In the code it is this line of `{path}` in `{where}`:",
        f"```py\n{line}\n```",
    ]
    return "\n\n".join(parts)


def equation_text(name: str, up: str) -> str:
    """Return a formula's equation with its letters, and where all else is said of it; `up` leads to docs/."""
    formula = formula_of(name)
    chapter = next(chapter for chapter, formulas in CHAPTERS.items() if formula in formulas)
    link = f"[{formula.title}]({up}chapters/{chapter}.md#{slug(formula.title)})"
    return "\n\n".join((f"**{link}**", equation(formula), legend(formula)))


def equation(formula: Formula) -> str:
    """Return the equation as a display formula."""
    return f"$$\n{formula.latex}\n$$"


def legend(formula: Formula) -> str:
    """Return what the letters of a formula mean, the model's point behind those that a trace shows."""
    lines = []
    for name, meaning in formula.meanings.items():
        point = f" (`{meaning.point.format(layer='N')}`)" if meaning.point else ""
        lines.append(f"- ${letter(name)}$: {meaning.text}{point}")
    plain = sorted(plain_letters(formula), key=list(LETTERS).index)
    if plain:
        lines.append("- " + ", ".join(f"${letter(name)}$: {LETTERS[name]}" for name in plain))
    return "\n".join(lines)


def letter(name: str) -> str:
    """Return the LaTeX of a symbol by its name."""
    return notation.latex(sympy.Symbol(name))


def plain_letters(formula: Formula) -> set[str]:
    """Return the sizes and indices of a formula, which have no meaning of their own.

    Raises:
        LookupError: one of them is unknown here.
    """
    found = {str(symbol.name) for symbol in formula.equation.atoms(sympy.Symbol)} - formula.meanings.keys()
    unknown = found - LETTERS.keys()
    if unknown:
        raise LookupError(f"formula '{formula.name}' has letters that nothing explains: {', '.join(sorted(unknown))}")
    return found


def slug(title: str) -> str:
    """Return the anchor that a heading gets, on GitHub and in the site."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
