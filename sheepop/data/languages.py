"""Which language a text is in."""

import functools
from collections.abc import Callable

from sheepop.utils.errors import DataError

UNDETERMINED = "und"  # ISO 639-2's code for a language that cannot be told
FEWEST_LETTERS = 20
# A model of byte n-grams is sure long before this; parts from the whole text outvote a foreign heading or quotation.
PARTS = 3
PART_CHARACTERS = 700


def language_of(text: str) -> str:
    """Return the code of the text's language after ISO 639-1, or "und" where there are too few letters to tell.

    By langid's naive Bayes over byte n-grams (Lui and Baldwin 2012), in the implementation `py3langid`, on three
    parts of the text. Short texts are often told wrong.

    Raises:
        DataError: the library is not installed.
    """
    classify = _classifier()
    shown = parts_of(text)
    if sum(map(str.isalpha, shown)) < FEWEST_LETTERS:
        return UNDETERMINED
    code = classify(shown)[0]
    return UNDETERMINED if code == "zxx" else code


def parts_of(text: str) -> str:
    """Return a long text's beginning, middle and end, a short one whole."""
    if len(text) <= PARTS * PART_CHARACTERS:
        return text
    last = len(text) - PART_CHARACTERS
    starts = [number * last // (PARTS - 1) for number in range(PARTS)]
    return "\n".join(text[start : start + PART_CHARACTERS] for start in starts)


@functools.cache
def _classifier() -> Callable[[str], tuple[str, float]]:
    try:
        from py3langid import classify
    except ImportError:
        raise DataError(
            "Telling languages needs the package py3langid, which is not installed. Install it with "
            "`pip install 'sheepop[quality]'`, or leave the languages out."
        ) from None
    return classify  # type: ignore[no-any-return]
