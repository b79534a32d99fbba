"""The examples' numbers: made of a run of seconds, checked while they are made."""

import math
import re
from pathlib import Path

import pytest
from places import outside_of_places
from worked_examples import EXAMPLES, example_run, fill_examples
from worked_examples.run import ExampleRun, table

from sheepop.models.pretrained import save_weights, stored_weights
from sheepop.utils.files import write_json

PROJECT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run() -> ExampleRun:
    return example_run()


def test_the_model_has_learned_something(run: ExampleRun) -> None:
    assert run.record.val[-1]["loss"] < 0.7 * math.log(run.config.model.vocab_size)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_fills_its_place_with_numbers(name: str, run: ExampleRun) -> None:
    page = f"before\n\n<!-- example: {name} -->\nwill stand here\n<!-- end of example -->\n\nafter\n"
    filled = fill_examples(page)
    assert "will stand here" not in filled
    assert re.search(r"^\|.*\|$|<img", filled, re.MULTILINE)
    assert filled.startswith("before\n")
    assert filled.endswith("after\n")
    assert "nan" not in re.sub(r"data:[^\"]*", "", filled)


def test_weights_of_another_run_would_be_found(run: ExampleRun) -> None:
    points = [f"blocks.{layer}.attention.weights" for layer in range(2)]
    wrong = run.trace.tensors | {point: run.trace[point].roll(1, dims=0) for point in points}
    broken = type(run)(**{**vars(run), "trace": type(run.trace)(run.model, run.trace.token_ids, wrong)})
    with pytest.raises(AssertionError):
        EXAMPLES["attention"][1](broken)


def test_the_page_of_formulas_can_be_laid_beside_a_model_of_ones_own(
    run: ExampleRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (PROJECT / "docs" / "mathematics.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```py\n(.*?)^```", outside_of_places(page), re.DOTALL | re.MULTILINE)
    checkpoint = tmp_path / "runs" / "mine"
    write_json(checkpoint / "config.json", run.config.model_dump())
    save_weights(stored_weights(run.model), run.config.model, checkpoint / "model.safetensors")
    run.tokenizer.save(checkpoint / "tokenizer.json")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "mathematics.md", "exec"), {})
    assert re.search(r"largest difference: \de-0[78]", capsys.readouterr().out)


def test_a_table_escapes_what_would_end_a_cell() -> None:
    assert table(("a|b", "c"), [(-1.23456, float("-inf"))]) == "| a\\|b | c |\n| --- | --- |\n| −1.235 | −∞ |"
