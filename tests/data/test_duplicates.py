import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepop.data.duplicates import (
    NUM_HASHES,
    band_sizes,
    content_hash,
    hash_words,
    minhash_signature,
    near_duplicates,
    shingles,
    similar_earlier,
    words_of,
)
from sheepop.utils.errors import ConfigError

VOCABULARY = [f"w{number}" for number in range(5000)]


def random_words(seed, count=400):
    return random.Random(seed).choices(VOCABULARY, k=count)


def jaccard(first, second):
    sets = [{tuple(words[n : n + 5]) for n in range(len(words) - 4)} for words in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_content_hash_is_the_same_everywhere():
    # printf sheep | b2sum -l 64
    assert content_hash("sheep").to_bytes(8, "little").hex() == "3ac81ffa8e296c1c"
    assert len({content_hash(text) for text in ("sheep", "Sheep", "sheep ", "", "\ud800")}) == 5


def test_words_have_no_case_and_no_punctuation():
    assert words_of("The sheep's HILL—2 dogs.") == ["the", "sheep", "s", "hill", "2", "dogs"]
    assert words_of("羊が好き sheep") == ["羊", "が", "好", "き", "sheep"]


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 6))
def test_shingles_are_equal_exactly_where_the_runs_are(words, length):
    numbers = shingles(hash_words(words), length)
    runs = [tuple(words[n : n + length]) for n in range(len(words) - length + 1)]
    assert len(numbers) == len(runs)
    assert len(set(numbers.tolist())) == len(set(runs))
    assert len(set(zip(numbers.tolist(), runs, strict=True))) == len(set(runs))


@pytest.mark.parametrize("changed", [0, 2, 8, 40])
def test_signatures_estimate_the_similarity_of_the_texts(changed):
    first = random_words(1)
    second = list(first)
    for place in random.Random(2).sample(range(len(second)), changed):
        second[place] = "other"
    signatures = [minhash_signature(" ".join(words)) for words in (first, second)]
    expected = jaccard(first, second)
    deviation = (expected * (1 - expected) / NUM_HASHES) ** 0.5
    assert abs(np.mean(signatures[0] == signatures[1]) - expected) <= 4 * deviation


def test_signatures_do_not_see_case_and_layout():
    text = "The old sheep sees the dog on the hill, and goes."
    assert (minhash_signature(text) == minhash_signature(text.upper().replace(" ", "\n"))).all()
    assert minhash_signature(text).dtype == np.uint32
    assert minhash_signature(text).shape == (NUM_HASHES,)


def test_short_texts_have_signatures_of_their_own():
    texts = ["", "!?", "sheep", "dog", "sheep dog", "dog sheep", "a b c d", "a b c d e"]
    signatures = np.stack([minhash_signature(text) for text in texts])
    assert similar_earlier(signatures, threshold=0.5).tolist() == [-1, 0, -1, -1, -1, -1, -1, -1]


def test_a_long_text_is_the_union_of_its_runs():
    words = random_words(3, count=9000)  # more runs than are worked on at once
    cut = 5000
    halves = [minhash_signature(" ".join(part)) for part in (words[:cut], words[cut - 4 :])]
    assert (minhash_signature(" ".join(words)) == np.minimum(*halves)).all()


@given(st.floats(0.05, 1))
def test_bands_find_what_is_similar_enough(threshold):
    bands, rows = band_sizes(threshold, NUM_HASHES)
    assert bands * rows <= NUM_HASHES
    assert rows == 1 or 1 - (1 - threshold**rows) ** bands >= 0.99


def slow_partners(signatures, threshold):
    equal = [[np.mean(a == b) >= threshold for b in signatures[:n]] for n, a in enumerate(signatures)]
    return [any(row) for row in equal]


@given(st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_near_duplicates_equal_the_comparison_of_all_pairs(seed, count):
    random_numbers = np.random.default_rng(seed)
    signatures = random_numbers.integers(0, 2**32, size=(count, NUM_HASHES), dtype=np.uint32)
    for later in range(1, count):
        if random_numbers.random() < 0.5:  # far from the threshold of 0.7, on either side
            share = random_numbers.choice([0.4, 0.95])
            copied = random_numbers.random(NUM_HASHES) < share
            earlier = random_numbers.integers(later)
            signatures[later, copied] = signatures[earlier, copied]
    found = near_duplicates(signatures, threshold=0.7)
    expected = np.array(slow_partners(signatures, 0.7), dtype=bool)
    assert not (found & ~expected).any()
    assert (expected & ~found).sum() <= 0.05 * count


def test_the_partner_is_earlier_and_similar():
    texts = [" ".join(random_words(seed)) for seed in (1, 2, 1, 3, 2, 1)]
    signatures = np.stack([minhash_signature(text) for text in texts])
    assert similar_earlier(signatures, threshold=0.8).tolist() in ([-1, -1, 0, -1, 1, 2], [-1, -1, 0, -1, 1, 0])
    assert near_duplicates(signatures, threshold=0.8).tolist() == [False, False, True, False, True, True]


def test_many_equal_documents_need_no_comparison_of_all_pairs():
    signatures = np.tile(minhash_signature("the same text in all of them"), (20_000, 1))
    assert near_duplicates(signatures, threshold=0.8).sum() == 19_999


def test_no_documents_have_no_duplicates():
    assert near_duplicates(np.empty((0, NUM_HASHES), dtype=np.uint32), threshold=0.8).shape == (0,)


@pytest.mark.parametrize("threshold", [0, -1, 1.1, float("nan")])
def test_a_threshold_out_of_range(threshold):
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        near_duplicates(np.empty((0, NUM_HASHES), dtype=np.uint32), threshold=threshold)
