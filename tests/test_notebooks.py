"""The notebooks run as plain Python, and are notebooks: cells of text and code in percent format."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sheepop.data.corpora import INSTALLED
from sheepop.learn.lessons import held_out_loss, show, some_text, train_small_model

PROJECT = Path(__file__).parents[1]
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.py"))
PICTURES = {
    "01_attention_from_scratch": {"attention"},
    "02_train_in_a_minute": {"loss"},
    "03_tokenizer": {"tokenizers"},
    "04_sampling": {"temperature", "kept"},
    "05_inside_the_model": {"attention_maps", "stream", "lens"},
}
CELL = re.compile(r"^# %%(?P<kind>.*)\n(?P<body>(?:(?!# %%).*\n)*)", re.MULTILINE)


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={name: value for name, value in os.environ.items() if name != "DISPLAY"} | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def test_all_notebooks_are_known() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(PICTURES)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_as_a_script_and_its_claims_hold(notebook: Path, tmp_path: Path) -> None:
    done = run(notebook, str(tmp_path / "figures"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    written = {path.stem for path in (tmp_path / "figures").iterdir() if path.read_bytes().startswith(b"\x89PNG")}
    assert written == PICTURES[notebook.stem]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_cells_of_text_and_of_code_that_asserts(notebook: Path) -> None:
    source = notebook.read_text(encoding="utf-8")
    cells = [(cell["kind"].strip(), cell["body"]) for cell in CELL.finditer(source)]
    assert "".join(f"# %%{' ' + kind if kind else ''}\n{body}" for kind, body in cells) == source
    assert cells[0][0] == "[markdown]"
    assert cells[0][1].startswith("# # ")
    for kind, body in cells:
        assert kind in ("", "[markdown]")
        if kind:
            assert all(line == "" or line == "#" or line.startswith("# ") for line in body.splitlines()), body
        else:
            compile(body, notebook.name, "exec")
    text = "".join(body for kind, body in cells if kind)
    assert "**For children.**" in text
    assert "**For scientists.**" in text
    assert sum(body.count("assert") for kind, body in cells if not kind) >= 10


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_in_jupyter(notebook: Path) -> None:
    jupytext = pytest.importorskip("jupytext", reason="needs jupytext")
    cells = jupytext.read(notebook).cells
    assert {cell.cell_type for cell in cells} == {"markdown", "code"}
    assert cells[0].source.startswith("# ")
    assert not any(line.startswith("# %%") for cell in cells for line in cell.source.splitlines())


@pytest.mark.slow
def test_the_tour_runs_and_ends_inside_the_model() -> None:
    done = run(PROJECT / "example.py")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.findall(r"^=== (\d)\. ", done.stdout, re.MULTILINE) == list("12345")
    losses = [float(loss) for loss in re.findall(r"held-out text (\d+\.\d+)", done.stdout)]
    assert len(losses) >= 3
    assert losses[-1] < losses[0] - 1


TALE = "the sheep sees the hill and the hill sees the sheep. " * 60


def test_a_small_model_learns_and_is_the_same_each_time() -> None:
    first, again = (train_small_model(TALE, steps=12, vocab_size=270, context=8, batch_size=4) for _ in range(2))
    assert len(first.losses) == 12
    assert first.losses[-1] < first.losses[0] - 1
    assert first.losses == again.losses
    assert len(first.train_tokens) > 10 * len(first.val_tokens) > 0
    assert first.tokenizer.decode(np.concatenate((first.train_tokens, first.val_tokens)).tolist()) == TALE
    assert held_out_loss(first.model, first.val_tokens) < first.losses[0] - 1
    assert first.model.training


def test_the_held_out_loss_is_that_of_each_token_once() -> None:
    small = train_small_model(TALE, steps=2, vocab_size=270, context=8, batch_size=4)
    tokens = small.val_tokens[:11]  # a window of eight targets, and one of two
    with torch.no_grad():
        parts = [small.model(torch.from_numpy(tokens[a:b].astype(int))[None])[0] for a, b in ((0, 8), (8, 10))]
    expected = -torch.cat(parts).log_softmax(-1)[torch.arange(10), torch.from_numpy(tokens[1:].astype(int))].mean()
    assert held_out_loss(small.model, tokens) == pytest.approx(expected.item(), rel=1e-5)


def test_without_the_plays_there_is_still_a_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(INSTALLED, "plays")
    name, text = some_text(5000)
    assert "Python" in name
    assert len(text) == 5000


def test_a_picture_is_written_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from matplotlib.figure import Figure

    from sheepop.learn import lessons

    lessons.figure_folder.cache_clear()
    monkeypatch.setattr(sys, "argv", ["notebook", str(tmp_path / "pictures")])
    show(Figure(), "empty")
    lessons.figure_folder.cache_clear()
    assert (tmp_path / "pictures" / "empty.png").read_bytes().startswith(b"\x89PNG")
    assert "empty.png" in capsys.readouterr().out
