"""Formulas as pages have them, from `sheepop/learn/formulas.py`: equation, letters, voices, pitfalls, source, code."""

import contextlib
import io
import re
import textwrap
import tokenize
from pathlib import Path

import sympy

from sheepop.learn import notation
from sheepop.learn.formula import Formula
from sheepop.learn.formulas import CHAPTERS, formula_of
from sheepop.learn.notation import SIZES, counters

MOST_LINES = 10  # of a statement that is shown whole


def formula_text(name: str) -> str:
    """Return all that a chapter says of a formula."""
    formula = formula_of(name)
    file, number, _ = formula.implementation()
    module, _, path = formula.code.partition(":")
    where = module.replace(".", "/") + ("/__init__" if file.stem == "__init__" else "") + ".py"
    parts = [
        f"### {formula.title}",
        equation(formula),
        legend(formula),
        f"**For kids.** {formula.kids}",
        f"**For scientists.** {formula.scientists}",
        f"**What usually goes wrong.** {formula.pitfalls}",
        f"Source: {formula.source}. In the code, `{path}` in `{where}`:",
        f"```py\n{statement_at(file, number)}\n```",
    ]
    return "\n\n".join(parts)


def statement_at(file: Path, number: int) -> str:
    """Return a line of code, with those that follow where brackets are still open; of many, the first and the last."""
    lines = file.read_text(encoding="utf-8").splitlines()[number - 1 :]
    taken = 1
    while taken < len(lines) and not is_closed("\n".join(lines[:taken])):
        taken += 1
    if taken > MOST_LINES:
        return f"{lines[0].strip()}...{lines[taken - 1].strip()}"
    return textwrap.dedent("\n".join(lines[:taken]))


def is_closed(code: str) -> bool:
    """Say whether all brackets that some code opens are closed; it may begin inside of others."""
    depth = 0
    # The end may come inside of brackets.
    with contextlib.suppress(tokenize.TokenError, IndentationError):
        for token in tokenize.generate_tokens(io.StringIO(code.lstrip()).readline):
            depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
    return depth <= 0


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
    plain = plain_letters(formula)
    if plain:
        lines.append("- " + "; ".join(plain))
    return "\n".join(lines)


def letter(name: str) -> str:
    """Return the LaTeX of a symbol by its name."""
    return notation.latex(sympy.Symbol(name))


def plain_letters(formula: Formula) -> list[str]:
    """Return what the sizes and indices of a formula are, which have no meaning of their own.

    Raises:
        LookupError: one of them is unknown here.
    """
    counted: dict[str, list[str]] = {}
    for index, size in counters(formula.equation):
        counted.setdefault(size, []).append(index)
    letters = {str(symbol.name) for symbol in formula.equation.atoms(sympy.Symbol)} - formula.meanings.keys()
    unknown = letters - SIZES.keys() - {index for indices in counted.values() for index in indices}
    if unknown or not counted.keys() <= SIZES.keys() | formula.meanings.keys():
        names = ", ".join(sorted(unknown or counted.keys()))
        raise LookupError(f"formula '{formula.name}' has letters that nothing explains: {names}")
    found = []
    for size, meaning in SIZES.items():
        if size in counted:
            indices = ", ".join(f"${letter(index)}$" for index in sorted(set(counted[size])))
            verb = "counts" if len(set(counted[size])) == 1 else "count"
            found.append(f"{indices} {verb} the ${letter(size)}$ {meaning}")
        elif size in letters:
            found.append(f"${letter(size)}$: {meaning}")
    return found


def slug(title: str) -> str:
    """Return the anchor that a heading gets, on GitHub and in the site."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
