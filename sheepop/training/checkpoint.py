"""Checkpoints: folders that are whole or absent, with all that an exact resume needs.

A checkpoint is a pretrained model by itself (`config.json`, `model.safetensors`, `tokenizer.json`) with
`training_state/` beside it and a manifest of SHA-256 sums that is written last. Nothing is pickled, but for the index
that PyTorch's distributed engine writes beside the moments of a sharded run (`training_state/sharded/.metadata`); it
is read only after its sum was compared.
"""

import copy
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sheepop.config import Config
from sheepop.models.pretrained import (
    CONFIG_FILE,
    LATEST_POINTER,
    MANIFEST_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    checkpoints_of,
    load_weights,
    read_manifest,
    read_tensors,
    resolve_checkpoint,
    save_tensors,
    save_weights,
    stored_weights,
    verify_manifest,
    write_manifest,
)
from sheepop.models.transformer import TransformerModel
from sheepop.training.distributed import World, as_placed, full, is_sharded, on_main, own_part
from sheepop.training.state import Run, TrainingState
from sheepop.utils.errors import CheckpointError, NoSpaceError
from sheepop.utils.files import atomic_folder, full_disk_is_a_clear_error, read_json, recover_replaced, write_json
from sheepop.utils.logging import log

OPTIMIZER_FILE = "training_state/optimizer.safetensors"
SHARDED_FOLDER = "training_state/sharded"
SPARE_BYTES = 1_000_000  # for the files beside the tensors


