"""Which tokens have something of their spelling in common."""

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from sheepop.data.spelling import spelling_groups


def companions(texts):
    members = defaultdict(set)
    for token, group in zip(*spelling_groups(texts), strict=True):
        members[group].add(texts[token])
    return list(members.values())


def test_cases_forms_and_endings_share_a_group_each():
    found = companions(["walk", " Walk", " walks", " walked", "talked", "", "x"])
    assert {"walk", " Walk"} in found  # the word
    assert {"walk", " Walk", " walks", " walked"} in found  # its beginning
    assert {" walked", "talked"} in found  # its end
    assert {" Walk", " walks", " walked"} in found  # after a space
    assert not any("" in group for group in found)


def test_characters_share_their_letter_and_their_case():
    found = companions(["a", "A", "b", "B", "\n"])
    assert {"a", "A"} in found
    assert {"A", "B"} in found


@given(st.lists(st.text(max_size=8)))
def test_pairs_are_sorted_and_groups_are_numbered_and_shared(texts):
    tokens, groups = spelling_groups(texts)
    pairs = list(zip(tokens.tolist(), groups.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert set(groups.tolist()) == set(range(len(set(groups.tolist()))))
    assert all(groups.tolist().count(group) > 1 for group in groups.tolist())
