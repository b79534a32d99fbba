"""What is asked of many documents at once equals what is asked of each."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.data.batch import Batch
from sheepop.data.characters import NUM_CODE_POINTS, SPACE, UNASSIGNED, UNSEEN, character_classes
from sheepop.data.cleaning import INVISIBLE, LINE_ENDS, clean
from sheepop.data.duplicates import content_hash
from sheepop.data.fast_bpe import has_unassigned

SPECIAL = "a \t\n\r\v\f\x1c\x1f\x7f\x85\xa0é\u1680\u2003\u2028\u200b\u200e\u205f\u3000\ufeff\uffff\u0378漢😀\U0010ffff"
documents = st.lists(
    st.text(st.one_of(st.sampled_from(SPECIAL), st.characters(exclude_categories=["Cs"])), min_size=1)
    | st.sampled_from(["a\n\n\n\nb", "\n\n", "\n\nx ", "tail\t", " \n", "x \ny", "a line of " + "text, " * 9 + "é"])
    | st.integers(50, 80).map(lambda n: "é" * n + "\n" + "x" * n),
    min_size=1,
)


def batch_of(texts: list[str]) -> Batch:
    return Batch.of([text.encode("utf-8", errors="surrogatepass") for text in texts])


@settings(deadline=None)
@given(documents)
def test_each_document_is_counted_by_itself(texts: list[str]) -> None:
    batch = batch_of(texts)
    assert (batch.ends - batch.begins).tolist() == [len(text.encode()) for text in texts]
    assert batch.characters().tolist() == [len(text) for text in texts]
    assert batch.words().tolist() == [len(text.split()) for text in texts]
    assert batch.hashes().tolist() == [content_hash(text) for text in texts]
    assert batch.has_unassigned().tolist() == [has_unassigned(text) for text in texts]
    assert not batch.has_surrogates().any()


@settings(deadline=None)
@given(documents)
def test_no_document_that_cleaning_would_change_is_passed_over(texts: list[str]) -> None:
    changed = [clean(text, "standard") != text for text in texts]
    assert batch_of(texts).may_need_cleaning()[changed].all()


def test_text_that_is_clean_is_not_cleaned() -> None:
    texts = ["It is\n\n\n“clean”.\n", "\tindented: naïve\u2009— 漢字"]
    assert not batch_of(texts).may_need_cleaning().any()


@settings(deadline=None)
@given(documents)
def test_long_lines_are_those_of_each_document(texts: list[str]) -> None:
    hashes, numbers = batch_of(texts).long_lines()
    expected = [
        (int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little"), number)
        for number, text in enumerate(texts)
        for line in text.split("\n")
        if len(line) >= 60 and len(line) % 8 == 3
    ]
    assert list(zip(hashes.tolist(), numbers.tolist(), strict=True)) == expected


def test_halves_of_surrogate_pairs_are_found() -> None:
    batch = batch_of(["a", "b\ud800", "é"])
    assert batch.has_surrogates().tolist() == [False, True, False]
    assert batch.may_need_cleaning().tolist() == [False, True, False]


@pytest.mark.parametrize("begin", range(0, NUM_CODE_POINTS, NUM_CODE_POINTS // 4))
def test_every_character_is_classed(begin: int) -> None:
    code_points = range(begin, begin + NUM_CODE_POINTS // 4, 7)
    classes = character_classes(np.array(code_points, dtype=np.uint32))
    for code_point, bits in zip(code_points, classes.tolist(), strict=True):
        character = chr(code_point)
        assert bool(bits & SPACE) == (not character.split())
        assert bool(bits & UNSEEN) == bool(INVISIBLE.search(character) or LINE_ENDS.search(character))
        if not 0xD800 <= code_point < 0xE000:
            assert bool(bits & UNASSIGNED) == has_unassigned(character)
