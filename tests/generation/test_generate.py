import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepop.config import ModelConfig
from sheepop.generation.generate import context_start, generate_naive
from sheepop.generation.sampling import SamplingSettings
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import CheckpointError, ConfigError

GREEDY = SamplingSettings(temperature=0.0)


@pytest.fixture(scope="module")
def model() -> TransformerModel:
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=29, d_model=12, num_layers=2, num_heads=3, d_ff=20, max_seq_len=8, dropout=0.5, init_std=0.5
    )
    return TransformerModel(config)


@given(length=st.integers(1, 500), max_seq_len=st.integers(1, 40))
def test_the_window_is_the_longest_that_fits_or_at_least_half_of_it(length: int, max_seq_len: int) -> None:
    window = length - context_start(length, max_seq_len)
    if length <= max_seq_len:
        assert window == length
    else:
        assert max_seq_len // 2 < window <= max_seq_len


@given(length=st.integers(1, 500), max_seq_len=st.integers(1, 40))
def test_the_window_moves_only_when_it_is_full(length: int, max_seq_len: int) -> None:
    start, next_start = context_start(length, max_seq_len), context_start(length + 1, max_seq_len)
    assert next_start == start or length - start == max_seq_len


def test_greedy_tokens_are_the_most_likely_ones_of_the_visible_context(model: TransformerModel) -> None:
    [continuation] = generate_naive(model, [3, 5], GREEDY, max_new_tokens=19, seed=0)
    tokens = [3, 5, *continuation.token_ids]
    assert len(continuation.token_ids) == 19
    assert continuation.finish_reason == "length"
    model.eval()
    for n in range(2, len(tokens)):
        window = torch.tensor([tokens[context_start(n, 8) : n]])
        assert int(model(window)[0, -1].argmax()) == tokens[n]


def test_a_sample_does_not_depend_on_how_many_there_are(model: TransformerModel) -> None:
    def draw(num_samples: int) -> list[list[int]]:
        samples = generate_naive(
            model, [7], SamplingSettings(), max_new_tokens=10, seed=4, num_samples=num_samples, end_of_text_id=None
        )
        return [sample.token_ids for sample in samples]

    three = draw(3)
    assert draw(1) == three[:1]
    assert len({tuple(sample) for sample in three}) == 3


def test_the_seed_decides(model: TransformerModel) -> None:
    def draw(seed: int) -> list[int]:
        return generate_naive(model, [7], SamplingSettings(), max_new_tokens=12, seed=seed)[0].token_ids

    assert draw(1) == draw(1) != draw(2)


def test_the_end_of_text_ends_a_sample_and_is_not_part_of_it(model: TransformerModel) -> None:
    [endless] = generate_naive(model, [3], SamplingSettings(), max_new_tokens=12, seed=0)
    end = endless.token_ids[6]
    [ended] = generate_naive(model, [3], SamplingSettings(), max_new_tokens=12, seed=0, end_of_text_id=end)
    assert ended.finish_reason == "stop"
    assert ended.token_ids == endless.token_ids[: endless.token_ids.index(end)]


def test_an_empty_prompt_begins_a_document(model: TransformerModel) -> None:
    def draw(prompt: list[int]) -> list[int]:
        return generate_naive(model, prompt, GREEDY, max_new_tokens=5, seed=0, end_of_text_id=2)[0].token_ids

    assert draw([]) == draw([2])


def test_the_mark_before_a_document_is_not_penalised_as_a_repetition(model: TransformerModel) -> None:
    def draw(token_id: int, penalty: float, end_of_text_id: int) -> list[int]:
        chosen = SamplingSettings(temperature=0.0, repetition_penalty=penalty)
        [sample] = generate_naive(model, [token_id], chosen, max_new_tokens=1, seed=0, end_of_text_id=end_of_text_id)
        return sample.token_ids

    echo = next(token_id for token_id in range(29) if draw(token_id, 1.0, end_of_text_id=-1) == [token_id])
    assert draw(echo, 1e6, end_of_text_id=-1) != [echo]  # as a word it has become unlikely
    assert draw(echo, 1e6, end_of_text_id=echo) == []  # as the mark it is still drawn, and ends the sample


def test_on_token_sees_each_token_and_can_end_a_sample(model: TransformerModel) -> None:
    seen: list[tuple[int, int]] = []

    def on_token(sample: int, token_id: int) -> bool:
        seen.append((sample, token_id))
        return sample == 0 and len(seen) == 3

    first, second = generate_naive(
        model, [3], SamplingSettings(), max_new_tokens=5, seed=0, num_samples=2, on_token=on_token
    )
    assert (first.finish_reason, len(first.token_ids)) == ("stop", 3)
    assert (second.finish_reason, len(second.token_ids)) == ("length", 5)
    assert seen == [(0, token) for token in first.token_ids] + [(1, token) for token in second.token_ids]


def test_a_full_context_is_said_once(model: TransformerModel, capsys: pytest.CaptureFixture[str]) -> None:
    generate_naive(model, [3], GREEDY, max_new_tokens=7, seed=0)
    assert capsys.readouterr().err == ""
    generate_naive(model, [3], GREEDY, max_new_tokens=30, seed=0, num_samples=2)
    assert capsys.readouterr().err.count("context of 8 tokens is full") == 1


def test_training_goes_on_undisturbed(model: TransformerModel) -> None:
    model.train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    generate_naive(model, [3], SamplingSettings(), max_new_tokens=4, seed=0)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    model.eval()
    generate_naive(model, [3], SamplingSettings(), max_new_tokens=1, seed=0)
    assert not model.training


def test_no_tokens_can_be_asked_for(model: TransformerModel) -> None:
    [continuation] = generate_naive(model, [3], GREEDY, max_new_tokens=0, seed=0)
    assert (continuation.token_ids, continuation.finish_reason) == ([], "length")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_new_tokens": -1}, ConfigError, "'max_new_tokens' is -1"),
        ({"num_samples": 0}, ConfigError, "'num_samples' is 0"),
        ({"settings": SamplingSettings(top_p=1.5)}, ConfigError, "'top_p' is 1.5"),
        ({"prompt_ids": []}, ConfigError, "prompt is empty"),
        ({"prompt_ids": [3, 29]}, CheckpointError, "token 29, but the model knows only 29"),
    ],
)
def test_what_cannot_be_is_said(
    model: TransformerModel, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    request = {"prompt_ids": [3], "settings": GREEDY, "max_new_tokens": 1, "seed": 0, "num_samples": 1} | changes
    with pytest.raises(error, match=message):
        generate_naive(model, **request)  # type: ignore[arg-type]
