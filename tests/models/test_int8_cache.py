import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepop.config import ModelConfig
from sheepop.generation.runner import Chunk, ModelRunner
from sheepop.models.int8_cache import Int8PagedCache, rounded
from sheepop.models.paged_cache import CachedSequence, PagedCache
from sheepop.models.transformer import TransformerModel

CONFIG = ModelConfig(vocab_size=31, d_model=40, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=40, max_seq_len=30)


@given(numbers=st.lists(st.floats(-1024, 1024, width=32), min_size=1, max_size=9))
def test_a_number_is_off_by_half_a_step_at_most(numbers: list[float]) -> None:
    vectors = torch.tensor([numbers])
    steps, step = rounded(vectors)
    assert steps.dtype == torch.int8
    assert ((steps * step[:, None] - vectors).abs() <= step[:, None] * 0.50001).all()


def test_zeros_stay_zeros() -> None:
    steps, step = rounded(torch.zeros(2, 3))
    assert not (steps * step[:, None]).any()


@pytest.mark.parametrize("sight", [{}, {"sliding_window": 5}, {"sliding_window": 5, "attention_sinks": 3}], ids=str)
def test_logits_are_close(sight: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = TransformerModel(CONFIG.model_copy(update=sight)).eval()
    text = torch.randint(31, (30,)).tolist()
    logits = []
    for kind in (PagedCache, Int8PagedCache):
        cache, sequence = kind(model.config, 8, 4), CachedSequence()
        rows = []
        for begin, end in ((0, 7), (7, 15), (15, 16), (16, 30)):
            assert cache.reserve(sequence, end - begin)
            rows += ModelRunner(model)([Chunk(sequence, text[begin:end], all_logits=True)], cache)
            cache.advance(sequence, text[begin:end])
        logits.append(torch.cat(rows))
    exact, close = logits
    assert not torch.equal(exact, close)
    torch.testing.assert_close(close, exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))
    with torch.no_grad():
        whole = model(torch.tensor([text]))[0]
    torch.testing.assert_close(exact, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"conv_width": 4}, {"copy_width": 8}], ids=str)
def test_page_bytes_are_those_of_the_tensors(changes: dict[str, int]) -> None:
    config = CONFIG.model_copy(update=changes)
    for kind in (PagedCache, Int8PagedCache):
        cache = kind(config, 7, 5)
        tensors = [*cache.keys, *cache.values, *cache.inputs, cache.copy_keys, cache.token_ids]
        if isinstance(cache, Int8PagedCache):
            tensors += cache.key_scales + cache.value_scales
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert held == 7 * kind.page_bytes(config, 5, torch.float32)
    assert Int8PagedCache.page_bytes(CONFIG, 5, torch.float32) == pytest.approx(
        0.35 * PagedCache.page_bytes(CONFIG, 5, torch.float32)
    )
