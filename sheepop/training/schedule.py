"""Learning rate as a pure function of the step, so that there is no scheduler state to save or to lose."""

import math
from dataclasses import dataclass

from sheepop.config import TrainingConfig


@dataclass(frozen=True)
class Anchor:
    """Where a run stood in its schedule when its number of steps was last decided again.

    The schedule was laid out for `schedule_steps` steps. What is left of it is spread over the steps that are left, so
    the learning rate goes on from where it is and still comes down to the last of the schedule at the run's last step.

    Attributes:
        schedule_steps: of the run as it was first planned.
        step: steps done when it was decided.
        place: the step of the schedule that the next step of the run is.
    """

    schedule_steps: int
    step: int
    place: float

    def place_of(self, step: int, total_steps: int) -> float:
        """Return which step of the schedule the step `step` is, both counted from 0, in a run of now `total_steps`."""
        if step < self.step:
            return self.place - (self.step - step)
        if step >= total_steps - 1:
            return self.schedule_steps - 1 + (step - (total_steps - 1))
        share = (step - self.step) / (total_steps - 1 - self.step)
        return self.place + share * (self.schedule_steps - 1 - self.place)


def place_in_schedule(step: int, total_steps: int, anchor: Anchor | None) -> tuple[float, int]:
    """Return which step of the schedule a step is, and how many steps that has; without an anchor they are the run's.

    Args:
        step: from 0; `total_steps` is the place behind the last one.
        total_steps: of the run as it is planned now.
        anchor: of the last time that this number changed.
    """
    if anchor is None:
        return step, total_steps
    return anchor.place_of(step, total_steps), anchor.schedule_steps


def learning_rate_at(step: int, total_steps: int, training: TrainingConfig, anchor: Anchor | None = None) -> float:
    """Return the learning rate of step `step`, counted from 0, in a run of `total_steps`.

    Linear warm-up over `warmup_steps`, then from the peak down to `min_learning_rate_ratio` of it at the last step:

    - cosine: half a cosine (Loshchilov and Hutter 2017);
    - linear: a straight line;
    - wsd: warm-up, stable, decay: the peak, then a straight line over the last `decay_fraction` (Hu et al. 2024);
    - constant: the peak to the end.

    With an anchor these are steps of the schedule as it was first laid out, see `Anchor`.
    """
    place, total_steps = place_in_schedule(step, total_steps, anchor)
    peak, warmup = training.learning_rate, training.warmup_steps
    if place <= warmup - 1:
        return peak * (place + 1) / warmup
    floor = training.min_learning_rate_ratio
    progress = (place - warmup) / max(1, total_steps - 1 - warmup)  # 0 after warm-up, 1 at the last step
    match training.schedule:
        case "constant":
            remaining = 1.0
        case "linear":
            remaining = 1.0 - progress
        case "wsd":
            decay_steps = max(1, round(training.decay_fraction * total_steps))
            remaining = (total_steps - 1 - place) / decay_steps
        case "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return peak * (floor + (1.0 - floor) * min(1.0, max(0.0, remaining)))
