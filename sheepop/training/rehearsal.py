"""Making a plan: estimate, and where the estimate says that the run fits, measure some real steps of it."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sheepop.config import Config, load_config
from sheepop.data.corpus import Corpus
from sheepop.models.sizing import count_parameters, training_flops_per_token, weight_bytes
from sheepop.models.transformer import TransformerModel
from sheepop.training.batches import batch_loader
from sheepop.training.compiling import decide_compiling
from sheepop.training.dial import choose_settings, is_dial
from sheepop.training.distributed import World
from sheepop.training.gradient_libraries import decide_gradient_libraries
from sheepop.training.kernels import by_kernels, decide_kernels, use_of_kernels
from sheepop.training.length import LEAVING_SECONDS, measure_step, steps_in_seconds, time_checkpoint
from sheepop.training.optimizer import make_optimizer
from sheepop.training.plan import (
    Plan,
    Times,
    changed,
    free_disk_bytes,
    plan_length,
    plan_memory,
    plan_steps,
    with_measurements,
    with_vocabulary,
)
from sheepop.training.plan_advice import settings_that_fit
from sheepop.training.run import open_text, set_up
from sheepop.training.speed import precision_of
from sheepop.training.state import Learner, Run, TrainingState
from sheepop.training.step import MicroBatch, train_step
from sheepop.training.validation import sample_text, validate
from sheepop.utils.devices import Precision, peak_flops, resolve_device
from sheepop.utils.logging import log
from sheepop.utils.memory import available_bytes, forget_peak, peak_resident_bytes, resident_bytes
from sheepop.utils.runtime import keep_freed_memory, return_freed_memory

Loader = Callable[[int], list[MicroBatch]]

SECONDS = 10.0  # that measuring steps may take, about
STEPS_MEASURED = 5
SAMPLE_TOKENS = 16
STARTING_SECONDS = 3.0  # that a run takes to its first step, about; it goes off a time budget
REHEARSED = 64  # width, vocabulary and context of the model that libraries are loaded with
LIKELY_SHARE = 0.2  # of the device's best, to guess whether a single sequence takes too long to measure


def make_plan(file: Path | None, *, preset: str | None, overrides: dict[str, object]) -> Plan:
    """Say what `start_run` with the same arguments would take; without `data.path` what can be said without a text.

    Where `start_run` would choose the settings for a time budget, they are chosen here and said in the same way.

    Raises:
        SheepopError: what `start_run` would raise before its first step.
    """
    config = load_config(file, preset=preset, overrides=overrides)
    device = resolve_device(config.device)
    if config.data.path and is_dial(file, preset, overrides):
        choice = choose_settings(overrides, device=device, began=time.perf_counter())
        config = load_config(preset="modern", overrides=choice.settings | overrides)
    corpus = open_text(config, World()) if config.data.path else None
    if corpus is not None:
        config = with_vocabulary(config, corpus)
    precision = precision_of(config, device)
    per_epoch = None if corpus is None else epoch_of(config, corpus)[1]
    config = use_of_kernels(config, device, steps=plan_steps(config.training, per_epoch))
    return_freed_memory()
    keep_freed_memory()
    rehearse_libraries(config, device, precision)
    process = resident_bytes() if device.type == "cpu" else 0
    memory = plan_memory(config, device, process=process, available=process + available_bytes(device))
    missing = []
    if corpus is None:
        missing.append(
            f"Without --data the vocabulary is taken to be model.vocab_size ({config.model.vocab_size}), and neither "
            "time nor the steps of an epoch are known."
        )
    steps = plan_steps(config.training, None)
    plan = Plan(
        config=config,
        device=str(device),
        precision=precision.name,
        parameters=count_parameters(config.model),
        memory=memory,
        tokens_per_epoch=None,
        length=None if steps is None else plan_length(config.training, steps, steps),
        times=None,
        disk_available=free_disk_bytes(Path(config.training.save_dir)),
        advice=[] if memory.fits else settings_that_fit(config, device, memory),
        missing=missing,
    )
    return plan if corpus is None else plan_with_text(plan, config, corpus, device)


def plan_with_text(plan: Plan, config: Config, corpus: Corpus, device: torch.device) -> Plan:
    """Add what only a text can tell: epochs, and by real steps the time and the memory, if these steps fit."""
    # The copy that steps are made on counts as well.
    if plan.memory.estimate + weight_bytes(config.model) > plan.memory.available:
        windows, per_epoch = epoch_of(config, corpus)
        steps = plan_steps(config.training, per_epoch)
        return replace(
            plan,
            tokens_per_epoch=windows * config.data.max_length,
            length=None if steps is None else plan_length(config.training, per_epoch, steps),
            missing=[*plan.missing, "Time was not measured, since the model and a copy of it to measure do not fit."],
        )
    forget_peak()
    run = set_up(config, corpus, device=device, world=World())
    times = measure(run)
    steps = plan_steps(config.training, run.sampler.steps_per_epoch)
    if steps is None:
        assert config.training.max_minutes is not None
        steps = max(
            1,
            steps_in_seconds(
                60 * config.training.max_minutes - STARTING_SECONDS - LEAVING_SECONDS - times.compiling,
                seconds_per_step=times.step,
                seconds_per_pause=times.validation + times.sample + times.checkpoint,
                eval_interval=config.training.eval_interval,
                steps_per_epoch=run.sampler.steps_per_epoch,
            ),
        )
    plan = with_measurements(plan, times, plan_length(config.training, run.sampler.steps_per_epoch, steps))
    plan = replace(plan, tokens_per_epoch=run.sampler.num_windows * config.data.max_length)
    if not plan.memory.fits:  # the estimate did, but what was measured does not
        plan = replace(plan, advice=settings_that_fit(config, device, plan.memory))
    return plan


def epoch_of(config: Config, corpus: Corpus) -> tuple[int, int]:
    """Return the windows and the steps of an epoch, of a text that is not packed."""
    windows = max(1, corpus.split("train").num_windows(config.data.max_length, config.data.stride))
    return windows, -(-windows // (config.training.batch_size * config.training.gradient_accumulation_steps))


def rehearse_libraries(config: Config, device: torch.device, precision: Precision) -> None:
    """Make a step of a tiny model of the same kind, so that libraries load what they load at their first use."""
    length = min(config.data.max_length, REHEARSED)
    sizes = {"vocab_size": REHEARSED, "d_model": REHEARSED, "d_ff": REHEARSED, "max_seq_len": length, "num_layers": 1}
    heads = {"num_heads": 2, "num_kv_heads": 2 if config.model.num_heads % 2 else 1, "head_dim": 16, "rotary_dim": 0}
    settings: dict[str, object] = {f"model.{key}": value for key, value in {**sizes, **heads}.items()}
    tiny = changed(config, settings | {"data.max_length": length, "data.stride": length})
    model = TransformerModel(tiny.model).to(device)
    model.learn_by_kernels(**by_kernels(config))
    optimizer = make_optimizer(model, tiny.training)
    state = TrainingState(total_steps=1, data_fingerprint="")
    token_ids = torch.zeros((1, length), dtype=torch.long, device=device)
    learner = Learner(tiny, model, model, optimizer, precision, World(), "none", state)
    train_step(learner, [MicroBatch(0, token_ids, token_ids, length)], step=0, learning_rate=0.0)


def measure(run: Run) -> Times:
    """Measure what the run consists of, on its own model and text, in some seconds altogether."""
    training = run.config.training
    log(f"measuring some steps of this run on {run.model.device}; that takes some seconds")
    decide_kernels(run)
    load = batch_loader(run)
    full = sum(len(batch.targets) for batch in load(0))  # sequences of a step
    run.model.train()
    best = peak_flops(run.model.device, run.precision.autocast_dtype)
    context = run.config.data.max_length
    flops = sequence_flops(run, context)
    # One sequence first, or its beginning, to see how many fit into the time.
    length = context
    while length > 16 and sequence_flops(run, length) / (LIKELY_SHARE * best) > SECONDS / 2:
        length //= 2
    one = measure_step(run, limited(load, 1, length), seconds=0, at_least=1) * flops / sequence_flops(run, length)
    affordable = max(1, int(SECONDS / (STEPS_MEASURED + 1) / one))
    is_whole = affordable >= full
    compiling = 0.0
    if is_whole:
        decide_gradient_libraries(run)
        began = time.perf_counter()
        decide_compiling(run)  # as the run will; what is compiled here is kept for it
        is_compiled = run.config.training.compile == "on"
        compiling = time.perf_counter() - began if is_compiled else 0.0
        step = measure_step(run, load, seconds=SECONDS / 4, at_least=STEPS_MEASURED)
    else:
        rows = min(affordable, training.batch_size)
        step = full * one
        if rows > 1:
            several = measure_step(run, limited(load, rows, context), seconds=0, at_least=STEPS_MEASURED - 2)
            a_row = (several - one) / (rows - 1)  # without what a step costs once, the update above all
            step = several + (full - rows) * max(0.0, a_row)
    peak_bytes = measured_peak(run) if is_whole else None
    return Times(
        step=step,
        compiling=compiling,
        validation=time_validation(run, seconds_per_sequence=step / full),
        sample=time_sample(run),
        checkpoint=time_checkpoint(run),
        is_whole_step=is_whole,
        peak_flops=best,
        peak_bytes=peak_bytes,
    )


def sequence_flops(run: Run, length: int) -> float:
    """Return the operations of learning from one sequence of `length` tokens."""
    return length * training_flops_per_token(run.config.model, length)


def limited(load: Loader, rows: int, length: int) -> Loader:
    """Return a loader of steps that have the first tokens of the first `rows` sequences of a micro-batch alone."""

    def load_some(step: int) -> list[MicroBatch]:
        batch = load(step)[0]
        documents = batch.document_ids
        return [
            replace(
                batch,
                token_ids=batch.token_ids[:rows, :length],
                targets=batch.targets[:rows, :length],
                num_targets=batch.targets[:rows, :length].numel(),
                document_ids=None if documents is None else documents[:rows, :length],
            )
        ]

    return load_some


def measured_peak(run: Run) -> int:
    """Return the most memory that the steps took, without the copy that they were made on where a run makes none."""
    device = run.model.device
    held = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_resident_bytes()
    return held - (0 if run.config.training.max_minutes else weight_bytes(run.config.model))


def time_validation(run: Run, *, seconds_per_sequence: float) -> float:
    """Return the seconds of a validation, from a part of one where that is long."""
    config, context = run.config, run.config.data.max_length
    wanted = min(run.corpus.split("val").num_tokens, config.training.eval_max_tokens)
    seconds_of_one = seconds_per_sequence / 3  # a forward pass of three that learning takes
    if seconds_of_one > SECONDS / 4:
        return seconds_of_one * wanted / context
    affordable = context * max(1, int(2 / seconds_of_one))
    part = replace(run, config=changed(config, {"training.eval_max_tokens": min(wanted, affordable)}))
    validate(replace(run, config=changed(config, {"training.eval_max_tokens": context})))  # pays for allocations
    began = time.perf_counter()
    scored = validate(part).tokens
    return (time.perf_counter() - began) * max(1.0, wanted / scored)


def time_sample(run: Run) -> float:
    """Return the seconds of a sample, from its first tokens."""
    tokens = run.config.training.sample_tokens
    if not tokens:
        return 0.0
    some = min(tokens, SAMPLE_TOKENS)
    began = time.perf_counter()
    sample_text(replace(run, config=changed(run.config, {"training.sample_tokens": some})))
    return (time.perf_counter() - began) * tokens / some
