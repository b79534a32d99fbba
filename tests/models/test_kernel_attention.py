import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import load_config
from sheepop.models import attention_kernels, kernel_attention
from sheepop.models.attention import attention, visible
from sheepop.models.attention_kernels import items_for
from sheepop.models.kernel_attention import KernelAttention
from sheepop.models.optimized_attention import optimized_attention
from sheepop.models.squares import MULTIPLIES_BF16
from sheepop.models.transformer import TransformerModel

attend = kernel_attention.kernel_attention


def tensors(batch, heads, kv_heads, time, width, *, seed=0, dtype=torch.float32):
    """Return queries, keys and values as a model makes them: views of one projection."""
    random = torch.Generator().manual_seed(seed)
    projected = torch.randn(batch, time, heads + 2 * kv_heads, width, generator=random).to(dtype).transpose(1, 2)
    return projected.split((heads, kv_heads, kv_heads), dim=1)


def learn(implementation, parts, wanted, **options):
    """Return what comes out, and the gradients of queries, keys and values for the gradient `wanted`."""
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    mixed = implementation(*leaves, **options)
    mixed.backward(wanted)
    return [mixed.detach(), *(leaf.grad for leaf in leaves)]


@settings(deadline=None, max_examples=60)
@given(
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    time=st.integers(1, 330),
    width=st.sampled_from([16, 32, 48, 64, 80, 96]),
    window=st.one_of(st.just(0), st.integers(1, 350)),
    sinks=st.one_of(st.just(0), st.integers(1, 200)),
    documents=st.sampled_from([0.0, 0.01, 0.2]),
    seed=st.integers(0, 1000),
)
def test_kernels_learn_as_the_reference(kv_heads, group, time, width, window, sinks, documents, seed):
    parts = tensors(2, kv_heads * group, kv_heads, time, width, seed=seed)
    random = torch.Generator().manual_seed(seed)
    ids = (torch.rand(2, time, generator=random) < documents).cumsum(1) if documents else None
    wanted = torch.randn(2, kv_heads * group, time, width, generator=random)
    hides = {"window": window, "sinks": sinks if window else 0, "document_ids": ids}
    results = [learn(implementation, parts, wanted, **hides) for implementation in (attend, attention)]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("multiplies_bf16", [False, True], ids=["as fp32", "in pairs"])
@pytest.mark.parametrize("hides", [{}, {"window": 70, "sinks": 3}], ids=str)
@pytest.mark.parametrize("width", [32, 48, 64, 96])
def test_bf16_is_multiplied_by_itself_where_the_processor_can(width, hides, multiplies_bf16, monkeypatch):
    if multiplies_bf16 and not MULTIPLIES_BF16:
        pytest.skip("this processor does not multiply bf16")
    monkeypatch.setattr(attention_kernels, "MULTIPLIES_BF16", multiplies_bf16)
    in_pairs = items_for(torch.bfloat16, width).shape[1] == 2
    assert in_pairs == (multiplies_bf16 and width != 48)
    parts = tensors(2, 4, 2, 200, width, dtype=torch.bfloat16)
    wanted = torch.randn(2, 4, 200, width).bfloat16()
    found = learn(attend, parts, wanted, **hides)
    assert {each.dtype for each in found} == {torch.bfloat16}
    expected = learn(attention, [part.float() for part in parts], wanted.float(), **hides)
    for one, other in zip(found, expected, strict=True):
        # The rounding of the result, and in pairs that of weights, half a unit in the eighth place each.
        torch.testing.assert_close(one.float(), other, rtol=2**-7, atol=0.02)


def kept_weights(query, key, dropout, seed):
    """Return the weights (B, H, T, T) that are left, by values of which each is one number of a token's own."""
    time = query.shape[2]
    values = torch.eye(time).expand(*key.shape[:2], time, time)
    parts = []
    for first in range(0, time, query.shape[3]):
        torch.manual_seed(seed)
        parts.append(attend(query, key, values[..., first : first + query.shape[3]], dropout=dropout))
    return torch.cat(parts, dim=-1)


