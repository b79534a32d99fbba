import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.data.dataset import IGNORE_INDEX
from sheepop.models import head_loss
from sheepop.models.head_loss import summed_head_loss
from sheepop.models.kernel_head import KernelHead

pytest.importorskip("numba")


def case(time, width, vocab, *, scale=1.0, copies=False, seed=0):
    """Hidden states, a head, targets of which a fifth hold no token, and sums of copies or None."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, time, width, generator=generator).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator) * scale / math.sqrt(width)).requires_grad_()
    targets = torch.randint(0, vocab, (2, time), generator=generator)
    targets[torch.rand(2, time, generator=generator) < 0.2] = IGNORE_INDEX
    copied = None
    if copies:
        of_all = torch.randn(2, time, generator=generator) * scale
        copied = torch.stack((of_all, of_all - torch.rand(2, time, generator=generator) * 9)).requires_grad_()
    return hidden, weight, targets, copied


def with_gradients(loss, *tensors):
    """The loss and, of a multiple of it, the gradients."""
    return [loss.detach(), *torch.autograd.grad(loss * 0.37, [tensor for tensor in tensors if tensor is not None])]


def by_the_formula(hidden, weight, targets, copied):
    """The same in fp64."""
    exact = [None if each is None else each.detach().double().requires_grad_() for each in (hidden, weight, copied)]
    logits = (exact[0] @ exact[1].t()).flatten(0, 1)
    total, wanted = logits.logsumexp(1), logits.gather(1, targets.clamp(min=0).view(-1, 1))[:, 0]
    if copied is not None:
        of_all, of_right = exact[2].flatten(1)
        total, wanted = torch.logaddexp(total, of_all), torch.logaddexp(wanted, of_right)
    losses = (total - wanted).where(targets.flatten() >= 0, 0.0)
    return with_gradients(losses.sum(), *exact)


@settings(deadline=None, max_examples=60)
@given(
    time=st.integers(1, 150),
    width=st.sampled_from([32, 64, 96]),
    vocab=st.integers(2, 700),
    rows=st.integers(1, 400),
    scale=st.sampled_from([0.1, 3.0, 30.0, 90.0]),
    copies=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_loss_and_gradients_are_those_of_the_formula(time, width, vocab, rows, scale, copies, seed):
    """Scores of a hundred and more come with a scale of 30: the powers of the first entries are changed then."""
    hidden, weight, targets, copied = case(time, width, vocab, scale=scale, copies=copies, seed=seed)
    expected = by_the_formula(hidden, weight, targets, copied)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_loss, "rows_at_once", lambda *_, **__: rows)
        loss = summed_head_loss(hidden, weight, targets, copied, by_kernels=True)
        found = with_gradients(loss, hidden, weight, copied)
    # Where the target is nearly certain, losses and errors are small differences of large numbers.
    added = [float((hidden @ weight.t()).norm()), float(weight.norm()), float(hidden.norm()), math.sqrt(2 * time)]
    for ours, reference, of in zip(found, expected, added, strict=False):
        assert ours.dtype == torch.float32
        assert float((ours - reference).norm()) <= 3e-6 * max(float(reference.norm()), of)


def test_a_later_entry_may_have_a_much_larger_score():
    hidden, weight, targets, _ = case(70, 32, 600)
    with torch.no_grad():
        weight[300] = 30 * hidden[0, 5]  # a thousand above the entries before it, for one token
        weight[599] = 60 * hidden[0, 5]
    targets[0, 5], targets[0, 6] = 300, 599
    expected = by_the_formula(hidden, weight, targets, None)
    found = with_gradients(summed_head_loss(hidden, weight, targets, by_kernels=True), hidden, weight)
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads):
    hidden, weight, targets, copied = case(200, 32, 700, copies=True)
    results, before = [], torch.get_num_threads()
    try:
        for count in (2, threads):
            torch.set_num_threads(count)
            loss = summed_head_loss(hidden, weight, targets, copied, by_kernels=True)
            results.append(with_gradients(loss, hidden, weight, copied))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_noticed(bad):
    hidden, weight, targets, _ = case(9, 32, 300)
    with torch.no_grad():
        hidden[1, 3, 7] = bad
    targets[1, 3] = 4
    assert not summed_head_loss(hidden, weight, targets, by_kernels=True).isfinite()


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, targets, _ = case(9, 32, 300)
    tensors = [hidden, weight]
    tensors[frozen].requires_grad_(False)
    summed_head_loss(hidden, weight, targets, by_kernels=True).backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad is not None


@pytest.mark.parametrize("reason", ["bf16", "width", "no gradients"])
def test_other_heads_go_by_operators(reason, monkeypatch):
    monkeypatch.setattr(KernelHead, "score", None)
    hidden, weight, targets, _ = case(9, 40 if reason == "width" else 32, 300)
    with torch.set_grad_enabled(reason != "no gradients"), torch.autocast("cpu", enabled=reason == "bf16"):
        found = summed_head_loss(hidden, weight, targets, by_kernels=True)
        assert torch.equal(found, summed_head_loss(hidden, weight, targets))
