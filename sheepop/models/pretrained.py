"""A model as a folder: `config.json` and `model.safetensors`; a checkpoint is such a folder with more beside it.

Nothing is unpickled: settings are JSON and weights are safetensors.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sheepop.config import Config, parse_config
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import CheckpointError, ConfigError
from sheepop.utils.files import read_json, sha256_of_file, to_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
LATEST_POINTER = "latest.json"
BEST_POINTER = "best.json"


def resolve_checkpoint(path: Path | str) -> Path:
    """Find the checkpoint folder that a user means.

    `path` is a checkpoint folder, a run folder (its best checkpoint, else its latest), or the spelling
    `checkpoint_epoch_10.pt` for the folder `checkpoint_epoch_10`.

    Raises:
        CheckpointError: there is none; says what is beside it.
    """
    path = Path(path)
    if path.suffix == ".pt" and not path.exists():
        path = path.with_suffix("")
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file. A checkpoint of sheepop is a folder with {CONFIG_FILE} and {WEIGHTS_FILE} inside; "
            "name that folder, or the run's folder."
        )
    if (path / WEIGHTS_FILE).is_file():
        return path
    for pointer in (BEST_POINTER, LATEST_POINTER):
        if (path / pointer).is_file():
            name = read_json(path / pointer, CheckpointError).get("checkpoint")
            target = path / str(name)
            if (target / WEIGHTS_FILE).is_file():
                return target
    present = sorted(entry.name for entry in path.parent.glob("checkpoint_*")) if path.parent.is_dir() else []
    inside = sorted(entry.name for entry in path.glob("checkpoint_*")) if path.is_dir() else []
    hint = f" There is: {', '.join((inside or present)[-5:])}." if inside or present else ""
    what = "holds no checkpoint" if path.is_dir() else "does not exist"
    raise CheckpointError(f"{path} {what}.{hint} Train a model with `sheepop train`, or name another folder.")


def verify_manifest(folder: Path) -> None:
    """Compare every file of a checkpoint with the size and SHA-256 sum in its manifest.

    A folder without a manifest (an export, say) has nothing to compare with and passes.

    Raises:
        CheckpointError: a file is missing or differs; it is named.
    """
    if not (folder / MANIFEST_FILE).is_file():
        if (folder / "training_state").exists():
            raise CheckpointError(f"The checkpoint {folder} has no {MANIFEST_FILE}: it was not written to its end.")
        return
    files = read_json(folder / MANIFEST_FILE, CheckpointError).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder / MANIFEST_FILE} does not list the checkpoint's files; use another checkpoint.")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            problem = "is missing"
        elif not isinstance(expected, dict) or path.stat().st_size != expected.get("bytes"):
            problem = f"has {path.stat().st_size} bytes, not those that were written (truncated?)"
        elif sha256_of_file(path) != expected.get("sha256"):
            problem = "was changed after it was written (its SHA-256 sum differs)"
        else:
            continue
        raise CheckpointError(f"The checkpoint {folder} is damaged: {name} {problem}. Use another checkpoint.")


def save_weights(model: TransformerModel, path: Path) -> None:
    """Write the weights as safetensors under the names of the modules; a tied head is stored once."""
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_weights:
        del weights["head.weight"]
    save_file(weights, path, metadata={"format": "pt", "sheepop": to_json(model.config.model_dump(), indent=None)})


def read_settings(folder: Path) -> Config:
    """Read the settings that a checkpoint was trained with.

    Raises:
        CheckpointError: they are missing or not valid.
    """
    try:
        return parse_config(read_json(folder / CONFIG_FILE, CheckpointError), source=str(folder / CONFIG_FILE))
    except ConfigError as error:
        raise CheckpointError(f"The checkpoint's settings cannot be used. {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}.") from None
    except (SafetensorError, OSError, ValueError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}). Use another checkpoint.") from None


def load_weights(model: TransformerModel, folder: Path) -> None:
    """Fill `model` from `folder`.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape; it is named with both shapes.
    """
    weights = read_tensors(folder / WEIGHTS_FILE)
    own = model.state_dict()
    if model.config.tie_weights:
        del own["head.weight"]
    for name in own.keys() | weights.keys():
        found, wanted = weights.get(name), own.get(name)
        if found is None or wanted is None or found.shape != wanted.shape:
            has = "lacks it" if found is None else f"has shape {tuple(found.shape)}"
            needs = "has no such weight" if wanted is None else f"needs shape {tuple(wanted.shape)}"
            raise CheckpointError(
                f"The checkpoint {folder} does not fit the model: for '{name}' the file {has}, the model {needs}."
            )
    model.load_state_dict(weights, strict=False)


def load_pretrained(folder: Path, device: torch.device | str = "cpu") -> TransformerModel:
    """Build the model of a checkpoint folder, ready to evaluate or generate.

    Raises:
        CheckpointError: the folder is damaged or not a checkpoint.
    """
    verify_manifest(folder)
    model = TransformerModel(read_settings(folder).model, initialize=False)
    load_weights(model, folder)
    return model.to(device).eval()
