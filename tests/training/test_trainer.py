import json
import math
import multiprocessing
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from sheepop.cli import main
from sheepop.training.checkpoint import find_resume, read_state
from sheepop.training.run import start_run
from sheepop.training.step import micro_batch_loss
from sheepop.utils.errors import Interrupted, NonFiniteError

FAMILIES = {
    "classic": {"preset": "classic", "model.dropout": 0.1},
    "modern": {"training.shared_spelling": True, "preset": "modern", "model.dropout": 0.1, "model.num_kv_heads": 1},
    "muon": {"preset": "modern", "model.dropout": 0.1, "training.optimizer": "muon"},
}
TIMING = {"elapsed_seconds", "tokens_per_second", "mfu"}


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def metrics_without_timing(run):
    return [
        {key: value for key, value in line.items() if key not in TIMING} for line in read_lines(run / "metrics.jsonl")
    ]


def assert_same_tensors(one, other):
    for name in ("model.safetensors", "training_state/optimizer.safetensors"):
        expected, found = load_file(one / name), load_file(other / name)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert tensor.equal(found[key]), f"{name}: {key}"


def assert_same_run(one, other, last):
    assert_same_tensors(one / last, other / last)
    assert metrics_without_timing(one) == metrics_without_timing(other)
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    states = [read_state(run / last) for run in (one, other)]
    for state in states:
        state.elapsed_seconds = 0.0
    assert states[0] == states[1]


