"""The training loop: flat, resumable at any step, and the same on one process or many."""

import math
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

from sheepop.data.prefetch import prefetch
from sheepop.models.sizing import training_flops_per_token
from sheepop.training.batches import batch_loader
from sheepop.training.distributed import agree_on_any
from sheepop.training.late_steps import QueuedNumbers, Refusals
from sheepop.training.length import PAUSES, decide_length, is_review_due, review_length
from sheepop.training.metrics import RunLog
from sheepop.training.profiling import begin_part, is_profiling
from sheepop.training.saver import Saver
from sheepop.training.schedule import learning_rate_at, place_in_schedule
from sheepop.training.signals import StopRequest, stop_signals
from sheepop.training.state import Run
from sheepop.training.step import MicroBatch, StepResult, result_of, train_step
from sheepop.training.validation import log_validation, sample_text, validate
from sheepop.utils.devices import peak_flops
from sheepop.utils.errors import CheckpointError, Interrupted, NonFiniteError
from sheepop.utils.logging import format_duration, warn


def train(run: Run) -> None:
    """Train from `run.state.step` to `run.state.total_steps`, writing metrics, samples and checkpoints.

    Raises:
        NonFiniteError: loss or gradient was not a number; the last good state was saved.
        Interrupted: SIGINT or SIGTERM came; the state was saved.
        NoSpaceError: a checkpoint did not fit on the disk; earlier ones are untouched.
    """
    config, state, model = run.config, run.state, run.model
    training = config.training
    if not state.total_steps:
        state.total_steps = decide_length(run)
    steps_per_epoch, has_clock = run.sampler.steps_per_epoch, training.max_minutes is not None
    if run.world.is_main and training.warmup_steps >= state.total_steps:
        warn(
            f"warm-up ({training.warmup_steps} steps) is as long as the whole run ({state.total_steps} steps), so the "
            "learning rate never comes down; lower training.warmup_steps"
        )
    flops_per_token = training_flops_per_token(config.model, config.data.max_length)
    peak = peak_flops(model.device, run.precision.autocast_dtype) * run.world.size
    interval_tokens, interval_seconds = 0, 0.0
    reviewed_steps, reviewed_seconds = 0, 0.0  # since the time budget was looked at
    elapsed_before, started = state.elapsed_seconds, time.perf_counter()
    state.starting_seconds += started - run.began if has_clock else 0.0

    run_log = RunLog(
        run.folder,
        step=state.step,
        is_unfinished=state.is_unfinished,
        tensorboard=training.tensorboard,
        is_silent=not run.world.is_main,
    )
    with run_log, stop_signals(is_alone=run.world.size == 1) as stop, Saver(run) as saver:
        model.train()
        if state.is_unfinished:
            finish_step(run, run_log, saver, stop)
        is_open = has_clock and state.step < state.total_steps  # its end may yet move
        last_step = None if is_open else state.total_steps
        batches = prefetch(batch_loader(run), state.step, last_step, config.data.num_workers)
        step_started = time.perf_counter()
        begin_part("load")
        for step, learning_rate, result, ahead in steps_of(run, batches, stop):
            begin_part("between steps")
            if result is None:
                leave(run, saver, stop)
            if not result.is_updated or result.verdict == "spike":
                deal_with_bad_step(run, run_log, saver, result)
            if run.precision.needs_loss_scaling and (result.is_updated or result.overflowed):
                state.loss_scale.update(overflowed=result.overflowed)
            if not result.overflowed:
                state.guard.note(result.verdict, result.loss, is_updated=result.is_updated)
            state.step = done = step + 1
            state.tokens += result.num_targets if result.is_updated else 0
            interval_tokens += result.num_targets
            step_seconds = time.perf_counter() - step_started
            interval_seconds += step_seconds
            state.elapsed_seconds = elapsed_before + time.perf_counter() - started
            reviewed_steps, reviewed_seconds = reviewed_steps + 1, reviewed_seconds + step_seconds
            if is_review_due(run, reviewed_seconds):
                change = review_length(run, reviewed_seconds / reviewed_steps, ahead=ahead)
                reviewed_steps, reviewed_seconds = 0, 0.0
                if change is not None:
                    run_log.event(kind="length", step=done, total_steps=state.total_steps)
                    run_log.say(change)

            if done % training.log_interval == 0 or done == state.total_steps:
                tokens_per_second = interval_tokens / interval_seconds
                run_log.metrics(
                    type="train",
                    step=done,
                    epoch=done / steps_per_epoch,
                    tokens=state.tokens,
                    loss=result.loss,
                    elapsed_seconds=state.elapsed_seconds,
                    learning_rate=learning_rate,
                    grad_norm=result.grad_norm,
                    tokens_per_second=tokens_per_second,
                    mfu=flops_per_token * tokens_per_second / peak,
                )
                run_log.progress(
                    step=done,
                    total_steps=state.total_steps,
                    loss=result.loss,
                    learning_rate=learning_rate,
                    tokens_per_second=tokens_per_second,
                    left=(state.total_steps - done) * result.num_targets / tokens_per_second,
                )
                interval_tokens, interval_seconds = 0, 0.0

            state.is_unfinished = True
            if result.stop_asked:
                leave(run, saver, stop)
            pause_started = time.perf_counter()
            if finish_step(run, run_log, saver, stop) and has_clock:
                state.pause_seconds = time.perf_counter() - pause_started
            state.elapsed_seconds = elapsed_before + time.perf_counter() - started
            if done == state.total_steps:
                break
            # Loading the next batch belongs to the next step; validating, sampling and saving belong to none.
            step_started = time.perf_counter()
            begin_part("load")
        batches.close()
        run_log.say(f"trained {state.step} steps, {state.tokens} tokens in {format_duration(state.elapsed_seconds)}")


