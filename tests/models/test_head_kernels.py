import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from sheepop.models.head_kernels import turn_into_errors


def by_operators(logits, targets):
    """Losses, and the gradient of their sum, in fp64."""
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), exact)[0]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 70),
    scale=st.sampled_from([0.0, 1.0, 9.0, 60.0]),
    offset=st.sampled_from([-300.0, 0.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_losses_and_gradients_are_those_of_the_operators(rows, vocab, scale, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * scale + offset).to(torch.bfloat16)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    losses, errors = by_operators(logits, targets)
    found = turn_into_errors(logits, targets)
    torch.testing.assert_close(found.double(), losses, rtol=1e-6, atol=2e-6)
    # Rounded to bf16; where a probability is nearly one, of two numbers of fp32 that nearly cancel.
    torch.testing.assert_close(logits.double(), errors, rtol=2**-8, atol=2e-7)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_gives_the_same_bits_on_any_number_of_threads(threads):
    logits = torch.randn(11, 301, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    targets = torch.arange(11)
    alone = [(row := logits[n : n + 1].clone(), turn_into_errors(row, targets[n : n + 1])) for n in range(11)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        losses = turn_into_errors(logits, targets)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(losses, torch.cat([loss for _, loss in alone]))
    assert torch.equal(logits, torch.cat([row for row, _ in alone]))


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_what_is_not_finite_is_noticed_in_its_row_alone(bad):
    logits = torch.zeros(2, 40, dtype=torch.bfloat16)
    logits[0, 7] = bad
    losses = turn_into_errors(logits, torch.tensor([3, 4]))
    assert losses[0].isnan()
    assert logits[0].isnan().all()
    assert losses[1].item() == pytest.approx(math.log(40))
    assert logits[1].isfinite().all()


def test_a_token_that_cannot_come_has_no_part():
    logits = torch.tensor([[0.0, -math.inf, 0.0]], dtype=torch.bfloat16)
    assert turn_into_errors(logits, torch.tensor([0])).item() == pytest.approx(math.log(2))
    assert logits[0].tolist() == pytest.approx([-0.5, 0.0, 0.5], abs=1e-30)
