"""Work shared among processes, with results in order and little of it waiting in memory."""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from sheepop.utils.errors import WorkerLostError
from sheepop.utils.logging import log

Task = TypeVar("Task")
Result = TypeVar("Result")
SECONDS_BETWEEN_PROGRESS = 5.0


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(function: Callable[[Task], Result], tasks: Iterable[Task], num_workers: int) -> Iterator[Result]:
    """Yield `function(task)` in the tasks' order, computed by `num_workers` processes; by this one for 1 or less.

    Args:
        function: of a module's top level, so that another process finds it.

    Raises:
        WorkerLostError: a worker was killed. What `function` raises reaches the caller at its place.
    """
    if num_workers <= 1:
        yield from map(function, tasks)
        return
    # Fresh processes: a copy of this one might inherit locks that other threads hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_be_one_of_many) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise WorkerLostError(
                "A worker process was ended from outside, probably because the memory was full. What is done is kept: "
                "run the same command again, with fewer --workers."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def tell_progress(results: Iterable[Result], what: str, total: int) -> Iterator[Result]:
    """Pass the results on, and say every few seconds how many of `total` there were."""
    said = time.monotonic()
    for number, result in enumerate(results, start=1):
        if time.monotonic() - said > SECONDS_BETWEEN_PROGRESS:
            said = time.monotonic()
            log(f"{what} {number / total:.0%} of the text")
        yield result


def _be_one_of_many() -> None:
    """Keep libraries from starting threads of their own: the processes are the parallelism."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
