import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import ModelConfig, load_config
from sheepop.models.kv_cache import KVCache
from sheepop.models.short_convolution import ShortConvolution
from sheepop.models.transformer import TransformerModel
from sheepop.training.optimizer import make_optimizer

SIZES = {"vocab_size": 31, "d_model": 8, "num_layers": 2, "num_heads": 2, "d_ff": 16, "max_seq_len": 24}


def convolution_of(width):
    convolution = ShortConvolution(ModelConfig(**SIZES | {"conv_width": width, "dropout": 0.0}), 0, 0)
    torch.nn.init.normal_(convolution.weight)
    return convolution


@settings(deadline=None, max_examples=40)
@given(width=st.integers(2, 6), time=st.integers(1, 9), documents=st.booleans(), seed=st.integers(0, 1000))
def test_each_token_is_mixed_with_those_before_it_in_its_document(width, time, documents, seed):
    torch.manual_seed(seed)
    convolution, hidden = convolution_of(width), torch.randn(2, time, 8)
    ids = torch.randint(0, 2, (2, time)).cumsum(1) if documents else torch.zeros(2, time, dtype=torch.long)
    expected = hidden.clone()
    for b in range(2):
        for t in range(time):
            for distance in range(1, min(width - 1, t) + 1):
                if ids[b, t - distance] == ids[b, t]:
                    expected[b, t] += convolution.weight[distance - 1] * hidden[b, t - distance]
    found = convolution(hidden, document_ids=ids if documents else None)
    torch.testing.assert_close(found, expected)


@settings(deadline=None, max_examples=40)
@given(width=st.integers(2, 6), pieces=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_a_text_in_pieces_is_mixed_as_in_one(width, pieces, seed):
    torch.manual_seed(seed)
    convolution, hidden = convolution_of(width), torch.randn(2, sum(pieces), 8)
    cache = KVCache(ModelConfig(**SIZES | {"conv_width": width}), 2, sum(pieces))
    found = []
    for part in hidden.split(pieces, dim=1):
        found.append(convolution(part, cache))
        cache.length += part.shape[1]
    torch.testing.assert_close(torch.cat(found, dim=1), convolution(hidden))


def test_a_cache_of_another_model_stores_nothing_of_it():
    assert KVCache(ModelConfig(**SIZES), 1, 4).inputs == []


@pytest.mark.parametrize("width", [0, -1])
def test_a_width_below_one_is_refused(width):
    with pytest.raises(Exception, match="conv_width"):
        load_config(overrides={"model.conv_width": width})


def test_muon_leaves_convolutions_to_adamw():
    config = load_config(
        overrides={f"model.{key}": value for key, value in SIZES.items()}
        | {"model.conv_width": 3, "training.optimizer": "muon"}
    )
    model = TransformerModel(config.model)
    optimizer = make_optimizer(model, config.training)
    orthogonal = {id(parameter) for group in optimizer.matrices for parameter in group["params"]}
    convolutions = [parameter for name, parameter in model.named_parameters() if "convolution" in name]
    assert len(convolutions) == 4
    assert not orthogonal & {id(parameter) for parameter in convolutions}
