"""Files → cleaned documents in a working folder, in parts that fit into memory.

A unit is a run of neighbouring files, read by one worker; what it yields is cut into parts. A part is a file of texts
behind each other and an `.npz` of one entry a document, and of the lines that leakage is looked for by, so that nothing
but encoding reads the texts again. A unit is named for all that its content follows from, and its
`.json` is written last: where that stands, the work is done, by this run, by one that was killed, or by one that had
fewer files.
"""

import hashlib
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sheepop.data.batch import Batch
from sheepop.data.cleaning import Cleaning, clean
from sheepop.data.documents import RawDocument, raw_documents_of_file
from sheepop.data.duplicates import minhash_signature
from sheepop.data.filters import FilterSettings, reason_to_drop
from sheepop.data.pii import replace_pii
from sheepop.utils.errors import ChangedError, DataError
from sheepop.utils.files import read_json, sha256_of_file, to_json, write_json

UNIT_BYTES = 16_000_000  # of files that one worker reads
PART_BYTES = 16_000_000  # of text that one worker encodes
BATCH_BYTES = 1_000_000  # of text that is looked at together: as much as a core's cache holds
FILES_A_UNIT = 64  # on average, where files are small
GATHER_VERSION = 3  # to be raised when the same files and settings give other documents or parts
EXAMPLES = 3  # of what each filter dropped
EXAMPLE_CHARACTERS = 120


@dataclass(frozen=True)
class GatherSettings:
    """How files become documents.

    Attributes:
        separator: text that ends a document inside a file, or None.
        cleaning: see `cleaning.clean`.
        filters: which documents are dropped.
        find_near_duplicates: whether signatures are needed.
        strict: a file that cannot be read is an error, not skipped.
    """

    separator: str | None
    cleaning: Cleaning = "none"
    filters: FilterSettings = field(default_factory=FilterSettings)
    find_near_duplicates: bool = False
    strict: bool = False


@dataclass(frozen=True)
class Unit:
    """Neighbouring files of one source; those that the user named must be readable."""

    name: str
    source: int
    paths: tuple[Path, ...]
    named: bool


@dataclass(frozen=True)
class Part:
    """Documents of a unit, behind each other in `text`, with one entry each in `index`; `report` is the unit's."""

    source: int
    text: Path
    index: Path
    report: Path


@dataclass
class Dropped:
    """What one filter took out."""

    documents: int = 0
    bytes: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, text: str, source: str) -> None:
        """Count a document, and keep its beginning while there are few."""
        self.documents += 1
        self.bytes += len(text.encode("utf-8", errors="surrogatepass"))
        self.add_example(text, source)

    def has_enough_examples(self) -> bool:
        """Say whether more examples would be left out."""
        return len(self.examples) >= EXAMPLES

    def add_example(self, text: str, source: str) -> None:
        """Keep the beginning of a document while there are few."""
        if not self.has_enough_examples():
            beginning = text.strip()[:EXAMPLE_CHARACTERS].encode("utf-8", errors="replace").decode("utf-8")
            self.examples.append({"source": source, "text": beginning})

    def join(self, other: "Dropped") -> None:
        """Add what the same filter took out elsewhere."""
        self.documents += other.documents
        self.bytes += other.bytes
        self.examples = (self.examples + other.examples)[:EXAMPLES]


def units_of(files: Sequence[Path], sources: Sequence[Path], settings: GatherSettings) -> list[Unit]:
    """Group files, in their order, into units of at most about `UNIT_BYTES`, of one source each.

    Units also end where a file's name says so, so that a new file changes the unit that it falls into and no other.
    """
    units: list[Unit] = []
    group: list[Path] = []
    waiting, current = 0, (0, False)

    def close() -> None:
        nonlocal group, waiting
        if group:
            what = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in group]
            key = to_json([GATHER_VERSION, asdict(settings), current[1], what])
            name = hashlib.blake2b(key.encode("utf-8", errors="surrogateescape"), digest_size=12).hexdigest()
            units.append(Unit(name, current[0], tuple(group), current[1]))
            group, waiting = [], 0

    for path in files:
        source = next(n for n, source in enumerate(sources) if path == source or source in path.parents)
        place = (source, path == sources[source])
        size = path.stat().st_size
        begins_unit = zlib.crc32(path.name.encode("utf-8", errors="surrogateescape")) % FILES_A_UNIT == 0
        if place != current or begins_unit or waiting + size > UNIT_BYTES:
            close()
        current = place
        group.append(path)
        waiting += size
    close()
    return units


