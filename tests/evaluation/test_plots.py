import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.evaluation.plots import DARK, RunRecord, read_metrics, read_run, render, series, smooth, write_plots
from sheepop.utils.errors import CheckpointError

PNG = b"\x89PNG\r\n\x1a\n"


def train_line(step: int, **changes: object) -> dict[str, Any]:
    return {
        "type": "train",
        "step": step,
        "epoch": step / 70,
        "tokens": step * 96,
        "loss": 3 + 6 * math.exp(-step / 20),
        "elapsed_seconds": step / 5,
        "learning_rate": 1e-3 * min(1, step / 10),
        "grad_norm": 1.5,
        "tokens_per_second": 480.0,
        "mfu": 0.2,
    } | changes


def val_line(step: int, **changes: object) -> dict[str, Any]:
    loss = 3.2 + 6 * math.exp(-step / 20)
    return {
        "type": "val",
        "step": step,
        "epoch": step / 70,
        "tokens": step * 96,
        "loss": loss,
        "elapsed_seconds": step / 5,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / 3,
        "accuracy": 0.4,
    } | changes


def write_lines(run: Path, lines: list[dict[str, Any]], ending: str = "") -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + ending, encoding="utf-8")
    return run


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [train_line(10)],
        [val_line(10)],
        [train_line(10), train_line(20), val_line(20)],
        [train_line(0, grad_norm=0.0, learning_rate=0.0, mfu=None, tokens_per_second=None), val_line(0)],
        [train_line(10, loss=None, grad_norm=None), val_line(10, loss=None, perplexity=None)],
        [train_line(10, loss=9000.0), val_line(10, loss=9000.0, perplexity=None)],
        [*map(train_line, range(200)), *map(val_line, range(0, 200, 40))],
    ],
    ids=["nothing", "one training", "one validation", "few", "step 0", "no numbers", "diverged", "many"],
)
def test_every_run_has_five_pictures(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    run = write_lines(tmp_path / "run", lines)
    paths = write_plots(run)
    names = ["loss", "perplexity", "learning_rate", "grad_norm", "throughput"]
    assert paths == [run / "plots" / f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(PNG) for path in paths)


def test_the_vocabulary_comes_from_the_runs_settings(tmp_path: Path) -> None:
    run = write_lines(tmp_path / "run", [train_line(10), train_line(20)])
    assert read_run(run).vocab_size is None
    (run / "config.json").write_text('{"model": {"vocab_size": 65}}')
    assert read_run(run).vocab_size == 65


def test_blind_guessing_and_the_theme_show_in_the_picture() -> None:
    lines = [train_line(10), train_line(20)]
    plain = render("loss", RunRecord(lines, [], None), DARK)
    assert render("loss", RunRecord(lines, [], 65), DARK) != plain
    assert render("loss", RunRecord(lines, [], None), DARK) == plain


def test_drawing_leaves_matplotlibs_global_state_alone(tmp_path: Path) -> None:
    from matplotlib import _pylab_helpers

    write_plots(write_lines(tmp_path / "run", [train_line(10)]))
    assert not _pylab_helpers.Gcf.figs


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    run = write_lines(tmp_path / "run", [train_line(10), val_line(10)], ending='{"type": "train", "st')
    assert read_metrics(run / "metrics.jsonl") == [train_line(10), val_line(10)]


@pytest.mark.parametrize("damaged", ['{"type"\n', "7\n", "\n"])
def test_a_damaged_line_before_the_last_is_named(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(train_line(1))}\n{damaged}{json.dumps(train_line(2))}\n")
    with pytest.raises(CheckpointError, match=r"Line 2 of .*metrics\.jsonl is damaged"):
        read_metrics(path)


@pytest.mark.parametrize("name", ["empty", "nowhere"])
def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        write_plots(tmp_path / name)
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_series_takes_what_is_a_number() -> None:
    steps, values = series(
        [{"step": 1, "loss": 2}, {"step": 2, "loss": None}, {"step": 3}, {"step": 4, "loss": 1.5}], "loss"
    )
    assert steps.tolist() == [1, 4]
    assert values.tolist() == [2, 1.5]


@settings(deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3), max_size=300))
def test_a_smooth_curve_stays_within_its_values_and_begins_with_the_first(values: list[float]) -> None:
    curve = smooth(np.array(values, dtype=np.float64))
    assert len(curve) == len(values)
    if values:
        assert curve[0] == pytest.approx(values[0])
        assert min(values) - 1e-6 <= curve.min() <= curve.max() <= max(values) + 1e-6


def test_a_smooth_curve_removes_noise_and_keeps_a_slope() -> None:
    slope = np.linspace(5, 2, 500)
    noise = np.random.default_rng(0).normal(0, 0.2, 500)
    middle = slice(0, 480)
    assert np.abs(smooth(slope) - slope)[middle].max() < 1e-6
    assert np.abs(smooth(slope + noise) - slope)[20:480].max() < 0.2