def checkpoint_name(step: int, steps_per_epoch: int) -> str:
    """Return the folder name of a checkpoint after `step` steps: by epoch where one ends there, else by step."""
    epoch, rest = divmod(step, steps_per_epoch)
    return f"checkpoint_step_{step}" if rest or not step else f"checkpoint_epoch_{epoch}"


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds.

    Attributes:
        weights: whole tensors, named as the model stores them; empty on all but the main process.
        moments: the optimizer's tensors, named by their weight: `blocks.0.attention.output.weight/exp_avg`; this
            process's slices of them where the run is sharded, else likewise empty on all but the main process.
        is_sharded: whether they are slices.
    """

    config: Config
    tokenizer_json: str
    state: TrainingState
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    is_sharded: bool


def take_snapshot(run: Run, *, copied: bool = False) -> Snapshot:
    """Collect what a checkpoint holds, as it is now; all processes of a sharded run must call it.

    Args:
        run: as it stands between two steps.
        copied: whether tensors are copied, so that later steps do not change them.
    """

    def keep(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=copied)

    weights = {}
    for name, weight in stored_weights(run.model).items():
        whole = full(weight)
        if run.world.is_main:
            weights[name] = keep(whole)
    in_slices = run.parallel == "fsdp"
    moments = {
        f"{name}/{key}": tensor if in_slices else keep(tensor)
        for name, parameter in run.model.named_parameters()
        for key, tensor in run.optimizer.state.get(parameter, {}).items()
        if in_slices or run.world.is_main
    }
    return Snapshot(
        run.config, run.tokenizer.to_json(), copy.deepcopy(run.state), weights, moments, is_sharded=in_slices
    )


def save_checkpoint(folder: Path, name: str, snapshot: Snapshot, world: World | None = None) -> Path:
    """Write a checkpoint into a run's folder whole, then point `latest.json` at it.

    The moments of a sharded run are written by all processes at once, which therefore all call this; the weights are
    in one piece in any case, so that the checkpoint is a model by itself.

    Raises:
        NoSpaceError: the disk is full; earlier checkpoints and the pointer are untouched.
    """
    world = world or World()
    target = folder / name
    shards = folder / f".{name}.shards.tmp"
    on_main(world, lambda: check_free_space(target, snapshot, world))
    if snapshot.is_sharded:
        try:
            with full_disk_is_a_clear_error(target):
                save_shards(snapshot.moments, shards)
        except NoSpaceError:
            on_main(world, lambda: shutil.rmtree(shards, ignore_errors=True))
            raise

    def publish() -> None:
        with atomic_folder(target) as temporary:
            (temporary / STATE_FILE).parent.mkdir()
            write_json(temporary / CONFIG_FILE, snapshot.config.model_dump())
            (temporary / "tokenizer.json").write_text(snapshot.tokenizer_json, encoding="utf-8")
            save_weights(snapshot.weights, snapshot.config.model, temporary / WEIGHTS_FILE)
            if snapshot.is_sharded:
                os.replace(shards, temporary / SHARDED_FOLDER)
            else:
                save_tensors(snapshot.moments, temporary / OPTIMIZER_FILE)
            write_json(temporary / STATE_FILE, asdict(snapshot.state) | {"seed": snapshot.config.seed})
            write_manifest(temporary, step=snapshot.state.step)
        write_json(folder / LATEST_POINTER, {"checkpoint": name, "step": snapshot.state.step})

    on_main(world, publish)
    return target


def save_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Let every process write its slices, through PyTorch's distributed checkpoints.

    Raises:
        OSError: on all processes, where one of them could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(tensors), checkpoint_id=folder)
    except CheckpointException as error:
        for problem, _ in error.failures.values():
            if isinstance(problem, OSError):
                raise problem from error
        raise


def check_free_space(target: Path, snapshot: Snapshot, world: World) -> None:
    """Compare the size of a checkpoint with what is free, before anything is written.

    Raises:
        NoSpaceError: it would not fit.
    """
    weights = sum(tensor.nbytes for tensor in snapshot.weights.values())
    moments = sum(own_part(tensor).nbytes for tensor in snapshot.moments.values())
    needed = weights + moments * (world.size if snapshot.is_sharded else 1) + SPARE_BYTES
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise NoSpaceError(
            f"The checkpoint {target} needs {needed / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are left on the disk. "
            "Nothing was written and earlier checkpoints are untouched. Free some space, or choose another folder, and "
            "go on with --resume auto."
        )


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
    reasons = []
    for candidate in checkpoints_of(run):
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
    """Read where the run stood, also from a checkpoint of an older version.

    Raises:
        CheckpointError: the state is missing or of an unknown form.
    """
    saved = read_json(checkpoint / STATE_FILE, CheckpointError)
    saved.pop("seed", None)
    try:
        if read_manifest(checkpoint)["version"] == 1:
            scaler = saved.pop("loss_scaler")  # PyTorch's GradScaler, empty where it was not needed
            kept = {"value": scaler["scale"], "steps_without_overflow": scaler["_growth_tracker"]} if scaler else {}
            saved |= {"loss_scale": kept, "guard": {}}
        return TrainingState.from_json(saved)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / STATE_FILE} is not a training state of sheepop: {error}.") from None


def restore_weights(checkpoint: Path, model: TransformerModel) -> None:
    """Fill a model, sharded or not, from a checkpoint whose sums were compared.

    Raises:
        CheckpointError: the checkpoint belongs to a different model.
    """
    parameters = dict(model.named_parameters())
    if not any(map(is_sharded, parameters.values())):
        load_weights(model, checkpoint)
        return
    weights = read_tensors(checkpoint / WEIGHTS_FILE)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name not in weights or weights[name].shape != parameter.shape:
                raise CheckpointError(f"The checkpoint {checkpoint} does not fit the model: '{name}' differs.")
            parameter.copy_(as_placed(weights[name], parameter))


def restore(checkpoint: Path, model: TransformerModel, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimizer from a checkpoint that `find_resume` has verified, sharded or not on either side.

    Raises:
        CheckpointError: the checkpoint belongs to a different model.
    """
    restore_weights(checkpoint, model)
    parameters = dict(model.named_parameters())
    if (checkpoint / SHARDED_FOLDER).is_dir():
        moments = read_sharded(checkpoint / SHARDED_FOLDER, parameters)
    else:
        moments = read_tensors(checkpoint / OPTIMIZER_FILE)
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in moments.items():
        name, _, what = key.rpartition("/")
        states[name][what] = tensor
    for name, parameter in parameters.items():
        if moments and not states[name]:
            raise CheckpointError(f"{checkpoint} holds no optimizer state for the weight '{name}'.")
        # AdamW's step counters stay on the CPU unless fused on a GPU; they are copied wherever the weights are.
        optimizer.state[parameter] = {key: as_placed(tensor, parameter) for key, tensor in states[name].items()}


def read_sharded(folder: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the optimizer's tensors of a sharded run, sliced as the parameters now are."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors = {}
    for key, what in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        parameter = parameters[key.rpartition("/")[0]]
        is_counter = what.size != parameter.shape  # type: ignore[union-attr]
        tensors[key] = torch.zeros((), device="cpu") if is_counter else torch.zeros_like(parameter)
    if tensors:
        load(tensors, checkpoint_id=folder)
    return tensors


def sweep_leftovers(run: Path) -> None:
    """Remove what a killed run left half written or half removed; put back what it was about to replace.

    To be called before anything is looked for in the run, by the one process that writes to it.
    """
    recover_replaced(run, "checkpoint_*")
    for pattern in (".*.tmp", ".checkpoint_*.old"):
        for leftover in run.glob(pattern):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()
