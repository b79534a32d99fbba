import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.generation.sampling import (
    SamplingSettings,
    apply_repetition_penalty,
    apply_temperature,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    race,
    sample_token,
    sample_tokens,
)
from sheepop.utils.errors import CheckpointError, ConfigError

# Multiples of a quarter are exact in fp32 and often equal, so that ties are tried.
LOGITS = st.lists(st.integers(-20, 20).map(lambda quarter: quarter / 4), min_size=1, max_size=13)
# No sum of probabilities below lies within rounding of one of these shares by construction: see `is_near_a_sum`.
SHARES = st.floats(0.01, 0.99)


def kept(logits: torch.Tensor) -> list[int]:
    return [token_id for token_id, logit in enumerate(logits.tolist()) if logit != -math.inf]


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def by_likelihood(logits: list[float]) -> list[int]:
    """Token ids, the most likely first, of equally likely ones the lower id first."""
    return sorted(range(len(logits)), key=lambda token_id: (-logits[token_id], token_id))


def nucleus(logits: list[float], p: float) -> list[int]:
    """Walk down the list until the share p is reached."""
    chosen, mass = [], 0.0
    for token_id in by_likelihood(logits):
        chosen.append(token_id)
        mass += softmax(logits)[token_id]
        if mass >= p:
            break
    return sorted(chosen)


def is_near_a_sum(logits: list[float], p: float) -> bool:
    """Whether rounding could decide what belongs to the nucleus."""
    mass = 0.0
    for probability in sorted(softmax(logits), reverse=True):
        mass += probability
        if abs(mass - p) < 1e-5:
            return True
    return False


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None)
@given(logits=LOGITS, k=st.integers(0, 15))
def test_top_k_keeps_the_k_most_likely_and_of_equals_the_lower_id(logits: list[float], k: int) -> None:
    expected = sorted(by_likelihood(logits)[:k]) if k else list(range(len(logits)))
    assert kept(keep_top_k(torch.tensor(logits), k)) == expected


@settings(deadline=None)
@given(logits=LOGITS, p=SHARES)
def test_top_p_keeps_the_smallest_set_that_reaches_the_share(logits: list[float], p: float) -> None:
    if not is_near_a_sum(logits, p):
        assert kept(keep_top_p(torch.tensor(logits), p)) == nucleus(logits, p)


@pytest.mark.parametrize("share", [0.5, 0.97, 0.999])
def test_top_p_reaches_far_into_a_large_vocabulary(share: float) -> None:
    spread = torch.linspace(0.2, 3.0, 2)[:, None]  # a flat row, whose nucleus is large, and a steep one
    rows = torch.randn(2, 3001, generator=generator()) * spread
    for row, filtered in zip(rows, keep_top_p(rows, share), strict=True):
        descending = row.double().softmax(dim=-1).sort(descending=True)
        size = int((descending.values.cumsum(dim=-1) < share).sum()) + 1
        assert kept(filtered) == sorted(descending.indices[:size].tolist())


@settings(deadline=None)
@given(logits=LOGITS, min_p=SHARES)
def test_min_p_keeps_what_is_likely_enough_beside_the_most_likely(logits: list[float], min_p: float) -> None:
    ratios = [probability / max(softmax(logits)) for probability in softmax(logits)]
    if all(abs(ratio - min_p) > 1e-5 for ratio in ratios):
        expected = [token_id for token_id, ratio in enumerate(ratios) if ratio >= min_p]
        assert kept(keep_min_p(torch.tensor(logits), min_p)) == expected


@settings(deadline=None)
@given(logits=LOGITS, penalty=st.floats(0.5, 2.0), data=st.data())
def test_repetition_penalty_acts_once_on_each_token_that_occurred(
    logits: list[float], penalty: float, data: st.DataObject
) -> None:
    previous = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=7))
    penalised = [logit / penalty if logit > 0 else logit * penalty for logit in logits]
    expected = [penalised[i] if i in previous else logits[i] for i in range(len(logits))]
    result = apply_repetition_penalty(torch.tensor(logits), torch.tensor(previous, dtype=torch.int64), penalty)
    torch.testing.assert_close(result, torch.tensor(expected))


@settings(deadline=None)
@given(logits=LOGITS, temperature=st.floats(0.1, 10.0))
def test_temperature_divides_the_differences(logits: list[float], temperature: float) -> None:
    expected = softmax([logit / temperature for logit in logits])
    result = apply_temperature(torch.tensor(logits), temperature).softmax(dim=-1)
    torch.testing.assert_close(result, torch.tensor(expected), atol=1e-6, rtol=1e-5)


@settings(deadline=None)
@given(logits=LOGITS, temperature=st.floats(1e-320, 1e-30))
def test_the_smallest_temperatures_leave_the_most_likely_tokens(logits: list[float], temperature: float) -> None:
    result = apply_temperature(torch.tensor(logits), temperature)
    assert [i for i, logit in enumerate(result.tolist()) if logit == 0] == [
        i for i, logit in enumerate(logits) if logit == max(logits)
    ]