def gather(unit: Unit, folder: Path, settings: GatherSettings) -> None:
    """Read, clean and filter the documents of a unit into parts below `folder`; nothing if that was done before.

    Raises:
        DataError: a file that the user named cannot be read, or any file with `strict`.
        ChangedError: something wrote to a file, or took it away.
    """
    report = folder / f"{unit.name}.json"
    if report.exists():
        return
    files: list[dict[str, Any]] = []
    skipped: list[str] = []
    dropped: dict[str, Dropped] = {}
    encodings: dict[str, int] = {}
    parts = _PartWriter(folder, unit.name, settings.find_near_duplicates)
    waiting: list[RawDocument] = []
    waiting_bytes = 0

    def take() -> None:
        nonlocal waiting, waiting_bytes
        if waiting:
            parts.add(*_clean_and_filter(waiting, settings, dropped))
        waiting, waiting_bytes = [], 0

    for path in unit.paths:
        try:
            documents = raw_documents_of_file(
                path, separator=settings.separator, strict=settings.strict, skipped=skipped
            )
            for document in documents:
                encodings[document.encoding] = encodings.get(document.encoding, 0) + 1
                waiting.append(document)
                waiting_bytes += len(document.raw)
                if waiting_bytes >= min(BATCH_BYTES, PART_BYTES):
                    take()
            files.append({"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of_file(path)})
        except FileNotFoundError:
            raise ChangedError(f"{path} went away while it was read. Run the command again.") from None
        except ChangedError:
            raise
        except DataError as error:
            if unit.named or settings.strict:
                raise
            skipped.append(str(error))
    take()
    parts.close()
    write_json(
        report,
        {
            "parts": parts.number,
            "names": list(parts.names),
            "files": files,
            "skipped": skipped,
            "encodings": encodings,
            "dropped": {reason: vars(what) for reason, what in dropped.items()},
        },
    )


def _clean_and_filter(
    documents: Sequence[RawDocument], settings: GatherSettings, dropped: dict[str, Dropped]
) -> tuple[Sequence[RawDocument], Batch]:
    """Return the documents as they go on, also as a batch; what needs neither cleaning nor filters is never decoded.

    None of the given ones is empty.
    """
    batch = Batch.of([document.raw for document in documents])
    if settings.cleaning == "repair" or settings.filters != FilterSettings():
        is_unusual = np.ones(len(documents), dtype=bool)
    else:
        is_unusual = batch.has_surrogates()
        if settings.cleaning == "standard":
            is_unusual |= batch.may_need_cleaning()
    if not is_unusual.any():
        return documents, batch
    kept = []
    for document, unusual in zip(documents, is_unusual.tolist(), strict=True):
        if not unusual:
            kept.append(document)
            continue
        text = clean(document.text, settings.cleaning)
        if settings.filters.pii == "replace":
            text = replace_pii(text)
        reason = _reason_to_drop(text, settings.filters)
        if reason:
            dropped.setdefault(reason, Dropped()).add(document.text, document.source)
        else:
            kept.append(document._replace(raw=text.encode("utf-8")))
    return kept, Batch.of([document.raw for document in kept])


def _reason_to_drop(text: str, filters: FilterSettings) -> str | None:
    if not text.strip():
        return "empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return reason_to_drop(text, filters)


class _PartWriter:
    """Texts into files of about `PART_BYTES`, what is known of each document beside them."""

    def __init__(self, folder: Path, unit: str, with_signatures: bool) -> None:
        self.folder, self.unit, self.number, self.with_signatures = folder, unit, 0, with_signatures
        self.names: dict[str, int] = {}  # where documents come from, numbered
        self._file: BinaryIO | None = None
        self._columns: dict[str, list[NDArray[Any]]] = {}
        self._bytes = self._documents = 0

    def add(self, documents: Sequence[RawDocument], batch: Batch) -> None:
        """Write documents, given as a batch too, and close the part when it is full."""
        if not documents:
            return
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
        if self._file is None:
            self._file = self._path(".text").open("wb")
        self._file.write(batch.raw)
        self._bytes += len(batch.raw)
        self._documents += len(documents)
        if self._bytes >= PART_BYTES:
            self.close()

    def close(self) -> None:
        """End the part that is begun, if any."""
        if self._file is None:
            return
        self._file.close()
        arrays: dict[str, Any] = {name: np.concatenate(columns) for name, columns in self._columns.items()}
        np.savez(self._path(".npz"), **arrays)
        self.number += 1
        self._file, self._columns, self._bytes, self._documents = None, {}, 0, 0

    def _path(self, ending: str) -> Path:
        return (self.folder / f"{self.unit}-{self.number:06d}").with_suffix(ending)


def forget_others(units: Sequence[Unit], folder: Path) -> None:
    """Remove what was gathered and encoded of units that are not among these: their files are gone or changed."""
    names = {unit.name for unit in units}
    for path in folder.iterdir():
        unit = re.match(r"([0-9a-f]{24})[-.]", path.name)
        if unit and unit[1] not in names:
            path.unlink()


def read_report(unit: Unit, folder: Path) -> dict[str, Any]:
    """Return what `gather` wrote about a unit: parts, files, skipped, encodings, dropped."""
    return read_json(folder / f"{unit.name}.json", DataError)


def parts_of(unit: Unit, folder: Path, number: int) -> list[Part]:
    """Return a gathered unit's `number` parts, in order."""
    names = [folder / f"{unit.name}-{n:06d}" for n in range(number)]
    report = folder / f"{unit.name}.json"
    return [Part(unit.source, name.with_suffix(".text"), name.with_suffix(".npz"), report) for name in names]


def read_names(part: Part) -> list[str]:
    """Return for each of a part's documents where it comes from."""
    names = read_json(part.report, DataError)["names"]
    return [names[number] for number in np.load(part.index)["names"].tolist()]


def read_texts(part: Part, wanted: NDArray[np.bool_] | None = None) -> Iterator[tuple[int, str]]:
    """Yield the number and text of a part's documents, all or those that are wanted."""
    for number, raw in read_raw(part, wanted):
        yield number, raw.decode("utf-8")


def read_raw(part: Part, wanted: NDArray[np.bool_] | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the number and UTF-8 of a part's documents, all or those that are wanted."""
    sizes = np.load(part.index)["bytes"]
    ends = np.cumsum(sizes)
    with part.text.open("rb", buffering=BATCH_BYTES) as file:
        at = 0
        for number, (size, end) in enumerate(zip(sizes.tolist(), ends.tolist(), strict=True)):
            if wanted is None or wanted[number]:
                if at != end - size:
                    file.seek(end - size - at, os.SEEK_CUR)
                yield number, file.read(size)
                at = end
