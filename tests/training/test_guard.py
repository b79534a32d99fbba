import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepop.config import TrainingConfig
from sheepop.training.guard import HISTORY, LEAST_HISTORY, Guard, allows_update
from sheepop.training.loss_scale import GROW_AFTER, SMALLEST, LossScale

TRAINING = TrainingConfig()


def experienced(losses):
    guard = Guard()
    for loss in losses:
        guard.note("good", loss, is_updated=True)
    return guard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_bad_whatever_came_before(bad):
    for guard in (Guard(), experienced([3.0, 3.1] * 64)):
        assert guard.judge(bad, 1.0, TRAINING) == "bad"
        assert guard.judge(3.0, bad, TRAINING) == "bad"


def test_a_jump_is_measured_by_how_much_losses_vary():
    guard = experienced([3.0, 3.2] * 64)  # mean 3.1, deviation 0.1
    assert guard.usual_loss() == pytest.approx((3.1, 0.1))
    assert guard.judge(3.69, 1.0, TRAINING) == "good"
    assert guard.judge(3.71, 1.0, TRAINING) == "spike"
    assert guard.judge(0.1, 1.0, TRAINING) == "good"  # better is never a spike
    assert guard.judge(9.0, 1.0, TrainingConfig(on_loss_spike="ignore")) == "good"
    assert guard.judge(3.45, 1.0, TrainingConfig(spike_threshold=3.0)) == "spike"
    assert experienced([3.0, 3.2] * (LEAST_HISTORY // 2 - 1)).judge(9.0, 1.0, TRAINING) == "good"


@given(st.lists(st.floats(0, 20), max_size=3 * HISTORY))
def test_it_remembers_the_last_steps_and_no_more(losses):
    assert experienced(losses).recent_losses == losses[-HISTORY:]


def test_steps_left_out_are_counted_and_not_compared_with():
    guard = experienced([3.0, 3.2] * 64)
    guard.note("spike", 9.0, is_updated=False)
    guard.note("bad", math.nan, is_updated=False)
    assert (guard.skipped_in_a_row, guard.skipped, guard.spikes) == (2, 2, 1)
    guard.note("spike", 9.0, is_updated=True)
    assert (guard.skipped_in_a_row, guard.skipped, guard.spikes) == (0, 2, 2)
    assert guard.recent_losses[-2:] == [3.2, 9.0]


def test_a_spike_is_made_unless_it_is_to_be_skipped():
    for policy, is_made in (("report", True), ("skip", False)):
        assert allows_update("spike", TrainingConfig(on_loss_spike=policy)) == is_made
    assert allows_update("good", TRAINING)
    assert not allows_update("bad", TrainingConfig(on_bad_numbers="skip"))


def test_the_loss_scale_halves_at_once_and_doubles_after_long():
    scale = LossScale(value=1024.0)
    scale.update(overflowed=True)
    for _ in range(GROW_AFTER - 1):
        scale.update(overflowed=False)
    assert scale.value == 512.0
    scale.update(overflowed=True)  # the count begins again
    for _ in range(GROW_AFTER):
        scale.update(overflowed=False)
    assert scale == LossScale(512.0, 0)
    while scale.can_shrink:
        scale.update(overflowed=True)
    assert scale.value == SMALLEST
