"""Cleaning: what is done to a document's text before anything else sees it."""

import re
from typing import Literal

from sheepop.utils.errors import DataError

Cleaning = Literal["none", "standard", "repair"]
CLEANINGS: tuple[Cleaning, ...] = ("none", "standard", "repair")

LINE_ENDS = re.compile("\r\n?|[\u0085\u2028\u2029]")
# Control characters without tab and newline, the marks of byte order and text direction, halves of surrogate pairs and
# code points that Unicode keeps free for ever: nothing that a reader sees.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff\ufffe\uffff]+"
)
TRAILING_SPACE = re.compile(r"[ \t]+$", re.MULTILINE)
EMPTY_LINES = re.compile(r"\n{4,}")
MOST_REPAIRS = 10  # of one text; two are usually enough to see that nothing changes any more


def clean(text: str, cleaning: Cleaning) -> str:
    """Return the text without what no reader sees.

    Args:
        cleaning: `none` leaves the text as it is; `standard` makes all line ends newlines and removes control
            characters, invisible marks, spaces before line ends and all but two of many empty lines; `repair` first
            mends text that was decoded wrongly ("cafÃ©") and joins characters and accents to Unicode's NFC form.

    Raises:
        DataError: `repair` needs a package that is not installed.
    """
    if cleaning == "none":
        return text
    if cleaning == "standard":
        return remove_unseen(text)
    # What stood around a character that goes may look like wrong decoding once it has gone, so until nothing changes.
    for _ in range(MOST_REPAIRS):
        before, text = text, remove_unseen(repair(text))
        if text == before:
            break
    return text


def remove_unseen(text: str) -> str:
    """Return the text without what no reader sees: the `standard` cleaning."""
    # Most texts need nothing, and each of these questions is answered many times as fast as a pattern is looked for.
    if not text.replace("\n", " ").replace("\t", " ").isprintable():
        text = INVISIBLE.sub("", LINE_ENDS.sub("\n", text))
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        text = TRAILING_SPACE.sub("", text)
    if "\n\n\n\n" in text:
        text = EMPTY_LINES.sub("\n\n\n", text)
    return text


def repair(text: str) -> str:
    """Mend wrongly decoded characters, and leave quotes, ligatures and widths as their author wrote them.

    Raises:
        DataError: the package `ftfy` is not installed.
    """
    try:
        import ftfy
    except ImportError:
        raise DataError("Repairing text needs the package ftfy. Install it: pip install 'sheepop[quality]'.") from None
    mended: str = ftfy.fix_text(
        text,
        unescape_html=False,
        uncurl_quotes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        fix_line_breaks=False,
        remove_terminal_escapes=True,
        normalization="NFC",
    )
    return mended
