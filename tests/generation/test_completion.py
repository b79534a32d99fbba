from dataclasses import asdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import ModelConfig
from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.batching import Engine, generate_batched
from sheepop.generation.completion import Transcript, complete
from sheepop.generation.request import Request
from sheepop.generation.sampling import SamplingSettings
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import ConfigError

# Characters outside the vocabulary are written in bytes, so that a character spans up to four tokens.
TOKENIZER = Tokenizer.train("char", ["abc\n"], vocab_size=5)
TEXTS = st.text(st.sampled_from("abcé羊🐑"), max_size=20)
STOPS = st.lists(st.text(st.sampled_from("abé羊"), min_size=1, max_size=4), max_size=3)


@pytest.fixture(scope="module")
def model() -> TransformerModel:
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size, d_model=24, num_layers=2, num_heads=3, d_ff=40, max_seq_len=14, init_std=0.4
    )
    return TransformerModel(config).eval()


def cut_at_first_stop(text: str, stop: list[str]) -> str:
    """Read character by character, and end as soon as a stop string has been read."""
    for end in range(1, len(text) + 1):
        begins = [end - len(string) for string in stop if text[:end].endswith(string)]
        if begins:
            return text[: min(begins)]
    return text


@settings(deadline=None)
@given(text=TEXTS, stop=STOPS)
def test_a_transcript_ends_at_the_first_stop_string_and_streams_only_what_stays(text: str, stop: list[str]) -> None:
    streamed: list[str] = []
    transcript = Transcript(TOKENIZER, stop, streamed.append)
    expected = cut_at_first_stop(text, stop)
    for token_id in TOKENIZER.encode(text):
        is_stopped = transcript.add(token_id)
        assert expected.startswith("".join(streamed))
        if is_stopped:
            break
    assert transcript.finish() == expected
    assert "".join(streamed) == expected
    assert all(streamed)


def test_text_streams_as_soon_as_it_is_certain() -> None:
    streamed: list[str] = []
    transcript = Transcript(TOKENIZER, ["bc"], streamed.append)
    for character, so_far in (("a", "a"), ("b", "a"), ("b", "ab"), ("a", "abba")):
        transcript.add(TOKENIZER.encode(character)[0])
        assert "".join(streamed) == so_far


def test_half_a_character_waits_for_its_other_half() -> None:
    streamed: list[str] = []
    transcript = Transcript(TOKENIZER, [], streamed.append)
    first, second = TOKENIZER.encode("é")
    transcript.add(first)
    assert streamed == []
    transcript.add(second)
    assert streamed == ["é"]
    transcript.add(first)
    assert transcript.finish() == "é\ufffd"


