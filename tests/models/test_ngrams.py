import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import ModelConfig
from sheepop.generation.engine import generate_cached
from sheepop.generation.generate import generate_naive
from sheepop.generation.sampling import SamplingSettings
from sheepop.models.ngrams import MULTIPLIER, NgramEmbedding
from sheepop.models.transformer import TransformerModel


def config_of(**changes):
    sizes = {"vocab_size": 7, "d_model": 6, "num_layers": 2, "num_heads": 3, "max_seq_len": 9, "dropout": 0.0}
    return ModelConfig(**sizes | {"head_dim": 4, "ngram_order": 3, "ngram_entries": 100} | changes)


def written_out(group, *, symbols, size):
    """Return the row of a group of tokens, the newest first, by Python's own integers."""
    number = 0
    for token in group:
        number = number * symbols + token + 1
    if symbols ** len(group) <= size:
        return number
    to_signed = lambda value: (value + 2**63) % 2**64 - 2**63  # noqa: E731
    mixed = to_signed(number * MULTIPLIER)
    return (mixed ^ (mixed >> 32)) % size


@settings(deadline=None, max_examples=50)
@given(
    tokens=st.lists(st.integers(0, 6), min_size=1, max_size=9),
    order=st.integers(2, 5),
    entries=st.sampled_from([11, 64, 100, 600]),
)
def test_it_adds_the_rows_of_all_groups(tokens, order, entries):
    embedding = NgramEmbedding(config_of(ngram_order=order, ngram_entries=entries))
    for table in embedding.tables:
        torch.nn.init.normal_(table.weight)
    found = embedding(torch.tensor([tokens]), torch.full((1, order - 1), -1))[0]
    padded = [-1] * order + tokens
    for at in range(len(tokens)):
        expected = torch.zeros(6)
        for length, table in zip(range(2, order + 1), embedding.tables, strict=True):
            group = [padded[at + order - back] for back in range(length)]
            expected += table.weight[written_out(group, symbols=8, size=table.num_embeddings)]
        torch.testing.assert_close(found[at], expected)


def test_groups_that_fit_have_a_row_each():
    embedding = NgramEmbedding(config_of(ngram_order=2))
    assert embedding.tables[0].num_embeddings == 64
    pairs = list(itertools.product(range(7), repeat=2))
    rows = {written_out(pair, symbols=8, size=64) for pair in pairs}
    assert len(rows) == len(pairs)


@pytest.mark.parametrize("order", [2, 4])
def test_generating_with_and_without_a_cache_is_the_same(order):
    torch.manual_seed(0)
    model = TransformerModel(config_of(ngram_order=order, init_std=0.5)).eval()
    for prompt in ([3], [1, 2, 3, 4]):
        arguments = {"max_new_tokens": 20, "seed": 1, "num_samples": 2}  # longer than the context
        settings_ = SamplingSettings(temperature=1.0)
        assert generate_cached(model, prompt, settings_, **arguments) == generate_naive(
            model, prompt, settings_, **arguments
        )
