"""Whether what is held out also stands in what is trained on, line by line."""

import numpy as np
from numpy.typing import NDArray

from sheepop.data.parts import Part


def lines_of_part(part: Part, wanted: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Return the sorted distinct hashes of the wanted documents' long lines, see `Batch.long_lines`."""
    if not wanted.any():
        return np.zeros(0, np.uint64)
    index = np.load(part.index)
    return np.unique(index["lines"][wanted[index["line_documents"]]])


def seen_in(lines: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Say of each of the sorted `lines` whether it is among the `others`."""
    seen = np.zeros(len(lines), dtype=bool)
    if len(lines) and len(others):
        places = np.minimum(np.searchsorted(lines, others), len(lines) - 1)
        seen[places[lines[places] == others]] = True
    return seen
