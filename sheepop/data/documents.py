"""Files and folders → documents, one at a time, so that a corpus need not fit into memory."""

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sheepop.utils.errors import DataError
from sheepop.utils.logging import warn

BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
TEXT_FIELD = "text"
# A folder with all of these is a prepared corpus: its files are made from text, and are not text to read.
PREPARED_FILES = frozenset({"manifest.json", "tokenizer.json", "train.bin"})


@dataclass(frozen=True)
class Document:
    """A text that stands alone, and the file that it came from."""

    text: str
    source: str


def list_files(sources: Sequence[Path]) -> list[Path]:
    """Return the files that the sources name, each once, folders searched recursively in sorted order.

    Hidden files and folders and prepared corpora are left out, and links to folders are not followed, so loops end.

    Raises:
        DataError: a source does not exist, or there is no file in any of them.
    """
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            for folder, folders, names in os.walk(source):
                if set(names) >= PREPARED_FILES:
                    folders.clear()
                    continue
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                found = (Path(folder) / name for name in sorted(names) if not name.startswith("."))
                files.extend(path for path in found if path.is_file())
        elif source.is_file():
            files.append(source)
        else:
            raise DataError(
                f"There is no file or folder {source}. Check the path; it is read as seen from {Path.cwd()}."
            )
    if not files:
        named = ", ".join(map(str, sources)) or "nothing"
        raise DataError(f"There are no files in {named}. Name text files, or folders that hold some.")
    return list({path.resolve(): path for path in reversed(files)}.values())[::-1]


def iter_documents(sources: Sequence[Path], *, separator: str | None) -> Iterator[Document]:
    """Yield the documents of all files in order; a file is one document, or several where `separator` stands in it.

    `.jsonl` files hold one document a line, in the field "text". Files without text inside a folder are skipped with
    a warning, since folders hold all kinds of things; a file that was named must be text.

    Raises:
        DataError: a source is missing, is not text, or all of them are empty.
    """
    named = {source for source in sources if source.is_file()}
    is_empty = True
    for path in list_files(sources):
        try:
            texts = _texts_of_file(path)
        except DataError as error:
            if path in named:
                raise
            warn(f"skipped: {error}")
            continue
        for text in texts:
            for piece in split_at(text, separator):
                is_empty = False
                yield Document(piece, str(path))
    if is_empty:
        raise DataError(
            f"There is no text in {', '.join(map(str, sources))}: the files are empty or none of them is text. "
            "Name files with text inside."
        )


def split_at(text: str, separator: str | None) -> list[str]:
    """Split a file's text into documents; line breaks around a separator and empty pieces belong to none of them."""
    if not separator or separator not in text:
        return [text] if text.strip() else []
    return [piece.strip("\r\n") for piece in text.split(separator) if piece.strip()]


def read_text(path: Path) -> str:
    """Read a text file: UTF-8, or UTF-16 where it begins with a byte order mark. Line ends are kept as they are.

    Raises:
        DataError: the file cannot be read or is not text; says at which byte.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    encoding = "utf-8"
    for mark, name in BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            raw, encoding = raw[len(mark) :], name
            break
    advice = "Save it as UTF-8 text (for instance with `iconv -f LATIN1 -t UTF-8`), or leave it out."
    if encoding == "utf-8" and b"\0" in raw:
        raise DataError(f"{path} is not text: there is a zero byte at offset {raw.index(0)}. {advice}")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not {encoding.upper()} text: the byte 0x{raw[error.start]:02x} at offset {error.start} does "
            f"not fit. {advice}"
        ) from None


def _texts_of_file(path: Path) -> list[str]:
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [text]
    texts = []
    for number, line in enumerate(text.split("\n"), start=1):  # a JSON string may hold the other line ends of Unicode
        if not line.strip():
            continue
        try:
            document = json.loads(line)[TEXT_FIELD]
            document.encode("utf-8")  # an escape can name half of a surrogate pair, which is no character
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DataError(
                f'{path} line {number} is not a JSON object with a text in "{TEXT_FIELD}". Mend the line, or remove it.'
            ) from None
        texts.append(document)
    return texts
