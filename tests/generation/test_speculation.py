import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepop.config import ModelConfig
from sheepop.generation.batching import Engine, generate_batched
from sheepop.generation.draft_model import DraftModel
from sheepop.generation.generate import generate_naive
from sheepop.generation.request import Request
from sheepop.generation.sampling import SamplingSettings, distribution
from sheepop.generation.speculation import Guess, LookUp, accept_or_replace, draw_or_accept, look_up
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import CheckpointError, ConfigError

V = 6
NOTHING_SAID = torch.empty(0, dtype=torch.int64)


def tiny(seed: int, **changes: object) -> TransformerModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "d_model": 24, "num_layers": 2, "num_heads": 4, "d_ff": 40, "max_seq_len": 14}
    return TransformerModel(ModelConfig.model_validate({**sizes, "init_std": 0.3, **changes})).eval()


TARGET = tiny(1)
DRAFT = tiny(2, d_model=12, num_layers=1, num_heads=2, d_ff=20, max_seq_len=10)


def draft(**options: int) -> DraftModel:
    return DraftModel(DRAFT, TARGET.config, **{"num_guesses": 3, "max_batch_size": 64} | options)


def chi_square(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> tuple[float, int]:
    """Return the statistic and its degrees of freedom, over outcomes that are expected at least five times."""
    total = sum(counts.values())
    cells = [(counts[key], total * share) for key, share in expected.items() if total * share >= 5]
    rare = total - sum(count for count, _ in cells), total - sum(share for _, share in cells)
    cells += [rare] if rare[1] >= 5 else []
    return sum((count - share) ** 2 / share for count, share in cells), len(cells) - 1


def is_plausible(statistic: float, freedom: int) -> bool:
    """Say whether a chi-square statistic is within four standard deviations (mean k, variance 2k) of what it should."""
    return statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    "settings", [SamplingSettings(), SamplingSettings(0.6, top_k=4), SamplingSettings(1.3, top_p=0.8)]
)
def test_an_accepted_or_replaced_guess_is_distributed_as_the_model_says(settings: SamplingSettings) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, guessing = torch.randn(2, V, generator=generator) * 1.5
    wanted, guessed_from = distribution(scores, settings, NOTHING_SAID), guessing.softmax(0)
    counts = Counter()
    for _ in range(6000):
        guess = int(torch.multinomial(guessed_from, 1, generator=generator))
        counts[accept_or_replace(guess, guessed_from, scores, settings, generator, NOTHING_SAID),] += 1
    assert is_plausible(*chi_square(counts, {(token,): float(share) for token, share in enumerate(wanted)}))
    assert all(wanted[token] > 0 for (token,) in counts)
    # The test would see it if guesses were taken as they come.
    naive = Counter((int(token),) for token in torch.multinomial(guessed_from, 6000, True, generator=generator))
    assert not is_plausible(*chi_square(naive, {(token,): float(share) for token, share in enumerate(wanted)}))


def test_a_guess_from_the_models_own_distribution_is_always_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(V)
    for guess in range(V):
        for _ in range(50):
            own = scores.softmax(0)
            assert accept_or_replace(guess, own, scores, SamplingSettings(), generator, NOTHING_SAID) == guess


def sequence_probabilities(model: TransformerModel, prompt: list[int], length: int) -> dict[tuple[int, ...], float]:
    expected = {}
    for tail in itertools.product(range(V), repeat=length):
        with torch.no_grad():
            logprobs = model(torch.tensor([[*prompt, *tail]]))[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + length - 1)
        expected[tail] = float(sum(logprobs[place, token] for place, token in zip(places, tail, strict=True)).exp())
    return expected


def test_texts_with_a_draft_model_are_distributed_as_without() -> None:
    prompt, length, num_samples = [1, 2, 3], 3, 3000
    engine = Engine(TARGET, max_batch_size=64, page_size=4, speculator=draft())
    samples = generate_batched(engine, Request(prompt, SamplingSettings(), length, num_samples=num_samples))
    counts = Counter(tuple(sample.token_ids) for sample in samples)
    assert 0.2 < engine.counters.accepted / engine.counters.guessed < 0.9
    assert is_plausible(*chi_square(counts, sequence_probabilities(TARGET, prompt, length)))


