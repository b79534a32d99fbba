"""Files and folders → documents, one at a time, so that a corpus need not fit into memory."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, NamedTuple

from sheepop.data.archives import MAX_DEPTH, Budget, decompressed, seekable, tar_members, zip_members
from sheepop.data.encodings import TextStream
from sheepop.data.formats import text_of_html, text_of_image, text_of_pdf, texts_of_xml
from sheepop.data.kinds import HEAD_BYTES, inner_name, kind_of
from sheepop.data.records import (
    Report,
    records_of_csv,
    records_of_json,
    records_of_json_lines,
    texts_of_parquet,
    texts_of_records,
)
from sheepop.data.splitting import split_at, split_stream, split_utf8
from sheepop.utils.errors import ChangedError, DataError
from sheepop.utils.files import read_json
from sheepop.utils.logging import log, warn

__all__ = [
    "Document",
    "RawDocument",
    "documents_of_file",
    "iter_documents",
    "list_files",
    "raw_documents_of_file",
    "read_text",
    "split_at",
]

# A folder with all of these is a prepared corpus: its files are made from text, and are not text to read.
PREPARED_FILES = frozenset({"manifest.json", "tokenizer.json", "train.bin"})
RECORD_KEYS = frozenset({"corpus", "licence", "sha256"})  # of the record beside a downloaded corpus, among others
MAX_LISTED = 20


@dataclass(frozen=True)
class Document:
    """A text that stands alone, where it came from, and the encoding that it was in.

    `source` is the path of the file, and for what is in an archive `a.zip!inner/b.txt`.
    """

    text: str
    source: str
    encoding: str = "utf-8"


class RawDocument(NamedTuple):
    """A document whose text is in UTF-8, halves of surrogate pairs (from JSON, for instance) as if they were whole.

    Most text that is read is UTF-8 and has no need of being decoded, which takes longer than all else.
    """

    raw: bytes
    source: str
    encoding: str = "utf-8"

    @property
    def text(self) -> str:
        """The text."""
        return self.raw.decode("utf-8", errors="surrogatepass")


def list_files(
    sources: Sequence[Path],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    unreadable: list[str] | None = None,
) -> list[Path]:
    """Return the files that the sources name, each once, folders searched recursively in sorted order.

    Hidden files and folders, prepared corpora and the records of downloaded ones are left out, and links to folders are
    not followed, so loops end. Patterns like `*.md` or `notes/*` are compared with the path inside of the source and
    with the file's name; those of `exclude` also with each folder on the way. Folders that cannot be opened are
    appended to `unreadable` with the reason, or without such a list warned of.

    Raises:
        DataError: a source does not exist or cannot be opened, or there is no file in any of them.
    """
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            files.extend(_files_in(source, include, exclude, unreadable))
        elif source.is_file():
            if _is_wanted(source.name, include, exclude):
                files.append(source)
        else:
            raise DataError(
                f"There is no file or folder {source}. Check the path; it is read as seen from {Path.cwd()}."
            )
    if not files:
        named = ", ".join(map(str, sources)) or "nothing"
        patterns = " that the patterns leave" if include or exclude else ""
        raise DataError(f"There are no files in {named}{patterns}. Name text files, or folders that hold some.")
    return list({path.resolve(): path for path in reversed(files)}.values())[::-1]


def documents_of_file(
    path: Path, *, separator: str | None, strict: bool = False, skipped: list[str] | None = None
) -> Iterator[Document]:
    """Yield the documents of one file of any kind as `raw_documents_of_file` does, as text.

    Raises:
        DataError, ChangedError: likewise.
    """
    for document in raw_documents_of_file(path, separator=separator, strict=strict, skipped=skipped):
        yield Document(document.text, document.source, document.encoding)


def raw_documents_of_file(
    path: Path, *, separator: str | None, strict: bool = False, skipped: list[str] | None = None
) -> Iterator[RawDocument]:
    """Yield the documents of one file of any kind; plain text is split at `separator`, and cut where it is too long.

    What cannot be read inside of it (a member of an archive, a line of JSONL) is left out; the reason is appended to
    `skipped`, or without such a list warned of. With `strict` it is an error.

    Raises:
        DataError: the file cannot be read, or nothing in it. It may come behind documents that were read before the
            damage.
        ChangedError: something wrote to the file meanwhile.
    """
    source = str(path)

    def report(message: str) -> None:
        if strict:
            raise DataError(message)
        if skipped is None:
            warn(message)
        else:
            skipped.append(message)

    try:
        stream = path.open("rb", buffering=HEAD_BYTES)
        with stream:
            before = os.fstat(stream.fileno())
            yield from _documents(path.name, source, stream, separator, Budget(source, before.st_size), report)
            after = path.stat()
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from None
    if (before.st_mtime_ns, before.st_size, before.st_ino) != (after.st_mtime_ns, after.st_size, after.st_ino):
        raise ChangedError(f"{source} changed while it was read. Wait until it is written, and start again.")


def iter_documents(
    sources: Sequence[Path],
    *,
    separator: str | None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    strict: bool = False,
    skipped: list[str] | None = None,
) -> Iterator[Document]:
    """Yield the documents of all files in order, as `documents_of_file` does, which files `list_files` tells.

    Files in folders that cannot be read are skipped, since folders hold all kinds of things; they are listed with the
    reason at the end, and appended to `skipped`. A file that was named itself must be readable.

    Raises:
        DataError: a source is missing, a file that was named or with `strict` any file cannot be read, or there is no
            text in all of them.
    """
    skipped = [] if skipped is None else skipped
    already = len(skipped)
    named = {source for source in sources if source.is_file()}
    encodings: Counter[str] = Counter()
    is_empty = True
    files = list_files(sources, include=include, exclude=exclude, unreadable=skipped)
    if strict and skipped[already:]:
        raise DataError(skipped[already])
    for path in files:
        count = 0
        encoding = "utf-8"
        try:
            for document in documents_of_file(path, separator=separator, strict=strict, skipped=skipped):
                count += 1
                encoding = document.encoding
                yield document
        except DataError as error:
            if strict or path in named:
                raise
            skipped.append(f"{error} (The {count:,} documents before that are used.)" if count else str(error))
        is_empty = is_empty and not count
        encodings[encoding] += 1
    _say_what_was_found(encodings, skipped[already:])
    if is_empty:
        raise DataError(
            f"There is no text in {', '.join(map(str, sources))}: the files are empty or none of them is text. "
            "Name files with text inside."
        )


def read_text(path: Path) -> str:
    """Read a text file as one string, in the encoding that it is in. Line ends are kept as they are.

    Raises:
        DataError: the file cannot be read or is not text; says at which byte.
    """
    try:
        with path.open("rb") as stream:
            return "".join(TextStream(stream, str(path)))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _files_in(
    source: Path, include: Sequence[str], exclude: Sequence[str], unreadable: list[str] | None
) -> Iterator[Path]:
    def explain(error: OSError) -> None:
        message = f"The folder {error.filename} cannot be opened: {error.strerror}."
        if Path(error.filename) == source:
            raise DataError(message)
        if unreadable is None:
            warn(message)
        else:
            unreadable.append(message)

    for folder, folders, names in os.walk(source, onerror=explain):
        if set(names) >= PREPARED_FILES:
            folders.clear()
            continue
        neighbours = {*names, *folders}
        inside = Path(folder).relative_to(source)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not _matches((inside / name).as_posix(), exclude)
        )
        for name in sorted(names):
            path = Path(folder) / name
            wanted = not name.startswith(".") and _is_wanted((inside / name).as_posix(), include, exclude)
            if wanted and path.is_file() and not _is_record(path, neighbours):
                yield path


def _is_record(path: Path, neighbours: Set[str]) -> bool:
    """Say whether a file is what `sheepop download` notes beside the text or the folder that it writes."""
    if path.suffix != ".json" or not neighbours & {path.stem, f"{path.stem}.txt"}:
        return False
    try:
        record = read_json(path, DataError)
    except DataError:
        return False
    return record.keys() >= RECORD_KEYS


def _is_wanted(relative: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return (not include or _matches(relative, include)) and not _matches(relative, exclude)


def _matches(relative: str, patterns: Sequence[str]) -> bool:
    name = relative.rpartition("/")[2]
    return any(
        fnmatchcase(relative, form) or fnmatchcase(name, form)
        for pattern in patterns
        for form in (pattern, pattern.removeprefix("**/").rstrip("/"))
    )


def _documents(
    name: str, source: str, stream: BinaryIO, separator: str | None, budget: Budget, report: Report, depth: int = 0
) -> Iterator[RawDocument]:
    """Yield the documents of a stream of any kind; `name` is what its ending is read from."""
    head = stream.peek(HEAD_BYTES)[:HEAD_BYTES]  # type: ignore[attr-defined]  # every stream here is buffered
    kind = kind_of(name, head)
    if depth > MAX_DEPTH:
        raise DataError(f"{source} is packed more than {MAX_DEPTH} times over. Unpack it, and name the files.")
    if kind in ("gzip", "zstd", "xz", "bzip2"):
        inner = decompressed(stream, kind, source, budget)
        yield from _documents(inner_name(name), source, inner, separator, budget, report, depth + 1)
    elif kind in ("zip", "tar"):
        if kind == "zip":
            with closing(seekable(stream, source)) as file:
                yield from _documents_of_members(
                    zip_members(file, source, budget), source, separator, budget, report, depth
                )
        else:
            yield from _documents_of_members(tar_members(stream, source), source, separator, budget, report, depth)
    elif kind == "text":
        text = TextStream(stream, source)
        for raw in split_utf8(text.in_utf8(), separator, source):
            yield RawDocument(raw, source, text.encoding)
    elif kind == "xml":
        for piece in split_stream(texts_of_xml(stream, source), separator, source):
            yield RawDocument(_to_utf8(piece), source)
    else:
        for whole, encoding in _texts(kind, name, source, stream, head, report):
            for piece in split_at(whole, separator):
                yield RawDocument(_to_utf8(piece), source, encoding)


def _documents_of_members(
    members: Iterator[tuple[str, BinaryIO]],
    source: str,
    separator: str | None,
    budget: Budget,
    report: Report,
    depth: int,
) -> Iterator[RawDocument]:
    is_readable = False
    reason = None
    for name, stream in members:
        try:
            yield from _documents(
                name.rpartition("/")[2], f"{source}!{name}", stream, separator, budget, report, depth + 1
            )
            is_readable = True
        except DataError as error:
            if budget.used > budget.limit:
                raise
            report(str(error))
            reason = reason or error
    if reason and not is_readable:
        raise DataError(f"{source} holds nothing that can be read. The first reason: {reason}")


def _to_utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def _texts(
    kind: str, name: str, source: str, stream: BinaryIO, head: bytes, report: Report
) -> Iterator[tuple[str, str]]:
    """Yield the texts of a file that is not plain text, each with its encoding."""
    if kind == "html":
        yield text_of_html(stream, source)
    elif kind == "jsonl":
        for text in texts_of_records(records_of_json_lines(stream, head, source), source, "line", report):
            yield text, "utf-8"
    elif kind in ("csv", "json"):
        decoded = TextStream(stream, source)
        is_table = kind == "csv"
        records = records_of_csv(decoded, name, source) if is_table else records_of_json(decoded, source)
        for text in texts_of_records(records, source, "row" if is_table else "value", report):
            yield text, decoded.encoding
    else:
        with closing(seekable(stream, source)) as file:
            if kind == "parquet":
                for text in texts_of_parquet(file, source):
                    yield text, "utf-8"
            else:
                yield (text_of_pdf if kind == "pdf" else text_of_image)(file, source), "utf-8"


def _say_what_was_found(encodings: Counter[str], skipped: Sequence[str]) -> None:
    others = {name: count for name, count in encodings.items() if name != "utf-8"}
    if others:
        found = ", ".join(f"{count} {name}" for name, count in sorted(others.items()))
        log(f"encodings other than UTF-8 were found in {sum(others.values())} files: {found}.")
    if skipped:
        warn(f"left out because it could not be read, {len(skipped)} in all:")
        for reason in skipped[:MAX_LISTED]:
            log(f"  {reason}")
        if len(skipped) > MAX_LISTED:
            log(f"  and {len(skipped) - MAX_LISTED} more.")