@settings(deadline=None)
@given(
    logits=LOGITS,
    k=st.integers(0, 15),
    p=SHARES,
    min_p=st.floats(0.0, 0.99),
    temperature=st.floats(1e-4, 1e4),
    penalty=st.floats(0.5, 2.0),
)
def test_all_filters_together_always_leave_the_most_likely_token(
    logits: list[float], k: int, p: float, min_p: float, temperature: float, penalty: float
) -> None:
    chosen = SamplingSettings(temperature, top_k=k, top_p=p, min_p=min_p, repetition_penalty=penalty)
    chosen.validate()
    result = filter_logits(torch.tensor(logits), torch.tensor([0]), chosen)
    penalised = apply_repetition_penalty(torch.tensor(logits), torch.tensor([0]), penalty)
    assert int(penalised.argmax()) in kept(result)
    assert len(kept(result)) <= (k or len(logits))


def test_top_p_is_a_share_of_what_top_k_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    both = filter_logits(logits, torch.tensor([], dtype=torch.int64), SamplingSettings(top_k=2, top_p=0.5))
    assert kept(both) == [0]  # 0.4 of 0.7 is more than half; alone, top_p would have kept two
    assert kept(keep_top_p(logits, 0.5)) == [0, 1]


def test_filters_treat_rows_alone() -> None:
    rows = torch.randn(3, 5, 7, generator=generator())
    previous = torch.randint(7, (3, 5, 2), generator=generator())
    chosen = SamplingSettings(0.7, top_k=5, top_p=0.8, min_p=0.05, repetition_penalty=1.3)
    together = filter_logits(rows, previous, chosen)
    for index in ((0, 0), (1, 4), (2, 3)):
        assert torch.equal(together[index], filter_logits(rows[index], previous[index], chosen))


def test_temperature_zero_takes_the_most_likely_and_of_equals_the_lowest() -> None:
    greedy = SamplingSettings(temperature=0.0)
    assert sample_token(torch.tensor([1.0, 3.0, 3.0, 2.0]), greedy, generator()) == 1
    assert (
        sample_token(torch.tensor([1.0, 3.0, 3.0]), SamplingSettings(0.0, repetition_penalty=4.0), generator(), [1])
        == 2
    )


def test_top_k_of_one_is_greedy() -> None:
    logits = torch.randn(11, generator=generator(3)).round()
    greedy = sample_token(logits, SamplingSettings(temperature=0.0), generator())
    assert all(sample_token(logits, SamplingSettings(top_k=1), generator(seed)) == greedy for seed in range(20))


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1, 0.0])
    stream, draws = generator(1), 4000
    drawn = Counter(sample_token(probabilities.log(), SamplingSettings(), stream) for _ in range(draws))
    for token_id, probability in enumerate(probabilities.tolist()):
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(drawn[token_id] - draws * probability) <= 4 * deviation


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 7, 23, 100])
def test_a_race_is_won_as_often_as_the_probabilities_say(vocab_size: int) -> None:
    scores = torch.randn(vocab_size, generator=generator(5)) * 1.5
    scores[1::5] = -math.inf  # what cannot be drawn, and for some sizes a whole block of it
    scores[vocab_size // 2 : vocab_size * 3 // 4] = -math.inf
    expected, draws = scores.softmax(0), 4000
    stream = generator(6)
    counts = torch.bincount(race(scores.expand(draws, -1), [stream] * draws), minlength=vocab_size)
    assert counts[expected == 0].sum() == 0
    large = draws * expected >= 5
    cells = torch.stack((counts[large], draws * expected[large]), dim=1).tolist()
    cells += [[draws - sum(count for count, _ in cells), draws - sum(share for _, share in cells)]]
    statistic = sum((count - share) ** 2 / max(share, 1e-3) for count, share in cells)
    assert statistic < len(cells) + 4 * math.sqrt(2 * len(cells))  # mean k, variance 2k


@given(scores=st.lists(st.sampled_from([-math.inf, -1e30, -80.0, 0.0, 80.0, 1e30]), min_size=1, max_size=30))
def test_what_cannot_be_drawn_never_wins_a_race(scores: list[float]) -> None:
    if max(scores) > -math.inf:
        [winner] = race(torch.tensor([scores]), [generator(len(scores))]).tolist()
        assert scores[winner] == max(scores)  # the others are too far behind


def test_a_race_hardly_ever_depends_on_the_last_bits_of_the_scores() -> None:
    # By one uniform number and cumulated probabilities some twenty of these would change: every boundary moves.
    scores, draws = torch.randn(20_000, generator=generator(2)), 4000
    nearly = scores + 1e-4 * torch.randn(20_000, generator=generator(3))
    changed = sum(
        race(scores[None], [generator(seed)]) != race(nearly[None], [generator(seed)]) for seed in range(draws)
    )
    assert changed <= 3


def test_a_row_draws_the_same_token_whatever_rows_are_beside_it() -> None:
    rows = torch.randn(4, 9, generator=generator())
    previous = torch.zeros((4, 0), dtype=torch.int64)
    together = sample_tokens(rows, SamplingSettings(), [generator(seed) for seed in range(4)], previous).tolist()
    assert together == [sample_token(row, SamplingSettings(), generator(seed)) for seed, row in enumerate(rows)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_not_drawn_from(temperature: float, bad: float) -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        sample_token(torch.tensor([0.0, bad, 1.0]), SamplingSettings(temperature), generator())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.0),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
    ],
)
def test_an_option_out_of_range_is_named_with_its_value(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"'{option}' is {value}, but must be"):
        SamplingSettings(**{option: value}).validate()
