"""A talk at the terminal."""

import io
import sys

import pytest
import torch

from sheepop.config import load_config
from sheepop.data.chat_template import TEMPLATE_FILE
from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.completion import complete
from sheepop.generation.sampling import SamplingSettings
from sheepop.generation.terminal import chat, load_model_and_tokenizer
from sheepop.interop.imported import write_imported
from sheepop.models.pretrained import stored_weights
from sheepop.models.transformer import TransformerModel

TEMPLATE = "{% for each in messages %}{{ each.role }}:{{ each.content }};{% endfor %}a:"
SETTINGS = SamplingSettings(temperature=0.9)


@pytest.fixture
def checkpoint(tmp_path):
    tokenizer = Tokenizer.train("char", ["user:the assistant; sheep see a dog\n"], vocab_size=64)
    sizes = {"d_model": 24, "num_layers": 1, "num_heads": 2, "d_ff": 32, "max_seq_len": 256, "init_std": 0.4}
    values = sizes | {"vocab_size": tokenizer.vocab_size, "dropout": 0.0}
    config = load_config(overrides={f"model.{key}": value for key, value in values.items()})
    torch.manual_seed(3)
    write_imported(tmp_path / "model", config.model, stored_weights(TransformerModel(config.model)), tokenizer)
    return tmp_path / "model"


@pytest.fixture
def talk(checkpoint, monkeypatch, capsys):
    def talk(*lines):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n\n"))
        chat(checkpoint, SETTINGS, max_new_tokens=12, seed=7, device="cpu", compiles=False)
        return capsys.readouterr()

    return talk


@pytest.fixture
def write(checkpoint):
    def write(prompt, turn):
        pair = load_model_and_tokenizer(checkpoint, "cpu")
        return complete(*pair, prompt, SETTINGS, max_new_tokens=12, seed=7 + turn).completions[0].text

    return write


def test_a_model_without_a_template_continues_one_text(talk, write):
    said = talk("the sheep", "see")
    first = write("the sheep\n", 0)
    first += "" if first.endswith("\n") else "\n"
    second = write(f"the sheep\n{first}see\n", 1)
    assert said.out.removesuffix("\n") == (first + second).removesuffix("\n")
    assert "continues what you write" in said.err


def test_a_model_with_a_template_answers(talk, write, checkpoint):
    (checkpoint / TEMPLATE_FILE).write_text(TEMPLATE)
    said = talk("the sheep", "see")
    first = write("user:the sheep;a:", 0)
    second = write(f"user:the sheep;assistant:{first};user:see;a:", 1)
    assert said.out.removesuffix("\n") == "\n".join([first.removesuffix("\n"), second.removesuffix("\n")])
    assert "answers what you write" in said.err


def test_a_token_that_is_no_text_ends_an_answer(talk, checkpoint, monkeypatch):
    (checkpoint / TEMPLATE_FILE).write_text(TEMPLATE)
    letters = Tokenizer.load(checkpoint / "tokenizer.json").encode("s")
    monkeypatch.setattr(Tokenizer, "special_ids", property(lambda self: {"<end>": letters[0]}))
    assert "s" not in talk("the sheep", "see", "a dog").out
