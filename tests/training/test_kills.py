"""SIGKILL at chosen moments of training and saving: there is always a checkpoint to load, and the end is the same."""

import itertools
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from copies import Break

from sheepop.models.pretrained import load_pretrained, resolve_checkpoint
from sheepop.training.checkpoint import find_resume
from sheepop.training.verify import compare_runs

SETTINGS = {
    "training.max_steps": 40,
    "training.save_interval": 1,
    "training.eval_interval": 4,
    "training.keep_last": 2,
    "model.dropout": 0.1,
}
# What is called when, and which moments of it there are.
FUNCTIONS = {
    "sheepop.training.step.micro_batch_loss": ("before", "after"),  # between micro-batches
    "torch.optim.AdamW.step": ("before", "after"),
    "sheepop.training.metrics._append": ("before", "middle", "after"),
    "sheepop.models.pretrained.save_file": ("before", "middle", "after"),  # weights and moments
    "sheepop.training.checkpoint.write_json": ("before", "middle", "after"),  # settings, state, the latest's pointer
    "sheepop.models.pretrained.write_json": ("before", "middle", "after"),  # the manifest
    "sheepop.utils.files.flush_to_disk": ("before", "after"),
    "os.replace": ("before", "after"),
    "sheepop.training.saver.write_json": ("before", "middle", "after"),  # the best's pointer
    "pathlib.Path.rename": ("before", "after"),  # pruning
    "shutil.rmtree": ("before", "after"),
}


def moments() -> Iterator[Break]:
    """Yield moments, spread over all functions, the places around them and the number of the call, without an end."""
    kinds = [(function, place) for function, places in FUNCTIONS.items() for place in places]
    numbers = random.Random(3)
    for function, place in itertools.cycle(kinds):
        yield Break(f"kill-{place}", function, numbers.choice((1, 1, 2, 3, 5)))


def assert_same(straight: Path, run: Path) -> None:
    for row in compare_runs(straight, run):
        assert row["equal"] == row["count"], row


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("async_save", [False, True])
def test_there_is_always_a_checkpoint_and_the_end_is_the_same(
    tmp_path, train_in, run_program, pytestconfig, async_save
):
    asked = pytestconfig.getoption("--kills")
    straight = train_in(tmp_path / "straight", **SETTINGS, **{"training.async_save": async_save})
    run = tmp_path / "killed"
    kills, had_checkpoint = 0, False
    for moment in moments():
        command = ["train", "--config", straight / "config.json", "--output", run, "--resume", "auto"]
        done = run_program(*command, breaks=moment)
        _, errors = done.written()
        assert "Traceback" not in errors, errors
        if done.returncode == 0:  # the run was over before that moment came
            assert_same(straight, run)
            shutil.rmtree(run)
            had_checkpoint = False
            continue
        assert done.returncode == -signal.SIGKILL, moment
        kills += 1
        checkpoint = find_resume(run, "auto")
        assert checkpoint or not had_checkpoint, moment
        if checkpoint:
            had_checkpoint = True
            load_pretrained(resolve_checkpoint(run))
        if kills >= asked / 2:
            break
    train_in(run, resume="auto", **SETTINGS, **{"training.async_save": async_save})
    assert_same(straight, run)
    assert not list(run.glob(".checkpoint_*"))
