"""One run a folder: who may write to it, and where in it a run goes on."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from sheepop.evaluation.perplexity import Scores
from sheepop.training.checkpoint import find_resume, read_state
from sheepop.training.run_folder import hold_folder
from sheepop.training.verify import compare_runs
from sheepop.utils.errors import CheckpointError, ConfigError, Interrupted

SETTINGS = {"training.max_steps": 12, "training.save_interval": 2, "training.eval_interval": 5, "model.dropout": 0.1}


def assert_same(one, other):
    for row in compare_runs(one, other):
        assert row["equal"] == row["count"], row


class BrokenError(Exception):
    """What no one expects."""


@pytest.fixture
def break_in(monkeypatch):
    """Let a function raise at its `nth` call, or let another stand in for it."""

    def install(function, nth=1, error=BrokenError):
        calls = 0
        original = pytest.MonkeyPatch()
        module, _, name = function.rpartition(".")
        real = getattr(__import__(module, fromlist=[name]), name)

        def breaking(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == nth:
                raise error
            return real(*arguments, **options)

        original.setattr(function, breaking)
        return original

    return install


def test_two_processes_do_not_write_to_one_run(tmp_path, train_in):
    run = train_in(tmp_path / "run", **SETTINGS)
    before = (run / "metrics.jsonl").read_bytes()
    with hold_folder(run, resuming=True), pytest.raises(ConfigError, match="Another process is training"):
        train_in(run, resume="auto", **SETTINGS)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_kill_before_the_pointer_does_not_lose_the_best(tmp_path, train_in, break_in):
    straight = train_in(tmp_path / "straight", **SETTINGS)
    patch = break_in("sheepop.training.saver.mark_best", nth=2)
    with pytest.raises(BrokenError):
        train_in(tmp_path / "run", **SETTINGS)
    patch.undo()
    best = json.loads((tmp_path / "run/best.json").read_text())
    train_in(tmp_path / "run", resume="auto", **SETTINGS)
    assert best != json.loads((tmp_path / "run/best.json").read_text())
    assert_same(straight, tmp_path / "run")


def test_a_validation_that_is_done_twice_is_recorded_once(tmp_path, train_in, monkeypatch, break_in):
    straight = train_in(tmp_path / "straight", **SETTINGS)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("sheepop.training.trainer.agree_on_any", lambda *_: True)
        with pytest.raises(Interrupted, match="after step 5"):
            train_in(run, **SETTINGS)
    assert read_state(find_resume(run, "auto")).is_unfinished
    # It validates and samples at step 5, and breaks down before it saves.
    patch = break_in("sheepop.training.saver.take_snapshot")
    with pytest.raises(BrokenError):
        train_in(run, resume="auto", **SETTINGS)
    patch.undo()
    train_in(run, resume="auto", **SETTINGS)
    assert_same(straight, run)


def test_going_back_does_not_mix_two_runs(tmp_path, train_in):
    run = train_in(tmp_path / "run", **SETTINGS)
    before = {path.name for path in run.iterdir()}
    with pytest.raises(ConfigError, match="checkpoint_step_10, checkpoint_step_12"):
        train_in(run, resume=str(run / "checkpoint_step_8"), **SETTINGS)
    assert {path.name for path in run.iterdir()} == before
    branch = train_in(tmp_path / "branch", resume=str(run / "checkpoint_step_8"), **SETTINGS)
    assert read_state(branch / "checkpoint_step_12").step == 12
    assert {path.name for path in run.iterdir()} == before


def test_damaged_newer_checkpoints_step_aside(tmp_path, train_in, capsys):
    straight = train_in(tmp_path / "straight", **SETTINGS)
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    weights = run / "checkpoint_step_12/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    train_in(run, resume="auto", **SETTINGS)
    assert "skipped" in capsys.readouterr().err
    assert (run / "damaged_checkpoint_step_12").is_dir()
    assert_same(straight, run)


def test_a_run_cannot_become_shorter_than_it_is(tmp_path, train_in):
    settings = SETTINGS | {"training.schedule": "constant"}
    run = train_in(tmp_path / "run", **settings)
    with pytest.raises(ConfigError, match=r"to have 5 steps .* has made 12 already"):
        train_in(run, resume="auto", **settings | {"training.max_steps": 5})


def test_a_schedule_that_would_have_been_another_is_refused_or_accepted(tmp_path, train_in):
    run = train_in(tmp_path / "run", **SETTINGS)
    longer = SETTINGS | {"training.max_steps": 15}
    with pytest.raises(ConfigError, match="other learning rates"):
        train_in(run, resume="auto", **longer)
    train_in(run, resume="auto", accept_changes=True, **longer)
    assert (run / "checkpoint_step_15").is_dir()
    # With warm-up, stable, decay nothing behind us changes before the decay begins.
    wsd = SETTINGS | {"training.schedule": "wsd", "training.decay_fraction": 0.25, "training.keep_last": 9}
    short = train_in(tmp_path / "short", **wsd)
    long = wsd | {"training.max_steps": 20}
    straight = train_in(tmp_path / "straight", **long)
    train_in(tmp_path / "branch", resume=str(short / "checkpoint_step_8"), **long)
    weights, same = (load_file(run / "checkpoint_step_20/model.safetensors") for run in (straight, tmp_path / "branch"))
    assert all(tensor.equal(same[name]) for name, tensor in weights.items())
    with pytest.raises(ConfigError, match="other learning rates"):
        train_in(short, resume="auto", **long)


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path, train_in, monkeypatch):
    nothing = Scores(float("nan"), 0.0, 0.0, 9)
    monkeypatch.setattr("sheepop.training.validation.evaluate_tokens", lambda *_, **__: nothing)
    run = train_in(tmp_path / "run", **SETTINGS)
    assert not (run / "best.json").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["loss"] for line in lines if line["type"] == "val"} == {None}
    assert read_state(run / "checkpoint_step_12").best_loss is None


def test_a_sample_that_cannot_be_drawn_does_not_end_the_run(tmp_path, train_in, break_in, capsys):
    patch = break_in("sheepop.training.validation.complete", error=CheckpointError("not finite"))
    run = train_in(tmp_path / "run", **SETTINGS)
    patch.undo()
    assert "so there is no sample" in capsys.readouterr().err
    assert len((run / "samples.jsonl").read_text().splitlines()) == 2
