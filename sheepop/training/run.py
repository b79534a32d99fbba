"""Setting up a run: its folder, its text, its model."""

import time
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch

from sheepop.config import Config, ModelConfig, TrainingConfig, load_config
from sheepop.data.corpus import Corpus, open_corpus
from sheepop.data.packing import PackingPlan, open_plan
from sheepop.data.prepare import prepare_on_the_way
from sheepop.data.sampler import Sampler
from sheepop.data.spelling import spelling_groups
from sheepop.data.tokenizer import TOKENIZER_FILE, Tokenizer
from sheepop.models.fp8 import LEAST_WIDTH, MULTIPLE
from sheepop.models.pretrained import (
    checkpoints_of,
    read_settings,
    resolve_checkpoint,
    verify_manifest,
)
from sheepop.models.sizing import count_parameters
from sheepop.models.transformer import TransformerModel
from sheepop.training.checkpoint import resolve_resume, restore_weights
from sheepop.training.compiling import decide_compiling
from sheepop.training.dial import choose_settings, compare_with_expectation, is_dial, note_expectation
from sheepop.training.distributed import (
    World,
    choose_parallel,
    distribute,
    join_world,
    local_device,
    on_main,
)
from sheepop.training.gradient_libraries import decide_gradient_libraries
from sheepop.training.kernels import decide_kernels
from sheepop.training.optimizer import make_optimizer
from sheepop.training.plan_advice import warn_if_too_large
from sheepop.training.profiling import profile_steps
from sheepop.training.recipe import Choice
from sheepop.training.resuming import resume_from
from sheepop.training.run_folder import find_start, hold_folder, was_begun_by_this_launch
from sheepop.training.speed import precision_of
from sheepop.training.state import Run, TrainingState
from sheepop.training.trainer import train
from sheepop.utils.devices import resolve_device
from sheepop.utils.errors import CheckpointError, ConfigError, DataError
from sheepop.utils.files import write_json
from sheepop.utils.logging import format_count, log, warn
from sheepop.utils.runtime import keep_freed_memory
from sheepop.utils.seeds import derive_seed


def start_run(
    file: Path | None,
    *,
    preset: str | None,
    overrides: dict[str, object],
    resume: str | None,
    accept_changes: bool = False,
    profile: bool = False,
    began: float | None = None,
) -> Path:
    """Train as the settings say, from the start or from a checkpoint, and return the run's folder.

    Without `file` a resumed run takes its settings from its checkpoint. With a time budget and neither `file` nor
    `preset`, a fresh one has its settings chosen for that time (`dial.py`).

    Args:
        file: settings file, see `load_config`.
        preset: see `load_config`.
        overrides: dotted settings of the command line, among them `data.path`.
        resume: None, `auto`, or the path of a checkpoint or run.
        accept_changes: let a resumed run go on with other settings than it began with.
        profile: trace and time some steps, see `profiling.py`.
        began: reading of `time.perf_counter` from which a time budget counts; None: from now.

    Raises:
        SheepopError: whatever the user can mend; its class says which exit status.
    """
    began = time.perf_counter() if began is None else began
    asked = load_config(file, preset=preset, overrides=overrides)
    if resume is None:
        require_text(asked)
    origin = None if asked.training.init_from is None else resolve_checkpoint(Path(asked.training.init_from))
    if origin is not None:
        overrides = settings_of_origin(origin) | overrides
        asked = load_config(file, preset=preset, overrides=overrides)
    refuse_quantized(asked.model)
    device = local_device(resolve_device(asked.device))
    keep_freed_memory()
    named = None if resume in (None, "auto") else resolve_resume(Path(str(resume)))
    keeps_settings = file is None and preset is None
    if named is not None and keeps_settings:
        asked = load_config(named / "config.json", overrides={"training.save_dir": str(named.parent)} | overrides)
    run_folder = Path(asked.training.save_dir)
    with join_world(device) as world, ExitStack() as stack:

        def enter_folder() -> Path | None:
            goes_on = was_begun_by_this_launch(run_folder)
            stack.enter_context(hold_folder(run_folder, resuming=goes_on or resume is not None))
            if goes_on and checkpoints_of(run_folder):
                return find_start(run_folder, named=None)
            return find_start(run_folder, named=named) if resume is not None else None

        checkpoint = on_main(world, enter_folder)
        if checkpoint is not None and named is None and keeps_settings:
            asked = load_config(
                checkpoint / "config.json", overrides={"training.save_dir": str(run_folder)} | overrides
            )
        require_text(asked)
        choice: Choice | None = None
        if checkpoint is None and origin is None and is_dial(file, preset, overrides):
            choice = on_main(
                world,
                lambda: choose_settings(overrides, device=device, began=began, num_processes=world.size),
            )
            asked = load_config(preset="modern", overrides=choice.settings | overrides)
        corpus = open_text(asked, world)
        on_main(world, lambda: warn_if_too_large(asked, corpus, device))
        run = set_up(asked, corpus, device=device, world=world)
        run.began = began
        if checkpoint is not None:
            resume_from(run, checkpoint, accept_changes=accept_changes)
        elif origin is not None:
            begin_with(run, origin)
        decide_kernels(run)
        decide_gradient_libraries(run)
        decide_compiling(run)
        if world.is_main:
            write_json(run_folder / "config.json", run.config.model_dump())
            if choice is not None:
                note_expectation(run_folder, choice)
            describe(run)
        with profile_steps(run_folder, device) if profile and world.is_main else nullcontext():
            train(run)
        outcome = compare_with_expectation(run_folder) if world.is_main else None
        if outcome is not None:
            log(outcome)
    return run_folder


