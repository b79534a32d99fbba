"""The folder of a run: held by one process at a time, and where in it a run goes on."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sheepop.evaluation.plots import METRICS_FILE
from sheepop.models.pretrained import checkpoints_of
from sheepop.training.checkpoint import find_resume, sweep_leftovers
from sheepop.training.distributed import launch_of_processes, number_of_restarts
from sheepop.utils.errors import CheckpointError, ConfigError
from sheepop.utils.files import read_json, write_json
from sheepop.utils.logging import log

LOCK_FILE = ".lock"
LAUNCH_FILE = ".launch.json"


@contextmanager
def hold_folder(folder: Path, *, resuming: bool) -> Iterator[None]:
    """Make the run's folder, or make sure that it can be gone on with, and hold it for this process alone.

    Raises:
        ConfigError: it holds another run, another process trains in it, or it cannot be written to.
    """
    if not resuming and ((folder / METRICS_FILE).exists() or any(folder.glob("checkpoint_*"))):
        raise ConfigError(
            f"The output folder {folder} already holds a run. Go on with it by --resume auto, or choose another folder "
            "with --output; nothing in it was changed."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if folder.is_file() else os.strerror(error.errno or 0)
        raise ConfigError(
            f"The output folder {folder} cannot be written to ({reason}). Choose another one with --output."
        ) from None
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another process is training in {folder}. Wait for it or end it, or choose another folder with "
                "--output; nothing in it was changed."
            ) from None
        sweep_leftovers(folder)
        launch = launch_of_processes()
        if launch:
            write_json(folder / LAUNCH_FILE, launch)
        yield


def was_begun_by_this_launch(folder: Path) -> bool:
    """Say whether `torchrun` has started these processes again after one was lost, and this run is theirs."""
    if not number_of_restarts():
        return False
    try:
        noted = read_json(folder / LAUNCH_FILE, CheckpointError)
    except CheckpointError:
        return False
    return any(noted.get(key) == value for key, value in launch_of_processes().items())


def find_start(folder: Path, *, named: Path | None) -> Path | None:
    """Return the checkpoint that a resumed run goes on from: the named one, or the newest whole one of the folder.

    Damaged checkpoints that are newer get other names, so that they are neither met nor counted again.

    Raises:
        CheckpointError: the named one is damaged, or there are damaged ones only.
        ConfigError: the folder has newer ones than the named one, whose steps would be mixed with those to come.
    """
    everything = checkpoints_of(folder)
    if named is None:
        checkpoint = find_resume(folder, "auto")
        for damaged in everything[: everything.index(checkpoint)] if checkpoint else []:
            damaged.rename(folder / f"damaged_{damaged.name}")
        if checkpoint is None:
            log(f"There is no checkpoint in {folder} yet; starting from the beginning.")
        return checkpoint
    checkpoint = find_resume(folder, str(named))
    places = [place for place, path in enumerate(everything) if path.resolve() == named.resolve()]
    if places and places[0] > 0:
        newer = ", ".join(path.name for path in reversed(everything[: places[0]]))
        raise ConfigError(
            f"{folder} has checkpoints after {named.name}: {newer}. To go on from the earlier one and keep them, "
            "choose another folder with --output; to give them up, remove them."
        )
    return checkpoint
