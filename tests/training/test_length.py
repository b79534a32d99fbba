import copy
import itertools
import json
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sheepop.config import TrainingConfig
from sheepop.data.corpus import open_corpus
from sheepop.training.batches import batch_loader
from sheepop.training.checkpoint import find_resume, read_state
from sheepop.training.distributed import World
from sheepop.training.length import (
    measure_seconds_per_step,
    measure_step,
    steps_in_seconds,
    total_steps_without_clock,
)
from sheepop.training.run import set_up, start_run
from sheepop.utils.errors import ConfigError, Interrupted


def test_steps_epochs_or_a_clock():
    assert total_steps_without_clock(TrainingConfig(max_steps=17), 5) == 17
    assert total_steps_without_clock(TrainingConfig(max_epochs=3), 5) == 15
    assert total_steps_without_clock(TrainingConfig(max_minutes=2.0), 5) is None


def steps_in(seconds, **parts):
    usual = {"seconds_per_step": 0.5, "seconds_per_pause": 2.0, "eval_interval": 4, "steps_per_epoch": 1}
    return steps_in_seconds(seconds, **(usual | parts))


def test_validations_are_paid_for_out_of_the_budget():
    # 60 s; a step 0.5 s; a validation 2 s every 4 steps makes a step 1 s, and one more at the end.
    assert steps_in(60) == 58
    # Ten validations of 2 s leave 40 s; half of the run has five of them.
    assert steps_in(60, eval_interval=None) == 80
    assert steps_in(60, eval_interval=None, share_left=0.5) == 100
    # Epochs of 10 steps are pauses too; shorter ones than the interval are not.
    assert steps_in(60, steps_per_epoch=10) == int(58 / 1.2)
    assert steps_in(60, steps_per_epoch=3) == 58


@settings(deadline=None)
@given(
    seconds=st.floats(-1, 1e5),
    seconds_per_step=st.floats(1e-4, 1e4),
    seconds_per_pause=st.floats(0, 1e4),
    eval_interval=st.none() | st.integers(1, 1000),
    steps_per_epoch=st.integers(1, 1000),
    share_left=st.floats(0, 1),
)
def test_the_budget_is_kept(seconds, seconds_per_step, seconds_per_pause, eval_interval, steps_per_epoch, share_left):
    steps = steps_in_seconds(
        seconds,
        seconds_per_step=seconds_per_step,
        seconds_per_pause=seconds_per_pause,
        eval_interval=eval_interval,
        steps_per_epoch=steps_per_epoch,
        share_left=share_left,
    )
    assert steps >= 0
    pauses = max(1, 10 * share_left) if eval_interval is None else 1 + steps // eval_interval
    if eval_interval is not None and steps_per_epoch >= eval_interval:
        pauses += steps // steps_per_epoch
    assert steps == 0 or steps * seconds_per_step + pauses * seconds_per_pause <= seconds * (1 + 1e-9) + 1e-9


def test_measuring_changes_nothing(tiny_config, corpus_folder):
    config = tiny_config(**{"training.max_steps": 9})
    run = set_up(config, open_corpus(corpus_folder), device=torch.device("cpu"), world=World())
    before = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict(), run.state))
    assert measure_step(run, batch_loader(run), seconds=0.0) > 0
    after = (run.model.state_dict(), run.optimizer.state_dict(), run.state)
    assert before[1:] == after[1:]
    assert all(tensor.equal(before[0][name]) for name, tensor in after[0].items())


def test_neither_the_first_step_nor_a_disturbance_counts(monkeypatch):
    now = 0.0
    monkeypatch.setattr("sheepop.training.length.time", SimpleNamespace(perf_counter=lambda: now))

    def run_step(step):
        nonlocal now
        now += {0: 100.0, 2: 30.0}.get(step, 2.0 + step / 100)

    measured = measure_seconds_per_step(run_step, device=torch.device("cpu"), first_step=0, seconds=200.0)
    assert 2.0 < measured < 3.0


class Machine:
    """A clock that only steps, validations and checkpoints move."""

    def __init__(self, monkeypatch, *, seconds_of_step, pause=2.0, saving=0.25):
        self.now, self.steps = 100.0, 0
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        for module in ("trainer", "length", "run"):
            monkeypatch.setattr(f"sheepop.training.{module}.time", clock)
        monkeypatch.setattr("sheepop.training.length.time_checkpoint", lambda run: saving)
        monkeypatch.setattr("sheepop.training.length.measure_step", lambda *_, **__: seconds_of_step(0))
        for module in ("trainer", "length"):
            self.slow_down(monkeypatch, f"sheepop.training.{module}.validate", pause)
        self.slow_down(monkeypatch, "sheepop.training.saver.Saver.save", saving)
        whole = pkgutil.resolve_name("sheepop.training.trainer.train_step")

        def train_step(*arguments, step, **options):
            self.steps += 1
            if "refusals" not in options:  # else time goes by until the numbers are there
                self.now += seconds_of_step(step)
            return whole(*arguments, step=step, **options)

        def result_of(*arguments, **options):
            self.now += seconds_of_step(self.steps - 1)
            return result(*arguments, **options)

        result = pkgutil.resolve_name("sheepop.training.trainer.result_of")
        monkeypatch.setattr("sheepop.training.trainer.train_step", train_step)
        monkeypatch.setattr("sheepop.training.trainer.result_of", result_of)

    def slow_down(self, monkeypatch, name, seconds):
        whole = pkgutil.resolve_name(name)

        def slowly(*arguments, **options):
            self.now += seconds
            return whole(*arguments, **options)

        monkeypatch.setattr(name, slowly)


