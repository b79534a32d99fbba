import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import ModelConfig
from sheepop.generation.runner import Chunk, KernelRunner, ModelRunner, NaiveRunner, Runner, groups_of_similar_length
from sheepop.models.paged_cache import CachedSequence, PagedCache
from sheepop.models.quantization import quantize
from sheepop.models.transformer import TransformerModel

FAMILIES: dict[str, dict[str, object]] = {
    "classic": {},
    "modern": {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "num_kv_heads": 2, "tie_weights": False},
    "learned": {"positions": "learned", "bias": True},
    "sinusoidal": {"positions": "sinusoidal"},
    "no positions": {"positions": "none"},
    "sliding window": {"sliding_window": 5},
    "short window": {"sliding_window": 2, "positions": "learned"},
    "sinks": {"sliding_window": 5, "attention_sinks": 2},
    "sinks in several pages": {"sliding_window": 3, "attention_sinks": 6, "num_kv_heads": 2},
    "more sinks than tokens": {"sliding_window": 2, "attention_sinks": 40, "positions": "learned"},
    "reference with sinks": {"attention": "reference", "sliding_window": 3, "attention_sinks": 3},
    "convolutions": {"conv_width": 4},
    "copying": {"copy_width": 8},
    "copying beyond the window": {"copy_width": 8, "sliding_window": 3, "attention_sinks": 2},
    "n-grams": {"ngram_order": 3, "ngram_entries": 97},
    "parallel": {"parallel_residual": True, "rotary_dim": 2},
    "reference attention": {"attention": "reference", "num_kv_heads": 2, "sliding_window": 3},
}


def tiny(**changes: object) -> TransformerModel:
    torch.manual_seed(11)
    sizes = {"vocab_size": 31, "d_model": 24, "num_layers": 3, "num_heads": 4, "d_ff": 40, "max_seq_len": 30}
    return TransformerModel(ModelConfig.model_validate({**sizes, "init_std": 0.4, "dropout": 0.3, **changes})).eval()


def kernels(model: TransformerModel) -> KernelRunner:
    pytest.importorskip("numba")
    from sheepop.generation.fast_decoding import FastDecoder

    return KernelRunner(model, FastDecoder(model))


@pytest.mark.parametrize("runner", [ModelRunner, kernels, NaiveRunner])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_of_many_texts_give_the_logits_of_each_text_alone(
    family: str, page_size: int, runner: Callable[[TransformerModel], Runner]
) -> None:
    model, draws = tiny(**FAMILIES[family]), random.Random(page_size)
    texts = [[draws.randrange(31) for _ in range(length)] for length in (5, 30, 17, 1, 17)]
    cache, run = PagedCache(model.config, 90, page_size), runner(model)
    sequences = [CachedSequence() for _ in texts]
    with torch.no_grad():
        whole = [model(torch.tensor([text]))[0] for text in texts]
    while any(sequence.length < len(text) for sequence, text in zip(sequences, texts, strict=True)):
        chunks, expected = [], []
        for sequence, text, logits in zip(sequences, texts, whole, strict=True):
            tokens = text[sequence.length :][: draws.choice([0, 1, 1, 2, 7])]
            if tokens:
                end = sequence.length + len(tokens)
                assert cache.reserve(sequence, len(tokens))
                chunks.append(Chunk(sequence, tokens, all_logits=draws.random() < 0.5))
                expected.append(logits[sequence.length if chunks[-1].all_logits else end - 1 : end])
        for found, wanted in zip(run(chunks, cache), expected, strict=True):
            assert found.shape == wanted.shape
            # What is copied is a power of a score, in which this score's rounding is a factor.
            near = (3e-5 if model.config.copy_width else 1e-5) * float(wanted.abs().max())
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=near)
        for chunk in chunks:
            cache.advance(chunk.sequence, chunk.token_ids)


@pytest.mark.parametrize("has_integers", [False, True])
def test_texts_of_quantized_models_do_not_depend_on_how_they_are_read(
    has_integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    from sheepop.generation.vector_integers import HAS_INTEGERS

    if has_integers and not HAS_INTEGERS:
        pytest.skip("the processor has no products of bytes")
    monkeypatch.setattr("sheepop.generation.fast_decoding.HAS_INTEGERS", has_integers)
    model = quantize(tiny(d_model=64, d_ff=128, max_seq_len=100), "int8")
    text = [random.Random(5).randrange(31) for _ in range(90)]
    readings = []
    for run, lengths in [
        (kernels(model), [90]),
        (kernels(model), [1] * 4 + [40, 20, 1, 25]),
        (ModelRunner(model), [50, 40]),
    ]:
        cache, sequence, other = PagedCache(model.config, 40, 5), CachedSequence(), CachedSequence()
        logits = []
        for length in lengths:
            chunk = Chunk(sequence, text[sequence.length :][:length], all_logits=True)
            assert cache.reserve(sequence, length)
            assert cache.reserve(other, 1)
            logits.append(run([Chunk(other, [3]), chunk], cache)[1])
            cache.advance(sequence, chunk.token_ids)
        readings.append(torch.cat(logits))
    at_once, in_chunks, by_model = readings
    assert not has_integers or at_once.equal(in_chunks)
    close = partial(torch.testing.assert_close, rtol=1e-4)
    close(in_chunks, at_once, atol=1e-4)
    close(at_once, by_model, atol=5e-3 if has_integers else 1e-4)


def test_what_a_page_held_before_does_not_matter() -> None:
    model = tiny()
    cache, run = PagedCache(model.config, 8, 4), ModelRunner(model)
    for pages in cache.keys + cache.values:
        pages.fill_(1e30)
    short, long = CachedSequence(), CachedSequence()
    chunks = [Chunk(short, [3, 1], all_logits=True), Chunk(long, [5, 9, 2], all_logits=True)]
    assert all(cache.reserve(chunk.sequence, len(chunk.token_ids)) for chunk in chunks)
    for chunk, found in zip(chunks, run(chunks, cache), strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([chunk.token_ids]))[0]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 300), max_size=20))
def test_padding_is_less_than_what_is_computed_and_single_tokens_stand_alone(lengths: list[int]) -> None:
    chunks = [Chunk(CachedSequence(), [0] * length) for length in lengths]
    groups = list(groups_of_similar_length(chunks))
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        inside = [lengths[index] for index in group]
        assert len(inside) * max(inside) < 2 * sum(inside)
        assert 1 not in inside or set(inside) == {1}
