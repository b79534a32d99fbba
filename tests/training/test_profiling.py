import json
import re

import torch

from sheepop.models.pretrained import read_tensors
from sheepop.training import profiling
from sheepop.training.profiling import PARTS, TIMED_STEPS, TRACED_STEPS, WARM_UP_STEPS, begin_part, profile_steps

CPU = torch.device("cpu")


def weights_of(run, step):
    return read_tensors(run / f"checkpoint_step_{step}" / "model.safetensors")


def test_a_profile_changes_no_result_and_leaves_a_trace_and_a_table(tmp_path, train_in, capsys):
    steps = WARM_UP_STEPS + TRACED_STEPS + TIMED_STEPS + 2
    settings = {"training.max_steps": steps, "training.eval_interval": 4}
    plain = train_in(tmp_path / "plain", **settings)
    capsys.readouterr()
    run = train_in(tmp_path / "profiled", profile=True, **settings)
    said = capsys.readouterr().err

    before, after = weights_of(plain, steps), weights_of(run, steps)
    assert all(after[name].equal(tensor) for name, tensor in before.items())

    trace = json.loads((run / "profile" / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    for part in PARTS:
        assert f"step: {part}" in names
    # One forward for each micro-batch of each traced step, on the thread that trains.
    marked = {event["ts"] for event in trace["traceEvents"] if event.get("name") == "step: forward"}
    assert TRACED_STEPS <= len(marked) <= 2 * TRACED_STEPS

    table = (run / "profile" / "table.txt").read_text()
    assert table in said
    assert f"({TIMED_STEPS} steps, without the tracer)" in table
    shares = {
        part: float(share) for part, share in re.findall(r"^(\w[\w ]*?) +[\d.]+ +([\d.]+)%$", table, re.MULTILINE)
    }
    assert shares.pop("the step") == 100.0
    assert shares.keys() == set(PARTS[:-1])
    assert abs(sum(shares.values()) - 100) < 0.5
    assert "aten::" in table
    assert "topk" not in table  # only validation looks for the best five


def test_a_run_without_a_profile_leaves_none(tmp_path, train_in):
    run = train_in(tmp_path / "run", **{"training.max_steps": 2})
    assert not (run / "profile").exists()


def test_a_run_that_is_too_short_says_so(tmp_path, train_in, capsys):
    run = train_in(tmp_path / "run", profile=True, **{"training.max_steps": 2})
    assert "warning: nothing was profiled" in capsys.readouterr().err
    assert not (run / "profile").exists()


def test_steps_that_end_while_they_are_traced_are_written(tmp_path, train_in):
    run = train_in(tmp_path / "run", profile=True, **{"training.max_steps": WARM_UP_STEPS + 1})
    assert "part of a step" not in (run / "profile" / "table.txt").read_text()
    assert json.loads((run / "profile" / "trace.json").read_text())["traceEvents"]


def test_parts_are_timed_whole_and_without_gaps(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now)
    kept = []
    monkeypatch.setattr(profiling, "write_profile", lambda folder, profile: kept.append(profile))
    monkeypatch.setattr(profiling, "TRACED_STEPS", 1)
    with profile_steps(tmp_path, CPU):
        for _ in range(WARM_UP_STEPS + 1 + TIMED_STEPS + 4):
            for seconds, part in enumerate(PARTS, start=1):
                begin_part(part)
                now += seconds
        begin_part("load")
    (profile,) = kept
    assert profile.timed_steps == TIMED_STEPS
    assert {part: seconds / TIMED_STEPS for part, seconds in profile.seconds.items()} == {
        part: seconds for seconds, part in enumerate(PARTS, start=1)
    }
    begin_part("load")  # nobody listens any more
    assert profile.timed_steps == TIMED_STEPS
