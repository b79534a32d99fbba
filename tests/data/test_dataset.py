from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.data.dataset import (
    IGNORE_INDEX,
    TokenShards,
    document_ids,
    expect_reading,
    num_windows,
    open_tokens,
    read_windows,
)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_are_little_endian_whatever_the_machine(tmp_path: Path, dtype: str) -> None:
    file = tmp_path / "a.bin"
    width = int(dtype.removeprefix("uint")) // 8
    file.write_bytes(b"".join(number.to_bytes(width, "little") for number in (1, 258, 65535)))
    assert open_tokens(file, dtype).tolist() == [1, 258, 65535]


def test_targets_are_the_next_tokens_and_the_end_is_padded() -> None:
    tokens = np.arange(10, 17, dtype=np.uint16)
    inputs, targets = read_windows(tokens, np.array([0, 3, 5]), 3)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.tolist() == [[10, 11, 12], [13, 14, 15], [15, 16, 0]]
    assert targets.tolist() == [[11, 12, 13], [14, 15, 16], [16, IGNORE_INDEX, IGNORE_INDEX]]


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(1, 13), st.data())
def test_every_token_but_the_first_is_a_target(num_tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    tokens = np.arange(num_tokens, dtype=np.uint32)
    count = num_windows(num_tokens, length, stride)
    inputs, targets = read_windows(tokens, np.arange(count) * stride, length)
    seen = Counter(targets[targets != IGNORE_INDEX].tolist())
    assert set(seen) == set(range(1, num_tokens))
    assert (targets != IGNORE_INDEX).any(axis=1).all(), "a window without a target is a waste"
    if stride == length:
        assert set(seen.values()) == {1}
    scored = targets != IGNORE_INDEX
    assert (targets[scored] == inputs[scored] + 1).all()


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(1, 13), st.data())
def test_moved_windows_have_every_token_as_a_target(num_tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    shift = data.draw(st.integers(0, stride - 1))
    tokens = np.array([0, *range(1, num_tokens - 1), 0], dtype=np.uint32)  # it begins and ends with an end of text
    starts = np.arange(num_windows(num_tokens, length, stride)) * stride - shift
    inputs, targets = read_windows(tokens, starts, length)
    scored = targets != IGNORE_INDEX
    assert set(targets[scored].tolist()) == set(range(num_tokens - 1))
    assert (targets[scored] == (inputs[scored] + 1) % (num_tokens - 1)).all()


def test_too_few_tokens_make_no_window() -> None:
    assert num_windows(0, 3, 3) == num_windows(1, 3, 3) == 0


def test_each_end_of_text_begins_a_document() -> None:
    inputs = np.array([[9, 1, 2, 9, 3], [1, 2, 9, 9, 4]])
    assert document_ids(inputs, 9).tolist() == [[1, 1, 1, 2, 2], [0, 0, 1, 2, 2]]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 13), st.data())
def test_shards_read_as_one_file(
    tmp_path_factory: pytest.TempPathFactory, num_tokens: int, length: int, data: st.DataObject
) -> None:
    tokens = np.arange(100, 100 + num_tokens, dtype=np.uint16)
    cuts = sorted(data.draw(st.lists(st.integers(0, num_tokens), max_size=4)))
    folder = tmp_path_factory.mktemp("shards")
    files = [folder / f"{number}.bin" for number in range(len(cuts) + 1)]
    for file, part in zip(files, np.split(tokens, cuts), strict=True):
        part.astype("<u2").tofile(file)
    shards = open_tokens(files, "uint16")
    assert len(shards) == num_tokens
    first, last = data.draw(st.integers(0, num_tokens)), data.draw(st.integers(0, num_tokens + 3))
    assert shards[first:last].tolist() == tokens[first:last].tolist()
    assert shards[-3:].tolist() == tokens[-3:].tolist()
    starts = np.array(data.draw(st.lists(st.integers(0, num_tokens - 1), min_size=1, max_size=5)))
    for found, expected in zip(read_windows(shards, starts, length), read_windows(tokens, starts, length), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_shards_refuse_what_they_cannot_do() -> None:
    shards = TokenShards([np.arange(3, dtype=np.uint16), np.arange(4, dtype=np.uint16)])
    with pytest.raises(ValueError, match="step of a slice"):
        shards[::2]
    with pytest.raises(ValueError, match="only clip"):
        shards.take(np.array([1]), mode="raise")


def test_an_empty_file_holds_no_tokens(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.touch()
    tokens = open_tokens(file, "uint32")
    assert len(tokens) == 0
    inputs, targets = read_windows(tokens, np.array([0, 4]), 3)
    assert inputs.tolist() == [[0, 0, 0]] * 2
    assert (targets == IGNORE_INDEX).all()


@pytest.mark.parametrize("stride", [1, 5, 1024])
def test_windows_are_those_of_a_loop_over_slices(tmp_path: Path, stride: int) -> None:
    file = tmp_path / "a.bin"
    np.random.default_rng(3).integers(0, 2**16, 5000, dtype=np.uint16).astype("<u2").tofile(file)
    tokens = open_tokens(file, "uint16")
    starts = np.arange(3, 4999, stride)
    inputs, targets = read_windows(tokens, starts, 100)
    for row, start in enumerate(starts):
        piece = tokens[start : start + 101].astype(int).tolist()
        wanted = piece + [IGNORE_INDEX] * (101 - len(piece))
        assert targets[row].tolist() == wanted[1:]
        assert inputs[row].tolist() == [max(0, token) for token in wanted[:-1]]


def test_advice_to_the_system_changes_no_token(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    np.arange(9000, dtype="<u2").tofile(file)
    tokens = open_tokens([file, file], "uint16")
    for in_order in (True, False, True):
        expect_reading(tokens, in_order=in_order)
        assert tokens[8990:9010].tolist() == [*range(8990, 9000), *range(10)]
    expect_reading(np.arange(3), in_order=True)