def steps_of(
    run: Run, batches: Iterable[list[MicroBatch]], stop: StopRequest
) -> Iterator[tuple[int, float, StepResult | None, int]]:
    """Make steps; yield for each its number, learning rate and result, and how many have begun after it, in order.

    On a GPU the next step is queued before the numbers of one are waited for, unless the run pauses in between. So the
    device always has something to do, and what is yielded is a step old (`late_steps.py`).
    """
    state, training = run.state, run.config.training
    refusals = Refusals(state.guard, training, run.model.device) if reads_late(run) else None
    waiting: tuple[int, float, QueuedNumbers] | None = None  # made, but not yet yielded
    for step, micro_batches in enumerate(batches, start=state.step):
        rate = learning_rate_at(step, state.total_steps, training, state.anchor)
        if refusals is None:
            yield step, rate, train_step(run, micro_batches, step=step, learning_rate=rate, stop=stop), 0
            continue
        queued = train_step(run, micro_batches, step=step, learning_rate=rate, stop=stop, refusals=refusals)
        is_stopping = False
        if waiting is not None:
            earlier, its_rate, numbers = waiting
            result = result_of(run, numbers)
            is_stopping = result.stop_asked
            # The run can leave after the step that is under way, not after this one.
            yield earlier, its_rate, replace(result, stop_asked=False), 0 if queued is None else 1
        waiting = None
        if queued is None:
            yield step, rate, None, 0
        elif is_stopping or pause_after(run, step + 1).is_due:
            yield step, rate, result_of(run, queued), 0
        else:
            waiting = step, rate, queued


def reads_late(run: Run) -> bool:
    """Say whether the loop may be a step behind: on a GPU, where nothing but finite numbers decides about a step."""
    needs_history = run.config.training.on_loss_spike == "skip"
    on_gpu = run.model.device.type == "cuda"
    return on_gpu and not (run.precision.needs_loss_scaling or needs_history or is_profiling())


class StopAsked(Exception):  # noqa: N818 - nothing is wrong
    """A signal came while the run was validating."""


def finish_step(run: Run, run_log: RunLog, saver: Saver, stop: StopRequest) -> bool:
    """Validate, sample and save where that is due after `state.step` steps.

    Returns:
        Whether it validated.

    Raises:
        Interrupted: a signal came while it validated; the resumed run does it again.
    """
    state, training = run.state, run.config.training
    pause = pause_after(run, state.step)

    def check_signals() -> None:
        # A signal may reach one process before another; all must leave at the same place.
        if agree_on_any(stop.is_made, run.world, run.model.device):
            raise StopAsked

    is_best = False
    if pause.validates:
        validation_started = time.perf_counter()
        try:
            scores = validate(run, check_signals)
        except StopAsked:
            leave(run, saver, stop)
        state.elapsed_seconds += time.perf_counter() - validation_started
        is_best = math.isfinite(scores.loss) and (state.best_loss is None or scores.loss < state.best_loss)
        if is_best:
            state.best_loss, state.best_step = scores.loss, state.step
        log_validation(run, run_log, scores)
    if pause.samples:
        try:
            run_log.sample(step=state.step, prompt=training.sample_prompt, text=sample_text(run))
        except CheckpointError:  # scores of the next token that are not finite; the next step's loss will say so
            run_log.say(f"warning: at step {state.step} the model's scores are not finite, so there is no sample")
    state.is_unfinished = False
    if pause.saves or is_best:
        saver.save(is_best=is_best)
    return pause.validates


