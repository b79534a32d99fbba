import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.config import TrainingConfig
from sheepop.training.schedule import learning_rate_at

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
