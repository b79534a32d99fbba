"""Planned documents → token files of the splits, part by part."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sheepop.data.corpus import SPLITS
from sheepop.data.gather import Part, read_raw, read_texts
from sheepop.data.tokenizer import Tokenizer
from sheepop.utils.errors import DataError
from sheepop.utils.files import read_json, write_json

COPY_AT_ONCE = 4 * 2**20  # bytes
ENCODE_AT_ONCE = 1_000_000  # characters, or bytes of several documents


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
    index = np.load(task.part.index)
    part_bytes = int(index["bytes"].sum())
    counts = {split: Counts() for split in SPLITS}
    files = {split: task.part.text.with_suffix(f".{split}.bin").open("wb") for split in SPLITS}
    waiting: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    waiting_bytes = 0
    unsure = index["has_unassigned"]

    def write_waiting(*, is_sure: bool) -> None:
        for split, documents in waiting.items():
            ids = tokenizer.encode_documents(documents, out_of=part_bytes) if is_sure and documents else None
            if ids is None:
                ids = encode_one_by_one(tokenizer, [raw.decode("utf-8") for raw in documents], dtype)
            ids.astype(dtype).tofile(files[split])
            counts[split].tokens += len(ids)
            documents.clear()

    try:
        if task.train_share is None:
            for number, raw in read_raw(task.part, task.copies > 0):
                if unsure[number] or waiting_bytes > ENCODE_AT_ONCE:
                    write_waiting(is_sure=True)
                    waiting_bytes = 0
                waiting["val" if task.held_out[number] else "train"] += [raw] * int(task.copies[number])
                waiting_bytes += len(raw)
                if unsure[number]:
                    write_waiting(is_sure=False)
            write_waiting(is_sure=True)
            for split, is_inside in (("train", ~task.held_out), ("val", task.held_out)):
                copies = np.where(is_inside, task.copies, 0).astype(np.int64)
                counts[split].documents = int(copies.sum())
                for name in ("bytes", "characters", "words"):
                    setattr(counts[split], name, int(copies @ index[name].astype(np.int64)))
        else:
            for number, text in read_texts(task.part, task.copies > 0):
                for split, piece in sides_of(task, number, text):
                    times = int(task.copies[number])
                    ids = encode_one_by_one(tokenizer, [piece], dtype)
                    np.tile(ids, times).tofile(files[split])
                    counted = Counts(len(ids), 1, len(piece.encode("utf-8")), len(piece), len(piece.split()))
                    counts[split].add(counted, times)
    finally:
        for file in files.values():
            file.close()
    write_json(report, {"key": task.key} | {split: asdict(counted) for split, counted in counts.items()})


def encode_one_by_one(tokenizer: Tokenizer, texts: Sequence[str], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the token ids of documents, each behind the end-of-text token."""
    end_of_text = np.array([tokenizer.end_of_text_id], dtype=dtype)
    ids = [piece for text in texts for piece in (end_of_text, encode(tokenizer, text, dtype))]
    return np.concatenate(ids) if ids else end_of_text[:0]


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
    end = np.array([end_of_text_id], dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
    sums = {}
    with ThreadPoolExecutor(1) as pool:
        for split in SPLITS:
            path, digest = folder / f"{split}.bin", hashlib.sha256()
            with path.open("wb") as file:
                for block in chain(_blocks([part.text.with_suffix(f".{split}.bin") for part in parts]), [end]):
                    hashed = pool.submit(digest.update, block)  # the two take about as long, and share nothing
                    file.write(block)
                    hashed.result()
            counts[split].tokens += 1
            sums[path.name] = digest.hexdigest()
    return counts, sums


def _blocks(paths: Sequence[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while block := file.read(COPY_AT_ONCE):
                yield block
