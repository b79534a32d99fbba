"""Steps whose numbers are read a step later, as on a GPU: the same run, and no question to the device on the way.

A CPU has its numbers at once, but the loop and the kernels are the same.
"""

import json
import math
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from copies import Break, always
from safetensors.torch import load_file

from sheepop.models.transformer import TransformerModel
from sheepop.training.checkpoint import find_resume, read_state
from sheepop.training.guard import Guard
from sheepop.training.late_steps import Refusals
from sheepop.training.optimizer import make_optimizer
from sheepop.training.step import MicroBatch, train_step
from sheepop.utils.errors import Interrupted, NonFiniteError

SETTINGS = {
    "training.max_steps": 20,
    "training.eval_interval": 6,
    "training.sample_interval": 9,
    "training.save_interval": 5,
    "training.keep_last": 20,
    "training.on_bad_numbers": "skip",
    "training.max_grad_norm": 0.7,  # some gradients are longer, some are not
    "model.dropout": 0.1,
    "model.d_model": 32,
    "model.num_heads": 4,
}
OPTIMIZERS = {
    "adamw": {},
    "muon": {"training.optimizer": "muon"},
    "muon with rows of equal size": {"training.optimizer": "muon", "training.muon_beta2": 0.95},
    "shared spelling": {"training.shared_spelling": True},
}
TENSORS = ("model.safetensors", "training_state/optimizer.safetensors")
CLOCKED = {"elapsed_seconds", "tokens_per_second", "mfu"}


LATE = {"sheepop.training.trainer.reads_late": always}


@pytest.fixture
def read_late(monkeypatch):
    """Let the loop be a step behind from now on."""
    return lambda: [monkeypatch.setattr(*patch) for patch in LATE.items()]


def read_lines(path):
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCKED} for line in lines]


def assert_same_run(one, other):
    names = [path.name for path in sorted(one.glob("checkpoint_*"))]
    assert names == [path.name for path in sorted(other.glob("checkpoint_*"))]
    for name in names:
        for part in TENSORS:
            expected, found = load_file(one / name / part), load_file(other / name / part)
            assert expected.keys() == found.keys()
            assert all(tensor.equal(found[key]) for key, tensor in expected.items()), (name, part)
        assert read_state(one / name).guard == read_state(other / name).guard
    for file in ("metrics.jsonl", "samples.jsonl", "events.jsonl"):
        assert (one / file).exists() == (other / file).exists()
        if (one / file).exists():
            assert read_lines(one / file) == read_lines(other / file)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_run_is_the_same_to_the_last_bit(tmp_path, train_in, spoil, read_late, optimizer):
    settings = SETTINGS | OPTIMIZERS[optimizer]
    bad = {3: math.nan, 15: math.inf, 22: math.nan, 24: math.nan}  # of 37; in the steps 2, 9 and then two in a row
    spoil(bad)
    train_in(tmp_path / "at-once", **settings)
    read_late()
    spoil(bad)
    train_in(tmp_path / "late", **settings)
    assert len(read_lines(tmp_path / "late/events.jsonl")) == 4
    assert_same_run(tmp_path / "at-once", tmp_path / "late")


@pytest.mark.parametrize(("first_bad", "allowed"), [(8, 1), (9, 3), (10, None)])
def test_no_step_is_made_after_one_that_ends_the_run(tmp_path, train_in, spoil, read_late, first_bad, allowed):
    policy = {"training.on_bad_numbers": "stop"} if allowed is None else {"training.max_skipped_steps": allowed}
    runs = [tmp_path / "at-once", tmp_path / "late"]
    for run in runs:
        if run == runs[1]:
            read_late()
        spoil(dict.fromkeys(range(first_bad, first_bad + 2 * (allowed or 0) + 1), math.nan))
        with pytest.raises(NonFiniteError):
            train_in(run, **SETTINGS | policy)
    assert_same_run(*runs)
    assert read_state(find_resume(runs[1], "auto")).guard.skipped_in_a_row == (allowed or 0)


