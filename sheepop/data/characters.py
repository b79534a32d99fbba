"""What preparation needs to know of a character, as bits, looked up for whole arrays of code points."""

import unicodedata

import numpy as np
from numpy.typing import NDArray

from sheepop.data.cleaning import INVISIBLE, LINE_ENDS

NUM_CODE_POINTS = 0x110000
SPACE = 2  # `str.split` splits at it
UNSEEN = 4  # standard cleaning removes or replaces it
UNASSIGNED = 8  # no character in the Unicode of this Python
SURROGATE = 16  # half of a pair
_KNOWN = 1
_classes = np.zeros(NUM_CODE_POINTS, dtype=np.uint8)  # filled with what occurs: asking of all takes a fifth of a second


def character_classes(code_points: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Return the bits of each code point, in their shape."""
    classes = _classes[code_points]
    if not classes.all():
        for code_point in np.unique(code_points[classes == 0]).tolist():
            _classes[code_point] = _class_of(chr(code_point))
        classes = _classes[code_points]
    return classes


def _class_of(character: str) -> int:
    category = unicodedata.category(character)
    return (
        _KNOWN
        | SPACE * character.isspace()
        | UNSEEN * bool(INVISIBLE.match(character) or LINE_ENDS.match(character))
        | UNASSIGNED * (category == "Cn")
        | SURROGATE * (category == "Cs")
    )
