from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.data import packing
from sheepop.data.dataset import IGNORE_INDEX, document_ids, open_tokens, read_windows
from sheepop.data.packing import (
    PackingPlan,
    best_fit,
    cut_documents,
    find_documents,
    open_plan,
    plan_best_fit,
    read_packed,
)

END = 0  # the end-of-text token of these tests
# Documents of as many tokens as these numbers say, besides the end-of-text token that begins each.
texts = st.lists(st.integers(0, 40), min_size=1, max_size=40)


def write_text(sizes: list[int]) -> np.ndarray:
    """Documents of consecutive numbers, so that a token tells its place; one more end-of-text token closes the text."""
    tokens, number = [], 1
    for size in sizes:
        tokens += [END, *range(number, number + size)]
        number += size
    return np.array([*tokens, END], dtype=np.uint16)


def best_fit_one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit-decreasing as it is defined: an item at a time, looking at every window."""
    windows = [0] * len(lengths)
    space: list[int] = []
    since: list[int] = []  # when the window came to its free space
    for clock, item in enumerate(sorted(range(len(lengths)), key=lambda item: -lengths[item])):
        fitting = [window for window in range(len(space)) if space[window] >= lengths[item]]
        if fitting:
            window = min(fitting, key=lambda window: (space[window], since[window]))
        else:
            window = len(space)
            space.append(capacity)
            since.append(0)
        space[window] -= lengths[item]
        since[window] = clock
        windows[item] = window
    return windows


def rows_of(plan: PackingPlan) -> list[list[tuple[int, int]]]:
    pieces = list(zip(plan.starts.tolist(), plan.lengths.tolist(), strict=True))
    return [pieces[first:last] for first, last in zip(plan.offsets, plan.offsets[1:], strict=False)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 40))
def test_best_fit_places_as_the_definition_does(lengths: list[int], capacity: int) -> None:
    assert best_fit(np.array(lengths, dtype=np.uint32), capacity).tolist() == best_fit_one_by_one(lengths, capacity)


def test_best_fit_with_few_lengths_and_many_items_places_as_the_definition_does() -> None:
    lengths = np.random.default_rng(3).choice([1, 2, 3, 5, 7, 11, 16], 2000).astype(np.uint32)
    assert best_fit(lengths, 16).tolist() == best_fit_one_by_one(lengths.tolist(), 16)


def test_windows_of_more_than_16_bits() -> None:
    lengths = np.array([70_000, 10, 69_990, 69_990, 20], dtype=np.uint32)
    assert best_fit(lengths, 70_000).tolist() == best_fit_one_by_one(lengths.tolist(), 70_000) == [0, 1, 1, 2, 3]


@settings(deadline=None)
@given(texts, st.integers(1, 25))
def test_every_token_is_read_once_and_no_document_is_cut_needlessly(sizes: list[int], length: int) -> None:
    tokens = write_text(sizes)
    plan = plan_best_fit(tokens, length=length, end_of_text_id=END)
    seen = [place for row in rows_of(plan) for start, size in row for place in range(start, start + size)]
    assert sorted(seen) == list(range(len(tokens) - 1))
    assert all(0 < sum(size for _, size in row) <= length for row in rows_of(plan))
    starts = np.flatnonzero(tokens == END)
    pieces = {start: size for row in rows_of(plan) for start, size in row}
    for start, size in zip(starts.tolist(), np.diff(starts).tolist(), strict=False):
        assert pieces[start] == min(size, length)
    # Two windows that are not more than half full would have been one.
    assert sum(sum(size for _, size in row) <= length // 2 for row in rows_of(plan)) <= 1


@settings(deadline=None)
@given(texts, st.integers(1, 25), st.sampled_from([1, 3, 1000]))
def test_packed_windows_hold_inputs_targets_and_documents(sizes: list[int], length: int, batch_size: int) -> None:
    tokens = write_text(sizes)
    plan = plan_best_fit(tokens, length=length, end_of_text_id=END)
    seen: Counter[int] = Counter()
    for first in range(0, plan.num_windows, batch_size):
        windows = np.arange(first, min(first + batch_size, plan.num_windows))[::-1]
        inputs, targets, documents = read_packed(tokens, plan, windows)
        assert inputs.shape == targets.shape == documents.shape == (len(windows), length)
        assert inputs.dtype == targets.dtype == documents.dtype == np.int64
        for row, window in enumerate(windows):
            at = 0
            for number, (start, size) in enumerate(rows_of(plan)[window]):
                assert inputs[row, at : at + size].tolist() == tokens[start : start + size].tolist()
                assert targets[row, at : at + size].tolist() == tokens[start + 1 : start + size + 1].tolist()
                assert documents[row, at : at + size].tolist() == [number] * size
                seen.update(range(start + 1, start + size + 1))
                at += size
            assert (inputs[row, at:] == 0).all()
            assert (targets[row, at:] == IGNORE_INDEX).all()
            assert (documents[row, at:] == len(rows_of(plan)[window])).all()
    assert seen == Counter(range(1, len(tokens))), "each token but the first is a target once"


@settings(deadline=None)
@given(texts, st.integers(1, 25))
def test_a_target_is_of_the_inputs_document_or_its_end(sizes: list[int], length: int) -> None:
    tokens = write_text(sizes)
    plan = plan_best_fit(tokens, length=length, end_of_text_id=END)
    inputs, targets, documents = read_packed(tokens, plan, np.arange(plan.num_windows))
    inside = targets > END
    assert (targets[inside & (inputs > END)] == inputs[inside & (inputs > END)] + 1).all()
    ends = np.cumsum([0, *sizes])
    # Where the target is the end-of-text token, the input was the last of its document.
    closing = inputs[(targets == END) & (inputs > END)]
    assert set(closing.tolist()) <= set(ends.tolist())
    assert (targets == END).sum() == len(sizes)
    # Tokens that see each other, by their number in the row, are of one document and in their order in the text.
    for row in range(plan.num_windows):
        for number in set(documents[row].tolist()):
            group = inputs[row][(documents[row] == number) & (targets[row] != IGNORE_INDEX)]
            assert (np.diff(group[group > END]) == 1).all()
            assert END not in group[1:]


def test_a_text_without_end_of_text_tokens_is_one_document() -> None:
    tokens = np.arange(1, 12, dtype=np.uint32)
    plan = plan_best_fit(tokens, length=4, end_of_text_id=END)
    assert sorted(rows_of(plan)) == [[(0, 4)], [(4, 4)], [(8, 2)]]
    assert plan_best_fit(tokens[:1], length=4, end_of_text_id=END).num_windows == 0
    assert plan_best_fit(tokens[:0], length=4, end_of_text_id=END).num_windows == 0


def test_documents_are_found_across_the_parts_of_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = write_text([3, 0, 8, 1, 1, 0, 5])
    whole = find_documents(tokens, END).tolist()
    assert whole == [0, 4, 5, 14, 16, 18, 19, 25]
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(packing, "SCAN_AT_ONCE", size)
        assert find_documents(tokens, END).tolist() == whole


def test_long_documents_are_cut_into_whole_windows() -> None:
    starts, lengths = cut_documents(np.array([0, 9, 12, 20]), 4)
    assert starts.tolist() == [0, 4, 8, 9, 12, 16]
    assert lengths.tolist() == [4, 4, 1, 3, 4, 4]


def test_packing_cuts_fewer_documents_than_concatenation_and_wastes_little() -> None:
    random = np.random.default_rng(5)
    tokens = write_text((np.exp(random.normal(3, 1, 800)).astype(int) + 1).tolist())
    length = 128
    plan = plan_best_fit(tokens, length=length, end_of_text_id=END)
    borders = find_documents(tokens, END)
    firsts, lasts = borders[:-1], borders[1:] - 1
    cut_by_concatenation = (firsts // length != lasts // length).sum()
    assert len(plan.starts) - len(firsts) < cut_by_concatenation / 4
    assert (len(tokens) - 1) / (plan.num_windows * length) > 0.98


def test_a_kept_plan_is_the_same_and_damage_is_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = write_text([5, 9, 2, 30, 1, 7, 7])

    def open_it(fingerprint: str = "a", length: int = 10) -> PackingPlan:
        return open_plan(
            tokens,
            length=length,
            end_of_text_id=END,
            folder=tmp_path / "plans",
            fingerprint=fingerprint,
            keep_from_seconds=0,
        )

    made = open_it()
    assert rows_of(made) == rows_of(plan_best_fit(tokens, length=10, end_of_text_id=END))
    (folder,) = (tmp_path / "plans").iterdir()
    before = (folder / "starts.bin").stat().st_mtime_ns
    kept = open_it()
    assert rows_of(kept) == rows_of(made)
    assert (folder / "starts.bin").stat().st_mtime_ns == before, "the kept plan was not used"
    assert not kept.starts.flags.owndata

    open_it(fingerprint="b")
    open_it(length=11)
    assert len(list((tmp_path / "plans").iterdir())) == 3

    for name, content in (("lengths.bin", b""), ("starts.bin", b"rubbish"), ("offsets.bin", None)):
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        assert rows_of(open_it()) == rows_of(made)
        assert "damaged" in capsys.readouterr().err
    made.lengths[:-1].astype("<u4").tofile(folder / "lengths.bin")
    assert rows_of(open_it()) == rows_of(made)
    assert "damaged" in capsys.readouterr().err
    assert rows_of(open_it()) == rows_of(made)
    assert "damaged" not in capsys.readouterr().err


def test_a_plan_that_is_quickly_made_or_cannot_be_kept_stays_in_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = write_text([5, 9, 2])
    open_plan(tokens, length=10, end_of_text_id=END, folder=tmp_path / "plans", fingerprint="a", keep_from_seconds=60)
    assert list(tmp_path.iterdir()) == []
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    plan = open_plan(tokens, length=10, end_of_text_id=END, folder=blocker, fingerprint="a", keep_from_seconds=0)
    assert plan.num_windows == 2
    assert "could not be kept" in capsys.readouterr().err


@settings(deadline=None)
@given(texts, st.integers(1, 25), st.data())
def test_packed_windows_of_shards_are_those_of_one_file(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int, data: st.DataObject
) -> None:
    tokens = write_text(sizes)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4)))
    folder = tmp_path_factory.mktemp("shards")
    files = [folder / f"{number}.bin" for number in range(len(cuts) + 1)]
    for file, part in zip(files, np.split(tokens, cuts), strict=True):
        part.astype("<u2").tofile(file)
    shards = open_tokens(files, "uint16")
    plan = plan_best_fit(tokens, length=length, end_of_text_id=END)
    of_shards = plan_best_fit(shards, length=length, end_of_text_id=END)
    assert rows_of(of_shards) == rows_of(plan)
    windows = np.arange(plan.num_windows)
    for found, expected in zip(read_packed(shards, plan, windows), read_packed(tokens, plan, windows), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_documents_as_long_as_the_windows_read_as_plain_windows_with_masks() -> None:
    tokens = write_text([7, 7, 7, 7])
    plan = plan_best_fit(tokens, length=8, end_of_text_id=END)
    inputs, targets, documents = read_packed(tokens, plan, np.arange(plan.num_windows))
    plain_inputs, plain_targets = read_windows(tokens, plan.starts, 8)
    np.testing.assert_array_equal(inputs, plain_inputs)
    np.testing.assert_array_equal(targets, plain_targets)
    assert (np.diff(document_ids(plain_inputs, END), axis=1) == np.diff(documents, axis=1)).all()
