"""Files → cleaned documents in a working folder, in parts that fit into memory, encoded where the tokenizer is given.

A unit is a run of neighbouring files, read by one worker; what it yields is cut into parts (`parts.py`). A unit is
named for all that its content follows from, and its `.json` is written last: where that stands, the work is done, by
this run, by one that was killed, or by one that had fewer files.

Where a tokenizer is given, documents are encoded while they are at hand, and their text is not kept: the few texts that
are asked for later are read from the files again. One that is yet to be trained needs the text twice, so it is kept.
"""

import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sheepop.data.batch import Batch
from sheepop.data.cleaning import Cleaning, clean
from sheepop.data.documents import RawDocument, raw_documents_of_file
from sheepop.data.duplicates import content_hash
from sheepop.data.filters import FilterSettings, reason_to_drop
from sheepop.data.parts import Part, PartWriter, Unit, read_kept
from sheepop.data.pii import replace_pii
from sheepop.data.shards import encode_documents, load_tokenizer
from sheepop.utils.errors import ChangedError, DataError
from sheepop.utils.files import read_json, sha256_of_file, to_json, write_json

UNIT_BYTES = 16_000_000  # of files that one worker reads
PART_BYTES = 16_000_000  # of text
BATCH_BYTES = 1_000_000  # of text that is looked at together: as much as a core's cache holds
FILES_A_UNIT = 64  # on average, where files are small
GATHER_VERSION = 4  # to be raised when the same files and settings give other documents or parts
GIVEN_TOKENIZER = "given.json"  # in the working folder, where a trained one has another name
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
        tokenizer: fingerprint of the one in the working folder that documents are encoded with; None keeps their text.
    """

    separator: str | None
    cleaning: Cleaning = "none"
    filters: FilterSettings = field(default_factory=FilterSettings)
    find_near_duplicates: bool = False
    strict: bool = False
    tokenizer: str | None = None


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


@dataclass
class Found:
    """What reading a unit found, beside its documents."""

    files: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    encodings: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, Dropped] = field(default_factory=dict)


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
    tokenizer = load_tokenizer(folder / GIVEN_TOKENIZER, settings.tokenizer) if settings.tokenizer else None
    found = Found()
    parts = PartWriter(unit, folder, PART_BYTES, with_signatures=settings.find_near_duplicates)
    for documents, batch in _read(unit, settings, found):
        encoded = None
        if tokenizer:
            encoded = encode_documents(tokenizer, [document.raw for document in documents], batch.has_unassigned())
        parts.add(documents, batch, encoded)
    parts.close()
    write_json(report, {"parts": parts.documents, "names": list(parts.names)} | asdict(found))


def _read(unit: Unit, settings: GatherSettings, found: Found) -> Iterator[tuple[Sequence[RawDocument], Batch]]:
    """Yield the documents of a unit as they go on, about a megabyte at a time; adds to `found`."""
    waiting: list[RawDocument] = []
    waiting_bytes = 0
    for path in unit.paths:
        try:
            documents = raw_documents_of_file(
                path, separator=settings.separator, strict=settings.strict, skipped=found.skipped
            )
            for document in documents:
                found.encodings[document.encoding] = found.encodings.get(document.encoding, 0) + 1
                waiting.append(document)
                waiting_bytes += len(document.raw)
                if waiting_bytes >= min(BATCH_BYTES, PART_BYTES):
                    yield from _clean_and_filter(waiting, settings, found.dropped)
                    waiting, waiting_bytes = [], 0
            found.files.append({"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of_file(path)})
        except FileNotFoundError:
            raise ChangedError(f"{path} went away while it was read. Run the command again.") from None
        except ChangedError:
            raise
        except DataError as error:
            if unit.named or settings.strict:
                raise
            found.skipped.append(str(error))
    yield from _clean_and_filter(waiting, settings, found.dropped)


def _clean_and_filter(
    documents: Sequence[RawDocument], settings: GatherSettings, dropped: dict[str, Dropped]
) -> Iterator[tuple[Sequence[RawDocument], Batch]]:
    """Yield the documents as they go on, also as a batch, unless none is left.

    None of the given ones is empty. What needs neither cleaning nor filters is never decoded.
    """
    if not documents:
        return
    batch = Batch.of([document.raw for document in documents])
    if settings.cleaning == "repair" or settings.filters != FilterSettings():
        is_unusual = np.ones(len(documents), dtype=bool)
    else:
        is_unusual = batch.has_surrogates()
        if settings.cleaning == "standard":
            is_unusual |= batch.may_need_cleaning()
    if not is_unusual.any():
        yield documents, batch
        return
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
    if kept:
        yield kept, Batch.of([document.raw for document in kept])


def _reason_to_drop(text: str, filters: FilterSettings) -> str | None:
    if not text.strip():
        return "empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return reason_to_drop(text, filters)


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


def parts_of(unit: Unit, folder: Path, documents: Sequence[int]) -> list[Part]:
    """Return a gathered unit's parts, which hold so many documents each, in order."""
    return [Part(unit, folder, number, sum(documents[:number])) for number in range(len(documents))]


def read_texts(
    part: Part, settings: GatherSettings, wanted: NDArray[np.bool_] | None = None
) -> Iterator[tuple[int, str]]:
    """Yield the number and text of a part's documents, all or those that are wanted.

    Raises:
        ChangedError: the text was not kept, and is not any more what its file holds.
    """
    if settings.tokenizer is None:
        for number, raw in read_kept(part, wanted):
            yield number, raw.decode("utf-8")
        return
    hashes = np.load(part.index)["hashes"].tolist()
    number = -part.first
    for documents, _ in _read(part.unit, settings, Found()):
        for document in documents:
            if number >= 0 and (wanted is None or wanted[number]):
                if content_hash(document.text) != hashes[number]:
                    raise ChangedError(f"{document.source} changed after it was read. Run the command again.")
                yield number, document.text
            number += 1
            if number == len(hashes):
                return
