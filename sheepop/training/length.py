"""How many steps a run has: from epochs or steps once; from minutes before the first, and again on the way."""

import copy
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sheepop.config import TrainingConfig
from sheepop.models.sizing import weight_bytes
from sheepop.training.batches import batch_loader
from sheepop.training.distributed import World, on_main
from sheepop.training.optimizer import make_optimizer
from sheepop.training.schedule import Anchor, place_in_schedule
from sheepop.training.state import Run
from sheepop.training.step import MicroBatch, train_step
from sheepop.training.validation import sample_text, validate
from sheepop.utils.errors import ConfigError
from sheepop.utils.logging import format_duration

MEASURED_SHARE = 0.03  # of the time budget
MEASURED_SECONDS = 3.0  # at most: the run itself will tell
MEASURED_STEPS = 4
# Shares of the schedule after which a time budget is looked at again: soon, since a few steps before the first say
# little, and at last when hardly anything can go wrong any more. Not at tenths, where the run pauses to validate.
REVIEWS = (0.03, 0.12, 0.26, 0.52, 0.76, 0.91, 0.97)
UNREVIEWED_SHARE, UNREVIEWED_LEAST = 0.25, 0.01  # of the time that is left, but not less of the budget
PAUSES = 10  # validations over a run where `eval_interval` is None
LEAVING_SECONDS = 0.3  # that the process takes to end
WORTH_SAYING = 0.03  # change of the number of steps, as a share of all
PROBE_BYTES = 16 * 2**20  # written to see how fast a checkpoint is


def total_steps_without_clock(training: TrainingConfig, steps_per_epoch: int) -> int | None:
    """Return the number of steps that `max_steps` or `max_epochs` asks for, or None for a time budget."""
    if training.max_steps is not None:
        return training.max_steps
    return training.max_epochs * steps_per_epoch if training.max_epochs is not None else None


def decide_length(run: Run) -> int:
    """Return the number of steps of the run; for a time budget from a short measurement that changes no weight.

    Raises:
        ConfigError: the time budget ends before a first step could be made and validated.
    """
    training, state = run.config.training, run.state
    known = total_steps_without_clock(training, run.sampler.steps_per_epoch)
    if known is not None:
        return known
    assert training.max_minutes is not None
    started = time.perf_counter()
    validate(run)
    if training.sample_tokens:
        sample_text(run)
    state.pause_seconds = time.perf_counter() - started + time_checkpoint(run)
    seconds = min(MEASURED_SECONDS, MEASURED_SHARE * 60 * training.max_minutes)
    seconds_per_step = measure_step(run, batch_loader(run), seconds=seconds)

    def decide() -> int:
        starting = state.starting_seconds + state.elapsed_seconds + time.perf_counter() - run.began
        steps = steps_that_fit(run, seconds_used=starting, seconds_per_step=seconds_per_step)
        if steps < 1 and not state.step:
            least = starting + seconds_per_step + state.pause_seconds + LEAVING_SECONDS
            raise ConfigError(
                f"{training.max_minutes:g} minutes are too short: starting took {starting:.1f} s, a step takes "
                f"{seconds_per_step:.2g} s, and the validation at the end with its sample and checkpoint "
                f"{state.pause_seconds:.1f} s. Give it --minutes {1.2 * least / 60:.2g} or more, or choose a smaller "
                "model or a lower training.eval_max_tokens."
            )
        return max(1, steps)

    return state.step + on_main(run.world, decide)


def steps_that_fit(run: Run, *, seconds_used: float, seconds_per_step: float) -> int:
    """Return how many more steps fit into the time budget, 0 if none.

    Args:
        run: at which step it is, what its pauses take, and how much of its schedule is left.
        seconds_used: of the budget, until now.
        seconds_per_step: without pauses.
    """
    training, state = run.config.training, run.state
    assert training.max_minutes is not None
    place, planned = place_in_schedule(state.step, state.total_steps, state.anchor)
    return steps_in_seconds(
        60 * training.max_minutes - seconds_used - LEAVING_SECONDS,
        seconds_per_step=seconds_per_step,
        seconds_per_pause=state.pause_seconds,
        eval_interval=training.eval_interval,
        steps_per_epoch=run.sampler.steps_per_epoch,
        share_left=1 - place / planned if planned else 1.0,
    )


def steps_in_seconds(
    seconds: float,
    *,
    seconds_per_step: float,
    seconds_per_pause: float,
    eval_interval: int | None,
    steps_per_epoch: int,
    share_left: float = 1.0,
) -> int:
    """Return how many steps fit into a time together with the pauses that go with them, one at the end among them.

    Args:
        seconds: to come.
        seconds_per_step: without pauses.
        seconds_per_pause: of a validation, with a sample and a checkpoint.
        eval_interval: steps between pauses; None means ten over the run, whatever its length.
        steps_per_epoch: which pause at their end as well, if they are not shorter than the interval.
        share_left: of the run.
    """
    seconds -= seconds_per_pause
    if eval_interval is None:
        others = max(0.0, PAUSES * share_left - 1)
        seconds -= others * seconds_per_pause
        interval = seconds / seconds_per_step / (others + 1)
    else:
        interval = eval_interval
        seconds_per_step += seconds_per_pause / eval_interval
    if steps_per_epoch >= interval:
        seconds_per_step += seconds_per_pause / steps_per_epoch
    return max(0, int(seconds / seconds_per_step))


def is_review_due(run: Run, seconds_since: float) -> bool:
    """Say whether the step just made, `run.state.step`, is one after which a time budget is looked at again.

    Beside the fixed places, a single process looks when a quarter of the time that was left has gone since: the machine
    may have become many times slower. Several processes would have to agree on that after each step.

    Args:
        seconds_since: of steps since the last time.
    """
    state, minutes = run.state, run.config.training.max_minutes
    if minutes is None or state.step >= state.total_steps:
        return False
    if run.world.size == 1:
        left = 60 * minutes - state.starting_seconds - state.elapsed_seconds
        if seconds_since >= max(UNREVIEWED_LEAST * 60 * minutes, UNREVIEWED_SHARE * left):
            return True
    places = [place_in_schedule(step, state.total_steps, state.anchor) for step in (state.step - 1, state.step)]
    passed = [sum(place >= review * planned for review in REVIEWS) for place, planned in places]
    return passed[1] > passed[0]


def review_length(run: Run, seconds_per_step: float, *, ahead: int = 0) -> str | None:
    """Decide the number of steps again from the time that is left; what is left of the schedule is spread over them.

    Args:
        run: whose `state.total_steps` and `state.anchor` change, the same on all processes.
        seconds_per_step: of late, without pauses.
        ahead: steps beyond `run.state.step` that have begun, by the schedule as it was.

    Returns:
        What there is to say about a change that is worth it.
    """
    state = run.state
    used = state.starting_seconds + state.elapsed_seconds
    before = state.total_steps
    if state.step + ahead == before:  # the last step has begun, with the last of the rates
        return None
    fitting = on_main(
        run.world, lambda: max(ahead + 1, steps_that_fit(run, seconds_used=used, seconds_per_step=seconds_per_step))
    )
    if state.step + fitting == before:
        return None
    place, planned = place_in_schedule(state.step + ahead, before, state.anchor)
    state.anchor = Anchor(planned, state.step + ahead, place)
    state.total_steps = state.step + fitting
    if abs(state.total_steps - before) <= WORTH_SAYING * before:
        return None
    assert run.config.training.max_minutes is not None
    left = format_duration(60 * run.config.training.max_minutes - used)
    return (
        f"{left} left at {seconds_per_step * 1000:.3g} ms a step: the run ends after {state.total_steps} steps instead "
        f"of {before}; the rest of the schedule is spread over the {fitting} to come"
    )


def time_checkpoint(run: Run) -> float:
    """Return the seconds of writing, flushing and summing a checkpoint's bytes, from a smaller file beside the run."""
    folder = Path(run.config.training.save_dir)
    ground = next(place for place in (folder, *folder.resolve().parents) if place.is_dir())
    size = 3 * weight_bytes(run.config.model)
    probe = os.urandom(min(size, PROBE_BYTES))
    began = time.perf_counter()
    try:
        with tempfile.NamedTemporaryFile(dir=ground) as file:
            file.write(probe)
            file.flush()
            os.fsync(file.fileno())
            hashlib.sha256(probe).digest()
    except OSError:  # a folder that cannot be written to is an error of the run, not of the plan
        return 0.0
    return (time.perf_counter() - began) * size / len(probe)


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
