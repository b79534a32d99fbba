"""Bytes → text, block by block: byte order marks, UTF-8 first, else the likeliest of the encodings that people use."""

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO

from sheepop.utils.errors import DataError

# UTF-32's little-endian mark begins with that of UTF-16, so it is tried first.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Guessing among all encodings that Python knows finds Hungarian of the Macintosh in French; these are in real use.
CANDIDATES = (
    *("cp1252", "cp1250", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256", "iso8859_2"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949"),
)
FIRST_BLOCK_BYTES = 8 * 2**20  # a file up to this size is judged as a whole
BLOCK_BYTES = 2**20
SAMPLE_BYTES = 64 * 1024
MIN_EVIDENCE = 3  # non-ASCII bytes; fewer fit nearly every encoding, and are more often damage
MAX_CONTROL_SHARE = 0.02
CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b"))
ADVICE = "Save it as UTF-8 text (for instance with `iconv -f LATIN1 -t UTF-8`), or leave it out."


class TextStream:
    """The text of a byte stream as an iterator over strings of bounded size; line ends are kept as they are.

    `encoding` names what the text that came last was decoded from: "utf-8" as long as all bytes were ASCII.

    Raises (while iterating):
        DataError: the bytes are not text; says at which byte.
    """

    def __init__(self, stream: BinaryIO, where: str) -> None:
        self.stream = stream
        self.where = where
        self.encoding = "utf-8"

    def __iter__(self) -> Iterator[str]:
        for decoder, block, offset, is_last in self._blocks():
            yield block.decode("ascii") if decoder is None else self._decode(decoder, block, offset, is_last)

    def in_utf8(self) -> Iterator[bytes]:
        """Yield the text as UTF-8, whole characters at a time; what was UTF-8 is only looked at, not made anew."""
        for decoder, block, offset, is_last in self._blocks():
            if decoder is None:
                yield block
            elif self.encoding != "utf-8":
                yield self._decode(decoder, block, offset, is_last).encode("utf-8")
            else:
                whole = decoder.getstate()[0] + block
                self._decode(decoder, block, offset, is_last)
                yield whole[: len(whole) - len(decoder.getstate()[0])]

    def _blocks(self) -> Iterator[tuple[codecs.IncrementalDecoder | None, bytes, int, bool]]:
        """Yield blocks of bytes with what decodes them (None: ASCII), their offset, and whether each is the last."""
        block = self.stream.read(FIRST_BLOCK_BYTES)
        mark, encoding = byte_order_mark(block)
        encoding = encoding or utf_16_without_mark(block)
        if encoding is None or encoding == "utf-8":
            _refuse_controls(block, self.where)
        offset = len(mark)
        block = block[offset:]
        decoder: codecs.IncrementalDecoder | None = None
        while block:
            following = self.stream.read(BLOCK_BYTES)
            is_last = not following
            wide = encoding is not None and encoding.startswith(("utf-16", "utf-32"))
            if not wide and b"\0" in block:
                at = offset + block.index(b"\0")
                raise DataError(f"{self.where} is not text: there is a zero byte at offset {at}. {ADVICE}")
            if decoder is None and (encoding or not block.isascii()):
                # ASCII is the same in all these encodings, so the choice waits for the first byte that tells.
                encoding = encoding or _encoding_of(block, is_last)
                decoder = codecs.getincrementaldecoder(encoding)()
                self.encoding = encoding
            yield decoder, block, offset, is_last
            offset += len(block)
            block = following

    def _decode(self, decoder: codecs.IncrementalDecoder, block: bytes, offset: int, is_last: bool) -> str:
        pending = len(decoder.getstate()[0])
        try:
            return decoder.decode(block, is_last)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.where} is not {self.encoding.upper()} text: the byte 0x{error.object[error.start]:02x} at "
                f"offset {offset - pending + error.start} does not fit. {ADVICE}"
            ) from None


def byte_order_mark(head: bytes) -> tuple[bytes, str | None]:
    """Return the byte order mark that the bytes begin with and its encoding; `(b"", None)` without one."""
    return next(((mark, name) for mark, name in BYTE_ORDER_MARKS if head.startswith(mark)), (b"", None))


def utf_16_without_mark(head: bytes) -> str | None:
    """Return "utf-16-le" or "utf-16-be" where every other byte is mostly zero, and what it spells is printable."""
    sample = head[:4096]
    half = len(sample) // 2
    if b"\0" not in sample or not half:
        return None
    zeros = sample[0::2].count(0) / half, sample[1::2].count(0) / half
    if max(zeros) < 0.4 or min(zeros) > 0.05:
        return None
    encoding = "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    text = sample[: 2 * half].decode(encoding, errors="replace")
    printable = sum(character.isprintable() or character in "\t\r\n" for character in text)
    return encoding if printable >= 0.95 * len(text) else None


