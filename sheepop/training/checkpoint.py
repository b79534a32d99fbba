"""Checkpoints: folders that are whole or absent, with all that an exact resume needs.

A checkpoint is a pretrained model by itself (`config.json`, `model.safetensors`, `tokenizer.json`) with
`training_state/` beside it and a manifest of SHA-256 sums that is written last. Nothing is pickled.
"""

import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sheepop.config import Config
from sheepop.models.pretrained import (
    BEST_POINTER,
    CONFIG_FILE,
    LATEST_POINTER,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    load_weights,
    read_tensors,
    resolve_checkpoint,
    save_weights,
    verify_manifest,
)
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import CheckpointError
from sheepop.utils.files import atomic_folder, read_json, sha256_of_file, write_json
from sheepop.utils.logging import log

STATE_FILE = "training_state/state.json"
OPTIMIZER_FILE = "training_state/optimizer.safetensors"
FORMAT_VERSION = 1


@dataclass
class TrainingState:
    """Where a run stands. Everything else about the next step follows from it and the settings.

    Random numbers need no stored generator: dropout draws from `(seed, step, micro_step)`, the sampler from
    `(seed, step)`.
    """

    total_steps: int
    data_fingerprint: str
    step: int = 0
    tokens: int = 0
    elapsed_seconds: float = 0.0
    best_loss: float | None = None
    loss_scaler: dict[str, Any] = field(default_factory=dict)


def checkpoint_name(step: int, steps_per_epoch: int) -> str:
    """Return the folder name of a checkpoint after `step` steps: by epoch where one ends there, else by step."""
    epoch, rest = divmod(step, steps_per_epoch)
    return f"checkpoint_step_{step}" if rest or not step else f"checkpoint_epoch_{epoch}"


def save_checkpoint(
    run: Path,
    name: str,
    *,
    model: TransformerModel,
    optimizer: torch.optim.Optimizer,
    config: Config,
    tokenizer_json: str,
    state: TrainingState,
) -> Path:
    """Write a checkpoint whole, then point `latest.json` at it.

    Raises:
        NoSpaceError: the disk is full; earlier checkpoints and the pointer are untouched.
    """
    target = run / name
    with atomic_folder(target) as folder:
        (folder / "training_state").mkdir()
        write_json(folder / CONFIG_FILE, config.model_dump())
        (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        save_weights(model, folder / WEIGHTS_FILE)
        save_file(_optimizer_tensors(model, optimizer), folder / OPTIMIZER_FILE)
        write_json(folder / STATE_FILE, asdict(state) | {"seed": config.seed})
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sums = {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
            for path in files
        }
        manifest = {"format": "sheepop-checkpoint", "version": FORMAT_VERSION, "step": state.step, "files": sums}
        write_json(folder / MANIFEST_FILE, manifest)
    write_json(run / LATEST_POINTER, {"checkpoint": name, "step": state.step})
    return target


def mark_best(run: Path, name: str, *, step: int, loss: float) -> None:
    """Point `best.json` at the checkpoint with the lowest validation loss so far."""
    write_json(run / BEST_POINTER, {"checkpoint": name, "step": step, "loss": loss})


def prune_step_checkpoints(run: Path, keep_last: int) -> None:
    """Remove step checkpoints but the newest `keep_last`; epochs, the best and the latest always stay."""
    protected = {
        read_json(run / pointer, CheckpointError).get("checkpoint")
        for pointer in (BEST_POINTER, LATEST_POINTER)
        if (run / pointer).exists()
    }
    by_step = sorted(run.glob("checkpoint_step_*"), key=_number, reverse=True)
    for folder in by_step[keep_last:]:
        if folder.name not in protected:
            # Renamed first, so that a reader never meets a checkpoint that is half removed.
            doomed = folder.with_name(f".{folder.name}.old")
            folder.rename(doomed)
            shutil.rmtree(doomed)


def sweep_leftovers(run: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for pattern in (".checkpoint_*.tmp", ".checkpoint_*.old"):
        for folder in run.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def find_resume(run: Path, resume: str) -> Path | None:
    """Return the checkpoint to go on from: the one that `resume` names, or for `auto` the newest whole one.

    `auto` says which damaged checkpoints it skipped and why, and returns None where there is nothing to resume.

    Raises:
        CheckpointError: the named checkpoint is missing or damaged, or `auto` found damaged ones only.
    """
    if resume != "auto":
        checkpoint = resolve_resume(Path(resume))
        verify_manifest(checkpoint)
        return checkpoint
    candidates = sorted((path for path in run.glob("checkpoint_*") if path.is_dir()), key=_step_of, reverse=True)
    reasons = []
    for candidate in candidates:
        try:
            if not (candidate / MANIFEST_FILE).is_file():
                raise CheckpointError(f"The checkpoint {candidate} has no {MANIFEST_FILE}.")
            verify_manifest(candidate)
            read_state(candidate)
        except CheckpointError as error:
            reasons.append(str(error))
            log(f"skipped: {error}")
            continue
        return candidate
    if reasons:
        raise CheckpointError(f"No checkpoint in {run} is whole. " + " ".join(reasons))
    return None


def resolve_resume(path: Path) -> Path:
    """Find the checkpoint to resume from: a run folder means its latest checkpoint, not its best."""
    pointer = path / LATEST_POINTER
    if pointer.is_file():
        return resolve_checkpoint(path / str(read_json(pointer, CheckpointError).get("checkpoint")))
    if (path / STATE_FILE).parent.is_dir():  # a checkpoint, even if it turns out to be damaged
        return path
    return resolve_checkpoint(path)


def read_state(checkpoint: Path) -> TrainingState:
    """Read where the run stood.

    Raises:
        CheckpointError: the state is missing or of an unknown form.
    """
    saved = read_json(checkpoint / STATE_FILE, CheckpointError)
    known = {item.name for item in fields(TrainingState)}
    try:
        return TrainingState(**{key: value for key, value in saved.items() if key in known})
    except TypeError as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE} is not a training state of sheepop: {error}.") from None


def restore(checkpoint: Path, model: TransformerModel, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimizer from a checkpoint that `find_resume` has verified.

    Raises:
        CheckpointError: the checkpoint belongs to a different model.
    """
    load_weights(model, checkpoint)
    tensors = read_tensors(checkpoint / OPTIMIZER_FILE)
    for name, parameter in model.named_parameters():
        state = {key.rpartition("/")[2]: tensor for key, tensor in tensors.items() if key.rpartition("/")[0] == name}
        if tensors and not state:
            raise CheckpointError(f"{checkpoint / OPTIMIZER_FILE} holds nothing for the weight '{name}'.")
        # AdamW's step counters stay on the CPU unless fused on a GPU; they are copied wherever the weights are.
        optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in state.items()}


def _optimizer_tensors(model: TransformerModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Name each of the optimizer's tensors by its weight: `blocks.0.attention.output.weight/exp_avg`."""
    return {
        f"{name}/{key}": tensor.contiguous()
        for name, parameter in model.named_parameters()
        for key, tensor in optimizer.state.get(parameter, {}).items()
    }


def _number(folder: Path) -> int:
    match = re.search(r"(\d+)$", folder.name)
    return int(match.group(1)) if match else -1


def _step_of(folder: Path) -> tuple[int, int]:
    """Sort key: the step in the manifest, else in the state; folders without a readable one come last, by number."""
    for name in (MANIFEST_FILE, STATE_FILE):
        try:
            return int(read_json(folder / name, CheckpointError)["step"]), _number(folder)
        except (CheckpointError, KeyError, TypeError, ValueError):
            continue
    return -1, _number(folder)
