import math
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.models import block_attention as blocks_of_queries
from sheepop.models.attention import attention
from sheepop.models.block_attention import BlockAttention, block_attention
from sheepop.models.optimized_attention import optimized_attention


def tensors(batch, heads, kv_heads, query_time, key_time, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, query_time, width), (batch, kv_heads, key_time, width), (batch, kv_heads, key_time, width)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def by_loops(query, key, value, window, sinks, document_ids):
    """Attention one number at a time, as a third opinion."""
    batch, heads, query_time, width = query.shape
    kv_heads, key_time = key.shape[1], key.shape[2]
    result = torch.zeros(batch, heads, query_time, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h // (heads // kv_heads)
            for t in range(query_time):
                here = key_time - query_time + t
                numbers = [0] * key_time if document_ids is None else document_ids[b].tolist()
                text = [s for s in range(here + 1) if numbers[s] == numbers[here]]
                seen = [s for place, s in enumerate(text) if not window or here - s < window or place < sinks]
                scores = [float(query[b, h, t].double() @ key[b, group, s].double()) / math.sqrt(width) for s in seen]
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                result[b, h, t] = sum(w * value[b, group, s].double() for w, s in zip(weights, seen, strict=True))
    return result


@settings(deadline=None, max_examples=40)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    key_time=st.integers(1, 9),
    query_share=st.floats(0.01, 1),
    window=st.integers(0, 10),
    sinks=st.integers(0, 10),
    documents=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_reference_and_optimized_equal_loops(kv_heads, group, key_time, query_share, window, sinks, documents, seed):
    query_time = max(1, int(key_time * query_share))
    query, key, value = tensors(2, kv_heads * group, kv_heads, query_time, key_time, 5, seed)
    ids = None
    if documents:
        ids = torch.randint(0, 2, (2, key_time), generator=torch.Generator().manual_seed(seed)).cumsum(1)
    expected = by_loops(query, key, value, window, sinks, ids)
    for implementation in (attention, optimized_attention):
        result = implementation(query, key, value, window=window, sinks=sinks, document_ids=ids)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sinks", [0, 2])
def test_gradients_of_optimized_equal_reference(sinks):
    parts = tensors(2, 6, 3, 7, 7, 4)
    gradients = []
    for implementation in (attention, optimized_attention):
        leaves = [part.clone().requires_grad_() for part in parts]
        implementation(*leaves, window=3, sinks=sinks).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for reference, optimized in zip(*gradients, strict=True):
        torch.testing.assert_close(optimized, reference, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    time=st.integers(1, 200),
    window=st.one_of(st.just(0), st.integers(1, 220)),
    sinks=st.one_of(st.just(0), st.integers(1, 90)),
    documents=st.booleans(),
    most_kept=st.sampled_from([0, 256]),
    seed=st.integers(0, 1000),
)
def test_blocks_learn_as_the_reference(kv_heads, group, time, window, sinks, documents, most_kept, seed):
    parts = tensors(2, kv_heads * group, kv_heads, time, time, 5, seed)
    random = torch.Generator().manual_seed(seed)
    ids = (torch.rand(2, time, generator=random) < 0.05).cumsum(1) if documents else None
    wanted = torch.randn(2, kv_heads * group, time, 5, generator=random)
    results = []
    for implementation in (attention, block_attention):
        leaves = [part.clone().requires_grad_() for part in parts]
        with mock.patch.object(blocks_of_queries, "MOST_KEPT", most_kept):
            mixed = implementation(*leaves, window=window, sinks=sinks if window else 0, document_ids=ids)
            mixed.backward(wanted)
        results.append([mixed.detach(), *(leaf.grad for leaf in leaves)])
    for reference, blocks in zip(*results, strict=True):
        torch.testing.assert_close(blocks, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_on_a_cpu_goes_in_blocks_and_nothing_else_does(dtype, monkeypatch):
    calls = []
    monkeypatch.setattr(BlockAttention, "apply", lambda query, *rest: calls.append(query.dtype) or query)
    time = 256 if dtype == torch.float32 else 64
    query, key, value = (part.to(dtype) for part in tensors(1, 2, 2, time, time, 4))
    optimized_attention(query, key, value)
    with torch.no_grad():
        optimized_attention(query.clone().requires_grad_(), key, value)
    optimized_attention(query[:, :, :9].clone().requires_grad_(), key, value)  # as with a cache
    assert not calls
    optimized_attention(query.clone().requires_grad_(), key, value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimized_attention(query.float().requires_grad_(), key.float(), value.float())
    assert calls == [dtype, torch.bfloat16]
    few = [part[:, :, :9].clone() for part in (query, key, value)]  # too few but where weights are dropped
    optimized_attention(few[0].requires_grad_(), *few[1:])
    assert calls == [dtype, torch.bfloat16]
    optimized_attention(few[0], *few[1:], dropout=0.1)
    assert calls == [dtype, torch.bfloat16, dtype]


@pytest.mark.parametrize("most_kept", [0, 256])
def test_blocks_drop_weights_in_the_backward_pass_as_in_the_forward_pass(most_kept, monkeypatch):
    """The mixture is linear in the values, so that their gradient times them is the mixture times its gradient."""
    monkeypatch.setattr(blocks_of_queries, "MOST_KEPT", most_kept)
    attend = partial(block_attention, dropout=0.4)
    query, key, value = (part.double().requires_grad_() for part in tensors(2, 4, 2, 150, 150, 3))
    wanted = torch.randn(2, 4, 150, 3, dtype=torch.float64)
    mixed = attend(query, key, value)
    mixed.backward(wanted)
    assert (value.grad * value).sum().item() == pytest.approx((mixed * wanted).sum().item(), rel=1e-6)

    # The gradient of the queries by a difference, with the same weights dropped.
    step = 1e-6 * torch.randn_like(query)
    difference = 0.0
    for sign in (1, -1):
        torch.manual_seed(3)
        difference += sign * (attend(query + sign * step, key, value) * wanted).sum().item() / 2
    query.grad = None
    torch.manual_seed(3)
    (attend(query, key, value) * wanted).sum().backward()
    assert (query.grad * step).sum().item() == pytest.approx(difference, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("hides", [{}, {"window": 70, "sinks": 3}], ids=str)
def test_weights_made_again_are_those_that_were_kept(hides, dropout, dtype, monkeypatch):
    parts = [part.to(dtype) for part in tensors(2, 4, 2, 150, 150, 5)]
    wanted = torch.randn(2, 4, 150, 5).to(dtype)
    ids = (torch.arange(150) > 90).long().expand(2, -1)
    results = []
    for most_kept in (256, 0):
        monkeypatch.setattr(blocks_of_queries, "MOST_KEPT", most_kept)
        torch.manual_seed(3)
        leaves = [part.clone().requires_grad_() for part in parts]
        mixed = block_attention(*leaves, **hides, document_ids=ids, dropout=dropout)
        mixed.backward(wanted)
        results.append([mixed.detach(), *(leaf.grad for leaf in leaves)])
    for kept, made_again in zip(*results, strict=True):
        assert torch.equal(kept, made_again)


def heads_of_one_projection(batch_size, time):
    """Return queries, keys and values as a model makes them: views, which a single text needs no copy of to fold."""
    projected = torch.randn(batch_size, time, 8, 5, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    return projected.split((4, 2, 2), dim=1)


@pytest.mark.parametrize("time", [150, 270], ids=["kept", "made again"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_compiler_is_told_what_the_operators_return(time, batch_size):
    parts, hides = heads_of_one_projection(batch_size, time), (70, 3, None, 0.4)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(blocks_of_queries.opaque_forward, (*parts, *hides), test_utils=tests)
    mixed, weights, masks = blocks_of_queries.forward_in_blocks(*parts, *hides)
    arguments = (torch.randn_like(mixed), *parts, *hides, weights, masks)
    torch.library.opcheck(blocks_of_queries.opaque_backward, arguments, test_utils=tests)


@pytest.mark.parametrize("time", [150, 270], ids=["kept", "made again"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_compiled_code_takes_the_same_blocks(time, dropout, batch_size):
    parts, wanted = heads_of_one_projection(batch_size, time), torch.randn(batch_size, 4, time, 5)
    ids = (torch.arange(time) > 90).long().expand(batch_size, -1)
    results = []
    for attend in (block_attention, torch.compile(block_attention, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(3)
        leaves = [part.detach().requires_grad_() for part in parts]
        mixed = attend(*leaves, window=70, sinks=3, document_ids=ids, dropout=dropout)
        mixed.backward(wanted)
        results.append([mixed.detach(), *(leaf.grad for leaf in leaves)])
        assert mixed.transpose(1, 2).is_contiguous()
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


def test_weights_of_long_texts_are_not_kept():
    sizes = {}
    for time in (256, 257):
        parts = [part.requires_grad_() for part in tensors(1, 2, 2, time, time, 4)]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda part, saved=saved: saved.append(part) or part, lambda x: x
        ):
            block_attention(*parts)
        sizes[time] = sum(part.numel() for part in saved)
    assert sizes[257] < 4 * 257 * 2 * 4 < 2 * 256 * 256 / 2 < sizes[256]


@pytest.mark.parametrize(
    ("query_time", "hides", "has_mask"),
    [
        (1, {}, False),
        (1, {"window": 3}, False),
        (1, {"window": 3, "sinks": 2}, False),
        (9, {}, False),
        (9, {"window": 9}, False),
        (9, {"window": 5, "sinks": 4}, False),
        (9, {"window": 5, "sinks": 3}, True),
        (4, {}, True),
    ],
)
def test_a_mask_is_made_only_where_one_is_needed(monkeypatch, query_time, hides, has_mask):
    given = []

    def fused(*parts, attn_mask, **options):
        given.append(attn_mask)
        return parts[0]

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", fused)
    optimized_attention(*tensors(1, 2, 2, query_time, 9, 4), **hides)
    assert [mask is not None for mask in given] == [has_mask]


@pytest.mark.parametrize("implementation", [attention, optimized_attention, block_attention])
def test_dropout_drops_weights_and_keeps_the_mean(implementation):
    torch.manual_seed(0)
    query, key, value = tensors(64, 2, 2, 9, 9, 3)
    value = torch.ones_like(value)
    plain = implementation(query, key, value)
    dropped = implementation(query, key, value, dropout=0.3)
    assert not torch.allclose(plain, dropped)
    assert abs(dropped.mean() - 1.0) < 0.05
