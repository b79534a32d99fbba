"""Windows over files of token ids that stay on the disk."""

import itertools
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -1  # a target without a token, behind the end of the text; PyTorch's cross_entropy leaves it out


class TokenShards:
    """Several runs of token ids, one behind the other, read as if they were one array.

    It has what reading needs of a 1-D array: a length, slices, and `take`.
    """

    def __init__(self, shards: Sequence[NDArray[Any]]) -> None:
        self.shards = tuple(shards)
        self.ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)  # (S,)

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.shards else 0

    def __getitem__(self, part: slice) -> NDArray[Any]:
        """Return a copy of the ids from `part.start` up to and without `part.stop`; other steps than 1 are refused."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            raise ValueError(f"the step of a slice of TokenShards must be 1, not {step}")
        return self.take(np.arange(start, stop))

    def take(self, positions: NDArray[np.int64], mode: str = "clip") -> NDArray[Any]:
        """Return the ids at `positions`, in their shape; positions outside give the nearest id, as in `numpy.take`."""
        if mode != "clip":
            raise ValueError(f"TokenShards can only clip positions, not {mode}")
        flat = np.clip(positions.ravel(), 0, len(self) - 1)
        taken = np.empty(flat.shape, dtype=self.shards[0].dtype)
        shard_of = np.searchsorted(self.ends, flat, side="right")
        # Windows are runs of neighbours, so the shard changes seldom: a copy for each run of the same shard.
        edges = [0, *(np.flatnonzero(np.diff(shard_of)) + 1).tolist(), len(flat)] if len(flat) else [0]
        for first, last in itertools.pairwise(edges):
            shard = self.shards[int(shard_of[first])]
            begin = self.ends[shard_of[first]] - len(shard)
            taken[first:last] = shard.take(flat[first:last] - begin)
        return taken.reshape(positions.shape)


Tokens = NDArray[Any] | TokenShards  # 1-D, uint16 or uint32


def open_tokens(path: Path | Sequence[Path], dtype: str) -> Tokens:
    """Map a file of raw little-endian token ids, or several that follow one another; nothing is read until used."""
    maps = [map_file(file, dtype) for file in ([path] if isinstance(path, Path) else path)]
    return maps[0] if len(maps) == 1 else TokenShards(maps)


def map_file(path: Path, dtype: str) -> NDArray[Any]:
    """Map a file of raw little-endian numbers, to be read here and there.

    Raises:
        OSError: there is no such file.
        ValueError: its size is not that of whole numbers.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    with path.open("rb") as file:
        if not path.stat().st_size:
            return np.empty(0, dtype=kind)  # an empty file cannot be mapped
        # Not a np.memmap: its slices cost several times those of an array.
        numbers = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=kind)
    expect_reading(numbers, in_order=False)
    return numbers


def expect_reading(tokens: Tokens, *, in_order: bool) -> None:
    """Tell the system how mapped tokens are about to be read; on others than mapped ones it does nothing.

    Windows lie anywhere, and by default the system reads far ahead of each: 64 windows of 1,024 tokens of a file that
    was not in memory took 250 ms, and 9 ms when it knew (`docs/log.md`). A pass over the whole needs the opposite.
    """
    _advise(tokens, "MADV_SEQUENTIAL" if in_order else "MADV_RANDOM")


def release_pages(tokens: Tokens) -> None:
    """Give back the memory of what was read of mapped tokens, which a pass over the whole would fill with all of it."""
    _advise(tokens, "MADV_DONTNEED")


def _advise(tokens: Tokens, advice: str) -> None:
    if not hasattr(mmap, advice):
        return
    for shard in tokens.shards if isinstance(tokens, TokenShards) else (tokens,):
        if isinstance(shard.base, memoryview) and isinstance(shard.base.obj, mmap.mmap):
            shard.base.obj.madvise(getattr(mmap, advice))


def num_windows(num_tokens: int, length: int, stride: int) -> int:
    """Return how many windows of `length`, `stride` apart, make every token after the first a target.

    With `stride` equal to `length` each is a target exactly once; the last window may be partly empty.
    """
    return max(1, -(-(num_tokens - 1 - length) // stride) + 1) if num_tokens > 1 else 0


def ids_at(tokens: Tokens, positions: NDArray[np.int64], *, behind_the_end: int) -> NDArray[np.int64]:
    """Return the token ids at `positions`, in their shape; `behind_the_end` where the text has no token any more."""
    if not len(tokens):
        return np.full(positions.shape, behind_the_end, dtype=np.int64)
    ids: NDArray[np.int64] = tokens.take(positions, mode="clip").astype(np.int64)
    if positions.size and positions.max() >= len(tokens):
        ids[positions >= len(tokens)] = behind_the_end
    return ids


def read_windows(tokens: Tokens, starts: NDArray[Any], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return inputs and targets, each (B, T) for B starts and T = `length`.

    Row b has inputs tokens[s : s + T] and targets tokens[s + 1 : s + T + 1] for s = starts[b]; behind the end of
    the tokens inputs are 0 and targets `IGNORE_INDEX`. A window that starts before the text begins in its end: the
    tokens are a ring, in which the last one, an end of text like the first, is the first.
    """
    positions = np.asarray(starts, dtype=np.int64)[:, None] + np.arange(length + 1)  # (B, T + 1)
    positions[positions < 0] %= max(1, len(tokens) - 1)
    windows = ids_at(tokens, positions, behind_the_end=IGNORE_INDEX)
    targets = windows[:, 1:].copy()
    inputs = np.maximum(windows[:, :-1], 0)
    # The last token of the text is an input only where it has something to predict; what it yields is ignored.
    return inputs, targets


def document_ids(inputs: NDArray[np.int64], end_of_text_id: int) -> NDArray[np.int64]:
    """Number the documents in each row of `inputs` (B, T): every end-of-text token begins a new one."""
    return np.cumsum(inputs == end_of_text_id, axis=1, dtype=np.int64)
