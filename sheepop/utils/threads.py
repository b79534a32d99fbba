"""Work on the rows of an array by several threads, for compiled code that lets other threads compute meanwhile."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


def on_all_threads(work: Callable[[slice], None], *, rows: int, most: int | None = None) -> None:
    """Call `work` for equal parts of the rows, one of them on this thread.

    Args:
        most: parts at the most, for small work; PyTorch's number of threads in any case.
    """
    parts = max(1, min(torch.get_num_threads(), rows if most is None else most))
    size = -(-rows // parts)
    parts_of_others = [slice(start, min(start + size, rows)) for start in range(size, rows, size)]
    others = [helpers().submit(work, part) for part in parts_of_others]
    work(slice(0, size))
    for other in others:
        other.result()


@cache
def helpers() -> ThreadPoolExecutor:
    """Return threads that stay: to start one takes as long as some rows."""
    return ThreadPoolExecutor(torch.get_num_threads())