def test_dropped_weights_are_a_share_and_the_same_ones_in_the_backward_pass():
    query, key, value = tensors(2, 4, 2, 192, 64)
    wanted, dropout = torch.randn(2, 4, 192, 64), 0.3
    weights = kept_weights(query, key, 0.0, seed=3)
    left = kept_weights(query, key, dropout, seed=3)
    seen = visible(192, 192, device=query.device)
    is_kept = left[:, :, seen] > 0
    torch.testing.assert_close(left[:, :, seen], weights[:, :, seen] * is_kept / (1 - dropout))
    # Shares of the whole, of each head, and of neighbours together, as of independent draws.
    assert is_kept.float().mean().item() == pytest.approx(0.7, abs=0.005)
    assert is_kept.float().mean(2).sub(0.7).abs().max() < 0.02
    both = (left[..., 1:, :-1] > 0) & (left[..., 1:, 1:] > 0)
    assert both[:, :, seen[1:, 1:]].float().mean().item() == pytest.approx(0.49, abs=0.01)
    both = (left[..., :-1, :] > 0) & (left[..., 1:, :] > 0)
    assert both[:, :, seen[:-1]].float().mean().item() == pytest.approx(0.49, abs=0.01)
    assert not torch.equal(left[0], left[1])
    assert not torch.equal(left, kept_weights(query, key, dropout, seed=4))

    mask = (left > 0).float() / (1 - dropout)

    def written_out(query, key, value):
        keys, values = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        scores = (query @ keys.mT / math.sqrt(64)).masked_fill(~seen, -math.inf)
        return (scores.softmax(-1) * mask) @ values

    torch.manual_seed(3)
    found = learn(attend, (query, key, value), wanted, dropout=dropout)
    for one, other in zip(found, learn(written_out, (query, key, value), wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_none_are_noticed_where_they_are_seen(number):
    parts = [part.clone() for part in tensors(1, 2, 2, 150, 16)]
    parts[1][0, 1, 100, 3] = number
    mixed = attend(*parts)
    assert mixed[:, 0].isfinite().all()
    assert mixed[:, 1, :100].isfinite().all()
    assert mixed[:, 1, 100].isnan().all()


def test_only_learning_on_a_cpu_goes_by_kernels(monkeypatch):
    calls = []
    monkeypatch.setattr(KernelAttention, "apply", lambda query, *rest: calls.append(query.dtype) or query)
    query, key, value = (part.clone() for part in tensors(1, 2, 2, 64, 16))
    learning = query.clone().requires_grad_()
    optimized_attention(learning, key, value)
    optimized_attention(query, key, value, by_kernels=True)
    with torch.no_grad():
        optimized_attention(learning, key, value, by_kernels=True)
    optimized_attention(learning[:, :, :9], key, value, by_kernels=True)  # as with a cache
    optimized_attention(*(part[:, :, :63] for part in (learning, key, value)), by_kernels=True)  # too short
    optimized_attention(*(part[..., :15] for part in (learning, key, value)), by_kernels=True)  # not such a width
    optimized_attention(*(part.double() for part in (learning, key, value)), by_kernels=True)
    seen = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    optimized_attention(learning, key, value, mask=seen, by_kernels=True)
    assert not calls
    optimized_attention(learning, key, value, by_kernels=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimized_attention(learning, key, value, by_kernels=True)
    assert calls == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_number_of_threads_changes_nothing(threads):
    parts, wanted = tensors(2, 4, 2, 130, 16), torch.randn(2, 4, 130, 16)
    with mock.patch("torch.get_num_threads", return_value=threads):
        found = learn(attend, parts, wanted, window=90)
    with mock.patch("torch.get_num_threads", return_value=1):
        assert all(map(torch.equal, found, learn(attend, parts, wanted, window=90)))


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_compiler_is_told_what_the_operators_return(kv_heads):
    parts, tests = tensors(2, 4, kv_heads, 150, 16), ("test_schema", "test_faketensor")
    starts = torch.zeros(2, 150, dtype=torch.int64)
    for options in ((70, 3, None, 0.0), (0, 0, starts, 0.4)):
        torch.library.opcheck(kernel_attention.opaque_forward, (*parts, *options), test_utils=tests)
        made = kernel_attention.forward_by_kernels(*parts, *options)
        arguments = (torch.randn_like(made[0]), *parts, *options, *made)
        torch.library.opcheck(kernel_attention.opaque_backward, arguments, test_utils=tests)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_compiled_code_learns_by_the_same_kernels(dropout):
    parts, wanted = tensors(2, 4, 2, 150, 16), torch.randn(2, 4, 150, 16)
    ids = (torch.arange(150) > 90).long().expand(2, -1)
    results = []
    for implementation in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(3)
        results.append(learn(implementation, parts, wanted, window=70, sinks=3, document_ids=ids, dropout=dropout))
        assert results[-1][0].transpose(1, 2).is_contiguous()
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_model_drops_the_same_weights_when_it_computes_again(recomputes):
    sizes = {"d_model": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64, "vocab_size": 29}
    dropped = {"dropout": 0.1, "attention_dropout": 0.3}
    config = load_config(overrides={f"model.{key}": value for key, value in (sizes | dropped).items()}).model
    torch.manual_seed(1)
    model = TransformerModel(config).train()
    model.learn_by_kernels(attention=True, head=False)
    token_ids = torch.randint(0, 29, (3, 64))
    gradients = []
    for again in (False, recomputes):
        if again:
            model.recompute_activations()
        model.zero_grad()
        torch.manual_seed(2)
        model(token_ids, targets=token_ids).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))
