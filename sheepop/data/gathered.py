"""All documents of the sources, from their parts: what planning needs to know of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sheepop.data.gather import (
    Dropped,
    GatherSettings,
    gather,
    parts_of,
    read_report,
    read_texts,
)
from sheepop.data.parts import Part, Unit, read_names
from sheepop.data.workers import parallel_map, tell_progress
from sheepop.utils.logging import warn


@dataclass(frozen=True)
class Gathered:
    """All documents of the sources, as far as the filters let them pass.

    Attributes:
        settings: how they were gathered.
        hashes, sizes, source_of: of each document its content's hash, its bytes of UTF-8 and its source's number.
        part_sizes: how many documents each part holds.
    """

    settings: GatherSettings
    parts: list[Part]
    part_sizes: list[int]
    hashes: NDArray[np.uint64]
    sizes: NDArray[np.int64]
    source_of: NDArray[np.uint16]
    files: list[dict[str, Any]]
    skipped: list[str]
    encodings: dict[str, int]
    dropped: dict[str, Dropped]

    def by_part(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Cut an array of one entry a document at the parts' borders."""
        return np.split(values, np.cumsum(self.part_sizes)[:-1])

    def drop(self, mask: NDArray[np.bool_], reason: str) -> None:
        """Note documents that are left out, with the text of the first few."""
        if not mask.any():
            return
        what = self.dropped.setdefault(reason, Dropped())
        what.documents += int(mask.sum())
        what.bytes += int(self.sizes[mask].sum())
        for source, text in self.texts(mask):
            if what.has_enough_examples():
                return
            what.add_example(text, source)

    def texts(self, mask: NDArray[np.bool_]) -> Iterator[tuple[str, str]]:
        """Yield where documents come from and their texts, in order.

        Raises:
            ChangedError: as `read_texts`.
        """
        for part, wanted in zip(self.parts, self.by_part(mask), strict=True):
            if wanted.any():
                names = read_names(part)
                for number, text in read_texts(part, self.settings, wanted):
                    yield names[number], text


def gather_all(
    units: Sequence[Unit], work: Path, settings: GatherSettings, num_workers: int, closed: Sequence[str]
) -> Gathered:
    """Gather all units, and join what their reports say; `closed` are the folders that could not be opened.

    Raises:
        DataError: as `gather`.
    """
    tasks = [(unit, work, settings) for unit in units]
    for _ in tell_progress(parallel_map(_gather_one, tasks, num_workers), "read", len(tasks)):
        pass
    reports = [read_report(unit, work) for unit in units]
    parts = [
        part for unit, report in zip(units, reports, strict=True) for part in parts_of(unit, work, report["parts"])
    ]
    hashes, sizes, sources = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], [np.zeros(0, np.uint16)]
    for part in parts:
        with np.load(part.index) as index:
            hashes.append(index["hashes"])
            sizes.append(index["bytes"])
        sources.append(np.full(len(sizes[-1]), part.unit.source, np.uint16))
    dropped: dict[str, Dropped] = {}
    encodings: dict[str, int] = {}
    for report in reports:
        for encoding, count in report["encodings"].items():
            encodings[encoding] = encodings.get(encoding, 0) + count
        for reason, what in report["dropped"].items():
            dropped.setdefault(reason, Dropped()).join(Dropped(**what))
    skipped = [*closed, *(reason for report in reports for reason in report["skipped"])]
    if skipped:
        warn(f"{len(skipped)} file(s) or folder(s) could not be read and were left out:\n  " + "\n  ".join(skipped))
    return Gathered(
        settings=settings,
        parts=parts,
        part_sizes=[len(size) for size in sizes[1:]],
        hashes=np.concatenate(hashes),
        sizes=np.concatenate(sizes),
        source_of=np.concatenate(sources),
        files=[file for report in reports for file in report["files"]],
        skipped=skipped,
        encodings=encodings,
        dropped=dropped,
    )


def _gather_one(task: tuple[Unit, Path, GatherSettings]) -> None:
    gather(*task)
