import copy
import json
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import TrainingConfig
from sheepop.data.corpus import open_corpus
from sheepop.training.batches import batch_loader
from sheepop.training.checkpoint import read_state
from sheepop.training.distributed import World
from sheepop.training.length import (
    measure_seconds_per_step,
    measure_step,
    steps_in_minutes,
    total_steps_without_clock,
)
from sheepop.training.run import set_up


def test_steps_epochs_or_a_clock():
    assert total_steps_without_clock(TrainingConfig(max_steps=17), 5) == 17
    assert total_steps_without_clock(TrainingConfig(max_epochs=3), 5) == 15
    assert total_steps_without_clock(TrainingConfig(max_minutes=2.0), 5) is None


def test_validations_are_paid_for_out_of_the_budget():
    # 60 s; a step 0.5 s; a validation 2 s every 4 steps makes a step 1 s.
    assert steps_in_minutes(1, seconds_per_step=0.5, seconds_per_validation=2, eval_interval=4) == 60
    # Ten validations of 2 s leave 40 s.
    assert steps_in_minutes(1, seconds_per_step=0.5, seconds_per_validation=2, eval_interval=None) == 80


@settings(deadline=None)
@given(
    minutes=st.floats(-1, 1e3),
    seconds_per_step=st.floats(1e-4, 1e4),
    seconds_per_validation=st.floats(0, 1e4),
    eval_interval=st.none() | st.integers(1, 1000),
)
def test_there_is_at_least_one_step_and_the_budget_is_kept(
    minutes, seconds_per_step, seconds_per_validation, eval_interval
):
    steps = steps_in_minutes(
        minutes,
        seconds_per_step=seconds_per_step,
        seconds_per_validation=seconds_per_validation,
        eval_interval=eval_interval,
    )
    assert steps >= 1
    validations = 10 if eval_interval is None else steps / eval_interval
    assert steps == 1 or steps * seconds_per_step + validations * seconds_per_validation <= 60 * minutes * (1 + 1e-9)


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


def test_a_time_budget_becomes_a_number_of_steps_that_is_kept(tmp_path, train_in, monkeypatch):
    # A long step keeps the run short without a look at the clock.
    monkeypatch.setattr("sheepop.training.length.measure_seconds_per_step", lambda *_, **__: 60.0)
    monkeypatch.setattr("sheepop.training.length.steps_in_minutes", lambda minutes, **_: round(minutes))
    run = train_in(tmp_path / "run", **{"training.max_minutes": 5.0})
    assert read_state(run / "checkpoint_step_5").total_steps == 5
    assert json.loads((run / "latest.json").read_text())["step"] == 5
