from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sheepop.models import dropout
from sheepop.models.dropout import LEAST_ENTRIES, drop, kept_entries

LARGE = (16, 33, 41)  # more than `LEAST_ENTRIES`, and no multiple of what is drawn at once


@settings(deadline=None)  # the first call loads what PyTorch computes with
@given(share=st.floats(0.001, 0.999), seed=st.integers(0, 2**31))
def test_the_share_is_dropped_and_the_rest_scaled_up_alike_in_each_part_of_a_random_word(share, seed):
    torch.manual_seed(seed)
    hidden = torch.ones(LARGE)
    dropped = drop(hidden, share)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / (1 - share)))
    for lane in range(4):
        of_lane = kept.flatten()[lane::4].double()
        # Six standard deviations: of a million such tests one fails in a hundred.
        assert abs(of_lane.mean() - (1 - share)) <= 6 * sqrt(share * (1 - share) / len(of_lane)) + 2**-16


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_shares_beyond_the_resolution(share):
    dropped = drop(torch.ones(LARGE), share)
    assert (dropped != 0).double().mean() == pytest.approx(1 - share, abs=0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [LARGE, (3, 5)], ids=["large", "small"])
def test_the_gradient_is_that_of_the_entries_kept(shape, dtype):
    hidden = torch.randn(shape).to(dtype).requires_grad_()
    dropped = drop(hidden, 0.25)
    (gradient,) = torch.autograd.grad(dropped, hidden, torch.ones_like(dropped))
    assert dropped.dtype == gradient.dtype == dtype
    assert set(gradient.unique().tolist()) <= {0.0, torch.tensor(4 / 3).to(dtype).item()}
    torch.testing.assert_close(dropped, hidden * gradient)


def test_numbers_come_from_the_generator_alone_and_differ_from_call_to_call():
    hidden = torch.randn(LARGE)
    torch.manual_seed(7)
    first, second = drop(hidden, 0.3), drop(hidden, 0.3)
    torch.manual_seed(7)
    again = drop(hidden.transpose(0, 2).contiguous().transpose(0, 2), 0.3)  # laid out in another way
    torch.manual_seed(7)
    kept = kept_entries(hidden, 0.3)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)
    assert torch.equal(kept, first != 0)


def test_small_tensors_get_the_numbers_that_pytorch_would_draw():
    hidden = torch.randn(LEAST_ENTRIES - 1)
    results = []
    for function in (drop, F.dropout):
        torch.manual_seed(3)
        results.append(function(hidden, 0.1))
    torch.testing.assert_close(*results)


def test_none_costs_nothing():
    hidden = torch.randn(LARGE)
    assert drop(hidden, 0.0) is hidden


def test_the_compiler_is_told_what_the_operator_returns():
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(dropout.opaque_draw, (torch.randn(LARGE), 0.3), test_utils=tests)
