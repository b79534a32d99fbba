"""How many steps a run has: decided once, before the first, from epochs, steps or minutes."""

import copy
import statistics
import time
from collections.abc import Callable

import torch

from sheepop.config import TrainingConfig
from sheepop.models.transformer import TransformerModel

MEASURED_SHARE = 0.03  # of the time budget
MEASURED_STEPS = 4


def total_steps_without_clock(training: TrainingConfig, steps_per_epoch: int) -> int | None:
    """Return the number of steps that `max_steps` or `max_epochs` asks for, or None for a time budget."""
    if training.max_steps is not None:
        return training.max_steps
    return training.max_epochs * steps_per_epoch if training.max_epochs is not None else None


def steps_in_minutes(
    minutes: float, *, seconds_per_step: float, seconds_per_validation: float, eval_interval: int | None
) -> int:
    """Return how many steps fit into a time budget together with the validations that go with them.

    `eval_interval` None means ten validations over the run, whatever its length.
    """
    seconds = minutes * 60
    if eval_interval is None:
        seconds -= 10 * seconds_per_validation
    else:
        seconds_per_step += seconds_per_validation / eval_interval
    return max(1, int(seconds / seconds_per_step))


def measure_seconds_per_step(
    model: TransformerModel,
    run_step: Callable[[TransformerModel, int], object],
    *,
    first_step: int,
    seconds: float,
    at_least: int = MEASURED_STEPS,
) -> float:
    """Return the median time of `at_least` real training steps, made for some `seconds` on a copy that is thrown away.

    `run_step(model, step)` makes one step. The first is left out: it pays for allocations. The median
    leaves out moments in which another program was busy.
    """
    scratch = copy.deepcopy(model)
    durations: list[float] = []
    started = time.perf_counter()
    while len(durations) <= at_least or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        run_step(scratch, first_step + len(durations))
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - before)
    return statistics.median(durations[1:])
