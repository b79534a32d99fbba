import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import TrainingConfig
from sheepop.training.schedule import Anchor, learning_rate_at, place_in_schedule

SCHEDULES = ("cosine", "linear", "wsd", "constant")


def rates(total_steps, **training):
    config = TrainingConfig(learning_rate=0.5, min_learning_rate_ratio=0.1, **training)
    return [learning_rate_at(step, total_steps, config) for step in range(total_steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule):
    assert rates(20, schedule=schedule, warmup_steps=4)[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.05), ("linear", 0.05), ("wsd", 0.05), ("constant", 0.5)])
def test_the_last_step_has_the_lowest_rate(schedule, last):
    assert rates(31, schedule=schedule, warmup_steps=3)[-1] == pytest.approx(last)


def test_the_shapes_between():
    cosine = rates(21, schedule="cosine", warmup_steps=0)
    assert cosine[10] == pytest.approx(0.5 * (0.1 + 0.9 * 0.5))
    assert cosine[5] == pytest.approx(0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    linear = rates(21, schedule="linear", warmup_steps=0)
    assert linear[5] == pytest.approx(0.5 * (0.1 + 0.9 * 0.75))
    stable_then_down = rates(20, schedule="wsd", warmup_steps=2, decay_fraction=0.25)
    assert stable_then_down[2:15] == pytest.approx([0.5] * 13)
    assert stable_then_down[15:] == pytest.approx([0.5 * (0.1 + 0.9 * left) for left in (0.8, 0.6, 0.4, 0.2, 0.0)])


@settings(deadline=None)
@given(
    total_steps=st.integers(1, 60),
    warmup_steps=st.integers(0, 80),
    schedule=st.sampled_from(SCHEDULES),
    decay_fraction=st.floats(0.01, 1.0),
)
def test_every_rate_lies_between_nothing_and_the_peak_and_never_rises_after_warm_up(
    total_steps, warmup_steps, schedule, decay_fraction
):
    values = rates(total_steps, schedule=schedule, warmup_steps=warmup_steps, decay_fraction=decay_fraction)
    assert all(0 < value <= 0.5 + 1e-12 for value in values)
    after = values[warmup_steps:]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))


@settings(deadline=None)
@given(
    planned=st.integers(2, 60),
    share=st.floats(0.0, 0.99),
    step=st.integers(0, 200),
    left=st.integers(1, 200),
    warmup_steps=st.integers(0, 20),
    schedule=st.sampled_from(SCHEDULES),
)
def test_after_another_length_was_decided_the_rate_goes_on_and_is_fully_decayed_at_the_new_end(
    planned, share, step, left, warmup_steps, schedule
):
    training = TrainingConfig(
        learning_rate=0.5, min_learning_rate_ratio=0.0, schedule=schedule, warmup_steps=warmup_steps
    )
    anchor = Anchor(schedule_steps=planned, step=step, place=share * (planned - 1))
    total_steps = step + left
    rates = [learning_rate_at(number, total_steps, training, anchor) for number in range(step, total_steps)]
    assert all(0 <= rate <= 0.5 for rate in rates)
    assert rates[-1] == learning_rate_at(planned - 1, planned, training)
    places = [place_in_schedule(number, total_steps, anchor)[0] for number in range(step, total_steps + 1)]
    assert all(before < after for before, after in itertools.pairwise(places))
    assert places[-1] == planned
    assert left == 1 or places[0] == anchor.place
    # Decided again from the same place for the same end, nothing changes.
    middle = step + left // 2
    again = Anchor(planned, middle, anchor.place_of(middle, total_steps))
    for number in range(middle, total_steps):
        assert again.place_of(number, total_steps) == pytest.approx(anchor.place_of(number, total_steps))
