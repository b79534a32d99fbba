"""Files → cleaned documents in a working folder, in parts that fit into memory.

A unit is a run of neighbouring files, read by one worker; what it yields is cut into parts. A part is a file of texts
behind each other and an `.npz` of one entry a document. A unit is named for all that its content follows from, and its
`.json` is written last: where that stands, the work is done, by this run, by one that was killed, or by one that had
fewer files.
"""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sheepop.data.cleaning import Cleaning, clean
from sheepop.data.documents import Document, documents_of_file
from sheepop.data.duplicates import content_hash, minhash_signature
from sheepop.data.filters import FilterSettings, reason_to_drop
from sheepop.data.pii import replace_pii
from sheepop.utils.errors import ChangedError, DataError
from sheepop.utils.files import read_json, sha256_of_file, to_json, write_json

UNIT_BYTES = 16_000_000  # of files that one worker reads
PART_BYTES = 16_000_000  # of text that one worker encodes
FILES_A_UNIT = 64  # on average, where files are small
GATHER_VERSION = 1  # to be raised when the same files and settings give other documents
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
    parts = _PartWriter(folder, unit.name)
    for path in unit.paths:
        try:
            documents = documents_of_file(path, separator=settings.separator, strict=settings.strict, skipped=skipped)
            for document in documents:
                encodings[document.encoding] = encodings.get(document.encoding, 0) + 1
                text = clean(document.text, settings.cleaning)
                if settings.filters.pii == "replace":
                    text = replace_pii(text)
                reason = _reason_to_drop(text, settings.filters)
                if reason:
                    dropped.setdefault(reason, Dropped()).add(document.text, document.source)
                else:
                    parts.add(Document(text, document.source), settings.find_near_duplicates)
            files.append({"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of_file(path)})
        except FileNotFoundError:
            raise ChangedError(f"{path} went away while it was read. Run the command again.") from None
        except ChangedError:
            raise
        except DataError as error:
            if unit.named or settings.strict:
                raise
            skipped.append(str(error))
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


def _reason_to_drop(text: str, filters: FilterSettings) -> str | None:
    if not text.strip():
        return "empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return reason_to_drop(text, filters)


class _PartWriter:
    """Texts into files of about `PART_BYTES`."""

    def __init__(self, folder: Path, unit: str) -> None:
        self.folder, self.unit, self.number = folder, unit, 0
        self._texts: list[bytes] = []
        self.names: dict[str, int] = {}  # where documents come from, numbered
        self._entries: list[tuple[int, int, int, int, int]] = []
        self._signatures: list[NDArray[np.uint32]] = []
        self._waiting = 0

    def add(self, document: Document, with_signature: bool) -> None:
        raw = document.text.encode("utf-8")
        self._texts.append(raw)
        self._waiting += len(raw)
        words = len(document.text.split())
        name = self.names.setdefault(document.source, len(self.names))
        self._entries.append((len(raw), len(document.text), words, content_hash(document.text), name))
        if with_signature:
            self._signatures.append(minhash_signature(document.text))
        if self._waiting >= PART_BYTES:
            self.close()

    def close(self) -> None:
        if not self._entries:
            return
        name = self.folder / f"{self.unit}-{self.number:06d}"
        with name.with_suffix(".text").open("wb") as file:
            file.writelines(self._texts)
        entries = np.array(self._entries, dtype=np.uint64)
        arrays = dict(zip(("bytes", "characters", "words", "hashes", "names"), entries.T, strict=True))
        if self._signatures:
            arrays["signatures"] = np.stack(self._signatures)
        np.savez(name.with_suffix(".npz"), **arrays)
        self.number += 1
        self._texts, self._entries, self._signatures, self._waiting = [], [], [], 0


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
    sizes = np.load(part.index)["bytes"].astype(np.int64)
    ends = np.cumsum(sizes)
    with part.text.open("rb") as file:
        for number, (size, end) in enumerate(zip(sizes.tolist(), ends.tolist(), strict=True)):
            if wanted is None or wanted[number]:
                file.seek(end - size)
                yield number, file.read(size).decode("utf-8")
