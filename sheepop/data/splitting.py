"""A stream of text → documents: at a separator, and where a document grows too long at the end of a paragraph."""

from collections.abc import Iterable, Iterator
from itertools import chain

from sheepop.utils.logging import log

MAX_DOCUMENT_CHARACTERS = 8_000_000


def split_at(text: str, separator: str | None) -> list[str]:
    """Split a text into documents; line breaks around a separator and empty pieces belong to none of them."""
    if not separator or separator not in text:
        return [text] if text.strip() else []
    return [piece.strip("\r\n") for piece in text.split(separator) if piece.strip()]


def split_utf8(chunks: Iterable[bytes], separator: str | None, where: str) -> Iterator[bytes]:
    """Yield the documents of a text in UTF-8 as `split_stream` does, in UTF-8, without looking at each character.

    Args:
        chunks: of whole characters.
        separator, where: as for `split_stream`.
    """
    mark = separator.encode("utf-8") if separator else None
    rest, was_split = b"", False
    chunks = iter(chunks)
    for chunk in chunks:
        buffer = rest + chunk
        pieces = buffer.split(mark) if mark else [buffer]
        if max(map(len, pieces)) > MAX_DOCUMENT_CHARACTERS:  # bytes: perhaps too long, for which characters count
            texts = (chunk.decode("utf-8") for chunk in chain([buffer], chunks))
            yield from (piece.encode("utf-8") for piece in split_stream(texts, separator, where, was_split=was_split))
            return
        rest = pieces.pop()
        was_split = was_split or bool(pieces)
        yield from (whole for piece in pieces if not is_blank(whole := piece.strip(b"\r\n")))
    if was_split:
        rest = rest.strip(b"\r\n")
    if not is_blank(rest):
        yield rest


def is_blank(text: bytes) -> bool:
    """Say whether a text in UTF-8 is nothing but white space."""
    rest = text.lstrip()
    # White space that is none for `bytes` (U+001C, U+3000) begins with none of the printable characters of ASCII.
    if not rest or 0x20 < rest[0] < 0x7F:
        return not rest
    first = rest[:4].decode("utf-8", errors="ignore")[:1]  # a dash or a quotation mark most often
    return first.isspace() and not rest.decode("utf-8", errors="surrogatepass").strip()


def split_stream(chunks: Iterable[str], separator: str | None, where: str, *, was_split: bool = False) -> Iterator[str]:
    """Yield the documents of a text that comes in chunks; how it is cut into chunks makes no difference.

    The result is that of `split_at` on the whole, but a document of more than MAX_DOCUMENT_CHARACTERS is cut at the
    last end of a paragraph before that (else of a line, else of a word), which is said once. Where there is no
    separator, the pieces joined are the whole text. Holds one document and one chunk in memory.

    Args:
        chunks: the text.
        separator: stands between documents; None for one document.
        where: what the text comes from, for the message.
        was_split: whether a separator stood before the first chunk.
    """
    limit = MAX_DOCUMENT_CHARACTERS
    reserve = len(separator) if separator else 0
    buffer = ""
    was_cut = False
    for chunk in chunks:
        searched = max(0, len(buffer) - reserve)
        buffer += chunk
        start = 0
        while True:
            found = buffer.find(separator, max(start, searched), start + limit + reserve) if separator else -1
            if found >= 0:
                was_split = True
                piece = buffer[start:found].strip("\r\n")
                start = found + reserve
            elif len(buffer) - start > limit + reserve:
                # A separator that begins before the limit is whole in the buffer, so no cut falls inside of one.
                if not was_cut:
                    log(
                        f"{where}: a document of more than {limit / 1e6:g} million characters is cut at paragraph ends."
                    )
                was_cut = True
                end = paragraph_end(buffer, start, start + limit)
                piece = buffer[start:end].strip("\r\n") if was_split else buffer[start:end]
                start = end
            else:
                break
            if piece.strip():
                yield piece
        buffer = buffer[start:]
    rest = buffer.strip("\r\n") if was_split else buffer
    if rest.strip():
        yield rest


def paragraph_end(text: str, start: int, end: int) -> int:
    """Return the last place in (start, end] behind a blank line, else a line end, else a space, else `end` itself."""
    middle = start + (end - start) // 2
    for marks in (("\n\n", "\n\r\n"), ("\n",), (" ",)):
        places = [place + len(mark) for mark in marks if (place := text.rfind(mark, middle, end)) >= 0]
        if places:
            return max(places)
    return end


def lines_of(chunks: Iterable[str]) -> Iterator[str]:
    r"""Yield the lines of a text that comes in chunks, each with its "\n"; no other character ends a line."""
    rest = ""
    for chunk in chunks:
        lines = (rest + chunk).split("\n")
        rest = lines.pop()
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest
