"""The training loop: flat, resumable at any step, and the same on one process or many."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from sheepop.config import Config
from sheepop.data.corpus import Corpus
from sheepop.data.dataset import IGNORE_INDEX, document_ids, read_windows
from sheepop.data.packing import PackingPlan, read_packed
from sheepop.data.prefetch import prefetch
from sheepop.data.sampler import Sampler
from sheepop.data.tokenizer import Tokenizer
from sheepop.evaluation.perplexity import Scores, bits_per_byte, evaluate_tokens, perplexity
from sheepop.generation.completion import complete
from sheepop.generation.sampling import SamplingSettings
from sheepop.models.sizing import training_flops_per_token
from sheepop.models.transformer import TransformerModel
from sheepop.training.checkpoint import (
    TrainingState,
    checkpoint_name,
    mark_best,
    prune_step_checkpoints,
    save_checkpoint,
)
from sheepop.training.distributed import World, agree_on_any, wait_for_all
from sheepop.training.length import (
    MEASURED_SHARE,
    MEASURED_STEPS,
    measure_seconds_per_step,
    steps_in_minutes,
    total_steps_without_clock,
)
from sheepop.training.metrics import RunLog
from sheepop.training.optimizer import make_optimizer
from sheepop.training.profiling import begin_part
from sheepop.training.schedule import learning_rate_at
from sheepop.training.step import MicroBatch, StepResult, train_step
from sheepop.utils.devices import Precision, peak_flops
from sheepop.utils.errors import Interrupted, NonFiniteError
from sheepop.utils.logging import format_duration, warn

# fp16 overflows now and then by design: the loss scale halves until it fits. This many in a row is no accident.
MAX_OVERFLOWS_IN_A_ROW = 20
SAMPLE_SETTINGS = SamplingSettings(temperature=0.8, top_p=0.95)


@dataclass
class Run:
    """The parts of a run that the loop works with; `state` is what changes."""

    folder: Path
    config: Config
    corpus: Corpus
    tokenizer: Tokenizer
    model: TransformerModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sampler: Sampler
    precision: Precision
    world: World
    state: TrainingState
    packing: PackingPlan | None = None


def train(run: Run) -> None:
    """Train from `run.state.step` to `run.state.total_steps`, writing metrics, samples and checkpoints.

    Raises:
        NonFiniteError: loss or gradient was not a number; the last good state was saved.
        Interrupted: SIGINT or SIGTERM came; the step was finished and the state saved.
        NoSpaceError: a checkpoint did not fit on the disk; earlier ones are untouched.
    """
    config, state, model = run.config, run.state, run.model
    training = config.training
    steps_per_epoch = run.sampler.steps_per_epoch
    if not state.total_steps:
        state.total_steps = decide_length(run)
    total_steps = state.total_steps
    eval_interval = training.eval_interval or max(1, math.ceil(total_steps / 10))
    sample_interval = training.sample_interval or eval_interval
    flops_per_token = training_flops_per_token(config.model, config.data.max_length)
    peak = peak_flops(model.device, run.precision.autocast_dtype) * run.world.size

    run_log = RunLog(run.folder, step=state.step, tensorboard=training.tensorboard) if run.world.is_main else None
    if run_log and training.warmup_steps >= total_steps:
        warn(
            f"warm-up ({training.warmup_steps} steps) is as long as the whole run ({total_steps} steps), so the "
            "learning rate never comes down; lower training.warmup_steps"
        )
    elapsed_before = state.elapsed_seconds
    started = step_started = time.perf_counter()
    interval_tokens, interval_seconds = 0, 0.0
    overflows = 0
    model.train()
    batches = prefetch(batch_loader(run), state.step, total_steps, config.data.num_workers)
    with stop_signals() as stop:
        begin_part("load")
        for step, micro_batches in enumerate(batches, start=state.step):
            learning_rate = learning_rate_at(step, total_steps, training)
            result = train_step(
                model,
                run.optimizer,
                micro_batches,
                step=step,
                seed=config.seed,
                learning_rate=learning_rate,
                training=training,
                precision=run.precision,
                scaler=run.scaler,
                world=run.world,
            )
            begin_part("between steps")
            if not result.is_finite:
                overflows += 1
                if not run.precision.needs_loss_scaling or overflows > MAX_OVERFLOWS_IN_A_ROW:
                    stop_on_bad_numbers(run, result)
            else:
                overflows = 0
            state.step = done = step + 1
            state.tokens += result.num_targets
            interval_tokens += result.num_targets
            interval_seconds += time.perf_counter() - step_started
            state.elapsed_seconds = elapsed_before + time.perf_counter() - started
            is_last, ends_epoch = done == total_steps, done % steps_per_epoch == 0

            if run_log and (done % training.log_interval == 0 or is_last):
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
                seconds_left = (total_steps - done) * result.num_targets / tokens_per_second
                run_log.progress(
                    step=done,
                    total_steps=total_steps,
                    loss=result.loss,
                    learning_rate=learning_rate,
                    tokens_per_second=tokens_per_second,
                    left=seconds_left,
                )
                interval_tokens, interval_seconds = 0, 0.0

            is_best = False
            if done % eval_interval == 0 or ends_epoch or is_last:
                scores = validate(run)
                is_best = state.best_loss is None or scores.loss < state.best_loss
                if is_best:
                    state.best_loss = scores.loss
                if run_log:
                    log_validation(run, run_log, scores, elapsed_seconds=elapsed_before + time.perf_counter() - started)
            if run_log and training.sample_tokens and (done % sample_interval == 0 or is_last):
                run_log.sample(step=done, prompt=training.sample_prompt, text=sample_text(run))

            # A signal may reach one process before another; all must leave at the same step.
            stopping = agree_on_any(stop.signal_number is not None, run.world, model.device)
            is_due = training.save_interval is not None and done % training.save_interval == 0
            if ends_epoch or is_due or is_best or is_last or stopping:
                save(run, is_best=is_best)
            if stopping and not is_last:
                if run_log:
                    run_log.close()
                raise Interrupted(
                    f"Stopped by a signal after step {done} of {total_steps}. The state is saved in {run.folder}; "
                    "go on with the same command and --resume auto.",
                    stop.signal_number or signal.SIGTERM,
                )
            # Loading the next batch belongs to the next step; validating, sampling and saving belong to none.
            step_started = time.perf_counter()
            begin_part("load")
    if run_log:
        run_log.say(f"trained {state.step} steps, {state.tokens} tokens in {format_duration(state.elapsed_seconds)}")
        run_log.close()


def batch_loader(run: Run) -> Callable[[int], list[MicroBatch]]:
    """Return the function that loads this process's micro-batches of a step; it is pure, so any thread may call it."""
    data, device = run.config.data, run.model.device
    tokens = run.corpus.split("train").tokens

    def load(step: int) -> list[MicroBatch]:
        loaded = []
        world = run.world
        for position, windows in enumerate(run.sampler.micro_batches(step, rank=world.rank, world_size=world.size)):
            documents: np.ndarray | None = None
            if run.packing is not None:
                inputs, targets, documents = read_packed(tokens, run.packing, windows)  # (B, T) each
            else:
                inputs, targets = read_windows(tokens, windows * data.stride, data.max_length)  # (B, T) each
                if data.document_mask:
                    documents = document_ids(inputs, run.tokenizer.end_of_text_id)
            loaded.append(
                MicroBatch(
                    index=position * world.size + world.rank,
                    token_ids=to_device(inputs, device),
                    targets=to_device(targets, device),
                    num_targets=int(np.count_nonzero(targets != IGNORE_INDEX)),
                    document_ids=None if documents is None else to_device(documents, device),
                )
            )
        return loaded

    return load


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to the device; to a GPU through pinned memory, so that computing does not wait for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def decide_length(run: Run) -> int:
    """Return the number of steps of the run; for a time budget from a short measurement on a copy of the model."""
    training = run.config.training
    known = total_steps_without_clock(training, run.sampler.steps_per_epoch)
    if known is not None:
        return known
    assert training.max_minutes is not None
    load = batch_loader(run)
    started = time.perf_counter()
    validate(run)
    if training.sample_tokens:
        sample_text(run)
    seconds_per_validation = time.perf_counter() - started
    seconds_per_step = measure_step(run, load, seconds=MEASURED_SHARE * 60 * training.max_minutes)
    spent = (time.perf_counter() - started) / 60
    steps = steps_in_minutes(
        training.max_minutes - spent,
        seconds_per_step=seconds_per_step,
        seconds_per_validation=seconds_per_validation,
        eval_interval=training.eval_interval,
    )
    return run.state.step + broadcast_steps(steps, run)


