"""Every formula in the pages comes from the registry, and every one of the registry stands in a page."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from formula_places import equation_text, formula_text, slug, statement_at
from places import fill, names_in, outside_of_places
from worked_examples import EXAMPLES, announcement

from sheepop.learn.formula import Formula
from sheepop.learn.formulas import CHAPTERS, FORMULAS

PROJECT = Path(__file__).parents[2]
PAGES = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md")])


def name_of(page: Path) -> str:
    return str(page.relative_to(PROJECT))


def prose(page: str) -> str:
    """What is neither made, nor code."""
    page = re.sub(r"^```.*?^```", "", outside_of_places(page), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`", "", page)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_formula_is_written_by_hand(page: Path) -> None:
    assert "$" not in prose(page.read_text(encoding="utf-8"))
    assert "```math" not in outside_of_places(page.read_text(encoding="utf-8"))


def test_a_formula_by_hand_would_be_found() -> None:
    made = "<!-- formula: attention -->\n\n$$\nO\n$$\n\n<!-- end of formula -->\n"
    assert "$" not in prose(f"Words, `$HOME`.\n\n{made}\n```text\n$ ls\n```\n")
    assert "$" in prose(f"Words.\n\n{made}\n$$\nE = mc^2\n$$\n")
    assert "$" in prose("Words about $E$.")


def test_every_formula_is_told_in_its_chapter_and_stands_in_the_overview() -> None:
    overview = names_in((PROJECT / "docs" / "mathematics.md").read_text(encoding="utf-8"), "equation")
    assert sorted(overview) == sorted(FORMULAS)
    for chapter, formulas in CHAPTERS.items():
        page = (PROJECT / "docs" / "chapters" / f"{chapter}.md").read_text(encoding="utf-8")
        assert names_in(page, "formula") == [formula.name for formula in formulas]


def test_every_example_stands_in_a_page_and_every_place_has_one() -> None:
    named = [name for page in PAGES for name in names_in(page.read_text(encoding="utf-8"), "example")]
    assert sorted(named) == sorted(EXAMPLES)


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=list(FORMULAS))
def test_a_formula_is_told_with_all_that_belongs_to_it(formula: Formula) -> None:
    text = formula_text(formula.name)
    for part in (formula.title, formula.latex, formula.kids, formula.scientists, formula.pitfalls, formula.source):
        assert part in text
    path, _, line = formula.implementation()
    assert line in text
    assert f"`{path.relative_to(PROJECT).as_posix()}`" in text
    for meaning in formula.meanings.values():
        assert meaning.text in text
    assert f"../chapters/{next(c for c, f in CHAPTERS.items() if formula in f)}.md#{slug(formula.title)}" in (
        equation_text(formula.name, "../")
    )


def test_a_statement_over_several_lines_is_shown_as_one(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    arguments = "".join(f"        {name},\n" for name in "abcdefghijkl")
    code.write_text(f"if True:\n    x = (1 +\n        2)\n    y = f(\n{arguments}    )\n", encoding="utf-8")
    assert statement_at(code, 2) == "x = (1 +\n    2)"
    assert statement_at(code, 3) == "2)"
    assert statement_at(code, 4) == "y = f(...)"


def test_letters_are_told_by_what_they_count() -> None:
    legend = formula_text("attention_scores")
    assert "$c$ counts the $C$ numbers of a head" in legend
    assert "$t$ counts the $T$ places of the text" in legend
    assert "`blocks.N.attention.query`" in legend


def test_filling_replaces_what_stood_there_and_nothing_else() -> None:
    page = "a\n\n<!-- example: loss -->\nold\n<!-- end of example -->\n\nb <!-- formula: attention -->\n"
    filled = fill(page, {"example": announcement})
    assert announcement("loss") in filled
    assert "old" not in filled
    assert filled.startswith("a\n")
    assert filled.endswith("b <!-- formula: attention -->\n")
    assert fill(filled, {"example": announcement}) == filled
    with pytest.raises(KeyError):
        fill(page.replace("loss", "gain"), {"example": announcement})


def test_the_glossary_is_in_order_and_says_each_word_once() -> None:
    page = (PROJECT / "docs" / "glossary.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- \*\*(.+?)\*\*", page, re.MULTILINE)
    assert len(entries) > 90
    assert entries == sorted(entries, key=lambda entry: re.sub(r"[^a-z0-9 ]", "", entry.lower()))
    words = [word for entry in entries for word in entry.split(", ")]
    assert len(set(words)) == len(words)


def test_a_formula_that_was_changed_in_a_page_is_named_and_mended(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(PROJECT / "docs", docs)
    page = docs / "chapters" / "loss.md"
    fresh = page.read_text(encoding="utf-8")
    stale = fresh.replace("\\ell = -", "\\ell = ")
    assert stale != fresh
    page.write_text(stale, encoding="utf-8")
    command = [sys.executable, str(docs / "generate.py")]
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([*command, "--check"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "docs/chapters/loss.md is out of date" in done.stderr
    assert page.read_text(encoding="utf-8") == stale
    subprocess.run(command, env=environment, capture_output=True, check=True)
    assert page.read_text(encoding="utf-8") == fresh
