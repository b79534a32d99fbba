import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sheepop.config import ModelConfig
from sheepop.models.kv_cache import KVCache
from sheepop.models.quantization import quantize
from sheepop.models.quantized_layers import QuantizedLinear
from sheepop.models.transformer import TransformerModel

pytest.importorskip("numba")
from sheepop.generation import integer_kernels
from sheepop.generation.fast_decoding import FastDecoder, KernelLinear, numba_threads
from sheepop.generation.vector_integers import HAS_INTEGERS, LEVELS, MOST_INPUTS
from sheepop.generation.vector_tiles import TILE

needs_integers = pytest.mark.skipif(not HAS_INTEGERS, reason="the processor has no products of bytes")
NONE = np.empty(0, dtype=np.float32)
Array = NDArray[np.float32]


@pytest.fixture(autouse=True)
def _threads():
    with numba_threads():
        yield


def both(inputs: Array, values: NDArray[np.int8], scale: Array, bias: Array = NONE, before: Array | None = None):
    """Return what the kernels for few rows and for many give, added to what was there if that is given."""
    found = []
    for multiply in (integer_kernels.matmul_few, integer_kernels.matmul_many):
        outputs = np.full((len(inputs), len(values)), 7, dtype=np.float32) if before is None else before.copy()
        multiply(inputs, values, scale, values.sum(1, dtype=np.int32), bias, outputs, before is not None)
        found.append(outputs)
    return found


@needs_integers
@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["usual", "outlier", "zeros", "subnormal", "smallest", "largest"]), min_size=1),
    width=st.sampled_from([64, 128, 192, 576]),
    outputs=st.integers(TILE, 3 * TILE),
    has_bias=st.booleans(),
    adds=st.booleans(),
)
def test_products_are_within_the_rounding_of_inputs_alone_or_in_any_batch(
    kinds: list[str], width: int, outputs: int, has_bias: bool, adds: bool
) -> None:
    draws = np.random.default_rng(len(kinds) + width + outputs)
    inputs = draws.standard_normal((len(kinds), width), dtype=np.float32)
    for row, kind in zip(inputs, kinds, strict=True):
        if kind == "outlier":
            row[draws.integers(width)] = 1e6
        row *= {"zeros": 0.0, "subnormal": 1e-40, "smallest": 1e-45, "largest": 1e28}.get(kind, 1.0)
    values = draws.integers(-127, 128, (outputs, width), dtype=np.int8)
    scale = draws.random(outputs, dtype=np.float32)
    bias = draws.standard_normal(outputs, dtype=np.float32) if has_bias else NONE
    before = draws.standard_normal((len(kinds), outputs), dtype=np.float32) if adds else None
    few, many = both(inputs, values, scale, bias, before)
    np.testing.assert_array_equal(few, many)
    row = int(draws.integers(len(kinds)))
    for alone in both(inputs[[row]], values, scale, bias, before if before is None else before[[row]]):
        np.testing.assert_array_equal(alone[0], many[row])

    weight = values.astype(np.float64) * scale[:, None]
    wanted = inputs.astype(np.float64) @ weight.T + (bias if has_bias else 0) + (0 if before is None else before)
    # Half a step for each input, less than 1e-36 for a row of nearly nothing, and the roundings of fp32 at the end.
    steps = np.abs(inputs).max(1).astype(np.float64) / LEVELS + 1e-36
    bound = 0.501 * steps[:, None] * np.abs(weight).sum(1) + 1e-6 * (1 + np.abs(wanted))
    assert (np.abs(many - wanted) <= bound).all()


@needs_integers
@pytest.mark.parametrize(("weight", "number"), [(-128, -1), (-128, 1), (127, -1), (127, 1)])
def test_the_largest_sums_do_not_overflow(weight: int, number: int) -> None:
    inputs = np.full((TILE + 1, MOST_INPUTS), number, dtype=np.float32)
    values, scale = np.full((TILE, MOST_INPUTS), weight, dtype=np.int8), np.ones(TILE, dtype=np.float32)
    for found in both(inputs, values, scale):
        np.testing.assert_allclose(found, weight * number * MOST_INPUTS, rtol=1e-6)


@needs_integers
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(number: float) -> None:
    draws = np.random.default_rng(5)
    inputs = draws.standard_normal((TILE + 3, 128), dtype=np.float32)
    values = draws.integers(-127, 128, (TILE + 1, 128), dtype=np.int8)
    scale = draws.random(TILE + 1, dtype=np.float32)
    clean, _ = both(inputs, values, scale)
    inputs[4, 77] = number
    for found in both(inputs, values, scale):
        assert np.isnan(found[4]).all()
        np.testing.assert_array_equal(np.delete(found, 4, 0), np.delete(clean, 4, 0))
    scale[3] = number
    for found in both(inputs, values, scale):
        assert not np.isfinite(found[:, 3]).any()


@pytest.mark.parametrize("has_integers", [False, pytest.param(True, marks=needs_integers)])
@pytest.mark.parametrize("width", [70, 128])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_a_layer_computes_with_these_instructions_and_without(
    has_integers: bool, width: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sheepop.generation.fast_decoding.HAS_INTEGERS", has_integers)
    torch.manual_seed(rows)
    layer = QuantizedLinear(width, 37, bias=True)
    layer.fill(torch.randn(37, width), torch.randn(37))
    hidden = torch.randn(rows, width)
    rounds = has_integers and width % 64 == 0
    tolerance = 5e-3 if rounds else 5e-5
    difference = (KernelLinear(layer)(hidden) - layer(hidden)).abs().max().item()
    assert difference <= tolerance
    assert (difference > 5e-5) == rounds


@needs_integers
def test_a_text_does_not_depend_on_the_others_to_the_last_bit() -> None:
    torch.manual_seed(3)
    settings = {"d_model": 64, "num_layers": 3, "num_heads": 4, "d_ff": 192, "vocab_size": 61, "max_seq_len": 16}
    model = TransformerModel(ModelConfig.model_validate({**settings, "norm": "rmsnorm", "activation": "swiglu"}))
    decoder = FastDecoder(quantize(model.eval(), "int8"))
    token_ids = torch.randint(0, 61, (21, 9))
    together, alone = KVCache(decoder.config, 21, capacity=9), KVCache(decoder.config, 1, capacity=9)
    with torch.inference_mode():
        for at in range(9):
            logits = decoder(token_ids[:, at : at + 1], together)
            assert decoder(token_ids[17:18, at : at + 1], alone).equal(logits[17:18])
