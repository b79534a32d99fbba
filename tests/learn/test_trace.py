import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import ModelConfig
from sheepop.data.tokenizer import Tokenizer
from sheepop.learn.trace import point_names, trace, trace_text
from sheepop.models.attention import visible
from sheepop.models.transformer import TransformerModel, inference
from sheepop.utils.errors import ConfigError, DataError

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 4,
    "d_ff": 44,
    "max_seq_len": 13,
    "dropout": 0.3,
}
MODERN = {
    "norm": "rmsnorm",
    "activation": "swiglu",
    "num_kv_heads": 2,
    "qk_norm": True,
    "bias": False,
    "tie_weights": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "classic": {},
    "modern": MODERN,
    "window": {**MODERN, "sliding_window": 3},
    "sinks": {**MODERN, "sliding_window": 3, "attention_sinks": 2},
    "learned": {"positions": "learned", "activation": "gelu_tanh"},
    "sinusoidal": {"positions": "sinusoidal", "activation": "relu_squared"},
    "no positions": {"positions": "none", "activation": "geglu"},
    "parallel": {"parallel_residual": True, "rotary_dim": 2},
    "convolutions": {"conv_width": 4},
    "copying": {"copy_width": 8},
    "n-grams": {"ngram_order": 3, "ngram_entries": 50},
}


def make(family: str, **changed: Any) -> TransformerModel:
    torch.manual_seed(3)
    model = TransformerModel(ModelConfig(**SIZES | FAMILIES[family] | changed))
    for parameter in model.parameters():  # far enough from the first draw that every part matters
        torch.nn.init.normal_(parameter, mean=0.3 * (parameter.dim() == 1), std=0.4)
    return model


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> TransformerModel:
    return make(request.param)


IDS = torch.tensor([5, 0, 36, 7, 7, 21, 3, 12, 30])


def test_what_is_traced_is_what_the_fused_model_computes(model: TransformerModel) -> None:
    seen = trace(model, IDS)
    with inference(model):
        expected = model(IDS[None])[0]
        hidden = model.hidden_states(IDS[None])[0]
    torch.testing.assert_close(seen["logits"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen["final_norm"], hidden, rtol=1e-4, atol=1e-4)
    assert model.training  # left as it was


def test_each_point_follows_from_those_before_it(model: TransformerModel) -> None:
    seen, config = trace(model, IDS), model.config
    mask = visible(9, 9, window=config.sliding_window, sinks=config.attention_sinks, device=torch.device("cpu"))
    stream = seen["embedding"]
    for layer in range(config.num_layers):
        at = {name.removeprefix(f"blocks.{layer}."): seen[name] for name in seen if name.startswith(f"blocks.{layer}.")}
        assert torch.equal(at["input"], stream)
        weights, group = at["attention.weights"], config.num_heads // config.num_kv_heads
        assert weights.shape == at["attention.scores"].shape == (4, 9, 9)
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 9))
        assert torch.equal(at["attention.mask"], mask)
        assert bool((weights[:, ~mask] == 0).all())
        scores = at["attention.query"] @ at["attention.key"].repeat_interleave(group, 0).mT / config.head_dim**0.5
        torch.testing.assert_close(at["attention.scores"], scores)
        mixed = weights @ at["attention.value"].repeat_interleave(group, 0)
        torch.testing.assert_close(at["attention.mixed"], mixed)
        torch.testing.assert_close(at["after_attention"], at["input"] + at["attention.output"])
        torch.testing.assert_close(at["output"], at["after_attention"] + at["feed_forward.output"])
        assert at["feed_forward.activation"].shape == (9, 44)
        assert ("feed_forward.gate" in at) == config.is_gated == ("feed_forward.input" not in at)
        assert ("attention.before_rotary" in at) == (config.positions == "rotary")
        stream = at["output"]
    assert ("position_embedding" in seen) == (config.positions in ("learned", "sinusoidal"))
    assert seen["token_embedding"].shape == (9, 24)


def test_no_point_is_told_unless_somebody_asks() -> None:
    told: list[str] = []
    model = make("modern")
    with inference(model):
        model(IDS[None])
        model(IDS[None], record=lambda name, _: told.append(name))
    assert told == point_names(model)
    assert len(told) == len(set(told))


def test_patterns_choose_points() -> None:
    model = make("classic")
    seen = trace(model, IDS, ["blocks.*.attention.weights", "logits"])
    assert list(seen) == ["blocks.0.attention.weights", "blocks.1.attention.weights", "logits"]
    assert torch.equal(seen["logits"], trace(model, IDS)["logits"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.0.attention.wieghts", "Did you mean 'blocks.0.attention.weights'"),
        ("blocks.2.attention.weights", "Did you mean 'blocks.[01].attention.weights'"),
        ("zzz", "There are: .*blocks.N.attention.scores.*logits"),
        ("blocks.0.feed_forward.gate", "no point 'blocks.0.feed_forward.gate'"),
    ],
)
def test_an_unknown_point_is_an_error_with_the_nearest_names(name: str, message: str) -> None:
    model = make("classic")
    with pytest.raises(ConfigError, match=message):
        trace(model, IDS, [name])
    with pytest.raises(ConfigError, match=message):
        trace(model, IDS)[name]


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([], "at least one token"),
        ([[1, 2]], "one text"),
        (range(14), re.escape("14 tokens, but the model sees at most 13 (model.max_seq_len)")),
        ([1, 37], "the token 37, but the model knows the tokens 0 to 36"),
        ([-1], "the token -1"),
    ],
)
def test_tokens_that_cannot_be_traced(token_ids: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        trace(make("classic"), list(token_ids))


def test_a_text_whose_scores_do_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sheepop.learn.trace.available_bytes", lambda device: 2000)
    with pytest.raises(DataError, match=r"9 tokens in 2 layers of 4 heads take .* Trace a shorter text"):
        trace(make("classic"), IDS)


@settings(deadline=None, max_examples=30)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=3) | st.sampled_from(["🐑🐑", "\x00\x1b[31m"]))
def test_any_text_can_be_traced(text: str) -> None:
    tokenizer = Tokenizer.train("bpe", ["a sheep"], vocab_size=260)
    model = make("modern", vocab_size=tokenizer.vocab_size, max_seq_len=20)
    seen = trace_text(model, tokenizer, text, ["logits"])
    assert len(seen.token_ids) == len(seen["logits"]) == len(tokenizer.encode(text)) + 1
    assert bool(seen["logits"].isfinite().all())