def refuse_quantized(settings: ModelConfig) -> None:
    """Refuse to train weights that are rounded.

    Raises:
        ConfigError: they are.
    """
    if settings.quantization != "none":
        raise ConfigError(
            f"A model whose weights are kept in {settings.quantization} cannot learn: model.quantization must be none. "
            "Train the model that it was made of, and quantize the result."
        )


def settings_of_origin(origin: Path) -> dict[str, object]:
    """Return the dotted settings of the model that a run begins with: its own, and the tokenizer beside it.

    Raises:
        CheckpointError: they are missing or not valid.
    """
    model = read_settings(origin).model.model_dump()
    return {f"model.{key}": value for key, value in model.items()} | {"data.tokenizer": str(origin / TOKENIZER_FILE)}


def begin_with(run: Run, origin: Path) -> None:
    """Take the weights of a checkpoint, and nothing else of it.

    Raises:
        CheckpointError: it is damaged, or its vocabulary is not that of the text.
    """
    verify_manifest(origin)
    if Tokenizer.load(origin).fingerprint != run.tokenizer.fingerprint:
        raise CheckpointError(
            f"The text in {run.corpus.path} was prepared with another vocabulary than that of {origin}, so its numbers "
            f"would mean other words. Prepare it with `--tokenizer {origin / TOKENIZER_FILE}`, or name plain text."
        )
    restore_weights(origin, run.model)
    if run.world.is_main:
        log(f"the run begins with the weights of {origin}")


def require_text(config: Config) -> None:
    """Refuse settings without a text.

    Raises:
        ConfigError: `data.path` is not set.
    """
    if not config.data.path:
        raise ConfigError("There is no text to train on: name files, folders or a prepared folder with --data PATH.")


def open_text(config: Config, world: World) -> Corpus:
    """Open the prepared folder that `data.path` names, or prepare its text on the way; one process does it for all."""
    data = config.data
    assert data.path is not None
    source = Path(data.path)

    def prepare() -> Path:
        return prepare_on_the_way(
            [source],
            Path(data.data_dir),
            tokenizer=data.tokenizer,
            vocab_size=config.model.vocab_size,
            val_fraction=data.val_fraction,
            seed=config.seed,
            separator=data.document_separator,
        ).path

    return open_corpus(on_main(world, prepare))


def set_up(config: Config, corpus: Corpus, *, device: torch.device, world: World) -> Run:
    """Build the model and all that trains it, at step 0.

    Raises:
        DataError: the text does not fill one context.
    """
    tokenizer = corpus.tokenizer()
    # A model that others trained may have more entries than its tokenizer.
    is_given = config.training.init_from is not None and config.model.vocab_size > tokenizer.vocab_size
    vocab_size = config.model.vocab_size if is_given else tokenizer.vocab_size
    if world.is_main and config.model.vocab_size != vocab_size:
        log(
            f"model.vocab_size is {vocab_size}, the number of the tokenizer's entries "
            f"({config.model.vocab_size} were asked for)"
        )
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"vocab_size": vocab_size}),
            "data": config.data.model_copy(update={"path": str(corpus.path.resolve())}),
        }
    )
    training, text = config.training, corpus.split("train")
    if text.num_tokens <= config.data.max_length:
        raise DataError(
            f"The text to train on in {corpus.path} has only {text.num_tokens} tokens, shorter than the context of "
            f"{config.data.max_length} and the one to predict. Lower data.max_length (or model.max_seq_len), or add "
            "text."
        )
    packing = open_packing(config, corpus, tokenizer.end_of_text_id, world)
    sampler = Sampler(
        num_windows=(
            text.num_windows(config.data.max_length, config.data.stride) if packing is None else packing.num_windows
        ),
        batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        seed=config.seed,
    )
    precision = precision_of(config, device)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = TransformerModel(config.model).to(device)
    if training.activation_checkpointing:
        model.recompute_activations()
    if precision.has_fp8:
        use_fp8(model, config, world)
    parallel = choose_parallel(training.parallel, count_parameters(config.model).total, device, world)
    if parallel == "fsdp":
        check_sharding(training)
    forward = distribute(model, parallel, world)
    return Run(
        folder=Path(training.save_dir),
        config=config,
        corpus=corpus,
        tokenizer=tokenizer,
        model=model,
        forward=forward,
        optimizer=make_optimizer(
            model, training, spelling_groups(tokenizer.token_texts) if training.shared_spelling else None
        ),
        sampler=sampler,
        precision=precision,
        world=world,
        parallel=parallel,
        state=TrainingState(total_steps=0, data_fingerprint=corpus.fingerprint),
        packing=packing,
    )