# An epoch has 7 steps, so a run stops inside the first, on the border and inside the second.
@pytest.mark.parametrize("stop_after", [4, 7, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_stop_and_resume_equals_an_undisturbed_run(tmp_path, train_in, signal_at, family, stop_after):
    settings = FAMILIES[family] | {"training.max_steps": 12, "training.eval_interval": 5}
    straight = train_in(tmp_path / "straight", **settings)
    signal_at(stop_after + 1)
    with pytest.raises(Interrupted) as caught:
        train_in(tmp_path / "stopped", **settings)
    assert caught.value.exit_status == 143
    assert f"after step {stop_after} of 12" in str(caught.value)
    assert "--resume auto" in str(caught.value)
    signal_at.undo()
    train_in(tmp_path / "stopped", resume="auto", **settings)
    assert_same_run(straight, tmp_path / "stopped", "checkpoint_step_12")


# What was under way when the signal came, the how manieth time, and after which step the run then left.
MOMENTS = {
    "between two micro-batches": ("sheepop.training.step.micro_batch_loss", 9, 4),
    "in the last backward pass": ("torch.nn.utils.get_total_norm", 5, 5),
    "in the update": ("sheepop.training.adamw.AdamW.step", 5, 5),
    "in a validation": ("sheepop.training.validation.evaluate_tokens", 2, 7),
    "in a sample": ("sheepop.training.validation.complete", 1, 5),
    "in a save": ("sheepop.training.saver.save_checkpoint", 3, 10),
    "in the last validation": ("sheepop.training.validation.evaluate_tokens", 4, 12),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_at_any_moment_saves_and_resume_is_exact(tmp_path, train_in, signal_at, moment):
    function, nth, stopped_after = MOMENTS[moment]
    settings = FAMILIES["modern"] | {"training.max_steps": 12, "training.eval_interval": 5}
    straight = train_in(tmp_path / "straight", **settings)
    signal_at(nth, function)
    with pytest.raises(Interrupted, match=f"after step {stopped_after} of 12"):
        train_in(tmp_path / "stopped", **settings)
    signal_at.undo()
    newest = find_resume(tmp_path / "stopped", "auto")
    assert read_state(newest).step == stopped_after
    train_in(tmp_path / "stopped", resume="auto", **settings)
    assert_same_run(straight, tmp_path / "stopped", "checkpoint_step_12")


def test_an_interrupt_from_the_keyboard_saves_too(tmp_path, train_in, signal_at):
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests themselves run in the background
    signal_at(3, number=signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        train_in(tmp_path / "run", **{"training.max_steps": 5})
    assert caught.value.exit_status == 130
    assert read_state(tmp_path / "run/checkpoint_step_2").step == 2
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("first_steps", [5, 8])
def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path, train_in, first_steps, capsys):
    settings = {"training.schedule": "constant", "training.eval_interval": 4}
    straight = train_in(tmp_path / "straight", **settings, **{"training.max_steps": 10})
    train_in(tmp_path / "run", **settings, **{"training.max_steps": first_steps})
    train_in(tmp_path / "run", resume="auto", **settings, **{"training.max_steps": 10})
    assert "the length of the run changes" in capsys.readouterr().err
    assert_same_tensors(straight / "checkpoint_step_10", tmp_path / "run/checkpoint_step_10")


def test_a_resumed_run_needs_only_its_checkpoint(tmp_path, train_in, signal_at, corpus_folder):
    settings = FAMILIES["modern"] | {"training.max_steps": 6}
    straight = train_in(tmp_path / "straight", **settings)
    signal_at(5)
    with pytest.raises(Interrupted):
        train_in(tmp_path / "run", **settings)
    signal_at.undo()
    start_run(None, preset=None, overrides={}, resume=str(tmp_path / "run/checkpoint_step_4"))
    assert_same_run(straight, tmp_path / "run", "checkpoint_step_6")


def test_what_a_run_writes(tmp_path, train_in, corpus_folder):
    run = train_in(
        tmp_path / "run", **{"training.max_steps": 15, "training.eval_interval": 4, "training.save_interval": 2}
    )
    lines = read_lines(run / "metrics.jsonl")
    train, val = ([line for line in lines if line["type"] == kind] for kind in ("train", "val"))
    common = {"type", "step", "epoch", "tokens", "loss", "elapsed_seconds"}
    assert all(line.keys() == common | {"learning_rate", "grad_norm", "tokens_per_second", "mfu"} for line in train)
    assert all(line.keys() == common | {"perplexity", "bits_per_byte", "accuracy"} for line in val)
    assert [line["step"] for line in train] == list(range(1, 16))
    assert [line["step"] for line in val] == [4, 7, 8, 12, 14, 15]
    assert [line["epoch"] for line in train][6::7] == [1.0, 2.0]
    # Every token but the first is a target once an epoch, although the last step of an epoch is short.
    manifest = json.loads((corpus_folder / "manifest.json").read_text())
    assert train[6]["tokens"] == manifest["splits"]["train"]["tokens"] - 1
    assert train[13]["tokens"] == 2 * train[6]["tokens"]
    assert val[-1]["loss"] < val[0]["loss"]
    assert all(line["perplexity"] == pytest.approx(math.exp(line["loss"])) for line in val)
    best = min(val, key=lambda line: line["loss"])
    assert json.loads((run / "best.json").read_text())["step"] == best["step"]
    assert json.loads((run / "latest.json").read_text()) == {"checkpoint": "checkpoint_step_15", "step": 15}
    folders = {path.name for path in run.glob("checkpoint_*")}
    assert {"checkpoint_epoch_1", "checkpoint_epoch_2", "checkpoint_step_15"} <= folders
    assert len(folders) <= 2 + 3 + 1  # epochs, the last three by step, the best
    samples = read_lines(run / "samples.jsonl")
    assert [line["step"] for line in samples] == [4, 8, 12, 15]
    assert json.loads((run / "config.json").read_text())["model"]["d_model"] == 20


def test_watching_a_run_more_closely_does_not_change_it(tmp_path, train_in):
    quiet = {"training.max_steps": 6, "training.sample_tokens": 0, "training.eval_interval": 100, "data.num_workers": 0}
    close = {"training.max_steps": 6, "training.eval_interval": 2, "training.save_interval": 1, "data.num_workers": 3}
    for name, settings in (("quiet", quiet), ("close", close)):
        train_in(tmp_path / name, **settings)
    assert_same_tensors(tmp_path / "quiet/checkpoint_step_6", tmp_path / "close/checkpoint_step_6")


@pytest.mark.parametrize(("batch_size", "accumulation"), [(3, 2), (2, 3), (1, 6)])
def test_how_a_step_is_cut_does_not_change_the_run(tmp_path, train_in, batch_size, accumulation):
    runs = []
    for cut in ((6, 1), (batch_size, accumulation)):
        runs.append(tmp_path / f"{cut[0]}x{cut[1]}")
        train_in(
            runs[-1],
            **{
                "training.batch_size": cut[0],
                "training.gradient_accumulation_steps": cut[1],
                "training.max_steps": 8,  # the seventh step is short
                "model.dropout": 0.0,
            },
        )
    whole, parts = (load_file(run / "checkpoint_step_8/model.safetensors") for run in runs)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_bad_number_stops_the_run_with_the_last_good_state(tmp_path, train_in, monkeypatch):
    settings = FAMILIES["classic"] | {"training.max_steps": 8, "training.save_interval": 1, "training.keep_last": 9}
    straight = train_in(tmp_path / "straight", **settings)
    calls = 0

    def spoiled_once(learner, batch):
        nonlocal calls
        calls += 1
        loss = micro_batch_loss(learner, batch)
        return loss * math.nan if calls == 2 * 4 + 1 else loss  # in the fifth step of two micro-batches

    monkeypatch.setattr("sheepop.training.step.micro_batch_loss", spoiled_once)
    settings["training.save_interval"] = None
    with pytest.raises(NonFiniteError, match=r"At step 5 the loss was nan") as caught:
        train_in(tmp_path / "run", **settings)
    assert caught.value.exit_status == 5
    assert_same_tensors(straight / "checkpoint_step_4", tmp_path / "run/checkpoint_step_4")
    assert [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]
    train_in(tmp_path / "run", resume="auto", **settings)
    assert_same_run(straight, tmp_path / "run", "checkpoint_step_8")


def test_a_warm_up_as_long_as_the_run_is_said(tmp_path, train_in, capsys):
    train_in(tmp_path / "long", **{"training.max_steps": 5, "training.warmup_steps": 4})
    assert "warning" not in capsys.readouterr().err
    train_in(tmp_path / "short", **{"training.max_steps": 4, "training.warmup_steps": 4})
    assert "warm-up (4 steps) is as long as the whole run (4 steps)" in capsys.readouterr().err


def start_process(arguments):
    """Run the program in a process of its own, forked from a server that has imported PyTorch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sheepop.training.run"])
    process = context.Process(target=main, args=(arguments,))
    process.start()
    return process


def wait_for_step(run, step, process):
    """Wait until the run has logged a step."""
    for _ in range(6000):
        metrics = run / "metrics.jsonl"
        if metrics.exists() and metrics.read_bytes().count(b'"train"') >= step:
            return
        assert process.is_alive()
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def test_killed_at_random_moments_and_resumed_it_ends_the_same(tmp_path, train_in, corpus_folder):
    settings = FAMILIES["modern"] | {
        "training.max_steps": 60,
        "training.save_interval": 2,
        "training.eval_interval": 30,
    }
    straight = train_in(tmp_path / "straight", **settings)
    run = tmp_path / "killed"
    command = ["train", "--data", str(corpus_folder), "--config", str(straight / "config.json"), "--output", str(run)]
    moments = random.Random(11)
    for attempt, killed_after in enumerate((3, 18, 37)):
        process = start_process(command if attempt == 0 else [*command, "--resume", "auto"])
        wait_for_step(run, killed_after, process)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    process = start_process([*command, "--resume", "auto"])
    wait_for_step(run, 45, process)
    process.terminate()
    process.join()
    assert process.exitcode == 143
    train_in(run, resume="auto", **settings)
    assert_same_run(straight, run, "checkpoint_step_60")
