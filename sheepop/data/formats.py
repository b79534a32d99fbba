"""Pages, books and pictures → text, each by the library that is kept for it: HTML, XML, PDF, and images by OCR."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from sheepop.data.encodings import decode_page
from sheepop.utils.errors import DataError

MAX_PAGE_BYTES = 64 * 2**20
BLOCK_BYTES = 2**16
INSTALL = "Install it: `pip install 'sheepop[formats]'`."


def text_of_html(stream: BinaryIO, where: str) -> tuple[str, str]:
    """Return the main text of a web page, without menus and footers, and the encoding of the page.

    By trafilatura (Barbaresi 2021, "Trafilatura: a web scraping library and command-line tool for text discovery and
    extraction"). A page where it finds no main text gives all of its text.

    Raises:
        DataError: no text, larger than MAX_PAGE_BYTES, or the library is missing.
    """
    raw = stream.read(MAX_PAGE_BYTES + 1)
    if len(raw) > MAX_PAGE_BYTES:
        raise DataError(
            f"{where} is a web page of more than {MAX_PAGE_BYTES:,} bytes. Convert it to text, or leave it out."
        )
    page, encoding = decode_page(raw, where)
    try:
        import trafilatura
    except ModuleNotFoundError:
        raise DataError(f"{where} is a web page, which needs trafilatura. {INSTALL}") from None
    with _quiet("trafilatura"):
        whole = page if "<html" in page.lower() else f"<html><body>{page}</body></html>"
        text = trafilatura.extract(whole, include_comments=False) or trafilatura.html2txt(whole)
    if not text or not text.strip():
        raise DataError(f"{where} is a web page without text. Leave it out.")
    return text, encoding


def texts_of_xml(stream: BinaryIO, where: str) -> Iterator[str]:
    """Yield the text of an XML file in pieces, elements on lines of their own but for those inside running text.

    Entities that the file defines itself are never expanded, and nothing is fetched.

    Raises:
        DataError: not XML (says where), or lxml is missing.
    """
    try:
        from lxml import etree
    except ModuleNotFoundError:
        raise DataError(f"{where} is XML, which needs lxml. {INSTALL}") from None
    collector = _XmlText()
    parser = etree.XMLParser(target=collector, resolve_entities=False, no_network=True, load_dtd=False)
    try:
        while block := stream.read(BLOCK_BYTES):
            parser.feed(block)
            yield collector.take()
        parser.close()
        yield collector.take()
    except etree.XMLSyntaxError as error:
        raise DataError(f"{where} is not XML that can be read: {error.msg}. Mend it, or leave it out.") from None


class _XmlText:
    """Collects text while a parser reports what it meets."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._last = "\n"
        self._line_ends = False
        self._has_text: list[bool] = []  # of each open element: running text of its own

    def start(self, _tag: str, _attributes: object) -> None:
        self._line_ends |= not (self._has_text and self._has_text[-1])
        self._has_text.append(False)

    def end(self, _tag: str) -> None:
        self._has_text.pop()
        self._line_ends |= not (self._has_text and self._has_text[-1])

    def data(self, text: str) -> None:
        if not text.strip():
            if "\n" in text:
                self._line_ends = True
            elif not self._line_ends:
                self._add(text)
            return
        if self._line_ends and not text[0].isspace() and self._last != "\n":
            self._add("\n")
        self._line_ends = False
        self._has_text[-1] = True
        self._add(text)

    def close(self) -> None:
        pass

    def take(self) -> str:
        text = "".join(self._pieces)
        self._pieces.clear()
        return text

    def _add(self, text: str) -> None:
        self._pieces.append(text)
        self._last = text[-1]


def text_of_pdf(file: BinaryIO, where: str) -> str:
    """Return the text of a PDF that can seek, pages parted by blank lines.

    Raises:
        DataError: damaged, locked with a password, without text (a scan), or pypdf is missing.
    """
    try:
        import pypdf
    except ModuleNotFoundError:
        raise DataError(f"{where} is a PDF, which needs pypdf. {INSTALL}") from None
    with _quiet("pypdf"):
        try:
            reader = pypdf.PdfReader(file)
            # Many are encrypted with an empty password, only to forbid printing.
            is_locked = reader.is_encrypted and not reader.decrypt("")
            pages = [] if is_locked else [page.extract_text().strip() for page in reader.pages]
        except Exception as error:  # damaged files make pypdf raise nearly everything
            raise DataError(f"{where} is a PDF that cannot be read: {error or type(error).__name__}.") from None
    if is_locked:
        raise DataError(f"{where} is locked with a password. Save a copy without one.")
    text = "\n\n".join(page for page in pages if page)
    if not text:
        raise DataError(
            f"{where} has no text in its {len(pages)} pages; it may be a scan. Save the pages as images for OCR."
        )
    return text.encode("utf-8", errors="ignore").decode("utf-8")  # fonts may map a glyph to half a surrogate pair


def text_of_image(file: BinaryIO, where: str) -> str:
    """Return the text that Tesseract sees in an image, frame by frame.

    Raises:
        DataError: not an image that can be read, no text in it, or no pytesseract, pillow or Tesseract.
    """
    try:
        import pytesseract
        from PIL import Image, ImageSequence, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise DataError(
            f"{where} is an image, whose text needs {error.name}. Install it: `pip install 'sheepop[ocr]'`, and the "
            "system's package tesseract-ocr."
        ) from None
    try:
        with Image.open(file) as image:
            texts = [pytesseract.image_to_string(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
    except pytesseract.TesseractNotFoundError:
        raise DataError(
            f"{where} is an image, whose text needs Tesseract. Install the system's package (for instance "
            "`apt install tesseract-ocr`), or leave images out."
        ) from None
    except pytesseract.TesseractError as error:
        raise DataError(f"{where} is an image that Tesseract could not read: {error.message}.") from None
    except UnidentifiedImageError:
        raise DataError(f"{where} is an image that cannot be read: it is damaged, or of an unknown kind.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} is an image that cannot be read: {error}.") from None
    text = "\n\n".join(piece.strip() for piece in texts if piece.strip())
    if not text:
        raise DataError(f"{where} is an image without text that Tesseract can see. Leave it out.")
    return text


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library's own warnings from the terminal: what matters is said in our errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