def decode_page(raw: bytes, where: str) -> tuple[str, str]:
    """Decode a web page: byte order mark, then UTF-8, then the charset it declares, then a guess; also its encoding.

    Raises:
        DataError: none of them fits.
    """
    mark, encoding = byte_order_mark(raw)
    names = [encoding] if encoding else ["utf-8", declared_charset(raw)]
    for name in filter(None, names):
        try:
            return raw[len(mark) :].decode(name), codecs.lookup(name).name
        except (UnicodeDecodeError, LookupError):
            continue
    guess = likeliest_encoding(raw)
    if guess is None:
        raise DataError(f"{where} is in no encoding that is known here. {ADVICE}")
    return raw.decode(guess, errors="replace"), guess


def declared_charset(head: bytes) -> str | None:
    """Return the encoding that HTML or XML names near its beginning."""
    found = re.search(rb"""(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_.:-]+)""", head[:4096])
    return found.group(1).decode("ascii") if found else None


def likeliest_encoding(block: bytes) -> str | None:
    """Return the likeliest encoding of text that is not UTF-8, by charset-normalizer; None where nothing can be told.

    Among equals Windows-1252 wins: it is by far the commonest of the old encodings.
    """
    try:
        from charset_normalizer import from_bytes
    except ModuleNotFoundError:
        raise DataError(
            "Text that is not UTF-8 needs charset-normalizer. Install it: `pip install 'sheepop[formats]'`, or save "
            "the text as UTF-8."
        ) from None
    high = [found.start() for found in re.finditer(rb"[\x80-\xff]", block[: 4 * SAMPLE_BYTES])]
    start = max(0, high[0] - SAMPLE_BYTES // 2) if high else max(0, _first_high(block) - SAMPLE_BYTES // 2)
    sample = block[start : start + SAMPLE_BYTES]
    matches = from_bytes(sample, cp_isolation=list(CANDIDATES), threshold=0.5)
    best, best_score = None, float("-inf")
    for match in matches:
        is_common = "cp1252" in match.could_be_from_charset
        letters = [character for character in str(match) if character.isalpha()]
        # Windows-1251 read as KOI8-R is Russian too, but with small and capital letters swapped.
        capitals = sum(character.isupper() for character in letters) / max(1, len(letters))
        score = round(match.coherence - 2 * match.chaos - capitals / 2 + 0.1 * is_common, 3)
        if score > best_score:
            best, best_score = "cp1252" if is_common else match.encoding, score
    return best


def _first_high(block: bytes) -> int:
    found = re.search(rb"[\x80-\xff]", block)
    return found.start() if found else 0


def _encoding_of(block: bytes, is_last: bool) -> str:
    """Return the encoding of a block with bytes beyond ASCII; "utf-8" also where it is UTF-8 with damage."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(block, is_last)
        return "utf-8"
    except UnicodeDecodeError:
        pass
    text = block.decode("utf-8", errors="surrogateescape")
    damaged = len(re.findall("[\udc80-\udcff]", text))
    whole = len(re.findall("[^\x00-\x7f\udc80-\udcff]", text))
    surrogates = len(
        re.findall(rb"\xed[\xa0-\xbf][\x80-\xbf]", block)
    )  # written by careless programs: UTF-8 with damage
    damaged, whole = damaged - 3 * surrogates, whole + surrogates
    if whole >= damaged or damaged < MIN_EVIDENCE:
        return "utf-8"
    guess = likeliest_encoding(block)
    try:
        codecs.getincrementaldecoder(guess or "utf-8")().decode(block, is_last)
    except UnicodeDecodeError:
        return "utf-8"
    return guess or "utf-8"


def _refuse_controls(head: bytes, where: str) -> None:
    sample = head[:SAMPLE_BYTES]
    controls = len(sample) - len(sample.translate(None, delete=CONTROLS))
    if controls > MAX_CONTROL_SHARE * len(sample):
        at = next(offset for offset, byte in enumerate(sample) if byte in CONTROLS)
        raise DataError(
            f"{where} is not text: {controls / len(sample):.0%} of its first bytes are control characters, the first "
            f"0x{sample[at]:02x} at offset {at}. Leave it out."
        )
