import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.models.quantized_layers import QuantizedLinear

pytest.importorskip("numba")
from numba import njit

from sheepop.generation import batch_kernels, decode_kernels
from sheepop.generation.decode_kernels import ACTIVATION, activate, attend
from sheepop.generation.fast_decoding import KernelLinear, numba_threads
from sheepop.generation.vector_tiles import PANEL, TILE
from sheepop.models.vector_exp import exp_fp32

NONE = np.empty(0, dtype=np.float32)


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    with numba_threads():
        yield


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3 * PANEL),
    width=st.sampled_from([3, 64, 70, 192]),
    outputs=st.integers(PANEL, 3 * PANEL),
    has_bias=st.booleans(),
    adds=st.booleans(),
    is_int8=st.booleans(),
)
def test_tiles_and_few_rows_give_the_products_of_one_row_at_a_time(
    rows: int, width: int, outputs: int, has_bias: bool, adds: bool, is_int8: bool
) -> None:
    draws = np.random.default_rng(rows)
    inputs = draws.standard_normal((rows, width), dtype=np.float32)
    bias = draws.standard_normal(outputs, dtype=np.float32) if has_bias else NONE
    if is_int8:
        weights = draws.integers(-127, 128, (outputs, width), dtype=np.int8), draws.random(outputs, dtype=np.float32)
    else:
        weights = (draws.standard_normal((outputs, width), dtype=np.float32),)
    name = "matmul_int8" if is_int8 else "matmul_fp32"
    tiles, few, wanted = (np.full((rows, outputs), 7, dtype=np.float32) for _ in range(3))
    getattr(batch_kernels, name)(inputs, *weights, bias, tiles, adds)
    getattr(decode_kernels, name)(inputs, *weights, bias, few, adds)
    for row in range(rows):
        getattr(decode_kernels, name)(inputs[row : row + 1], *weights, bias, wanted[row : row + 1], adds)
    scaled = weights[0].astype(np.float64) * (weights[1][:, None] if is_int8 else 1)
    exact = inputs @ scaled.T + (bias if has_bias else 0) + (7 if adds else 0)
    for found in (tiles, few, wanted):
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(1, 3, 128), (1, 7, 128), (2, PANEL, 128), (5, 7, 128)])
def test_a_layer_by_the_kernels_computes_what_the_layer_computes(
    quantization, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sheepop.generation.fast_decoding.HAS_INTEGERS", False)
    layer = QuantizedLinear(shape[-1], 37, bias=True, quantization=quantization)
    layer.fill(torch.randn(37, shape[-1]), torch.randn(37))
    hidden = torch.randn(shape)
    torch.testing.assert_close(KernelLinear(layer)(hidden), layer(hidden), rtol=1e-4, atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(1, 70),
    page_size=st.sampled_from([1, 5, TILE, TILE + 3, 40]),
    width=st.sampled_from([6, TILE, 64, 84]),
    window=st.sampled_from([0, 1, 9, 33]),
    sinks=st.sampled_from([0, 1, 4, 17, 80]),
)
def test_attention_over_pages_is_attention(length: int, page_size: int, width: int, window: int, sinks: int) -> None:
    draws = np.random.default_rng(length)
    heads, kv_heads, num_pages = 6, 2, -(-length // page_size)
    projected = draws.standard_normal((1, heads + 2 * kv_heads, width), dtype=np.float32)
    keys, values = draws.standard_normal((2, num_pages, kv_heads, page_size, width), dtype=np.float32)
    start = max(0, length - window) if window else 0
    seen = [place for place in range(length) if place >= start or place < sinks]
    # What stands behind the newest token is of others, or was never set, and what is out of sight may be, too.
    hidden = np.setdiff1d(np.arange(num_pages * page_size), seen)
    for each in (keys, values):
        each[hidden // page_size, :, hidden % page_size] = np.nan
    pages, mixed = draws.permutation(num_pages)[None], np.empty((1, heads, width), dtype=np.float32)
    keys, values = (each[np.argsort(pages[0])].copy() for each in (keys, values))
    attend(projected, np.array([length - 1]), keys, values, pages, window, sinks, mixed)
    for head in range(heads):
        own = head // (heads // kv_heads)
        key, value = (each[pages[0], own].reshape(-1, width)[seen].astype(np.float64) for each in (keys, values))
        scores = key @ projected[0, head] / math.sqrt(width)
        shares = np.exp(scores - scores.max())
        np.testing.assert_allclose(mixed[0, head], shares @ value / shares.sum(), rtol=1e-4, atol=1e-5)


def test_the_exponential_is_right_to_its_last_bits_and_keeps_what_is_no_number() -> None:
    @njit
    def of(numbers: np.ndarray) -> np.ndarray:
        found = np.empty_like(numbers)
        for at in range(len(numbers)):
            found[at] = exp_fp32(numbers[at])
        return found

    numbers = np.linspace(-87, 88, 100_003, dtype=np.float32)
    np.testing.assert_allclose(of(numbers), np.exp(numbers.astype(np.float64)), rtol=2e-7)
    lowest, highest, none = of(np.array([-np.inf, np.inf, np.nan], dtype=np.float32))
    assert 0 <= lowest < 1e-37
    assert highest > 1e38
    assert math.isnan(none)


def test_gelu_is_right_for_all_numbers() -> None:
    numbers = np.linspace(-12, 12, 24_000, dtype=np.float32)[None]
    found = np.empty_like(numbers)
    activate(numbers, ACTIVATION["gelu"], False, found)
    wanted = torch.nn.functional.gelu(torch.from_numpy(numbers).double()).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=4e-7)
    activate(np.array([[np.nan, np.inf]], dtype=np.float32), ACTIVATION["gelu"], False, found[:, :2])
    assert math.isnan(found[0, 0])
    assert found[0, 1] == np.inf