@pytest.mark.parametrize("nth", [1, 7])
def test_a_signal_saves_what_was_made_and_the_run_goes_on_as_it_was(tmp_path, train_in, read_late, signal_at, nth):
    read_late()
    settings = SETTINGS | {"training.save_interval": 20}
    straight = train_in(tmp_path / "straight", **settings)
    signal_at(nth)
    with pytest.raises(Interrupted):
        train_in(tmp_path / "run", **settings)
    signal_at.undo()
    newest = find_resume(tmp_path / "run", "auto")
    assert read_state(newest).step == nth - 1
    train_in(tmp_path / "run", resume="auto", **settings)
    last = "checkpoint_step_20"
    for part in TENSORS:
        expected, found = (load_file(run / last / part) for run in (straight, tmp_path / "run"))
        assert all(tensor.equal(found[key]) for key, tensor in expected.items())
    assert read_lines(straight / "metrics.jsonl") == read_lines(tmp_path / "run/metrics.jsonl")


@pytest.mark.usefixtures("replaces_functions_of_pytorch")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"model.dropout": 0.1, "model.attention_dropout": 0.1, "model.conv_width": 4, "model.ngram_order": 2},
        {"model.sliding_window": 5, "model.attention_sinks": 1, "model.activation": "gelu"},
        {"model.copy_width": 8},
    ],
    ids=["plain", "dropout", "window", "copying"],
)
def test_a_step_asks_its_device_for_nothing(tiny_config, bare_run, monkeypatch, optimizer, model):
    """On the device `meta`, which has no numbers: whoever wants to know one fails there, and would wait on a GPU."""
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())  # neither knows this device
    monkeypatch.setattr("torch.is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr("sheepop.training.step.QueuedNumbers", lambda numbers: numbers)  # which Python asks for later
    settings = {"model.d_model": 32, "model.num_heads": 4, "training.max_grad_norm": 0.1} | model
    config, meta = tiny_config(**settings | OPTIMIZERS[optimizer]), torch.device("meta")
    network = TransformerModel(config.model).to(meta).train()
    spelling = (np.array([0, 1, 1]), np.array([0, 0, 1])) if config.training.shared_spelling else None
    parts = {"model": network, "forward": network, "optimizer": make_optimizer(network, config.training, spelling)}
    run = bare_run(config, **parts)
    token_ids = torch.zeros((4, 14), dtype=torch.long, device=meta)
    batches = [MicroBatch(index, token_ids, token_ids, 56, token_ids if index else None) for index in (0, 1)]
    refusals = Refusals(Guard(), config.training, meta)
    for step in range(2):
        numbers = train_step(run, batches, step=step, learning_rate=1e-3, refusals=refusals)
        assert numbers.values.shape == (3,)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        train_step(run, batches, step=2, learning_rate=1e-3)  # which reads them at once


@pytest.mark.slow
def test_two_processes_are_a_step_behind_together(tmp_path, train_in, run_program):
    alone = train_in(tmp_path / "alone", **SETTINGS)
    command = ["train", "--config", alone / "config.json", "--training.parallel", "fsdp", "--output"]
    breaks = Break("nan", "sheepop.training.step.micro_batch_loss", 5)  # in one process
    for run, patches in (("at-once", {}), ("late", LATE)):
        done = run_program(*command, tmp_path / run, count=2, breaks=breaks, patches=patches)
        assert done.returncode == 0, done.written()
    assert len(read_lines(tmp_path / "late/events.jsonl")) == 1
    for name in ("metrics.jsonl", "events.jsonl"):
        assert read_lines(tmp_path / "at-once" / name) == read_lines(tmp_path / "late" / name)
    for step in (5, 10, 15, 20):
        expected, found = (
            load_file(tmp_path / run / f"checkpoint_step_{step}/model.safetensors") for run in ("at-once", "late")
        )
        assert all(tensor.equal(found[key]) for key, tensor in expected.items())


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both_at_one_step(tmp_path, train_in, run_program):
    settings = SETTINGS | {"training.save_interval": 20}
    config = train_in(tmp_path / "alone", **settings) / "config.json"
    train_two = partial(run_program, "train", "--config", config, count=2, patches=LATE)
    assert train_two("--output", tmp_path / "straight").returncode == 0
    run = tmp_path / "run"
    done = train_two("--output", run, breaks=Break("term", "sheepop.training.step.micro_batch_loss", 8))
    assert done.returncode != 0
    assert done.written()[1].count("Stopped by a signal after step") == 2
    assert 8 <= read_state(find_resume(run, "auto")).step < 12
    assert train_two("--output", run, "--resume", "auto").returncode == 0
    for part in TENSORS:
        expected, found = (load_file(folder / "checkpoint_step_20" / part) for folder in (tmp_path / "straight", run))
        assert all(tensor.equal(found[key]) for key, tensor in expected.items())
