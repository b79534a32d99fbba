import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from sheepop.config import ModelConfig
from sheepop.data.dataset import IGNORE_INDEX
from sheepop.evaluation.perplexity import evaluate_tokens
from sheepop.models import copying
from sheepop.models.copying import Copies, copy_sums, following
from sheepop.models.head_loss import summed_head_loss
from sheepop.models.kv_cache import KVCache
from sheepop.models.transformer import TransformerModel

SIZES = {"vocab_size": 23, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "max_seq_len": 64}


def model_of(**changes):
    torch.manual_seed(5)
    model = TransformerModel(ModelConfig(**SIZES | {"copy_width": 6, "dropout": 0.0, "init_std": 0.3} | changes))
    return model.eval()


def documents_of(time, seed):
    return torch.randint(0, 2, (2, time), generator=torch.Generator().manual_seed(seed)).cumsum(1)


@settings(deadline=None, max_examples=60)
@given(time=st.integers(1, 12), vocab=st.integers(2, 6), documents=st.booleans(), seed=st.integers(0, 1000))
def test_entries_and_places_share_one_softmax(time, vocab, documents, seed):
    torch.manual_seed(seed)
    logits, query, key = torch.randn(2, time, vocab), torch.randn(2, time, 3), torch.randn(2, time, 3)
    token_ids = torch.randint(vocab, (2, time))
    ids = documents_of(time, seed) if documents else None
    copies = Copies(query, key, following(token_ids), torch.arange(time)[None], ids)
    found = copies.add_to(logits).softmax(-1)
    for b in range(2):
        for t in range(time):
            places = [s for s in range(t) if ids is None or ids[b, s] == ids[b, t]]
            scores = torch.tensor([float(query[b, t] @ key[b, s]) for s in places])
            shares = torch.cat((logits[b, t], scores)).softmax(-1)
            expected = shares[:vocab].clone()
            for share, place in zip(shares[vocab:], places, strict=True):
                expected[token_ids[b, place + 1]] += share
            torch.testing.assert_close(found[b, t], expected)
            alone = copies.at(b, slice(t, t + 1)).add_to(logits[b : b + 1, t : t + 1])
            torch.testing.assert_close(alone.softmax(-1)[0, 0], expected)


