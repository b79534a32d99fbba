"""A tokenizer and a checkpoint of random weights, for every format."""

import pytest
import torch

from sheepop.config import load_config
from sheepop.data.tokenizer import Tokenizer
from sheepop.interop.imported import write_imported
from sheepop.models.pretrained import stored_weights
from sheepop.models.transformer import TransformerModel

TEXTS = ["The sheep sees the dog, and follows it.\n", "No dog at night: 3 sheep. Naïve!"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train("bpe", TEXTS * 4, vocab_size=283)


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A checkpoint of random weights, biases and norms included: `checkpoint(preset, activation="relu")`."""

    def make(preset, **settings):
        sizes = {"d_model": 40, "num_layers": 2, "num_heads": 4, "d_ff": 44, "max_seq_len": 23, "dropout": 0.0}
        overrides = {f"model.{key}": value for key, value in (sizes | settings).items()}
        config = load_config(preset=preset, overrides={"model.vocab_size": tokenizer.vocab_size} | overrides)
        torch.manual_seed(3)
        model = TransformerModel(config.model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        folder = tmp_path / "checkpoint"
        write_imported(folder, config.model, stored_weights(model), tokenizer)
        return folder

    return make
