"""Whether what is held out also stands in what is trained on, line by line."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sheepop.data.gather import Part, read_texts

# Shorter lines recur by chance; one length in eight keeps the search cheap and does not depend on the side.
LONG_LINE = 60
EVERY, WHICH = 8, 3


def line_hashes(texts: Iterable[str]) -> NDArray[np.uint64]:
    """Return the sorted distinct hashes of the long lines that leakage is looked for by."""
    digests = {
        hashlib.blake2b(line.encode("utf-8"), digest_size=8).digest()
        for text in texts
        for line in text.split("\n")
        if len(line) >= LONG_LINE and len(line) % EVERY == WHICH
    }
    return np.unique(np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64))


@dataclass(frozen=True)
class LinesTask:
    """The documents of a part whose lines are looked at."""

    part: Part
    wanted: NDArray[np.bool_]


def lines_of_part(task: LinesTask) -> NDArray[np.uint64]:
    """Return `line_hashes` of the wanted documents."""
    if not task.wanted.any():
        return np.zeros(0, np.uint64)
    return line_hashes(text for _, text in read_texts(task.part, task.wanted))


def seen_in(lines: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Say of each of the sorted `lines` whether it is among the `others`."""
    seen = np.zeros(len(lines), dtype=bool)
    if len(lines) and len(others):
        places = np.minimum(np.searchsorted(lines, others), len(lines) - 1)
        seen[places[lines[places] == others]] = True
    return seen