def slower_by(factor, *, since):
    return lambda step: 1.0 if step < since else factor


BUDGET = {
    "preset": "modern",
    "training.compile": "off",
    "training.max_minutes": 4.0,
    "training.eval_interval": None,
    "training.sample_tokens": 0,
}


@pytest.mark.parametrize(
    ("factor", "since", "reads_late"),  # late as on a GPU
    [
        (1.0, 0, False),
        (3.0, 1, True),
        (0.4, 1, False),
        (3.0, 40, False),
        (0.4, 40, True),
        (2.5, 150, False),
        (6.0, 175, True),
        (6.0, 175, False),
        (0.1, 150, False),
    ],
)
def test_a_run_ends_on_time_on_a_machine_whose_speed_changes(
    tmp_path, train_in, monkeypatch, capsys, factor, since, reads_late
):
    monkeypatch.setattr("sheepop.training.trainer.reads_late", lambda run: reads_late)
    machine = Machine(monkeypatch, seconds_of_step=slower_by(factor, since=since))
    run = train_in(tmp_path / "run", **BUDGET)
    assert machine.now - 100.0 == pytest.approx(240, rel=0.04)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines[-2:]] == ["train", "val"]
    rates = [line["learning_rate"] for line in lines if line["type"] == "train"]
    assert rates[-1] == pytest.approx(3e-4)  # fully decayed
    falling = [before - after for before, after in itertools.pairwise(rates[4:])]
    assert all(fall > 0 for fall in falling)  # and never jumped: no step fell by more than the last few could
    assert max(falling) < 0.3e-3
    assert 8 <= sum(line["type"] == "val" for line in lines) <= 16  # ten, and the ends of long epochs
    assert ("the rest of the schedule is spread" in capsys.readouterr().err) == (factor != 1.0)


def test_the_steps_decided_on_the_way_are_part_of_the_state(tmp_path, train_in, monkeypatch, signal_at):
    def run_in(folder, stop_at=None, **options):
        with pytest.MonkeyPatch.context() as patch:
            machine = Machine(patch, seconds_of_step=slower_by(2.0, since=30))
            if stop_at is None:
                return train_in(folder, **options, **BUDGET), machine
            signal_at(stop_at)
            with pytest.raises(Interrupted):
                train_in(folder, **BUDGET)
            signal_at.undo()
            return folder, machine

    straight, _ = run_in(tmp_path / "straight")
    run_in(tmp_path / "run", stop_at=70)
    interrupted, machine = run_in(tmp_path / "run", resume="auto")
    last = [find_resume(run, "auto") for run in (straight, interrupted)]
    assert last[0].name == last[1].name
    for name in ("model.safetensors", "training_state/optimizer.safetensors"):
        one, other = (load_file(checkpoint / name) for checkpoint in last)
        assert all(tensor.equal(other[key]) for key, tensor in one.items())
    assert (straight / "events.jsonl").read_bytes() == (interrupted / "events.jsonl").read_bytes()
    states = [read_state(checkpoint) for checkpoint in last]
    assert states[0].anchor == states[1].anchor is not None
    assert machine.steps == states[1].step - 69  # the budget was not taken anew


def test_a_resumed_run_takes_what_is_left_of_its_budget(tmp_path, train_in, signal_at):
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, seconds_of_step=lambda step: 1.0)
        signal_at(70)
        with pytest.raises(Interrupted):
            train_in(tmp_path / "run", **BUDGET)
        signal_at.undo()
        used = machine.now - 100.0
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(patch, seconds_of_step=lambda step: 1.0)
        began = machine.now
        machine.now += 40.0  # the machine takes long to start this time
        overrides = {"training.save_dir": str(tmp_path / "run")}
        start_run(None, preset=None, overrides=overrides, resume="auto", began=began)
    assert used + machine.now - began == pytest.approx(240, rel=0.04)


def test_a_budget_without_room_for_a_step_is_an_error(tmp_path, train_in, monkeypatch):
    Machine(monkeypatch, seconds_of_step=lambda step: 9.0, pause=3.0)
    with pytest.raises(ConfigError, match=r"0\.2 minutes are too short.*a step takes 9 s.*3\.2 s.*--minutes 0\.3"):
        train_in(tmp_path / "run", **(BUDGET | {"training.max_minutes": 0.2}))


def test_many_passes_over_a_small_text_are_not_many_checkpoints(tmp_path, train_in, monkeypatch):
    Machine(monkeypatch, seconds_of_step=lambda step: 1.0)
    run = train_in(tmp_path / "run", **(BUDGET | {"training.batch_size": 19, "training.keep_last": 2}))
    assert read_state(find_resume(run, "auto")).step > 150  # an epoch has one step
    assert len(list(run.glob("checkpoint_*"))) <= 11