@dataclass(frozen=True)
class Pause:
    """What there is to do between two steps."""

    validates: bool
    samples: bool
    saves: bool

    @property
    def is_due(self) -> bool:
        """Whether there is anything."""
        return self.validates or self.samples or self.saves


def pause_after(run: Run, step: int) -> Pause:
    """Return what there is to do after so many steps; that a model is the best so far is another reason to save it."""
    training = run.config.training
    is_last = step == run.state.total_steps
    is_sample = is_due(run, step, training.sample_interval or training.eval_interval)
    is_saved = training.save_interval is not None and step % training.save_interval == 0
    ends_epoch = step % run.sampler.steps_per_epoch == 0 and are_epochs_pauses(run)
    return Pause(
        validates=is_due(run, step, training.eval_interval) or ends_epoch or is_last,
        samples=training.sample_tokens > 0 and (is_sample or is_last),
        saves=ends_epoch or is_saved or is_last,
    )


def is_due(run: Run, step: int, interval: int | None) -> bool:
    """Say whether a step is a multiple of the interval; None: of a tenth of the schedule, whatever its length."""
    state = run.state
    if interval is not None:
        return step % interval == 0
    before, _ = place_in_schedule(step - 1, state.total_steps, state.anchor)
    place, planned = place_in_schedule(step, state.total_steps, state.anchor)
    tenth = max(1, math.ceil(planned / PAUSES))
    return place // tenth > before // tenth


def are_epochs_pauses(run: Run) -> bool:
    """Say whether the run validates and saves at the end of each epoch.

    Under a time budget, only where epochs are not shorter than the interval of validations: the passes over a small
    text may be thousands.
    """
    training = run.config.training
    interval = training.eval_interval or math.ceil(run.state.total_steps / PAUSES)
    return training.max_minutes is None or run.sampler.steps_per_epoch >= interval


def leave(run: Run, saver: Saver, stop: StopRequest) -> NoReturn:
    """Save the state and end the run, as a signal asked.

    Raises:
        Interrupted: always.
    """
    state = run.state
    if saver.saved_step != state.step or state.is_unfinished:
        saver.save()
    saver.wait()
    raise Interrupted(
        f"Stopped by a signal after step {state.step} of {state.total_steps}. The state is saved in {run.folder}; go "
        "on with the same command and --resume auto.",
        stop.signal_number or signal.SIGTERM,
    )


def deal_with_bad_step(run: Run, run_log: RunLog, saver: Saver, result: StepResult) -> None:
    """Record a step that was left out or whose loss jumped; end the run where the settings say so.

    Raises:
        NonFiniteError: the policy is to stop, or too many steps in a row were left out; the state before this step,
            which changed nothing, is saved.
    """
    state, training = run.state, run.config.training
    number = state.step + 1
    if result.overflowed:  # fp16 overflows now and then by design
        run_log.event(kind="overflow", step=number, loss=result.loss, grad_norm=result.grad_norm)
        return
    what = f"the loss was {result.loss:.4g} and the gradient norm {result.grad_norm:.4g}"
    if result.verdict == "spike":
        mean, deviation = state.guard.usual_loss()
        what = f"the loss jumped to {result.loss:.4g}, from {mean:.4g} ± {deviation:.2g} over the steps before"
    run_log.event(kind=result.verdict, step=number, loss=result.loss, grad_norm=result.grad_norm)
    left_out = state.guard.skipped_in_a_row + 1
    is_stop = result.verdict == "bad" and training.on_bad_numbers == "stop"
    if result.is_updated or not (is_stop or left_out > training.max_skipped_steps):
        done = "the step was made all the same" if result.is_updated else "the step was left out"
        run_log.say(f"warning: at step {number} {what}; {done}")
        return
    if saver.saved_step != state.step:
        saver.save()
    saver.wait()
    in_a_row = "" if is_stop else f" ({left_out} in a row, training.max_skipped_steps {training.max_skipped_steps})"
    raise NonFiniteError(
        f"At step {number} {what}, so the step was not made{in_a_row} and training stopped. The last good state is "
        f"saved in {run.folder}. Usually the learning rate is too high ({training.learning_rate}): try a third of it, "
        "a longer warm-up, or precision fp32, and go on with --resume auto --accept-changes; or leave such steps out "
        "with --training.on_bad_numbers skip. If the next step is bad again, earlier ones have spoiled the weights: go "
        "on from an earlier checkpoint (--resume PATH) into another folder (--output)."
    )
