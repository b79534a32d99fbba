import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sheepop.data.cleaning import CLEANINGS, EMPTY_LINES, INVISIBLE, LINE_ENDS, TRAILING_SPACE, clean


def test_none_leaves_the_text_alone() -> None:
    assert clean("a\r\nb\x00 \n\n\n\n\n\n", "none") == "a\r\nb\x00 \n\n\n\n\n\n"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\r\nb\rc\u2028d\u0085e", "a\nb\nc\nd\ne"),
        ("a\x00b\x1b[0m\x7f", "ab[0m"),
        ("\ufeffa\u200e\u202eb\ud800c", "abc"),
        ("a  \t\nb\t", "a\nb"),
        ("a\n\n\n\n\n\nb\n\nc", "a\n\n\nb\n\nc"),
        ("\tif x:\n\t\ty  = 1\n", "\tif x:\n\t\ty  = 1\n"),
        ("naïve 日本語 👩‍👩‍👧", "naïve 日本語 👩‍👩‍👧"),
    ],
)
def test_standard_removes_what_no_reader_sees(text: str, cleaned: str) -> None:
    assert clean(text, "standard") == cleaned


def test_repair_mends_wrong_decoding_and_keeps_typography() -> None:
    assert clean("cafÃ© “quoted” ﬁne &amp; e\u0301", "repair") == "café “quoted” ﬁne &amp; é"


@pytest.mark.parametrize("cleaning", CLEANINGS)
@given(st.text())
@example("À\x0c\x86")  # looks like wrong decoding once the control character has gone
def test_cleaning_twice_is_cleaning_once(cleaning: str, text: str) -> None:
    once = clean(text, cleaning)  # type: ignore[arg-type]
    assert clean(once, cleaning) == once  # type: ignore[arg-type]


@given(st.text(alphabet=st.characters() | st.sampled_from(" \t\r\n\x00\u2028\ufeff")))
def test_the_short_cuts_change_nothing(text: str) -> None:
    slow = INVISIBLE.sub("", LINE_ENDS.sub("\n", text))
    slow = EMPTY_LINES.sub("\n\n\n", TRAILING_SPACE.sub("", slow))
    assert clean(text, "standard") == slow
