import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.data.dataset import IGNORE_INDEX
from sheepop.models import head_loss
from sheepop.models.head_loss import rows_at_once, summed_head_loss
from sheepop.training.loss import summed_cross_entropy


def case(batch, time, width, vocab, seed=0, dtype=torch.float32):
    """Hidden states, a head and targets, a third of them without a token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, time, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab, (batch, time), generator=generator)
    targets[torch.rand(batch, time, generator=generator) < 1 / 3] = IGNORE_INDEX
    return hidden, weight, targets


def with_gradients(loss, *tensors):
    """The loss and, of a multiple of it, the gradients."""
    return [loss.detach(), *torch.autograd.grad(loss * 0.37, tensors)]


def by_the_reference(hidden, weight, targets):
    return summed_cross_entropy(torch.nn.functional.linear(hidden, weight), targets)


def assert_near(found, expected, tolerance, of=0.0):
    """Compare by the norm, of the result or of what it was added from: where terms cancel, it may be off by more."""
    assert found.dtype == expected.dtype
    assert float((found - expected).norm()) <= tolerance * max(float(expected.norm()), float(of))


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 4),
    time=st.integers(1, 9),
    width=st.integers(1, 11),
    vocab=st.integers(2, 40),
    rows=st.integers(1, 50),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradients_are_those_of_the_reference_however_the_rows_are_cut(batch, time, width, vocab, rows, seed):
    hidden, weight, targets = case(batch, time, width, vocab, seed)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = torch.nn.functional.linear(*exact)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    expected = with_gradients(loss, *exact)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_loss, "rows_at_once", lambda *_, **__: rows)
        found = with_gradients(summed_head_loss(hidden, weight, targets), hidden, weight)
    # A loss is a difference of logits, small where the target is nearly certain; a gradient adds rows of the other
    # tensor, each at most once.
    added = [logits.detach().norm(), weight.detach().norm(), hidden.detach().norm()]
    for ours, reference, of in zip(found, expected, added, strict=True):
        assert_near(ours, reference.float(), 1e-6, of)


@pytest.mark.parametrize(
    ("vocab", "rows", "rows_elsewhere"), [(1000, 4194, 4194), (8192, 512, 4096), (32768, 512, 4096), (32769, 256, 4096)]
)
def test_few_tokens_have_their_logits_at_a_time(vocab, rows, rows_elsewhere):
    assert (rows_at_once(vocab, "cpu"), rows_at_once(vocab, "cuda")) == (rows, rows_elsewhere)
    assert rows_at_once(vocab, "cpu", by_kernels=True) == max(rows, 512)


@pytest.mark.parametrize(("vocab", "chunks"), [(65, 1), (768, 1), (9001, 3)])
def test_real_sizes(vocab, chunks):
    hidden, weight, targets = case(3, 401, 24, vocab)
    assert math.ceil(3 * 401 / rows_at_once(vocab, "cpu")) == chunks
    expected = with_gradients(by_the_reference(hidden, weight, targets), hidden, weight)
    found = with_gradients(summed_head_loss(hidden, weight, targets), hidden, weight)
    for ours, reference in zip(found, expected, strict=True):
        assert_near(ours, reference, 1e-6)


@pytest.mark.parametrize("kernel_from", [0, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # what the norm before the head gives
def test_under_autocast_it_is_as_exact_as_the_reference(dtype, kernel_from, monkeypatch):
    monkeypatch.setattr(head_loss, "KERNEL_FROM", kernel_from)
    monkeypatch.setattr(head_loss, "rows_at_once", lambda *_, **__: 37)
    hidden, weight, targets = case(4, 50, 48, 300, dtype=dtype)
    exact = with_gradients(by_the_reference(hidden.float(), weight, targets), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        reference = with_gradients(by_the_reference(hidden, weight, targets), hidden, weight)
        found = with_gradients(summed_head_loss(hidden, weight, targets), hidden, weight)
    for ours, theirs, wanted in zip(found, reference, exact, strict=True):
        assert ours.dtype == theirs.dtype
        error = float((theirs.float() - wanted.float()).norm())
        assert float((ours.float() - wanted.float()).norm()) <= 1.2 * error + 1e-4 * float(wanted.float().norm())


def test_it_adds_in_fp32_and_does_not_overflow():
    hidden = torch.tensor([[[200.0], [-200.0]]]).requires_grad_()  # a probability of e^-400 for one of the targets
    weight = torch.tensor([[1.0], [-1.0]]).requires_grad_()
    loss = summed_head_loss(hidden, weight, torch.tensor([[1, 1]]))
    assert loss.item() == 400.0
    loss.backward()
    assert hidden.grad.flatten().tolist() == [2.0, 0.0]


def test_without_a_target_loss_and_gradients_are_zero():
    hidden, weight, targets = case(2, 3, 5, 7)
    found = with_gradients(summed_head_loss(hidden, weight, torch.full_like(targets, IGNORE_INDEX)), hidden, weight)
    assert all(not tensor.any() for tensor in found)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    tensors = case(2, 3, 5, 7)
    tensors[frozen].requires_grad_(False)
    summed_head_loss(*tensors).backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad is not None


def test_without_gradients_it_only_scores():
    hidden, weight, targets = case(2, 3, 5, 7)
    with torch.no_grad():
        loss = summed_head_loss(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, by_the_reference(hidden, weight, targets).detach())
