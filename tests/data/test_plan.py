"""The plan of a corpus equals the one that is made document by document."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sheepop.data.plan import TRIES_FOR_THE_REST, first_occurrences, make_plan
from sheepop.utils.seeds import derive_seed, mix

documents = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=30)  # content, copies


def held_out_one_by_one(hashes: list[int], sizes: list[int], val_fraction: float, seed: int) -> set[int]:
    """Return the hashes that `make_plan` holds out, of documents that are all used."""
    groups: dict[int, int] = {}
    for content, size in zip(hashes, sizes, strict=True):
        groups[content] = groups.get(content, 0) + size
    order = sorted(groups, key=lambda content: int(mix(np.array([content ^ derive_seed(seed, "split")], np.uint64))[0]))
    target = val_fraction * sum(groups.values())
    taken: list[int] = []
    for content in order[:-1]:
        if sum(groups[other] for other in taken) + groups[content] / 2 > target:
            break
        taken.append(content)
    for content in order[len(taken) : len(taken) + TRIES_FOR_THE_REST]:
        total = sum(groups[other] for other in taken)
        if total + groups[content] / 2 <= target and len(taken) + 1 < len(order):
            taken.append(content)
    return set(taken or [min(order, key=lambda content: groups[content])])


def hashes_of(contents: list[int]) -> NDArray[np.uint64]:
    return mix(np.array(contents, dtype=np.uint64) + np.uint64(1))


@given(documents, st.floats(0.01, 0.99), st.integers(0, 9))
def test_a_plan_equals_the_one_made_document_by_document(
    entries: list[tuple[int, int]], val_fraction: float, seed: int
) -> None:
    contents, copies = [content for content, _ in entries], np.array([count for _, count in entries], dtype=np.uint8)
    hashes, sizes = hashes_of(contents), np.array([3 + content**3 for content in contents], dtype=np.int64)
    plan = make_plan(hashes, sizes, copies, val_fraction=val_fraction, seed=seed)
    used = copies > 0
    if len(set(hashes[used].tolist())) < 2:
        assert plan.train_share == 1 - val_fraction
        assert not plan.held_out.any()
        assert plan.copies.tolist() == copies.tolist()
        return
    expected = held_out_one_by_one(hashes[used].tolist(), sizes[used].tolist(), val_fraction, seed)
    assert set(hashes[plan.held_out].tolist()) == expected
    assert (plan.held_out == used & np.isin(hashes, list(expected))).all()
    assert (plan.copies == np.where(plan.held_out, 1, copies)).all()
    assert plan.train_share is None


@given(st.lists(st.integers(0, 9)))
def test_the_first_of_equal_documents_is_found(contents: list[int]) -> None:
    expected = [content not in contents[:number] for number, content in enumerate(contents)]
    assert first_occurrences(hashes_of(contents)).tolist() == expected
