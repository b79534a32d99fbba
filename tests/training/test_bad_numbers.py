"""Numbers that are not finite, and losses that jump: what the run does, on one process and on two."""

import json
import math
from functools import partial

import pytest
import torch
from copies import Break
from safetensors.torch import load_file

from sheepop.training.checkpoint import find_resume, read_state
from sheepop.utils.devices import Precision
from sheepop.utils.errors import NonFiniteError

SETTINGS = {"training.max_steps": 12, "training.save_interval": 1, "training.keep_last": 20, "model.dropout": 0.1}
TENSORS = ("model.safetensors", "training_state/optimizer.safetensors")


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def assert_same_tensors(one, other):
    for name in TENSORS:
        expected, found = load_file(one / name), load_file(other / name)
        assert all(tensor.equal(found[key]) for key, tensor in expected.items()), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_is_left_out_and_changes_nothing(tmp_path, train_in, spoil, bad, capsys):
    spoil({2 * 4 + 1: bad})  # two micro-batches a step: the fifth
    run = train_in(tmp_path / "run", **SETTINGS, **{"training.on_bad_numbers": "skip"})
    assert_same_tensors(run / "checkpoint_step_4", run / "checkpoint_step_5")
    state = read_state(run / "checkpoint_step_12")
    assert (state.guard.skipped, state.guard.skipped_in_a_row) == (1, 0)
    assert len(state.guard.recent_losses) == 11
    assert read_lines(run / "events.jsonl") == [{"kind": "bad", "step": 5, "loss": None, "grad_norm": None}]
    line = read_lines(run / "metrics.jsonl")[4]
    assert (line["step"], line["loss"]) == (5, None)
    assert "at step 5 the loss was" in capsys.readouterr().err


def test_too_many_in_a_row_end_the_run_before_them(tmp_path, train_in, spoil):
    spoil(dict.fromkeys(range(9, 99), math.nan))
    settings = SETTINGS | {"training.on_bad_numbers": "skip", "training.max_skipped_steps": 3}
    with pytest.raises(NonFiniteError, match="4 in a row") as caught:
        train_in(tmp_path / "run", **settings)
    assert caught.value.exit_status == 5
    newest = find_resume(tmp_path / "run", "auto")
    assert read_state(newest).step == 7
    assert read_state(newest).guard.skipped_in_a_row == 3


@pytest.mark.parametrize("policy", ["report", "skip"])
def test_a_jump_of_the_loss_is_told_and_may_be_left_out(tmp_path, train_in, spoil, policy, capsys):
    settings = SETTINGS | {"training.max_steps": 42, "training.on_loss_spike": policy}
    spoil(dict.fromkeys((5 * 13 + 9, 5 * 13 + 10), 3.0))  # 13 micro-batches in the 7 steps of an epoch
    run = train_in(tmp_path / "run", **settings | {"training.keep_last": 50, "training.learning_rate": 1e-5})
    events = read_lines(run / "events.jsonl")
    assert [(event["kind"], event["step"]) for event in events] == [("spike", 40)]
    assert "the loss jumped to 16" in capsys.readouterr().err
    before, after = (load_file(run / f"checkpoint_step_{step}/model.safetensors") for step in (39, 40))
    assert all(tensor.equal(after[name]) for name, tensor in before.items()) == (policy == "skip")
    assert read_state(run / "checkpoint_step_41").guard.spikes == 1


def test_the_guard_goes_on_where_it_was(tmp_path, train_in, spoil):
    settings = SETTINGS | {"training.on_bad_numbers": "skip", "training.schedule": "constant"}
    spoil({9: math.nan})
    straight = train_in(tmp_path / "straight", **settings)
    spoil({9: math.nan})
    train_in(tmp_path / "run", **settings | {"training.max_steps": 6})
    spoil({})
    train_in(tmp_path / "run", resume="auto", **settings)
    for run in (straight, tmp_path / "run"):
        assert read_state(run / "checkpoint_step_12").guard.skipped == 1
    guards = [read_state(run / "checkpoint_step_12").guard for run in (straight, tmp_path / "run")]
    assert guards[0] == guards[1]
    assert_same_tensors(straight / "checkpoint_step_12", tmp_path / "run/checkpoint_step_12")


def test_fp16_overflows_shrink_the_scale_and_resume_is_exact(tmp_path, train_in, monkeypatch):
    fp16 = Precision("fp16", torch.float16, needs_loss_scaling=True)  # as on a GPU without bf16
    monkeypatch.setattr("sheepop.training.run.precision_of", lambda *_, **__: fp16)
    # A scale at which some steps overflow.
    monkeypatch.setattr("sheepop.training.loss_scale.LossScale.__init__.__defaults__", (2.0**22, 0))
    straight = train_in(tmp_path / "straight", **SETTINGS, **{"training.schedule": "constant"})
    state = read_state(straight / "checkpoint_step_12")
    assert state.loss_scale.value < 2.0**22
    assert state.guard.skipped == 0
    overflows = [event["step"] for event in read_lines(straight / "events.jsonl")]
    assert overflows[0] == 1
    assert overflows[-1] < 12
    first = overflows[-1] + 1
    train_in(tmp_path / "run", **SETTINGS | {"training.max_steps": first, "training.schedule": "constant"})
    train_in(tmp_path / "run", resume="auto", **SETTINGS, **{"training.schedule": "constant"})
    assert_same_tensors(straight / "checkpoint_step_12", tmp_path / "run/checkpoint_step_12")
    assert read_state(tmp_path / "run/checkpoint_step_12").loss_scale == state.loss_scale


@pytest.mark.slow
def test_a_bad_number_on_one_of_two_processes_changes_neither(tmp_path, train_in, run_program):
    in_the_fifth_step = Break("nan", "sheepop.training.step.micro_batch_loss", 5)  # each has one micro-batch a step
    alone = train_in(tmp_path / "alone", **SETTINGS)
    train_two = partial(run_program, "train", "--config", alone / "config.json", count=2)
    whole = tmp_path / "whole"
    assert train_two("--output", whole).returncode == 0
    run = tmp_path / "run"
    done = train_two("--output", run, breaks=in_the_fifth_step)
    assert done.returncode != 0
    assert done.written()[1].count("error: At step 5 the loss was") == 2  # both say it
    assert_same_tensors(whole / "checkpoint_step_4", find_resume(run, "auto"))
    skipped = tmp_path / "skipped"
    done = train_two("--output", skipped, "--training.on_bad_numbers", "skip", breaks=in_the_fifth_step)
    assert done.returncode == 0, done.written()[1]
    assert_same_tensors(whole / "checkpoint_step_4", skipped / "checkpoint_step_5")
    # And the run that stopped goes on as if nothing had been.
    assert train_two("--output", run, "--resume", "auto").returncode == 0
    assert_same_tensors(whole / "checkpoint_step_12", run / "checkpoint_step_12")