def use_fp8(model: TransformerModel, config: Config, world: World) -> None:
    """Let the model's large layers learn in 8 bits.

    Raises:
        ConfigError: it would have no effect.
    """
    few, many = model.learn_in_fp8()
    if not few:
        raise ConfigError(
            f"training.precision 'fp8' would change nothing: it is for linear layers of at least {LEAST_WIDTH} "
            f"inputs and outputs, multiples of {MULTIPLE}, and no block of this model (model.d_model "
            f"{config.model.d_model}, model.d_ff {config.model.d_ff}) has one. Use 'bf16', or a wider model."
        )
    rows = config.training.batch_size * config.data.max_length
    if rows % MULTIPLE:
        raise ConfigError(
            f"training.precision 'fp8' would change nothing: training.batch_size times data.max_length, {rows} tokens, "
            f"must be a multiple of {MULTIPLE}. Choose such sizes, or 'bf16'."
        )
    if world.is_main:
        log(f"fp8: {few} of the {many} linear layers in the blocks learn in 8 bits")


def check_sharding(training: TrainingConfig) -> None:
    """Refuse settings that sharded weights do not allow.

    Raises:
        ConfigError: it names the setting and why.
    """
    reasons = {
        "training.async_save (true)": training.async_save and "the processes write their slices together",
        "training.optimizer (muon)": training.optimizer == "muon"
        and "each process holds slices of matrices, and Muon needs whole ones",
        "training.shared_spelling (true)": training.shared_spelling
        and "each process holds slices of the embedding, whose rows would move together",
    }
    for setting, reason in reasons.items():
        if reason:
            raise ConfigError(
                f"{setting} does not go together with training.parallel (fsdp): {reason}. Leave one of them out."
            )


def open_packing(config: Config, corpus: Corpus, end_of_text_id: int, world: World) -> PackingPlan | None:
    """Return how documents are packed into sequences, or None where they are only concatenated.

    A plan that takes long to make is kept in the corpus's folder; one process makes it for all.
    """
    if config.data.packing == "concatenate":
        return None

    def make_plan() -> PackingPlan:
        return open_plan(
            corpus.split("train").tokens,
            length=config.data.max_length,
            end_of_text_id=end_of_text_id,
            folder=corpus.path / "packing",
            fingerprint=corpus.fingerprint,
        )

    made: list[PackingPlan] = []
    on_main(world, lambda: made.append(make_plan()))
    return made[0] if made else make_plan()


def describe(run: Run) -> None:
    """Say what is about to be trained, on what, with which settings."""
    config, corpus = run.config, run.corpus
    train_split, val_split = corpus.split("train"), corpus.split("val")
    counts = count_parameters(config.model)
    training = config.training
    tokens_per_step = training.batch_size * training.gradient_accumulation_steps * config.data.max_length
    log(
        f"model: {format_count(counts.total)} parameters ({config.preset}: {config.model.num_layers} layers, width "
        f"{config.model.d_model}, {config.model.num_heads} heads, context {config.model.max_seq_len}, vocabulary "
        f"{config.model.vocab_size})"
    )
    log(
        f"text: {format_count(train_split.num_tokens)} tokens to train on, {format_count(val_split.num_tokens)} to "
        f"validate, from {corpus.path}"
    )
    if run.packing is not None:
        places = run.packing.num_windows * run.packing.length
        log(
            f"packing: best fit, {run.packing.num_windows} sequences of {run.packing.length} tokens, "
            f"{(train_split.num_tokens - 1) / places:.1%} of their places filled"
        )
    log(
        f"training: {tokens_per_step} tokens a step, {run.sampler.steps_per_epoch} steps an epoch, in "
        f"{run.precision.name} on {run.model.device} with {torch.get_num_threads()} threads and {run.world.size} "
        "process(es)"
    )
    log(f"settings: {run.folder / 'config.json'}")
    shares = training.gradient_accumulation_steps
    if shares % run.world.size:
        warn(
            f"{run.world.size} processes share {shares} micro-batch(es) a step, so some wait for others; make "
            "training.gradient_accumulation_steps a multiple of the number of processes"
        )