@pytest.mark.parametrize("prompt", ["", "ab", "sheep 🐑"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_optimized_and_naive_write_the_same(model: TransformerModel, prompt: str, temperature: float) -> None:
    def write(optimized: bool) -> object:
        return complete(
            model,
            TOKENIZER,
            prompt,
            SamplingSettings(temperature),
            max_new_tokens=25,
            seed=1,
            num_samples=2,
            optimized=optimized,
        ).completions

    assert write(optimized=True) == write(optimized=False)


def test_with_an_8_bit_cache_the_tokens_are_those_of_such_an_engine(model: TransformerModel) -> None:
    def write(int8_cache: bool) -> list[list[int]]:
        options: dict[str, Any] = {"max_new_tokens": 25, "seed": 1, "num_samples": 20, "int8_cache": int8_cache}
        return [each.token_ids for each in complete(model, TOKENIZER, "ab", SamplingSettings(), **options).completions]

    prompt, end = [*TOKENIZER.start_ids, *TOKENIZER.encode("ab")], TOKENIZER.end_of_text_id
    request = Request(prompt, SamplingSettings(), 25, seed=1, num_samples=20, end_of_text_id=end)
    expected = generate_batched(Engine(model, max_batch_size=20, int8_cache=True), request)
    assert write(int8_cache=True) == [each.token_ids for each in expected]
    assert write(int8_cache=True) != write(int8_cache=False)


def test_text_is_what_the_tokens_say_and_the_stream_is_the_text(model: TransformerModel) -> None:
    streamed: list[str] = []
    generation = complete(
        model,
        TOKENIZER,
        "ab",
        SamplingSettings(),
        max_new_tokens=30,
        seed=2,
        num_samples=3,
        on_text=streamed.append,
    )
    for completion in generation.completions:
        assert completion.text == TOKENIZER.decode(completion.token_ids)
    assert "".join(streamed) == generation.completions[0].text


@pytest.mark.parametrize("optimized", [True, False])
def test_a_stop_string_ends_the_text_before_it(model: TransformerModel, optimized: bool) -> None:
    def write(stop: list[str]) -> list[tuple[str, list[int], str]]:
        generation = complete(
            model,
            TOKENIZER,
            "a",
            SamplingSettings(),
            max_new_tokens=30,
            seed=0,
            num_samples=2,
            stop=stop,
            optimized=optimized,
        )
        return [(each.text, each.token_ids, each.finish_reason) for each in generation.completions]

    (whole, tokens, _), _ = write([])
    stop = whole[5:7]
    assert len(stop) == 2
    for (text, _, reason), (without, _, _) in zip(write([stop]), write([]), strict=True):
        assert text == without.split(stop)[0]
        assert reason == "stop" or stop not in without
    (_, cut_tokens, _), _ = write([stop])
    assert cut_tokens == tokens[: len(cut_tokens)]
    assert len(cut_tokens) < len(tokens)


def test_a_generation_is_the_json_of_the_contract(model: TransformerModel) -> None:
    generation = complete(model, TOKENIZER, "ab", SamplingSettings(), max_new_tokens=4, seed=0)
    as_json = asdict(generation)
    assert list(as_json) == ["prompt", "completions", "tokens_per_second", "time_to_first_token_seconds"]
    assert list(as_json["completions"][0]) == ["text", "token_ids", "finish_reason"]
    assert as_json["prompt"] == "ab"
    assert as_json["tokens_per_second"] > 0
    assert as_json["time_to_first_token_seconds"] > 0


@pytest.mark.parametrize("max_new_tokens", [0, 1])
def test_speed_is_zero_where_nothing_was_decoded(model: TransformerModel, max_new_tokens: int) -> None:
    generation = complete(model, TOKENIZER, "ab", SamplingSettings(), max_new_tokens=max_new_tokens, seed=0)
    assert generation.tokens_per_second == 0
    assert len(generation.completions[0].token_ids) == max_new_tokens


@pytest.mark.parametrize(
    ("request_", "message"),
    [({"stop": ["a", ""]}, "stop string is empty"), ({"num_samples": 0}, "num_samples"), ({"num_samples": -1}, "-1")],
)
def test_what_cannot_be_is_said(model: TransformerModel, request_: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        complete(model, TOKENIZER, "a", SamplingSettings(), **({"max_new_tokens": 3, "seed": 0} | request_))  # type: ignore[arg-type]


def test_a_text_starts_as_its_tokenizer_says(model: TransformerModel) -> None:
    greedy = SamplingSettings(temperature=0.0)
    end = TOKENIZER.end_of_text_id

    def first(start_ids: list[int], prompt: str, *, optimized: bool) -> list[int]:
        tokenizer = TOKENIZER.with_marks(start_ids, end)
        written = complete(model, tokenizer, prompt, greedy, max_new_tokens=3, seed=0, optimized=optimized)
        return written.completions[0].token_ids

    for optimized in (True, False):
        for start, prompt, tokens in (
            ([end], "ab", [end, *TOKENIZER.encode("ab")]),
            ([9], "ab", [9, *TOKENIZER.encode("ab")]),
            ([], "ab", TOKENIZER.encode("ab")),
            ([], "", [end]),  # nothing to start from
        ):
            with torch.inference_mode():
                expected = int(model(torch.tensor([tokens]))[0, -1].argmax())
            written = first(start, prompt, optimized=optimized)
            assert written[:1] == ([] if expected == end else [expected])