def measure_step(
    run: Run, load: Callable[[int], list[MicroBatch]], *, seconds: float, at_least: int = MEASURED_STEPS
) -> float:
    """Return the seconds of a step on the micro-batches of `load`, from real steps of a copy; see `length.py`."""
    training = run.config.training
    optimizer: torch.optim.Optimizer | None = None

    def one_step(model: TransformerModel, step: int) -> None:
        nonlocal optimizer
        optimizer = optimizer or make_optimizer(model, training)
        train_step(
            model,
            optimizer,
            load(step),
            step=step,
            seed=run.config.seed,
            learning_rate=training.learning_rate,
            training=training,
            precision=run.precision,
            scaler=torch.amp.GradScaler(model.device.type, enabled=False),
            world=World(run.world.rank, 1),
        )

    return measure_seconds_per_step(run.model, one_step, first_step=run.state.step, seconds=seconds, at_least=at_least)


def broadcast_steps(steps: int, run: Run) -> int:
    """Let all processes use the main one's number of steps: their clocks differ."""
    if run.world.size == 1:
        return steps
    agreed = torch.tensor(steps, device=run.model.device)
    torch.distributed.broadcast(agreed, src=0)
    return int(agreed)


def validate(run: Run) -> Scores:
    """Score the validation split, or an even spread of `eval_max_tokens` of it, the same at every call."""
    config = run.config
    return evaluate_tokens(
        run.model,
        run.corpus.split("val").tokens,
        context=config.data.max_length,
        batch_size=config.training.batch_size,
        max_tokens=config.training.eval_max_tokens,
        end_of_text_id=run.tokenizer.end_of_text_id,
        document_mask=config.data.document_mask,
        autocast_dtype=run.precision.autocast_dtype,
    )


