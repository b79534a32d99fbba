"""A part: documents of a few files that are worked on together, and what is known of each of them, in a few files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sheepop.data.batch import Batch
from sheepop.data.documents import RawDocument
from sheepop.data.duplicates import minhash_signature
from sheepop.utils.errors import DataError
from sheepop.utils.files import read_json


@dataclass(frozen=True)
class Unit:
    """Neighbouring files of one source; those that the user named must be readable."""

    name: str
    source: int
    paths: tuple[Path, ...]
    named: bool


@dataclass(frozen=True)
class Part:
    """The part of a unit that begins with its document number `first`.

    There are the documents' `text`, their token `ids`, or both, behind each other. Beside them `index` has an entry for
    each document, and the lines that leakage is looked for by, so that nothing but encoding looks at the text again;
    `sizes` are the tokens of each. `report` is the unit's.
    """

    unit: Unit
    folder: Path
    number: int
    first: int = 0

    def _path(self, ending: str) -> Path:
        return self.folder / f"{self.unit.name}-{self.number:06d}{ending}"

    @property
    def text(self) -> Path:
        """UTF-8."""
        return self._path(".text")

    @property
    def index(self) -> Path:
        """An `.npz`."""
        return self._path(".npz")

    @property
    def ids(self) -> Path:
        """Little-endian, of the tokenizer's width; each document's behind the end-of-text token."""
        return self._path(".ids")

    @property
    def sizes(self) -> Path:
        """An `.npy`."""
        return self._path(".sizes.npy")

    @property
    def encoded(self) -> Path:
        """Says by which tokenizer the ids were made of the text."""
        return self._path(".encoded.json")

    @property
    def report(self) -> Path:
        """Stands where the whole unit is done."""
        return self.folder / f"{self.unit.name}.json"


def read_names(part: Part) -> list[str]:
    """Return for each of a part's documents where it comes from."""
    names = read_json(part.report, DataError)["names"]
    return [names[number] for number in np.load(part.index)["names"].tolist()]


def read_kept(part: Part, wanted: NDArray[np.bool_] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the number and UTF-8 of a part's documents whose text was kept, all or those that are wanted."""
    sizes = np.load(part.index)["bytes"].tolist()
    with part.text.open("rb") as file:
        begin = 0
        for number, size in enumerate(sizes):
            if wanted is None or wanted[number]:
                file.seek(begin)
                yield number, file.read(size)
            begin += size


class PartWriter:
    """Documents of a unit into parts of about `part_bytes` of text."""

    def __init__(self, unit: Unit, folder: Path, part_bytes: int, *, with_signatures: bool) -> None:
        self.unit, self.folder, self.part_bytes, self.with_signatures = unit, folder, part_bytes, with_signatures
        self.documents: list[int] = []  # of each part that is closed
        self.names: dict[str, int] = {}  # where documents come from, numbered
        self._part: Part | None = None
        self._content: BinaryIO | None = None
        self._columns: dict[str, list[NDArray[Any]]] = {}
        self._sizes: list[NDArray[np.int64]] = []
        self._bytes = self._documents = 0

    def add(
        self,
        documents: Sequence[RawDocument],
        batch: Batch,
        encoded: tuple[NDArray[Any], NDArray[np.int64]] | None,
    ) -> None:
        """Write documents, given as a batch too, and close the part when it is full.

        Args:
            encoded: their ids, and the number of ids of each, to write instead of the text.
        """
        names = [self.names.setdefault(document.source, len(self.names)) for document in documents]
        lines, line_documents = batch.long_lines()
        columns: dict[str, NDArray[Any]] = {
            "bytes": batch.ends - batch.begins,
            "characters": batch.characters(),
            "words": batch.words(),
            "hashes": batch.hashes(),
            "has_unassigned": batch.has_unassigned(),
            "names": np.array(names),
            "lines": lines,
            "line_documents": line_documents + self._documents,
        }
        if self.with_signatures:
            columns["signatures"] = np.stack([minhash_signature(document.text) for document in documents])
        for name, column in columns.items():
            self._columns.setdefault(name, []).append(column)
        if self._part is None or self._content is None:
            self._part = Part(self.unit, self.folder, len(self.documents))
            self._content = (self._part.text if encoded is None else self._part.ids).open("wb")
        if encoded is None:
            self._content.write(batch.raw)
        else:
            self._content.write(encoded[0].data)
            self._sizes.append(encoded[1])
        self._bytes += len(batch.raw)
        self._documents += len(documents)
        if self._bytes >= self.part_bytes:
            self.close()

    def close(self) -> None:
        """End the part that is begun, if any."""
        if self._part is None or self._content is None:
            return
        self._content.close()
        if self._sizes:
            np.save(self._part.sizes, np.concatenate(self._sizes))
        arrays: dict[str, Any] = {name: np.concatenate(columns) for name, columns in self._columns.items()}
        np.savez(self._part.index, **arrays)
        self.documents.append(self._documents)
        self._part = self._content = None
        self._columns, self._sizes, self._bytes, self._documents = {}, [], 0, 0
