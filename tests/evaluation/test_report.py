import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sheepop.config import load_config
from sheepop.evaluation.report import evenly_spread, headline, next_commands, resolved_settings, write_report
from sheepop.utils.errors import CheckpointError
from sheepop.utils.files import write_json

TRAIN = [
    {
        "type": "train",
        "step": step,
        "epoch": step / 70,
        "tokens": step * 96,
        "loss": 9.0 - step / 20,
        "elapsed_seconds": step * 1.5,
        "learning_rate": 1e-3,
        "grad_norm": 1.1,
        "tokens_per_second": 480.0,
        "mfu": None,
    }
    for step in range(10, 101, 10)
]
VAL = [
    {
        "type": "val",
        "step": step,
        "epoch": step / 70,
        "tokens": step * 96,
        "loss": loss,
        "elapsed_seconds": step * 1.5,
        "perplexity": math.exp(loss),
        "bits_per_byte": 1.25,
        "accuracy": 0.375,
    }
    for step, loss in ((50, 4.5), (100, 4.75))
]


class Page(HTMLParser):
    """What a page loads, its elements and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def make_run(parent: Path) -> Path:
    folder = parent / "my <run>"
    folder.mkdir()
    lines = [*TRAIN, *VAL]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = load_config(None, overrides={"model.vocab_size": 65, "data.path": "corpus", "training.max_steps": 100})
    write_json(folder / "config.json", config.model_dump())
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run with many samples, the first of them hostile."""
    run = make_run(tmp_path_factory.mktemp("runs"))
    hostile = {"step": 7, "prompt": "<b>bold</b>", "text": "{{ 1 + 1 }} & <script>alert(1)</script>\nnext"}
    samples = [hostile, *({"step": step, "prompt": "", "text": f"text of step {step}."} for step in range(10, 29))]
    (run / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples), encoding="utf-8")
    path = write_report(run)
    assert path == run / "report.html"
    assert (run / "plots" / "loss.png").exists()
    return path.read_text(encoding="utf-8")


def test_the_page_stands_alone(html: str) -> None:
    page = Page(html)
    assert len(page.addresses) == 10  # five pictures, by day and by night
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(|<script", html)
    assert "default-src 'none'" in html
    assert 'name="viewport"' in html


def test_the_headline_is_the_best_validation(html: str) -> None:
    text = Page(html).text
    for shown in ("4.500", "at step 50", "90.02", "1.250", "37.5%", "9.60K", "2m30s", "480"):
        assert shown in text


def test_names_and_samples_are_shown_as_they_were_written(html: str) -> None:
    page = Page(html)
    assert "<b>bold</b>{{ 1 + 1 }} & <script>alert(1)</script>\nnext" in page.text
    assert "script" not in page.tags
    assert "my <run>" in page.text


def test_of_many_samples_some_are_shown_and_none_is_lost(html: str) -> None:
    text = Page(html).text
    assert "14 more samples" in text
    assert all(text.count(f"text of step {step}.") == 1 for step in range(10, 29))


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (11, [0, 3, 7, 10])])
def test_an_even_spread_has_the_first_and_the_last(count: int, expected: list[int]) -> None:
    assert evenly_spread(range(count), 4) == expected


def test_settings_are_listed_and_changed_ones_marked() -> None:
    config = load_config(None, overrides={"model.dropout": 0.25, "data.path": "a b", "training.tensorboard": True})
    table = {setting.name: setting for setting in resolved_settings(config)}
    assert table["model.dropout"].value == "0.25"
    assert table["training.tensorboard"].value == "true"
    assert table["training.max_steps"].value == "null"
    assert {name for name, setting in table.items() if not setting.is_default} == {
        "model.dropout",
        "data.path",
        "training.tensorboard",
    }


def test_commands_can_be_pasted_whatever_the_folder_is_called() -> None:
    config = load_config(None, overrides={"data.path": "my texts"})
    commands = [command for _, command in next_commands(Path("runs/it's mine"), config)]
    assert "sheepop chat --checkpoint 'runs/it'\"'\"'s mine'" in commands
    assert any("--data 'my texts'" in command and "--resume auto" in command for command in commands)


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert "What to do next" in write_report(tmp_path).read_text(encoding="utf-8")
    assert headline([], [], None) == []


def test_a_run_without_numbers_has_a_page(run: Path) -> None:
    bad = [{**TRAIN[0], "loss": None, "grad_norm": None}, {**VAL[0], "loss": None, "perplexity": None}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    assert "training time" in write_report(run).read_text(encoding="utf-8")


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_settings_that_cannot_be_read_are_said(run: Path) -> None:
    (run / "config.json").write_text('{"model": {"width": 3}}')
    with pytest.raises(CheckpointError, match=r"settings of the run .* cannot be used"):
        write_report(run)
    assert not (run / "report.html").exists()
