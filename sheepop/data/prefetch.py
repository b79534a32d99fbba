"""Overlap loading with computing."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import TypeVar

T = TypeVar("T")


def prefetch(
    load: Callable[[int], T], first_step: int, last_step: int | None, num_workers: int
) -> Generator[T, None, None]:
    """Yield `load(step)` for the steps from `first_step` up to and without `last_step`, in order; None: without end.

    `num_workers` threads load two steps ahead each; 0 loads in the caller's thread. `load` must be pure. What it
    raises reaches the caller at that step.
    """
    steps = count(first_step) if last_step is None else range(first_step, last_step)
    if num_workers == 0:
        yield from map(load, steps)
        return
    with ThreadPoolExecutor(num_workers, thread_name_prefix="prefetch") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for step in steps:
                waiting.append(pool.submit(load, step))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
