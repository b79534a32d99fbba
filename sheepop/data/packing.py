"""Best-fit packing: whole documents side by side in windows of one length, so that few of them are cut.

Ding et al., "Fewer Truncations Improve Language Modeling", ICML 2024: documents longer than a window are cut into
windows; what is left of them and all shorter ones are packed, the longest first, each into the window whose free
space it fills best.

A document here is its end-of-text token and what follows up to the next one, as `prepare` writes them. The target of
its last token is the end-of-text token that closes it, so a model learns where texts end; no target is another
document's content.
"""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sheepop.data.dataset import IGNORE_INDEX, Tokens, expect_reading, ids_at, map_file, release_pages
from sheepop.utils.errors import SheepopError
from sheepop.utils.files import atomic_folder
from sheepop.utils.logging import log, warn

SCAN_AT_ONCE = 2**24  # tokens
ARRAYS = {"starts": "int64", "lengths": "uint32", "offsets": "int64"}  # of a plan, each in a file of its own
VERSION = 1  # of the rules that make a plan: a kept plan of other rules is another order of training
KEEP_FROM_SECONDS = 1.0  # plans that took longer to make are kept on the disk


@dataclass(frozen=True)
class PackingPlan:
    """Which pieces of the text stand in which window. W windows, P pieces; a document is one piece unless it was cut.

    Attributes:
        starts: (P,) int64, where in the text a piece begins; ordered by window.
        lengths: (P,) uint32, tokens of a piece, at most `length`.
        offsets: (W + 1,) int64; window w holds the pieces from offsets[w] up to and without offsets[w + 1].
        length: tokens of a window.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    length: int

    @property
    def num_windows(self) -> int:
        """How many windows hold the whole text."""
        return len(self.offsets) - 1


def open_plan(
    tokens: Tokens,
    *,
    length: int,
    end_of_text_id: int,
    folder: Path,
    fingerprint: str,
    keep_from_seconds: float = KEEP_FROM_SECONDS,
) -> PackingPlan:
    """Return the plan of `plan_best_fit`, from the disk where an earlier call kept it.

    Args:
        tokens, length, end_of_text_id: as in `plan_best_fit`.
        folder: where plans are kept, each in a folder of its own; where that fails, the plan is made again each time.
        fingerprint: of the text; a plan is found again by it.
        keep_from_seconds: plans that took less long to make are not kept.
    """
    key = hashlib.sha256(repr((VERSION, fingerprint, len(tokens), length, end_of_text_id)).encode()).hexdigest()[:16]
    place = folder / f"best_fit-{length}-{key}"
    if place.is_dir():
        kept = _load_plan(place, length=length, num_tokens=max(0, len(tokens) - 1))
        if kept is not None:
            return kept
        warn(f"the packing plan in {place} is damaged; it is made again")
    started = time.perf_counter()
    plan = plan_best_fit(tokens, length=length, end_of_text_id=end_of_text_id)
    seconds = time.perf_counter() - started
    if seconds >= keep_from_seconds:
        log(f"packed the text into {plan.num_windows} sequences of {length} tokens in {seconds:.1f} s")
        try:
            with atomic_folder(place) as temporary:
                for name, dtype in ARRAYS.items():
                    getattr(plan, name).astype(np.dtype(dtype).newbyteorder("<")).tofile(temporary / f"{name}.bin")
        except (OSError, SheepopError) as error:
            warn(f"the packing plan could not be kept in {place} ({error}); it will be made again the next time")
    return plan


def _load_plan(place: Path, *, length: int, num_tokens: int) -> PackingPlan | None:
    """Map a kept plan from the disk, or return None where it is not whole."""
    try:
        starts, lengths, offsets = (map_file(place / f"{name}.bin", dtype) for name, dtype in ARRAYS.items())
    except (OSError, ValueError):
        return None
    plan = PackingPlan(starts, lengths, offsets, length)
    is_whole = (
        len(plan.starts) == len(plan.lengths)
        and len(plan.offsets) > 0
        and plan.offsets[-1] == len(plan.starts)
        and (num_tokens == 0) == (plan.num_windows == 0)
    )
    return plan if is_whole else None


def plan_best_fit(tokens: Tokens, *, length: int, end_of_text_id: int) -> PackingPlan:
    """Pack a whole text into windows of `length` tokens: each token but the last is an input of exactly one window.

    Beside one pass over the text it takes time and memory in proportion to the number of pieces: while it works about
    60 bytes each, afterwards 12, and 8 for each window.
    """
    borders = find_documents(tokens, end_of_text_id)
    starts, lengths = cut_documents(borders, length)
    windows = best_fit(lengths, length)
    order = np.argsort(windows, kind="stable")
    offsets = np.zeros(int(windows.max()) + 2 if len(windows) else 1, dtype=np.int64)
    np.cumsum(np.bincount(windows), out=offsets[1:])
    return PackingPlan(starts[order], lengths[order], offsets, length)


def find_documents(tokens: Tokens, end_of_text_id: int) -> NDArray[np.int64]:
    """Return where documents begin, and behind them where the last input ends: (D + 1,).

    The last token of the text is nobody's input, for nothing follows it; in a prepared text it is the end-of-text
    token that closes the last document.
    """
    num_inputs = len(tokens) - 1
    found = [np.zeros(1 if num_inputs > 0 else 0, dtype=np.int64)]
    expect_reading(tokens, in_order=True)
    for first in range(1, num_inputs, SCAN_AT_ONCE):
        part = tokens[first : min(first + SCAN_AT_ONCE, num_inputs)]
        found.append(np.flatnonzero(part == end_of_text_id) + first)
        release_pages(tokens)
    expect_reading(tokens, in_order=False)
    found.append(np.array([max(num_inputs, 0)], dtype=np.int64))
    return np.concatenate(found)


def cut_documents(borders: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Cut documents longer than `length` into pieces of `length` and a shorter last one: starts and lengths, (P,)."""
    sizes = np.diff(borders)  # (D,)
    pieces = -(-sizes // length)
    number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of a piece in its document
    starts = np.repeat(borders[:-1], pieces) + number * length
    lengths = np.minimum(np.repeat(borders[1:], pieces) - starts, length)
    return starts, lengths.astype(np.uint32)


def best_fit(lengths: NDArray[Any], capacity: int) -> NDArray[np.int64]:
    """Return the window of each item, (P,): best-fit-decreasing bin packing (Johnson et al. 1974).

    The longest items come first, equal ones in their order; each goes where the least space is free among the windows
    that it fits into, the one that has had just so much space for longest, or into a new window. Equal lengths are
    placed together: the windows of equal free space take as many of them as go in, so the time follows from the number
    of different lengths.

    Args:
        lengths: (P,), each from 1 to `capacity`.
        capacity: of a window.
    """
    kind = np.uint16 if capacity < 2**16 else np.uint32  # numpy sorts 16 bits by radix, in linear time
    by_length = np.argsort((capacity - lengths.astype(np.int64)).astype(kind), kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    placed = np.empty(len(lengths), dtype=np.int64)  # in the order of `by_length`
    with_space: list[list[NDArray[np.int64]]] = [[] for _ in range(capacity + 1)]  # windows, by their free space
    is_there = np.zeros(capacity + 1, dtype=bool)  # whether any window has this free space
    is_there[capacity] = True  # an empty window can always be had
    opened = done = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        todo = int(counts[size])
        for space in (np.flatnonzero(is_there[size:]) + size).tolist():
            each = space // size  # items that go into one such window
            wanted = -(-todo // each)
            if space == capacity:
                windows = np.arange(opened, opened + wanted)
                opened += wanted
            else:
                found = with_space[space]
                free = found[0] if len(found) == 1 else np.concatenate(found)
                windows = free[:wanted]
                with_space[space] = [free[wanted:]] if wanted < len(free) else []
                is_there[space] = wanted < len(free)
            now = min(todo, len(windows) * each)
            placed[done : done + now] = np.repeat(windows, each)[:now]
            filled = now // each
            for part, left in (
                (windows[:filled], space - each * size),
                (windows[filled:], space - (now - filled * each) * size),
            ):
                if len(part) and left:
                    with_space[left].append(part)
                    is_there[left] = True
            done += now
            todo -= now
            if not todo:
                break
    result = np.empty_like(placed)
    result[by_length] = placed
    return result


def read_packed(
    tokens: Tokens, plan: PackingPlan, windows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return inputs, targets and document numbers of packed windows, each (B, T) for B windows and T = `plan.length`.

    The target of an input is the token behind it in the text. Pieces are numbered from 0 in each row; the unused end
    of a row has a number of its own, inputs 0 and targets `IGNORE_INDEX`.
    """
    # Arrays' own methods and one copy for inputs and targets: with few small rows the calls are what takes the time.
    firsts = plan.offsets[windows]  # (B,)
    # One place more for each row: its unused end, as a piece that lies behind the end of the text.
    places = plan.offsets[windows + 1] - firsts + 1
    row_ends = places.cumsum()
    row_begins, padding = row_ends - places, row_ends - 1
    number = np.arange(row_ends[-1] if len(row_ends) else 0) - row_begins.repeat(places)  # of a piece in its row
    piece = firsts.repeat(places) + number
    piece[padding] = 0
    starts, lengths = plan.starts[piece], plan.lengths[piece].astype(np.int64)
    starts[padding], lengths[padding] = len(tokens), 0
    lengths[padding] = plan.length - np.add.reduceat(lengths, row_begins)

    begins = lengths.cumsum() - lengths  # of a piece in the batch laid out flat
    positions = np.empty((2, len(windows), plan.length), dtype=np.int64)
    flat = positions[0].reshape(-1)
    np.add((starts - begins).repeat(lengths), np.arange(flat.size), out=flat)
    np.add(positions[0], 1, out=positions[1])
    inputs, targets = ids_at(tokens, positions, behind_the_end=IGNORE_INDEX)
    np.maximum(inputs, 0, out=inputs)
    return inputs, targets, number.repeat(lengths).reshape(inputs.shape)
