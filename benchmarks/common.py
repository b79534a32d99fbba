"""What the benchmarks share: a table for people, JSON for programs, and medians of alternating runs."""

import json
import platform
import statistics
from collections.abc import Callable, Sequence

import torch


def alternate(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure the contestants in turn, several times, so that a slow minute of the machine hits all of them."""
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, measure in contestants.items():
            results[name].append(measure())
    return results


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


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