def log_validation(run: Run, run_log: RunLog, scores: Scores, *, elapsed_seconds: float) -> None:
    """Write a validation into the record and show it."""
    split, state = run.corpus.split("val"), run.state
    bits = bits_per_byte(scores.loss, tokens=split.num_tokens, num_bytes=split.num_bytes)
    run_log.metrics(
        type="val",
        step=state.step,
        epoch=state.step / run.sampler.steps_per_epoch,
        tokens=state.tokens,
        loss=scores.loss,
        elapsed_seconds=elapsed_seconds,
        perplexity=perplexity(scores.loss),
        bits_per_byte=bits,
        accuracy=scores.accuracy,
    )
    run_log.say(
        f"validation at step {state.step}: loss {scores.loss:.4f}, perplexity {perplexity(scores.loss):.1f}, "
        f"{bits:.3f} bits per byte, {scores.accuracy:.1%} of tokens right"
    )


def sample_text(run: Run) -> str:
    """Return what the model writes now; the seed is fixed, so that samples of different steps compare."""
    training = run.config.training
    generation = complete(
        run.model,
        run.tokenizer,
        training.sample_prompt,
        SAMPLE_SETTINGS,
        max_new_tokens=training.sample_tokens,
        seed=run.config.seed,
    )
    return generation.completions[0].text


def save(run: Run, *, is_best: bool) -> None:
    """Write a checkpoint of the present state, and remove step checkpoints that are no longer kept."""
    run.state.loss_scaler = run.scaler.state_dict()
    if run.world.is_main:
        name = checkpoint_name(run.state.step, run.sampler.steps_per_epoch)
        save_checkpoint(
            run.folder,
            name,
            model=run.model,
            optimizer=run.optimizer,
            config=run.config,
            tokenizer_json=run.tokenizer.to_json(),
            state=run.state,
        )
        if is_best:
            assert run.state.best_loss is not None
            mark_best(run.folder, name, step=run.state.step, loss=run.state.best_loss)
        prune_step_checkpoints(run.folder, run.config.training.keep_last)
    wait_for_all(run.world)


def stop_on_bad_numbers(run: Run, result: StepResult) -> None:
    """Save the state before the bad step, which changed nothing, and end the run."""
    save(run, is_best=False)
    raise NonFiniteError(
        f"At step {run.state.step + 1} the loss was {result.loss} and the gradient norm {result.grad_norm}, so the "
        "step "
        f"was not made and training stopped. The last good state is saved in {run.folder}. Usually the learning rate "
        "is "
        f"too high ({run.config.training.learning_rate}): try a third of it, a longer warm-up, or precision fp32, and "
        "go "
        "on with --resume auto --accept-changes."
    )


@dataclass
class StopRequest:
    """The signal that asked the run to stop, if one did."""

    signal_number: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Let SIGINT and SIGTERM ask for an orderly stop; a second signal ends the process at once."""
    request = StopRequest()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        request.signal_number = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
