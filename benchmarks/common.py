"""What the benchmarks share: a table for people, JSON for programs, medians of alternating runs, timed steps."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch


def alternate(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure the contestants in turn, several times, so that a slow minute of the machine hits all of them."""
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, measure in contestants.items():
            results[name].append(measure())
    return results


def seconds_each(step: Callable[[], object], times: int, device: torch.device) -> float:
    """Return the mean seconds of steps made in a row; a GPU is waited for before the first and after the last alone.

    A wait after each would leave a GPU idle while Python prepares the next, which no user of it does.
    """
    _wait_for(device)
    began = time.perf_counter()
    for _ in range(times):
        step()
    _wait_for(device)
    return (time.perf_counter() - began) / times


def on_gpu(device: torch.device) -> str:
    """Return what a title says of the device: the name of a GPU; `show` says the rest by itself."""
    return f" on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""


def show(title: str, rows: Sequence[dict[str, object]]) -> None:
    """Print the rows as a table and as one line of JSON."""
    columns = list(rows[0])
    cells = [columns, *[[_text(row[column]) for column in columns] for row in rows]]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    print(f"\n{title} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    print(json.dumps({"title": title, "rows": rows}))


def median(values: Sequence[float]) -> float:
    """Return the middle value."""
    return statistics.median(values)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
