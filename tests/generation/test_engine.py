from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import ModelConfig
from sheepop.generation.engine import generate_cached
from sheepop.generation.generate import Continuation, generate_naive
from sheepop.generation.sampling import SamplingSettings
from sheepop.models.transformer import TransformerModel

Generate = Callable[..., list[Continuation]]

FAMILIES: dict[str, dict[str, object]] = {
    "classic": {},
    "modern": {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "num_kv_heads": 2, "tie_weights": False},
    "learned": {"positions": "learned", "bias": True},
    "sinusoidal": {"positions": "sinusoidal"},
    "no positions": {"positions": "none"},
    "sliding window": {"sliding_window": 5},
    "sinks": {"sliding_window": 5, "attention_sinks": 2},
    "sinks as long as the context": {"sliding_window": 3, "attention_sinks": 14, "positions": "learned"},
    "reference attention": {"attention": "reference", "num_kv_heads": 2, "sliding_window": 3},
}


def tiny(**changes: object) -> TransformerModel:
    torch.manual_seed(11)
    sizes = {"vocab_size": 31, "d_model": 24, "num_layers": 3, "num_heads": 4, "d_ff": 40, "max_seq_len": 14}
    # Wide initial weights: the untrained model's tokens then differ, and their scores are far apart.
    return TransformerModel(ModelConfig.model_validate({**sizes, "init_std": 0.4, "dropout": 0.3, **changes}))


CLASSIC = tiny()


def both(model: TransformerModel, prompt: Sequence[int], chosen: SamplingSettings, **request: object) -> None:
    naive = generate_naive(model, prompt, chosen, **request)  # type: ignore[arg-type]
    assert generate_cached(model, prompt, chosen, **request) == naive  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_naive_far_beyond_the_context(family: str, temperature: float) -> None:
    both(
        tiny(**FAMILIES[family]),
        [3, 1, 4, 1, 5],
        SamplingSettings(temperature),
        max_new_tokens=40,
        seed=9,
        num_samples=2,
    )


@settings(deadline=None, max_examples=25)
@given(
    prompt=st.lists(st.integers(0, 30), max_size=33),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 7]),
    top_p=st.sampled_from([1.0, 0.8]),
    penalty=st.sampled_from([1.0, 1.3]),
    max_new_tokens=st.integers(0, 20),
    num_samples=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_cached_equals_naive_for_any_request(
    prompt: list[int],
    temperature: float,
    top_k: int,
    top_p: float,
    penalty: float,
    max_new_tokens: int,
    num_samples: int,
    seed: int,
) -> None:
    chosen = SamplingSettings(temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    both(
        CLASSIC,
        prompt,
        chosen,
        max_new_tokens=max_new_tokens,
        seed=seed,
        num_samples=num_samples,
        end_of_text_id=17,
    )


def test_samples_end_one_by_one_and_the_others_go_on() -> None:
    endless = generate_cached(CLASSIC, [3], SamplingSettings(), max_new_tokens=30, seed=2, num_samples=3)
    end = endless[1].token_ids[4]
    ended = generate_cached(
        CLASSIC, [3], SamplingSettings(), max_new_tokens=30, seed=2, num_samples=3, end_of_text_id=end
    )
    for without, with_end in zip(endless, ended, strict=True):
        has_end = end in without.token_ids
        cut = without.token_ids.index(end) if has_end else 30
        assert with_end == Continuation(without.token_ids[:cut], "stop" if has_end else "length")


def test_tokens_come_in_turn_and_a_sample_can_be_ended() -> None:
    seen: list[int] = []

    def on_token(sample: int, token_id: int) -> bool:
        seen.append(sample)
        return sample == 1

    first, second = generate_cached(
        CLASSIC, [3], SamplingSettings(), max_new_tokens=3, seed=0, num_samples=2, on_token=on_token
    )
    assert seen == [0, 1, 0, 0]
    assert (len(first.token_ids), len(second.token_ids)) == (3, 1)


def test_a_full_context_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    generate_cached(CLASSIC, [3], SamplingSettings(0.0), max_new_tokens=13, seed=0)
    assert capsys.readouterr().err == ""
    for prompt_length in (1, 40):
        generate_cached(CLASSIC, [3] * prompt_length, SamplingSettings(0.0), max_new_tokens=30, seed=0, num_samples=2)
        assert capsys.readouterr().err.count("context of 14 tokens is full") == 1


def test_training_goes_on_undisturbed() -> None:
    CLASSIC.train()
    before = torch.get_rng_state()
    generate_cached(CLASSIC, [3], SamplingSettings(), max_new_tokens=4, seed=0)
    assert CLASSIC.training
    assert torch.equal(torch.get_rng_state(), before)
    CLASSIC(torch.tensor([[1, 2, 3]])).sum().backward()  # nothing that inference left behind stops a gradient


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_equals_naive_on_a_gpu(temperature: float) -> None:
    both(tiny().cuda(), [3, 1, 4], SamplingSettings(temperature), max_new_tokens=40, seed=9, num_samples=2)