@settings(deadline=None, max_examples=40)
@given(
    time=st.integers(1, 40),
    at_once=st.integers(1, 50),
    documents=st.booleans(),
    scale=st.sampled_from([0.3, 3.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_are_those_of_the_logits(time, at_once, documents, scale, seed):
    model = model_of()
    for parameter in model.copy_head.parameters():
        torch.nn.init.normal_(parameter, std=scale, generator=torch.Generator().manual_seed(seed))
    token_ids = torch.randint(23, (2, time + 1), generator=torch.Generator().manual_seed(seed))
    inputs, targets = token_ids[:, :-1], token_ids[:, 1:].clone()
    targets[0, time // 2] = IGNORE_INDEX
    ids = documents_of(time, seed) if documents else None
    expected = cross_entropy(
        model(inputs, document_ids=ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(copying, "QUERIES_AT_ONCE", at_once)
        loss = model(inputs, targets=targets, document_ids=ids)
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    for name, parameter in model.named_parameters():
        atol = 1e-4 * max(1.0, scale) + 1e-6 * float(wanted[name].abs().max())  # some are in the thousands
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=atol, msg=name)


@pytest.mark.parametrize("kernel_from", [0, 10**9], ids=["kernel", "operators"])
def test_bf16_is_close_to_fp32(kernel_from, monkeypatch):
    monkeypatch.setattr("sheepop.models.head_loss.KERNEL_FROM", kernel_from)
    torch.manual_seed(2)
    hidden, weight = torch.randn(2, 50, 16, requires_grad=True), torch.randn(300, 16, requires_grad=True)
    query, key = (torch.randn(2, 50, 8, requires_grad=True) for _ in range(2))
    token_ids = torch.randint(300, (2, 51)) // torch.tensor([[1], [60]])  # the second repeats itself much

    def gradients(dtype):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            parts = [part if dtype is None else part.to(dtype) for part in (query, key)]
            sums = copy_sums(*parts, token_ids[:, :-1], token_ids[:, 1:])
            loss = summed_head_loss(hidden, weight, token_ids[:, 1:], sums)
        return loss, torch.autograd.grad(loss, [hidden, weight, query, key])

    (exact, exact_gradients), (close, close_gradients) = gradients(None), gradients(torch.bfloat16)
    torch.testing.assert_close(close, exact, rtol=0.01, atol=0.0)
    for found, wanted in zip(close_gradients, exact_gradients, strict=True):
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_a_copy_that_is_sure_and_wrong_leaves_numbers():
    token_ids = torch.tensor([[1, 2, 1, 3]])
    query = torch.full((1, 3, 4), 20.0, requires_grad=True)  # scores of 1,600: e^1600 is no number
    hidden, weight = torch.randn(1, 3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = summed_head_loss(
        hidden, weight, token_ids[:, 1:], copy_sums(query, query, token_ids[:, :-1], token_ids[:, 1:])
    )
    loss.backward()
    assert 1500 < loss < 5000
    assert all(tensor.grad.isfinite().all() for tensor in (query, hidden, weight))
    assert weight.grad[3].abs().sum() > 0.1  # the entry that was right is still learned


def test_scores_that_are_no_numbers_are_noticed():
    token_ids, infinite = torch.tensor([[1, 2, 1, 3]]), torch.full((1, 4, 2), torch.inf)
    sums = copy_sums(infinite, infinite, token_ids, token_ids)
    assert not sums[0, 0, 1:].isfinite().any()
    assert sums[0, 0, 1:].isnan().all()  # and not minus infinity, as where nothing can be copied
    copies = Copies(infinite, infinite, following(token_ids), torch.arange(4)[None])
    assert copies.add_to(torch.zeros(1, 4, 5))[0, 1:].isnan().any()


def test_a_model_that_copies_learns_to_repeat_what_no_entry_tells():
    losses = {}
    for width in (0, 16):
        torch.manual_seed(1)
        model = TransformerModel(
            ModelConfig(**SIZES | {"copy_width": width, "dropout": 0.0, "vocab_size": 200})
        ).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(60):
            half = torch.randint(200, (16, 16))
            text = torch.cat((half, half), 1)
            loss = model(text[:, :-1], targets=text[:, 1:]) / text[:, 1:].numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            logits = model(text[:, :-1])[:, 16:]
        losses[width] = float(cross_entropy(logits.flatten(0, 1), text[:, 17:].flatten()))
    assert losses[0] > 4.5  # of ln 200 = 5.3
    assert losses[16] < 3.0


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("stride", [None, 5])
def test_held_out_text_is_scored_by_the_logits(stride, document_mask, monkeypatch):
    monkeypatch.setattr("sheepop.evaluation.perplexity.QUERIES_AT_ONCE", 7)
    model, tokens = model_of(), torch.randint(23, (100,)).numpy()
    scores = evaluate_tokens(model, tokens, context=20, stride=stride, document_mask=document_mask, end_of_text_id=4)
    step, losses = stride or 20, []
    with torch.no_grad():
        for begin in range(0, 99, step):
            window = torch.from_numpy(tokens[begin : begin + 21])[None]
            inputs, targets = window[:, :-1], window[:, 1:]
            ids = (inputs == 4).cumsum(1) if document_mask else None
            every = cross_entropy(model(inputs, document_ids=ids)[0], targets[0], reduction="none")
            losses += every[20 - step if begin else 0 :].tolist()
    assert scores.tokens == len(losses[:99])
    assert scores.loss == pytest.approx(sum(losses[:99]) / 99, rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(pieces=st.lists(st.integers(1, 9), min_size=1, max_size=5), window=st.sampled_from([0, 3]))
def test_a_text_in_pieces_copies_as_in_one(pieces, window):
    model, time = model_of(sliding_window=window), sum(pieces)
    token_ids = torch.randint(23, (2, time), generator=torch.Generator().manual_seed(time))
    cache = KVCache(model.config, 2, time)
    with torch.inference_mode():
        found = torch.cat([model(part, cache=cache) for part in token_ids.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(found, model(token_ids), rtol=1e-4, atol=1e-4)


def test_a_cache_of_another_model_stores_nothing_of_it():
    cache = KVCache(ModelConfig(**SIZES), 1, 4)
    assert cache.copy_keys.numel() == cache.token_ids.numel() == 0
