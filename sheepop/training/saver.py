"""When checkpoints are written and which are kept: the policy over `checkpoint.py`."""

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from sheepop.models.pretrained import BEST_POINTER, LATEST_POINTER, follow_pointer
from sheepop.training.checkpoint import Snapshot, checkpoint_name, save_checkpoint, take_snapshot
from sheepop.training.distributed import on_main
from sheepop.training.state import Run, TrainingState
from sheepop.utils.files import write_json


class Saver:
    """Writes the checkpoints of a run: at once, or with `training.async_save` in a thread beside the training.

    One is in flight at most; the next waits for it. What goes wrong in the thread is raised by the next call, on all
    processes. Leaving the context waits for the last one.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.saved_step: int | None = None
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    def save(self, *, is_best: bool = False) -> None:
        """Write a checkpoint of the present state, and remove step checkpoints that are no longer kept.

        Raises:
            NoSpaceError: the disk is full; earlier checkpoints are untouched.
        """
        self.wait()
        run = self.run
        name = checkpoint_name(run.state.step, run.sampler.steps_per_epoch)
        beside = run.config.training.async_save
        snapshot = take_snapshot(run, copied=beside)

        def write() -> None:
            save_checkpoint(run.folder, name, snapshot)
            self._tidy(name, snapshot, is_best=is_best)

        if snapshot.is_sharded:  # all processes write
            save_checkpoint(run.folder, name, snapshot, run.world)
            on_main(run.world, lambda: self._tidy(name, snapshot, is_best=is_best))
        elif not beside:
            on_main(run.world, write)
        elif run.world.is_main:
            self._thread = threading.Thread(target=self._keep_problem, args=(write,), name="saver")
            self._thread.start()
        self.saved_step = run.state.step

    def wait(self) -> None:
        """Wait for the checkpoint in flight.

        Raises:
            NoSpaceError: it could not be written.
        """
        if self.run.config.training.async_save:
            on_main(self.run.world, self._join)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _keep_problem(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as problem:
            self._problem = problem

    def _tidy(self, name: str, snapshot: Snapshot, *, is_best: bool) -> None:
        run, training = self.run.folder, self.run.config.training
        if is_best:
            mark_best(run, name, snapshot.state)
        prune_step_checkpoints(run, keep_last=training.keep_last, keep_every=training.keep_every)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # the other processes may not be there any more
            self._thread.join()


def mark_best(run: Path, name: str, state: TrainingState) -> None:
    """Point `best.json` at the checkpoint with the lowest validation loss so far, which `state` belongs to."""
    write_json(run / BEST_POINTER, {"checkpoint": name, "step": state.step, "loss": state.best_loss})


def prune_step_checkpoints(run: Path, *, keep_last: int, keep_every: int | None = None) -> None:
    """Remove step checkpoints but the newest `keep_last` and those at multiples of `keep_every` steps.

    Epochs, the best and the latest always stay.
    """
    protected = {follow_pointer(run, pointer) for pointer in (BEST_POINTER, LATEST_POINTER)}
    by_step = sorted(run.glob("checkpoint_step_*"), key=_step_in_name, reverse=True)
    for folder in by_step[keep_last:]:
        is_milestone = keep_every is not None and _step_in_name(folder) % keep_every == 0
        if folder not in protected and not is_milestone:
            # Renamed first, so that a reader never meets a checkpoint that is half removed.
            doomed = folder.with_name(f".{folder.name}.old")
            folder.rename(doomed)
            shutil.rmtree(doomed)


def _step_in_name(folder: Path) -> int:
    match = re.search(r"(\d+)$", folder.name)
    return int(match.group(1)) if match else -1
