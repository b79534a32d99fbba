import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.evaluation.plots import METRICS_FILE
from sheepop.evaluation.report import SAMPLES_FILE
from sheepop.training.metrics import RunLog, keep_lines_until


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_numbers_that_json_lacks_become_null(tmp_path):
    run_log = RunLog(tmp_path, step=0)
    run_log.metrics(type="train", step=1, loss=math.nan, grad_norm=math.inf, tokens=8)
    run_log.metrics(type="val", step=1, loss=2.5, perplexity=-math.inf)
    assert read_lines(tmp_path / METRICS_FILE) == [
        {"type": "train", "step": 1, "loss": None, "grad_norm": None, "tokens": 8},
        {"type": "val", "step": 1, "loss": 2.5, "perplexity": None},
    ]


def test_a_resumed_log_continues_without_doubles(tmp_path):
    run_log = RunLog(tmp_path, step=0)
    for step in range(1, 6):
        run_log.metrics(type="train", step=step, loss=float(step))
        run_log.sample(step=step, prompt="", text=f"Mäh {step}\n")
    resumed = RunLog(tmp_path, step=3)
    resumed.metrics(type="train", step=4, loss=40.0)
    assert [line["loss"] for line in read_lines(tmp_path / METRICS_FILE)] == [1.0, 2.0, 3.0, 40.0]
    assert [line["text"] for line in read_lines(tmp_path / SAMPLES_FILE)] == ["Mäh 1\n", "Mäh 2\n", "Mäh 3\n"]


@settings(deadline=None, max_examples=60)
@given(steps=st.lists(st.integers(1, 9), max_size=8).map(sorted), until=st.integers(0, 9), cut=st.integers(0, 400))
def test_what_is_kept_of_a_record_that_a_kill_cut_anywhere(tmp_path_factory, steps, until, cut):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    lines = [json.dumps({"step": step, "text": "ä\u2028b"}, ensure_ascii=False) + "\n" for step in steps]
    written = "".join(lines).encode()[:cut]
    path.write_bytes(written)
    whole = written.count(b"\n")
    keep_lines_until(path, until)
    assert path.read_text(encoding="utf-8") == "".join(
        line for step, line in zip(steps[:whole], lines[:whole], strict=True) if step <= until
    )


def test_without_a_record_there_is_nothing_to_cut(tmp_path):
    keep_lines_until(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_a_line_an_interval_where_nobody_watches(tmp_path, capsys):
    run_log = RunLog(tmp_path, step=0)
    run_log.progress(step=3, total_steps=8, loss=1.25, learning_rate=2e-3, tokens_per_second=1234.0, left=65.0)
    run_log.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "step 3/8  loss 1.2500  lr 2.00e-03  1.23K tokens/s  1m05s left\n"


def test_progress_is_a_bar_on_a_terminal_and_other_lines_do_not_break_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    run_log = RunLog(tmp_path, step=0)
    for step in (2, 4):
        run_log.progress(step=step, total_steps=8, loss=1.0, learning_rate=1e-3, tokens_per_second=10.0, left=1.0)
    run_log.say("hello")
    run_log.close()
    bar, hello, _ = capsys.readouterr().err.split("\n")
    assert bar.count("\r") == 2
    assert "#####....." in bar
    assert hello == "hello"


def test_tensorboard_gets_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_log = RunLog(tmp_path, step=0, tensorboard=True)
    run_log.metrics(type="train", step=3, loss=1.5, elapsed_seconds=2.0)
    run_log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 1.5)]
