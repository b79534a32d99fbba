"""Documents → token ids, and those that are planned → the token files of the splits."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sheepop.data.corpus import SPLITS
from sheepop.data.parts import Part, read_kept
from sheepop.data.tokenizer import Tokenizer
from sheepop.utils.errors import DataError
from sheepop.utils.files import read_json, write_json

COPY_AT_ONCE = 4 * 2**20  # bytes
ENCODE_AT_ONCE = 1_000_000  # characters, or bytes of several documents
INDEXED = ("bytes", "characters", "words")  # what the index of a part counts of each document


@dataclass
class Counts:
    """What a split holds."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0


@dataclass(frozen=True)
class EncodeTask:
    """A part with its text, and the file and the fingerprint of a tokenizer."""

    part: Part
    tokenizer: Path
    fingerprint: str


def encode_part(task: EncodeTask) -> None:
    """Write the ids of a part's documents, and then by which tokenizer; nothing if that was done before."""
    part = task.part
    if part.encoded.exists() and read_json(part.encoded, DataError)["tokenizer"] == task.fingerprint:
        return
    part.encoded.unlink(missing_ok=True)
    tokenizer = load_tokenizer(task.tokenizer, task.fingerprint)
    is_unsure = np.load(part.index)["has_unassigned"]
    sizes: list[NDArray[np.int64]] = []
    with part.ids.open("wb") as file:
        waiting: list[bytes] = []
        waiting_bytes = 0
        for number, raw in read_kept(part):
            waiting.append(raw)
            waiting_bytes += len(raw)
            if waiting_bytes >= ENCODE_AT_ONCE or number == len(is_unsure) - 1:
                unsure = is_unsure[number + 1 - len(waiting) : number + 1]
                ids, sizes_of_these = encode_documents(tokenizer, waiting, unsure)
                file.write(ids.data)
                sizes.append(sizes_of_these)
                waiting, waiting_bytes = [], 0
    np.save(part.sizes, np.concatenate(sizes))
    write_json(part.encoded, {"tokenizer": task.fingerprint})


def dtype_of(tokenizer: Tokenizer) -> str:
    """Return the width of the tokenizer's ids in files."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def encode_documents(
    tokenizer: Tokenizer, documents: Sequence[bytes], is_unsure: NDArray[np.bool_]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the ids of documents in UTF-8, each behind the end-of-text token, and how many each has.

    Args:
        is_unsure: whether each `has_unassigned`; such are encoded by themselves, the others many in one call.
    """
    dtype = np.dtype(dtype_of(tokenizer)).newbyteorder("<")
    out_of = sum(map(len, documents))
    ids: list[NDArray[Any]] = []
    sizes: list[NDArray[np.int64]] = []

    def take(some: Sequence[bytes], *, is_sure: bool) -> None:
        if not some:
            return
        together = tokenizer.encode_documents(some, out_of=out_of) if is_sure else None
        if together is not None:
            begins = np.flatnonzero(together == tokenizer.end_of_text_id)
            if len(begins) == len(some):
                ids.append(together.astype(dtype))
                sizes.append(np.diff(begins, append=len(together)))
                return
        one_by_one = [encode_document(tokenizer, raw.decode("utf-8"), dtype) for raw in some]
        ids.extend(one_by_one)
        sizes.append(np.array([len(document) for document in one_by_one], dtype=np.int64))

    begin = 0
    for at in np.flatnonzero(is_unsure).tolist():
        take(documents[begin:at], is_sure=True)
        take(documents[at : at + 1], is_sure=False)
        begin = at + 1
    take(documents[begin:], is_sure=True)
    return (ids[0], sizes[0]) if len(ids) == 1 else (np.concatenate(ids), np.concatenate(sizes))


def encode_document(tokenizer: Tokenizer, text: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the token ids of a document behind the end-of-text token."""
    return np.concatenate((np.array([tokenizer.end_of_text_id], dtype=dtype), encode(tokenizer, text, dtype)))


def encode(tokenizer: Tokenizer, text: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the token ids of a text of any length."""
    pieces = [tokenizer.encode_array(piece).astype(dtype) for piece in tokenizer.cut(text, ENCODE_AT_ONCE)]
    return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]


@lru_cache(maxsize=1)
def load_tokenizer(path: Path, _fingerprint: str) -> Tokenizer:
    """Load a tokenizer, once a process for each fingerprint."""
    return Tokenizer.load(path)


