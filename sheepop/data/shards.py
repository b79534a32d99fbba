"""Planned documents → token files of the splits, part by part."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sheepop.data.corpus import SPLITS
from sheepop.data.gather import Part, read_raw
from sheepop.data.tokenizer import Tokenizer
from sheepop.utils.errors import DataError
from sheepop.utils.files import read_json, write_json

ENCODE_AT_ONCE = 1_000_000  # characters
WRITE_AT_ONCE = 500  # arrays of token ids


@dataclass
class Counts:
    """What a split holds."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0

    def add(self, other: "Counts", copies: int = 1) -> None:
        """Add what something holds that stands here `copies` times."""
        self.tokens += copies * other.tokens
        self.documents += copies * other.documents
        self.bytes += copies * other.bytes
        self.characters += copies * other.characters
        self.words += copies * other.words


@dataclass(frozen=True)
class EncodeTask:
    """A part to encode, with the entries of `plan.Plan` for its documents.

    Attributes:
        tokenizer: file of the tokenizer.
        fingerprint: of that tokenizer.
        first_used: number of the corpus's first used document, if it is in this part.
    """

    part: Part
    tokenizer: Path
    fingerprint: str
    dtype: str
    copies: NDArray[np.uint8]
    held_out: NDArray[np.bool_]
    train_share: float | None
    first_used: int | None

    @property
    def key(self) -> str:
        """A digest of all that the token ids follow from."""
        what = (self.fingerprint, self.part.text.name, self.dtype, self.train_share, self.first_used)
        digest = hashlib.blake2b(repr(what).encode(), digest_size=16)
        digest.update(self.copies.tobytes() + self.held_out.tobytes())
        return digest.hexdigest()


def encode_part(task: EncodeTask) -> None:
    """Write the part's token ids, `.train.bin` and `.val.bin`, and then its counts with the task's key.

    Where counts with this key stand, nothing is done.
    """
    report = task.part.text.with_suffix(".counts.json")
    if report.exists() and read_json(report, DataError)["key"] == task.key:
        return
    report.unlink(missing_ok=True)
    tokenizer = load_tokenizer(task.tokenizer, task.fingerprint)
    dtype = np.dtype(task.dtype).newbyteorder("<")
    end_of_text = np.array([tokenizer.end_of_text_id], dtype=dtype)
    index = np.load(task.part.index)
    words, characters, has_unassigned = (index[name].tolist() for name in ("words", "characters", "has_unassigned"))
    part_bytes = int(index["bytes"].sum())
    counts = {split: Counts() for split in SPLITS}
    files = {split: task.part.text.with_suffix(f".{split}.bin").open("wb") for split in SPLITS}
    waiting: dict[str, list[NDArray[Any]]] = {split: [] for split in SPLITS}

    def take(split: str, ids: NDArray[Any], counted: Counts) -> None:
        copies = int(task.copies[number])
        waiting[split] += [end_of_text, ids] * copies
        counts[split].add(counted, copies)
        if len(waiting[split]) > WRITE_AT_ONCE:
            write(split)

    def write(split: str) -> None:
        if waiting[split]:
            np.concatenate(waiting[split], dtype=dtype, casting="unsafe").tofile(files[split])
            waiting[split].clear()

    try:
        for number, raw in read_raw(task.part, task.copies > 0):
            if task.train_share is None:
                ids = None if has_unassigned[number] else tokenizer.encode_utf8(raw, out_of=part_bytes)
                if ids is None:
                    ids = encode(tokenizer, raw.decode("utf-8"), dtype)
                counted = Counts(len(ids) + 1, 1, len(raw), characters[number], words[number])
                take("val" if task.held_out[number] else "train", ids, counted)
                continue
            for split, piece in sides_of(task, number, raw.decode("utf-8")):
                ids = encode(tokenizer, piece, dtype)
                counted = Counts(len(ids) + 1, 1, len(piece.encode("utf-8")), len(piece), len(piece.split()))
                take(split, ids, counted)
        for split in SPLITS:
            write(split)
    finally:
        for file in files.values():
            file.close()
    write_json(report, {"key": task.key} | {split: asdict(counted) for split, counted in counts.items()})


def sides_of(task: EncodeTask, number: int, text: str) -> Iterator[tuple[str, str]]:
    """Yield the split, or both, that a document belongs to that is cut by position, and what of its text."""
    assert task.train_share is not None
    cut = int(len(text) * task.train_share)
    yield "train", text[:cut]
    if number == task.first_used:  # copies of the only document would repeat what is held out
        yield "val", text[cut:]


def encode(tokenizer: Tokenizer, text: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the token ids of a text of any length."""
    pieces = [tokenizer.encode_array(piece).astype(dtype) for piece in tokenizer.cut(text, ENCODE_AT_ONCE)]
    return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]


@lru_cache(maxsize=1)
def load_tokenizer(path: Path, _fingerprint: str) -> Tokenizer:
    """Load a tokenizer, once a process for each fingerprint."""
    return Tokenizer.load(path)


def join_parts(
    parts: Sequence[Part], folder: Path, end_of_text_id: int, dtype: str
) -> tuple[dict[str, Counts], dict[str, str]]:
    """Write `train.bin` and `val.bin` from encoded parts, each closed by an end-of-text token.

    Returns:
        What each split holds, and the SHA-256 of each file by its name.
    """
    counts = {split: Counts() for split in SPLITS}
    for part in parts:
        report = read_json(part.text.with_suffix(".counts.json"), DataError)
        for split in SPLITS:
            counts[split].add(Counts(**report[split]))
    sums = {}
    for split in SPLITS:
        path = folder / f"{split}.bin"
        with path.open("wb") as raw:
            file = _Hashing(raw)
            for part in parts:
                with part.text.with_suffix(f".{split}.bin").open("rb") as tokens:
                    shutil.copyfileobj(tokens, file, 2**20)
            file.write(np.array([end_of_text_id], dtype=np.dtype(dtype).newbyteorder("<")).tobytes())
        counts[split].tokens += 1
        sums[path.name] = file.sum.hexdigest()
    return counts, sums


class _Hashing:
    """A file that is written, and its SHA-256 on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sum = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sum.update(data)
        return self.file.write(data)
