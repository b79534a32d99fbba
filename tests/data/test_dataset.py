from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.data.dataset import IGNORE_INDEX, document_ids, num_windows, open_tokens, read_windows


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


def test_too_few_tokens_make_no_window() -> None:
    assert num_windows(0, 3, 3) == num_windows(1, 3, 3) == 0


def test_each_end_of_text_begins_a_document() -> None:
    inputs = np.array([[9, 1, 2, 9, 3], [1, 2, 9, 9, 4]])
    assert document_ids(inputs, 9).tolist() == [[1, 1, 1, 2, 2], [0, 0, 1, 2, 2]]
