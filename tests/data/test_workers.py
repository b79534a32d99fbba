import os
from pathlib import Path

import pytest

from sheepop.data.workers import parallel_map
from sheepop.data.working_folder import working_folder
from sheepop.utils.errors import DataError, NoSpaceError, SheepopError, WorkerLostError


@pytest.mark.parametrize("num_workers", [1, 2])
def test_results_come_in_order(num_workers: int) -> None:
    assert list(parallel_map(abs, range(-20, 0), num_workers)) == list(range(20, 0, -1))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_what_a_task_raises_reaches_the_caller(num_workers: int) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(parallel_map(int, ["1", "x", "3"], num_workers))


def test_a_killed_worker_is_a_clear_error() -> None:
    with pytest.raises(WorkerLostError, match="run the same command again, with fewer --workers"):
        list(parallel_map(os._exit, [9, 9, 9], 2))


@pytest.mark.parametrize(
    ("error", "stays"), [(DataError, False), (WorkerLostError, True), (NoSpaceError, True), (KeyboardInterrupt, True)]
)
def test_work_stays_where_the_same_command_can_go_on(tmp_path: Path, error: type[SheepopError], stays: bool) -> None:
    with pytest.raises(error), working_folder(tmp_path / "out", keep=False) as folder:
        (folder / "done").write_text("half of it")
        raise error("no")
    assert folder.exists() == stays
    with working_folder(tmp_path / "out", keep=False) as folder:
        assert (folder / "done").exists() == stays
    assert not folder.exists()
