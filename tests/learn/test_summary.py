from dataclasses import replace
from pathlib import Path

from sheepop.learn.formulas import FORMULAS
from sheepop.learn.summary import first_sentences, inline, summary_rows

PROJECT = Path(__file__).parents[2]


def test_each_formula_has_a_row_whose_link_leads_to_its_code() -> None:
    rows = list(summary_rows())
    assert [row[0] for row in rows] == [formula.title for formula in FORMULAS.values()]
    for (_, kids, formula, where), registered in zip(rows, FORMULAS.values(), strict=True):
        assert formula.startswith("$`")
        assert formula.endswith("`$")
        path = PROJECT / where.partition("](")[2].rstrip(")")
        assert path.is_file()
        assert registered.code.rpartition(":")[2].rpartition(".")[2] in path.read_text(encoding="utf-8")
        assert registered.kids.startswith(kids)
        assert "\n" not in kids


def test_only_what_is_given_is_told() -> None:
    formula = replace(next(iter(FORMULAS.values())), title="Alone")
    assert [row[0] for row in summary_rows([formula])] == ["Alone"]


def test_a_formula_is_fit_for_a_cell_of_a_table_on_github() -> None:
    assert inline(r"\mathrm{erf}\left|x\right| + \|y\|" + "\n z") == (
        r"$`\mathrm{erf}\left\vert x\right\vert  + \Vert y\Vert z`$".replace("  ", " ")
    )


def test_a_short_first_sentence_takes_the_next_along() -> None:
    long = "This sentence is long enough to stand for itself in the table, is it not?"
    assert first_sentences(f"{long} Yes.") == long
    assert first_sentences(f"Short! {long} Yes.") == f"Short! {long}"
    assert first_sentences("All there is.") == "All there is."
