import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import load_config
from sheepop.data.dataset import IGNORE_INDEX
from sheepop.models.copying import copy_sums, following
from sheepop.models.kernel_copying import KernelCopySums
from sheepop.models.kernel_head import KernelHead
from sheepop.models.transformer import TransformerModel

pytest.importorskip("numba")


def case(batch, time, width, *, scale=1.0, documents=False, seed=0, dtype=torch.float32):
    """Queries, keys, tokens of few kinds, targets, documents or None, and a gradient for the sums."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        (torch.randn(batch, time, width, generator=generator) * scale / width**0.25).to(dtype).requires_grad_()
        for _ in range(2)
    )
    token_ids = torch.randint(0, 12, (batch, time), generator=generator)
    targets = following(token_ids)
    ids = (torch.rand(batch, time, generator=generator) < 0.02).cumsum(1) if documents else None
    return query, key, token_ids, targets, ids, torch.randn(2, batch, time, generator=generator)


def by_the_formula(query, key, token_ids, targets, ids, gradient):
    """Sums and gradients of queries and keys, in fp64."""
    exact = [each.detach().double().requires_grad_() for each in (query, key)]
    scores = exact[0] @ exact[1].transpose(1, 2)  # (B, T, S)
    is_seen = torch.ones_like(scores, dtype=torch.bool).tril(-1)
    if ids is not None:
        is_seen &= ids.unsqueeze(2) == ids.unsqueeze(1)
    is_right = is_seen & (following(token_ids).unsqueeze(1) == targets.unsqueeze(2))
    sums, loss = [], torch.zeros((), dtype=torch.float64)
    for own, mask in zip(gradient, (is_seen, is_right), strict=True):
        any_seen = mask.any(2)
        found = scores[any_seen].masked_fill(~mask[any_seen], -torch.inf).logsumexp(1)
        whole = torch.full(any_seen.shape, -torch.inf, dtype=torch.float64)
        whole[any_seen] = found.detach()
        sums.append(whole)
        loss = loss + (found * own[any_seen]).sum()
    of_query, of_key = torch.autograd.grad(loss, exact, allow_unused=True, materialize_grads=True)
    return torch.stack(sums), of_query, of_key


def by_kernels(query, key, token_ids, targets, ids, gradient):
    sums = copy_sums(query, key, token_ids, targets, ids, by_kernels=True)
    return sums.detach(), *torch.autograd.grad(sums, (query, key), gradient)


@settings(deadline=None, max_examples=50)
@given(
    batch=st.integers(1, 3),
    time=st.integers(64, 200),
    width=st.sampled_from([16, 32, 48]),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    documents=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_sums_and_gradients_are_those_of_the_formula(batch, time, width, scale, documents, seed):
    given_ones = case(batch, time, width, scale=scale, documents=documents, seed=seed)
    expected, found = by_the_formula(*given_ones), by_kernels(*given_ones)
    # A sum below the smallest number of fp32, over the largest score of all places, is none.
    finite = found[0].isfinite()
    assert torch.equal(finite[0], expected[0][0].isfinite())
    torch.testing.assert_close(found[0][finite].double(), expected[0][finite], rtol=1e-5, atol=1e-4)
    for ours, reference in zip(found[1:], expected[1:], strict=True):
        assert float((ours - reference).norm()) <= 1e-4 * max(1.0, float(reference.norm()))


def test_bf16_is_added_up_in_fp32():
    given_ones = case(2, 130, 32, dtype=torch.bfloat16)
    expected, found = by_the_formula(*given_ones), by_kernels(*given_ones)
    assert [each.dtype for each in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    finite = expected[0].isfinite()
    torch.testing.assert_close(found[0][finite].double(), expected[0][finite], rtol=1e-5, atol=1e-4)
    for ours, reference in zip(found[1:], expected[1:], strict=True):
        assert float((ours.double() - reference).norm()) <= 2**-8 * float(reference.norm())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads):
    given_ones = case(3, 200, 16, documents=True)
    results, before = [], torch.get_num_threads()
    try:
        for count in (2, threads):
            torch.set_num_threads(count)
            results.append(by_kernels(*given_ones))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_what_is_not_finite_is_noticed():
    query, key, *rest = case(1, 100, 16)
    with torch.no_grad():
        query[0, 70, 3] = torch.nan
    sums = copy_sums(query, key, *rest[:3], by_kernels=True)
    assert sums[:, 0, 70].isnan().all()
    assert not sums[:, 0, :70].isnan().any()


@pytest.mark.parametrize(("time", "width", "learns"), [(63, 32, True), (64, 24, True), (64, 32, False)])
def test_other_sums_go_by_operators(time, width, learns, monkeypatch):
    monkeypatch.setattr(KernelCopySums, "apply", None)
    query, key, *rest = case(1, time, width)
    with torch.set_grad_enabled(learns):
        copy_sums(query, key, *rest[:3], by_kernels=True)


def test_a_model_learns_the_same_by_kernels(monkeypatch):
    sizes = {"d_model": 32, "num_layers": 1, "num_heads": 2, "max_seq_len": 80, "vocab_size": 29, "copy_width": 16}
    sizes |= {"dropout": 0.0, "attention_dropout": 0.0}
    config = load_config(overrides={f"model.{key}": value for key, value in sizes.items()}).model
    torch.manual_seed(1)
    model = TransformerModel(config).train()
    generator = torch.Generator().manual_seed(2)
    token_ids = torch.randint(0, 29, (3, 81), generator=generator)
    inputs, targets = token_ids[:, :-1], token_ids[:, 1:].clone()
    targets[1, 7] = IGNORE_INDEX
    documents = (torch.rand(3, 80, generator=generator) < 0.05).cumsum(1)
    calls, results = [], []
    score = KernelHead.score
    monkeypatch.setattr(KernelHead, "score", lambda *given: calls.append(1) or score(*given))
    for by_kernels in (False, True):
        model.learn_by_kernels(attention=False, head=by_kernels)
        model.zero_grad()
        loss = model(inputs, targets=targets, document_ids=documents)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    assert len(calls) == 1
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