@pytest.mark.parametrize("make", [LookUp, draft], ids=["lookup", "draft"])
def test_greedy_tokens_are_the_same_far_beyond_the_context(make) -> None:
    chosen = SamplingSettings(0.0, repetition_penalty=1.2)
    engine = Engine(TARGET, page_size=3, num_pages=9, speculator=make())
    requests = [Request([token, 2, 3], chosen, 40, end_of_text_id=5) for token in range(4)]
    numbers = {engine.add(request): request for request in requests}
    texts: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.has_work:
        for event in engine.step():
            texts[event.request_id] += [] if event.token_id is None else [event.token_id]
    assert engine.counters.accepted > 0
    assert engine.cache.num_free == engine.cache.num_pages
    for number, request in numbers.items():
        [naive] = generate_naive(TARGET, request.prompt_ids, chosen, max_new_tokens=40, seed=0, end_of_text_id=5)
        assert texts[number] == naive.token_ids


def test_with_a_draft_model_too_a_seed_decides_whatever_the_batch_and_the_room() -> None:
    request = Request([1, 2], SamplingSettings(), 20, seed=3)
    [alone] = generate_batched(Engine(TARGET, speculator=draft()), request)
    engine = Engine(TARGET, page_size=2, num_pages=9, chunk_size=4, speculator=draft())
    for seed in range(3):
        engine.add(Request([4, 3, 2, 1][seed:], SamplingSettings(), 20, seed))
    number, tokens = engine.add(request), []
    while engine.has_work:
        tokens += [event.token_id for event in engine.step() if event.request_id == number]
    assert engine.counters.preempted > 0
    assert tokens == alone.token_ids


@pytest.mark.parametrize("sight", [{}, {"sliding_window": 4}, {"sliding_window": 4, "attention_sinks": 2}], ids=str)
def test_a_draft_model_that_is_the_model_is_always_right_and_saves_passes(sight: dict[str, int]) -> None:
    target = tiny(1, **sight)
    twin = DraftModel(target, target.config, num_guesses=4, page_size=2)
    engine = Engine(target, page_size=2, speculator=twin)
    generate_batched(engine, Request([1, 2], SamplingSettings(0.0), 11))
    assert engine.counters.guessed == engine.counters.accepted == 8
    # The prompt and the first token, 4 + 1 tokens, and the last 4 + 1.
    assert engine.counters.computed == 2 + 5 + 5


def test_more_texts_than_the_draft_model_has_room_for_get_no_guesses() -> None:
    engine = Engine(TARGET, speculator=draft(max_batch_size=1))
    samples = generate_batched(engine, Request([1, 2], SamplingSettings(0.0), 30, num_samples=5))
    [naive] = generate_naive(TARGET, [1, 2], SamplingSettings(0.0), max_new_tokens=30, seed=0)
    assert samples == [naive] * 5


@given(text=st.lists(st.integers(0, 2), min_size=1, max_size=25), count=st.integers(1, 5), longest=st.integers(1, 4))
def test_looked_up_is_what_followed_the_longest_ending_that_came_before(
    text: list[int], count: int, longest: int
) -> None:
    expected: list[int] = []
    for length in range(min(longest, len(text) - 1), 0, -1):
        places = [at for at in range(len(text) - length) if text[at : at + length] == text[-length:]]
        if places:
            expected = text[places[-1] + length :][:count]
            break
    assert look_up(text, count, longest) == expected


def test_what_was_looked_up_is_kept_if_it_is_what_would_be_drawn() -> None:
    scores, guess = torch.randn(V), Guess([3])
    for seed in range(30):
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        drawn = [
            draw_or_accept(each, 0, scores, SamplingSettings(), generator, NOTHING_SAID)
            for each, generator in zip((guess, Guess([])), generators, strict=True)
        ]
        assert drawn[0] == drawn[1]


def test_a_draft_model_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="has 6 tokens, but the model whose tokens it shall guess has 7"):
        DraftModel(DRAFT, tiny(1, vocab_size=7).config)
    with pytest.raises(ConfigError, match="'num_guesses' is 6, but must be from 1 to 5"):
        draft(num_guesses=6)


def test_scores_that_are_not_finite_are_said() -> None:
    generator = torch.Generator()
    with pytest.raises(CheckpointError, match="not finite"):
        accept_or_replace(
            0, torch.ones(V) / V, torch.full((V,), torch.nan), SamplingSettings(), generator, NOTHING_SAID
        )
