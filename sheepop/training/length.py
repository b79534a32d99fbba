"""How many steps a run has: decided once, before the first, from epochs, steps or minutes."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from sheepop.config import TrainingConfig
from sheepop.training.batches import batch_loader
from sheepop.training.distributed import World
from sheepop.training.optimizer import make_optimizer
from sheepop.training.state import Run
from sheepop.training.step import MicroBatch, train_step
from sheepop.training.validation import sample_text, validate

MEASURED_SHARE = 0.03  # of the time budget
MEASURED_STEPS = 4


def total_steps_without_clock(training: TrainingConfig, steps_per_epoch: int) -> int | None:
    """Return the number of steps that `max_steps` or `max_epochs` asks for, or None for a time budget."""
    if training.max_steps is not None:
        return training.max_steps
    return training.max_epochs * steps_per_epoch if training.max_epochs is not None else None


def decide_length(run: Run) -> int:
    """Return the number of steps of the run; for a time budget from a short measurement that changes nothing."""
    training = run.config.training
    known = total_steps_without_clock(training, run.sampler.steps_per_epoch)
    if known is not None:
        return known
    assert training.max_minutes is not None
    started = time.perf_counter()
    validate(run)
    if training.sample_tokens:
        sample_text(run)
    seconds_per_validation = time.perf_counter() - started
    seconds_per_step = measure_step(run, batch_loader(run), seconds=MEASURED_SHARE * 60 * training.max_minutes)
    spent = (time.perf_counter() - started) / 60
    steps = steps_in_minutes(
        training.max_minutes - spent,
        seconds_per_step=seconds_per_step,
        seconds_per_validation=seconds_per_validation,
        eval_interval=training.eval_interval,
    )
    return run.state.step + _agreed_steps(steps, run)


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


def measure_step(
    run: Run, load: Callable[[int], list[MicroBatch]], *, seconds: float, at_least: int = MEASURED_STEPS
) -> float:
    """Return the seconds of a step on the micro-batches of `load`, from real steps of a copy that is thrown away.

    A sharded model is measured as it is, without the update: a copy may not fit, and all processes must make equally
    many steps, so their number is fixed.
    """
    is_sharded = run.parallel == "fsdp"
    if is_sharded:
        scratch, seconds = run, 0.0
    else:
        model = copy.deepcopy(run.model)
        optimizer = make_optimizer(model, run.config.training)
        alone = World(run.world.rank, 1)
        scratch = replace(
            run,
            model=model,
            forward=model,
            optimizer=optimizer,
            world=alone,
            parallel="none",
            state=copy.deepcopy(run.state),
        )
    return measure_seconds_per_step(
        lambda step: train_step(
            scratch, load(step), step=step, learning_rate=run.config.training.learning_rate, update=not is_sharded
        ),
        device=run.model.device,
        first_step=run.state.step,
        seconds=seconds,
        at_least=at_least,
    )


def measure_seconds_per_step(
    run_step: Callable[[int], object],
    *,
    device: torch.device,
    first_step: int,
    seconds: float,
    at_least: int = MEASURED_STEPS,
) -> float:
    """Return the median time of `at_least` steps by `run_step(step)`, made for some `seconds`.

    The first is left out: it pays for allocations. The median leaves out moments in which another program was busy.
    """
    durations: list[float] = []
    started = time.perf_counter()
    while len(durations) <= at_least or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        run_step(first_step + len(durations))
        if device.type == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - before)
    return statistics.median(durations[1:])


def _agreed_steps(steps: int, run: Run) -> int:
    """Let all processes use the main one's number of steps: their clocks differ."""
    if run.world.size == 1:
        return steps
    agreed = torch.tensor(steps, device=run.model.device)
    dist.broadcast(agreed, src=0)
    return int(agreed)
