import threading
from collections.abc import Iterator

import pytest

from sheepop.data.prefetch import prefetch

WORKERS = [0, 1, 3]


@pytest.mark.parametrize("num_workers", WORKERS)
def test_steps_come_in_order(num_workers: int) -> None:
    assert list(prefetch(lambda step: step * step, 4, 30, num_workers)) == [step * step for step in range(4, 30)]
    assert list(prefetch(lambda step: step, 5, 5, num_workers)) == []


@pytest.mark.parametrize("num_workers", WORKERS)
def test_an_error_arrives_at_its_step(num_workers: int) -> None:
    def load(step: int) -> int:
        if step == 7:
            raise OSError("step 7")
        return step

    steps = prefetch(load, 5, 100, num_workers)
    assert [next(steps), next(steps)] == [5, 6]
    with pytest.raises(OSError, match="step 7"):
        next(steps)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_stopping_early_leaves_no_thread_and_loads_little(num_workers: int) -> None:
    loaded = []
    before = threading.active_count()
    steps = prefetch(lambda step: loaded.append(step) or step, 0, 10_000, num_workers)
    assert isinstance(steps, Iterator)
    assert next(steps) == 0
    steps.close()
    assert threading.active_count() == before
    assert len(loaded) <= 3 * num_workers + 2
