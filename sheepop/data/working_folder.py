"""A folder for unfinished work beside what it is for, held by one process at a time."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sheepop.utils.errors import NoSpaceError, SheepopError, WorkerLostError
from sheepop.utils.logging import log


@contextmanager
def working_folder(output: Path, *, keep: bool) -> Iterator[Path]:
    """Yield the folder beside `output` that holds unfinished work, for this process alone.

    It stays when the process or a worker is killed, interrupted or out of space, so that the next run goes on with it,
    and with `keep`; it goes away when all is done, and when what the user asked for cannot be.
    """
    folder = output.with_name(f".{output.name}.work")
    with lock_folder(folder):
        for leftover in output.parent.glob(f".{output.name}.*.tmp"):  # of a run that was killed while publishing
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            yield folder
        except SheepopError as error:
            if not keep and not isinstance(error, (NoSpaceError, WorkerLostError)):
                shutil.rmtree(folder)
            raise
        if not keep:
            shutil.rmtree(folder)


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Make the folder and hold it for this process alone; wait while another one has it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"waiting for another process that works in {folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            # The one that had it may have removed the folder: then this lock is on a file that has no name any more.
            if os.fstat(lock.fileno()).st_nlink:
                yield
                return