def join_parts(
    parts: Sequence[Part],
    copies: Sequence[NDArray[np.uint8]],
    held_out: Sequence[NDArray[np.bool_]],
    folder: Path,
    tokenizer: Tokenizer,
) -> tuple[dict[str, Counts], dict[str, str]]:
    """Write `train.bin` and `val.bin` from encoded parts, each closed by an end-of-text token.

    Args:
        copies, held_out: for each part the entries of `plan.Plan` for its documents.

    Returns:
        What each split holds, and the SHA-256 of each file by its name.
    """
    counts = {split: Counts() for split in SPLITS}
    with _files_of_splits(folder, tokenizer) as files:
        for part, times, is_held_out in zip(parts, copies, held_out, strict=True):
            with np.load(part.index) as index:
                columns = {"tokens": np.load(part.sizes)} | {name: index[name] for name in INDEXED}
            ends = np.cumsum(columns["tokens"]) * np.dtype(dtype_of(tokenizer)).itemsize
            ids = memoryview(part.ids.read_bytes())
            for split in SPLITS:
                wanted = np.where(is_held_out == (split == "val"), times, 0).astype(np.int64)
                for block in _planned(ids, ends, wanted):
                    files[split].write(block)
                counts[split].documents += int(wanted.sum())
                for name, column in columns.items():
                    setattr(counts[split], name, getattr(counts[split], name) + int(wanted @ column))
    return _closed(counts, files)


def write_halves(
    text: str, train_share: float, copies: int, folder: Path, tokenizer: Tokenizer
) -> tuple[dict[str, Counts], dict[str, str]]:
    """Write both splits, as `join_parts` does, of the only document, which is cut by position.

    Its beginning stands `copies` times in `train.bin`, its end once in `val.bin`: copies would repeat what is held out.
    """
    cut = int(len(text) * train_share)
    counts = {}
    with _files_of_splits(folder, tokenizer) as files:
        for split, piece, times in (("train", text[:cut], copies), ("val", text[cut:], 1)):
            ids = encode_document(tokenizer, piece, np.dtype(dtype_of(tokenizer)).newbyteorder("<"))
            for _ in range(times):
                files[split].write(ids.tobytes())
            once = (len(ids), 1, len(piece.encode("utf-8")), len(piece), len(piece.split()))
            counts[split] = Counts(*(times * count for count in once))
    return _closed(counts, files)


class _TokenFile:
    """Bytes → a file and their SHA-256, which a thread works out meanwhile: the two share nothing."""

    def __init__(self, path: Path, pool: ThreadPoolExecutor) -> None:
        self.path, self.digest, self._pool = path, hashlib.sha256(), pool
        self._file = path.open("wb")
        self.close = self._file.close
        self._hashed: Future[None] | None = None

    def write(self, block: bytes) -> None:
        """Append a block; the ones before are hashed when this returns."""
        hashed = self._pool.submit(self.digest.update, block)
        self._file.write(block)
        if self._hashed:
            self._hashed.result()
        self._hashed = hashed


@contextmanager
def _files_of_splits(folder: Path, tokenizer: Tokenizer) -> Iterator[dict[str, _TokenFile]]:
    """Yield the files of the splits; at the end an end-of-text token closes each."""
    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        files = {split: stack.enter_context(closing(_TokenFile(folder / f"{split}.bin", pool))) for split in SPLITS}
        yield files
        for file in files.values():
            file.write(np.array([tokenizer.end_of_text_id], dtype=dtype_of(tokenizer)).tobytes())


def _closed(counts: dict[str, Counts], files: dict[str, _TokenFile]) -> tuple[dict[str, Counts], dict[str, str]]:
    for counted in counts.values():
        counted.tokens += 1
    return counts, {file.path.name: file.digest.hexdigest() for file in files.values()}


def _planned(ids: memoryview, ends: NDArray[np.int64], copies: NDArray[np.int64]) -> Iterator[bytes]:
    """Yield the bytes of documents that end at `ends`, each so often, in blocks; neighbours are copied at once."""
    numbers = np.repeat(np.arange(len(ends)), copies)
    firsts = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)  # of runs of neighbours
    lasts = np.append(firsts[1:], len(numbers))[: len(firsts)] - 1
    begins = np.concatenate(([0], ends[:-1]))
    waiting: list[memoryview] = []
    waiting_bytes = 0
    for begin, end in zip(begins[numbers[firsts]].tolist(), ends[numbers[lasts]].tolist(), strict=True):
        waiting.append(ids[begin:end])
        waiting_bytes += end - begin
        if waiting_bytes >= COPY_AT_ONCE:
            yield b"".join(waiting)
            waiting, waiting_bytes = [], 0
    yield b"".join(waiting)
