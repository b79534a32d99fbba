"""Going on from a checkpoint: what must be as it was, and what may have changed."""

from pathlib import Path

from sheepop.config import LENGTH_KEYS, Config
from sheepop.data.tokenizer import TOKENIZER_FILE, Tokenizer
from sheepop.models.pretrained import read_settings
from sheepop.training.checkpoint import read_state, restore
from sheepop.training.length import total_steps_without_clock
from sheepop.training.saver import mark_best
from sheepop.training.schedule import learning_rate_at
from sheepop.training.state import Run, TrainingState
from sheepop.utils.errors import CheckpointError, ConfigError, DataError
from sheepop.utils.logging import log, warn

# Settings left open until the first step, with what versions did that did not ask.
DECIDED_AT_START = {
    "compile": "off",
    "weight_gradients": "onednn",
    "hidden_gradients": "onednn",
    "attention_kernels": "off",
    "head_kernels": "off",
}

# Settings that a resumed run may change without becoming another run: they say how it is watched, kept and loaded.
FREE_TO_CHANGE = {
    "preset",
    "device",
    "model.attention",
    "training.parallel",
    "training.activation_checkpointing",
    "training.on_bad_numbers",
    "training.max_skipped_steps",
    "training.save_dir",
    "training.save_interval",
    "training.keep_last",
    "training.keep_every",
    "training.async_save",
    "training.log_interval",
    "training.eval_interval",
    "training.eval_max_tokens",
    "training.sample_interval",
    "training.sample_prompt",
    "training.sample_tokens",
    "training.tensorboard",
    "data.path",
    "data.data_dir",
    "data.num_workers",
}


def resume_from(run: Run, checkpoint: Path, *, accept_changes: bool) -> None:
    """Bring `run` to where `checkpoint` stands.

    Raises:
        CheckpointError: the checkpoint belongs to another vocabulary or model.
        DataError: it belongs to another text, and that was not accepted.
        ConfigError: settings that change the course of training differ, and that was not accepted.
    """
    before = read_settings(checkpoint)
    for name, undecided in DECIDED_AT_START.items():
        if getattr(before.training, name) == "auto":
            before = before.with_training(**{name: undecided})
        if getattr(run.config.training, name) == "auto":
            run.config = run.config.with_training(**{name: getattr(before.training, name)})
    changes = changed_settings(before, run.config)
    length_changes = [change for change in changes if change.split(":")[0].removeprefix("training.") in LENGTH_KEYS]
    require_same_model(run, checkpoint, changes)
    state = read_state(checkpoint)
    if not accept_changes:
        require_same_course(run, checkpoint, state, [change for change in changes if change not in length_changes])
    if length_changes:
        change_length(run, checkpoint, state, before, "; ".join(length_changes), accept_changes=accept_changes)
    restore(checkpoint, run.model, run.optimizer)
    if run.world.is_main and state.best_step == state.step and checkpoint.parent == run.folder:
        mark_best(run.folder, checkpoint.name, state)  # a kill may have come between the checkpoint and its pointer
    state.data_fingerprint = run.state.data_fingerprint
    run.state = state
    if run.world.is_main:
        log(f"resumed from {checkpoint} after step {state.step}")


def require_same_model(run: Run, checkpoint: Path, changes: list[str]) -> None:
    """Refuse a checkpoint whose weights mean something else.

    Raises:
        CheckpointError: its vocabulary or its model is another one.
    """
    saved_tokenizer = Tokenizer.load(checkpoint)
    if saved_tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise CheckpointError(
            f"The vocabulary of {run.corpus.path} ({run.tokenizer.vocab_size} entries) is not the one that "
            f"{checkpoint} was trained with ({saved_tokenizer.vocab_size} entries), so its numbers would mean other "
            f"words. Prepare the text with `--tokenizer {checkpoint / TOKENIZER_FILE}`, or start a new run."
        )
    model_changes = [change for change in changes if change.startswith("model.")]
    if model_changes:
        raise CheckpointError(
            f"The checkpoint {checkpoint} holds another model than the settings ask for: {'; '.join(model_changes)}. "
            "Leave the model's settings as they were, or start a new run with another --output."
        )


def require_same_course(run: Run, checkpoint: Path, state: TrainingState, changes: list[str]) -> None:
    """Refuse what an undisturbed run would not have done.

    Raises:
        DataError: the text is another one.
        ConfigError: there are changes of the settings.
    """
    if state.data_fingerprint != run.state.data_fingerprint:
        raise DataError(
            f"The text in {run.corpus.path} is not the text that {checkpoint} was trained on (its fingerprint "
            "differs), so going on would not continue the same run. Use the same text, or say --accept-changes to go "
            "on all the same."
        )
    if changes:
        raise ConfigError(
            f"These settings differ from those of {checkpoint}: {'; '.join(changes)}. The result would not be the one "
            "of an undisturbed run. Set them back, or say --accept-changes to go on with the new ones."
        )


def change_length(
    run: Run, checkpoint: Path, state: TrainingState, before: Config, changes: str, *, accept_changes: bool
) -> None:
    """Let the schedule follow the run's new length.

    Raises:
        ConfigError: the steps made are more than it has, or had other learning rates, and that was not accepted.
    """
    total_steps = total_steps_without_clock(run.config.training, run.sampler.steps_per_epoch)
    if total_steps is not None and total_steps < state.step:
        raise ConfigError(
            f"The run is to have {total_steps} steps ({changes}), but {checkpoint} has made {state.step} already. "
            "Give it more, or go on from an earlier checkpoint."
        )
    if not accept_changes and not keeps_the_past(before, run, state):
        raise ConfigError(
            f"The length of the run changes ({changes}), and with schedule {run.config.training.schedule} the "
            f"{state.step} steps of {checkpoint} would have had other learning rates in a run of the new length. Say "
            "--accept-changes to go on all the same; schedules constant and, before its decay, wsd can be made longer "
            "without this."
        )
    if run.world.is_main:
        warn(f"the length of the run changes ({changes}); the schedule follows the new length")
    state.total_steps, state.anchor = 0, None


def keeps_the_past(before: Config, run: Run, state: TrainingState) -> bool:
    """Say whether a run of the new length would have made the steps behind us with the same learning rates."""
    if run.config.training.schedule == "constant":
        return True
    total_steps = total_steps_without_clock(run.config.training, run.sampler.steps_per_epoch)
    if total_steps is None or state.anchor is not None:
        return False
    return all(
        learning_rate_at(step, state.total_steps, before.training)
        == learning_rate_at(step, total_steps, run.config.training)
        for step in range(state.step)
    )


def changed_settings(before: Config, after: Config) -> list[str]:
    """List the settings that differ and matter to the course of training, as `key: old -> new`."""
    flat_before, flat_after = _flatten(before.model_dump()), _flatten(after.model_dump())
    return [
        f"{key}: {flat_before.get(key)} -> {value}"
        for key, value in flat_after.items()
        if key not in FREE_TO_CHANGE and flat_before.get(key) != value
    ]


def _flatten(nested: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
