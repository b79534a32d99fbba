"""Learning rate as a pure function of the step, so that there is no scheduler state to save or to lose."""

import math

from sheepop.config import TrainingConfig


def learning_rate_at(step: int, total_steps: int, training: TrainingConfig) -> float:
    """Return the learning rate of step `step`, counted from 0, in a run of `total_steps`.

    Linear warm-up over `warmup_steps`, then from the peak down to `min_learning_rate_ratio` of it at the last step:

    - cosine: half a cosine (Loshchilov and Hutter 2017);
    - linear: a straight line;
    - wsd: warm-up, stable, decay: the peak, then a straight line over the last `decay_fraction` (Hu et al. 2024);
    - constant: the peak to the end.
    """
    peak, warmup = training.learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = training.min_learning_rate_ratio
    progress = (step - warmup) / max(1, total_steps - 1 - warmup)  # 0 after warm-up, 1 at the last step
    match training.schedule:
        case "constant":
            remaining = 1.0
        case "linear":
            remaining = 1.0 - progress
        case "wsd":
            decay_steps = max(1, round(training.decay_fraction * total_steps))
            remaining = (total_steps - 1 - step) / decay_steps
        case "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return peak * (floor + (1.0 - floor) * min(1.0, max(0.0, remaining)))
