"""Windows over a file of token ids that stays on the disk."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[Any]  # 1-D, uint16 or uint32
IGNORE_INDEX = -1  # a target without a token, behind the end of the text; PyTorch's cross_entropy leaves it out


def open_tokens(path: Path, dtype: str) -> Tokens:
    """Map a file of raw little-endian token ids; nothing is read until it is used."""
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")


def num_windows(num_tokens: int, length: int, stride: int) -> int:
    """Return how many windows of `length`, `stride` apart, make every token after the first a target.

    With `stride` equal to `length` each is a target exactly once; the last window may be partly empty.
    """
    return max(1, -(-(num_tokens - 1 - length) // stride) + 1) if num_tokens > 1 else 0


def read_windows(tokens: Tokens, starts: NDArray[Any], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return inputs and targets, each (B, T) for B starts and T = `length`.

    Row b has inputs tokens[s : s + T] and targets tokens[s + 1 : s + T + 1] for s = starts[b]; behind the end of
    the tokens inputs are 0 and targets `IGNORE_INDEX`.
    """
    windows = np.full((len(starts), length + 1), IGNORE_INDEX, dtype=np.int64)  # (B, T + 1)
    for row, start in enumerate(starts):
        piece = tokens[start : start + length + 1]
        windows[row, : len(piece)] = piece
    targets = windows[:, 1:].copy()
    inputs = np.maximum(windows[:, :-1], 0)
    # The last token of the text is an input only where it has something to predict; what it yields is ignored.
    return inputs, targets


def document_ids(inputs: NDArray[np.int64], end_of_text_id: int) -> NDArray[np.int64]:
    """Number the documents in each row of `inputs` (B, T): every end-of-text token begins a new one."""
    return np.cumsum(inputs == end_of_text_id, axis=1, dtype=np.int64)
