import json
import re
import sys

import pytest
import torch

from sheepop.config import ModelConfig
from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.batching import Engine, generate_batched
from sheepop.generation.grammar import GrammarCompiler
from sheepop.generation.request import Request
from sheepop.generation.sampling import SamplingSettings
from sheepop.generation.speculation import LookUp
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import ConfigError

TEXTS = ['{"name": "羊 sheep", "age": 3} true false null 12 words and letters'] * 4
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "wool": {"type": "boolean"}},
    "required": ["age", "wool"],
    "additionalProperties": False,
}


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"pip install 'sheepop\[grammar\]'"):
        GrammarCompiler(Tokenizer.train("char", TEXTS, vocab_size=40), 40)


@pytest.fixture(scope="module", params=["char", "bpe"])
def parts(request: pytest.FixtureRequest) -> tuple[TransformerModel, Tokenizer, GrammarCompiler]:
    pytest.importorskip("llguidance")
    tokenizer = Tokenizer.train(request.param, TEXTS, vocab_size=300)
    torch.manual_seed(0)
    vocab_size = tokenizer.vocab_size + 3  # entries that no token has
    config = ModelConfig(
        vocab_size=vocab_size, d_model=24, num_layers=1, num_heads=3, d_ff=40, max_seq_len=64, init_std=0.4
    )
    return TransformerModel(config), tokenizer, GrammarCompiler(tokenizer, vocab_size)


def write(parts, kind: str, text: str, speculator: LookUp | None = None) -> list[str]:
    model, tokenizer, compiler = parts
    end, make = tokenizer.end_of_text_id, compiler.compile(kind, text)  # type: ignore[arg-type]
    request = Request([end], SamplingSettings(), 60, 0, 4, end, constrain=make)
    samples = generate_batched(Engine(model, speculator=speculator), request)
    assert {sample.finish_reason for sample in samples} == {"stop"}
    return [tokenizer.decode(sample.token_ids) for sample in samples]


@pytest.mark.parametrize("speculator", [None, LookUp()], ids=["plain", "lookup"])
def test_an_untrained_model_writes_json_of_a_schema(parts, speculator: LookUp | None) -> None:
    for text in write(parts, "json_schema", json.dumps(SCHEMA), speculator):
        value = json.loads(text)
        assert value.keys() == {"age", "wool"}
        assert 0 <= value["age"] <= 99
        assert isinstance(value["wool"], bool)


def test_an_untrained_model_writes_what_an_expression_matches(parts) -> None:
    expression = "([ab]{3}é|sheep){2}"
    for text in write(parts, "regex", expression):
        assert re.fullmatch(expression, text)


def test_an_untrained_model_writes_by_a_grammar(parts) -> None:
    for text in write(parts, "lark", 'start: "(" start ")" | DIGIT\nDIGIT: /[0-9]/'):
        assert re.fullmatch(r"\(*[0-9]\)*", text)
        assert text.count("(") == text.count(")")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "[ab", "regex cannot be used: .*unclosed"),
        ("json_schema", "{", "json schema cannot be used"),
        ("json_schema", '{"type": "objekt"}', "objekt"),
        ("lark", "start: wool", "wool"),
        ("ebnf", "", "no grammar of kind 'ebnf'. Choose one of json_schema"),
    ],
)
def test_what_is_no_grammar_is_said_before_anything_runs(parts, kind: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.compile(message, re.DOTALL)):
        parts[2].compile(kind, text)


def test_a_tokenizer_that_cannot_spell_is_refused() -> None:
    pytest.importorskip("llguidance")
    with pytest.raises(ConfigError, match="cannot spell"):
        GrammarCompiler(Tokenizer.train("word", TEXTS, vocab_size=40), 40)
