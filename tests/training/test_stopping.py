"""Real processes: what they answer to signals and to a disk that is full."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from copies import Break

from sheepop.training.checkpoint import find_resume, read_state
from sheepop.training.verify import compare_runs

SETTINGS = {"training.max_steps": 3000, "training.save_interval": 50, "training.sample_tokens": 0}


@pytest.fixture
def config(tmp_path, train_in):
    """The settings of a run that does not end by itself within this test."""
    run = train_in(tmp_path / "settings", **SETTINGS | {"training.max_steps": 1, "training.warmup_steps": 0})
    settings = json.loads((run / "config.json").read_text())
    settings["training"] |= {"max_steps": 3000, "eval_interval": 100}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_with_its_status(tmp_path, config, start, wait_for_step, number, status):
    process = start("train", "--config", config, "--output", tmp_path / "run")
    wait_for_step(tmp_path / "run", 5, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "--resume auto" in errors
    assert "Traceback" not in errors
    state = read_state(find_resume(tmp_path / "run", "auto"))
    assert f"after step {state.step} of 3000" in errors


def test_a_second_signal_leaves_at_once(tmp_path, config, start):
    run = tmp_path / "run"
    hanging = Break("hang", "sheepop.training.saver.save_checkpoint", 1)
    process = start("train", "--config", config, "--output", run, breaks=hanging)
    while "hanging\n" not in process.written()[1]:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # it is asked to leave, but cannot before the save has ended
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM
    assert not list(run.glob("checkpoint_*"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system; errors are injected in test_checkpoint.py")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_is_full_ends_with_status_6_and_the_run_goes_on_with_more_room(
    tmp_path, train_in, run_program, small_disk
):
    settings = {"training.max_steps": 8, "training.save_interval": 1, "training.keep_last": 3, "model.dropout": 0.1}
    straight = train_in(tmp_path / "straight", **settings)
    run = small_disk / "run"
    seen = set()
    for kilobytes in range(40, 2000, 250):  # so the disk is full at another write each time
        filler = small_disk / "filler"
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        filler.write_bytes(bytes(max(0, free - kilobytes * 1000)))
        process = run_program("train", "--config", straight / "config.json", "--output", run, "--resume", "auto")
        _, errors = process.written()
        filler.unlink()
        if process.returncode == 0:
            break
        assert process.returncode == 6, errors
        assert "Traceback" not in errors
        checkpoint = find_resume(run, "auto")
        assert not list(run.glob(".checkpoint_*"))
        seen.add(checkpoint and checkpoint.name)
    assert process.returncode == 0
    assert len(seen) > 1  # full before the first checkpoint, and after one
    assert all(row["equal"] == row["count"] for row in compare_runs(straight, run))
