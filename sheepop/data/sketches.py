"""Summaries of long streams in little memory: an even sample, and counts of what is frequent."""

from collections import Counter
from collections.abc import Iterable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class EvenSample(Generic[Item]):
    """At most `capacity` items of a stream, evenly spread: each 2^k-th, the first among them.

    Attributes:
        items: what is kept now.
        stride: one in so many is kept.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self.capacity = capacity
        self.items: list[Item] = []
        self.stride = 1
        self._seen = 0

    def wants_next(self) -> bool:
        """Say whether the next item would be kept, so that one that would not need not be made."""
        return self._seen % self.stride == 0

    def skip(self) -> None:
        """Let an item pass that is not wanted."""
        self._seen += 1

    def add(self, item: Item) -> None:
        """Take the next item; every second of those before it goes where there is no room."""
        if self.wants_next():
            if len(self.items) == self.capacity:
                self.items = self.items[::2]
                self.stride *= 2
            if self.wants_next():
                self.items.append(item)
        self._seen += 1


class FrequentCounter(Generic[Item]):
    """Counts of the frequent items of a stream with at most `capacity` counters (Misra and Gries 1982).

    Each count is too low by at most `missed`, which is at most the length of the stream / (capacity / 2).
    """

    def __init__(self, capacity: int) -> None:
        assert capacity > 1
        self.capacity = capacity
        self.missed = 0
        self._counts: Counter[Item] = Counter()

    def update(self, items: Iterable[Item]) -> None:
        """Count items; while this runs, as many more counters are in use as there are different items."""
        self._counts.update(items)
        if len(self._counts) > self.capacity:
            self._shrink()

    def most_common(self, number: int) -> list[tuple[Item, int]]:
        """Return the most frequent items with their counts, ties in the order of first sight."""
        return self._counts.most_common(number)

    def _shrink(self) -> None:
        """Lower all counts by the median's, and let go of what is then at zero: at least half."""
        lowered = sorted(self._counts.values())[len(self._counts) // 2]
        self.missed += lowered
        self._counts = Counter({item: count - lowered for item, count in self._counts.items() if count > lowered})
