"""A model as a folder: `config.json` and `model.safetensors`; a checkpoint is such a folder with more beside it.

Nothing is unpickled: settings are JSON and weights are safetensors.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sheepop.config import Config, ModelConfig, parse_config
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import CheckpointError, ConfigError
from sheepop.utils.files import read_json, sha256_of_file, to_json, write_json

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
LATEST_POINTER = "latest.json"
BEST_POINTER = "best.json"
STATE_FILE = "training_state/state.json"
CHECKPOINT_FORMAT = "sheepop-checkpoint"
LARGE_FILE = 2**24  # bytes, whose sum takes some ten milliseconds
LARGEST_HEADER = 2**21  # bytes of names and shapes in a safetensors file: some 20,000 tensors
FORMAT_VERSION = 2  # 1: the manifest had no sum of itself, the state no guard and PyTorch's own loss scaler


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
        target = follow_pointer(path, pointer)
        if target is not None:
            return target
    for target in checkpoints_of(path):  # a run that was killed before it wrote its first pointer
        if (target / MANIFEST_FILE).is_file():
            return target
    present = sorted(entry.name for entry in path.parent.glob("checkpoint_*")) if path.parent.is_dir() else []
    inside = sorted(entry.name for entry in path.glob("checkpoint_*")) if path.is_dir() else []
    hint = f" There is: {', '.join((inside or present)[-5:])}." if inside or present else ""
    what = "holds no checkpoint" if path.is_dir() else "does not exist"
    raise CheckpointError(f"{path} {what}.{hint} Train a model with `sheepop train`, or name another folder.")


def follow_pointer(run: Path, pointer: str) -> Path | None:
    """Return the checkpoint that `latest.json` or `best.json` of a run names, or None where that leads nowhere."""
    try:
        target = run / str(read_json(run / pointer, CheckpointError).get("checkpoint"))
    except CheckpointError:
        return None
    return target if (target / WEIGHTS_FILE).is_file() else None


def checkpoints_of(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, whole or not, the one after the most steps first."""

    def steps(folder: Path) -> tuple[int, str]:
        for name in (MANIFEST_FILE, STATE_FILE):
            try:
                return int(read_json(folder / name, CheckpointError)["step"]), folder.name
            except (CheckpointError, KeyError, TypeError, ValueError):
                continue
        return -1, folder.name

    return sorted((path for path in run.glob("checkpoint_*") if path.is_dir()), key=steps, reverse=True)


def write_manifest(folder: Path, *, step: int) -> None:
    """List every file of a checkpoint with its size and SHA-256 sum; the manifest carries a sum of itself."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {"format": CHECKPOINT_FORMAT, "version": FORMAT_VERSION, "step": step, "files": files}
    write_json(folder / MANIFEST_FILE, manifest | {"sha256": _sum_of(manifest)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest.

    Raises:
        CheckpointError: it is missing, damaged, or of a version that is not known yet.
    """
    path = folder / MANIFEST_FILE
    manifest = read_json(path, CheckpointError)
    version, files = manifest.get("version"), manifest.get("files")
    if manifest.get("format") != CHECKPOINT_FORMAT or not isinstance(files, dict) or not isinstance(version, int):
        raise CheckpointError(f"{path} does not list the files of a checkpoint; use another checkpoint.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"The checkpoint {folder} has version {version} of the format, but this sheepop reads up to "
            f"{FORMAT_VERSION}. Use the sheepop that wrote it, or a newer one."
        )
    # Written again it must be the same text, so that a change of any of its bytes is found.
    own_sum = manifest.pop("sha256", None)
    is_same = path.read_text(encoding="utf-8") == to_json(manifest | {"sha256": own_sum}) + "\n"
    if version > 1 and not (is_same and own_sum == _sum_of(manifest)):  # the first version had no sum
        raise CheckpointError(
            f"The checkpoint {folder} is damaged: {MANIFEST_FILE} was changed after it was written. Use another "
            "checkpoint."
        )
    return manifest


def _sum_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(manifest).encode()).hexdigest()


def verify_manifest(folder: Path) -> None:
    """Compare every file of a checkpoint with the size and SHA-256 sum in its manifest.

    A folder without a manifest (an export, say) has nothing to compare with and passes.

    Raises:
        CheckpointError: a file is missing or differs; it is named.
    """
    verify_files(folder, listed_files(folder))


@contextmanager
def verified_meanwhile(folder: Path) -> Iterator[None]:
    """Do what `verify_manifest` does, with the large files on another core while the block uses them.

    Small ones, among them settings, are compared before the block begins.

    Raises:
        CheckpointError: as `verify_manifest`; for a large file at the block's end, also in place of an error in it.
    """
    large = listed_files(folder)
    small = {name: large.pop(name) for name in list(large) if not is_large(folder / name)}
    verify_files(folder, small)
    with ThreadPoolExecutor(1) as pool:
        verdict = pool.submit(verify_files, folder, large)
        try:
            yield
        except Exception:
            verdict.result()
            raise
        verdict.result()


def is_large(path: Path) -> bool:
    """Say whether there is a file of whose sum the computation takes noticeable time."""
    return path.is_file() and path.stat().st_size >= LARGE_FILE


def listed_files(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint's manifest says of its files; nothing for a folder that has none and needs none.

    Raises:
        CheckpointError: as `read_manifest`, or the checkpoint of a run has none.
    """
    if (folder / MANIFEST_FILE).is_file():
        files: dict[str, Any] = read_manifest(folder)["files"]
        return files
    if (folder / STATE_FILE).parent.exists():
        raise CheckpointError(f"The checkpoint {folder} has no {MANIFEST_FILE}: it was not written to its end.")
    return {}


def verify_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Compare files of a checkpoint with what its manifest says of them.

    Raises:
        CheckpointError: as `verify_manifest`.
    """
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


def stored_weights(model: TransformerModel) -> dict[str, Tensor]:
    """Return a model's weights under the names that files have: those of the modules, a tied head only once."""
    weights: dict[str, Tensor] = model.state_dict()
    if model.config.tie_weights:
        return {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    return weights


def save_weights(weights: Mapping[str, Tensor], settings: ModelConfig, path: Path) -> None:
    """Write weights, named as by `stored_weights`, as safetensors."""
    save_tensors(weights, path, {"format": "pt", "sheepop": to_json(settings.model_dump(), indent=None)})


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write named tensors as safetensors.

    Raises:
        OSError: they could not be written, such as for want of space.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:  # the library tells the system's error in words alone
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number.group(1)), os.strerror(int(number.group(1))), str(path)) from error


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
        with path.open("rb") as beginning:
            header = int.from_bytes(beginning.read(8), "little")
        if header > LARGEST_HEADER:
            raise ValueError(f"a header of {header} bytes")
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {path}.") from None
    except (SafetensorError, OSError, ValueError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}). Use another checkpoint.") from None


def load_weights(model: TransformerModel, folder: Path, *, shares_file: bool = False) -> None:
    """Fill `model`, which is not sharded, from `folder`.

    With `shares_file` its weights become the file's memory, which is read where and when it is needed, in the type that
    the file has. It does not lie as it is read the fastest, so that this is for what is used once.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of another shape; it is named with both shapes.
    """
    weights = read_tensors(folder / WEIGHTS_FILE)
    own = stored_weights(model)
    for name in own.keys() | weights.keys():
        found, wanted = weights.get(name), own.get(name)
        if found is None or wanted is None or found.shape != wanted.shape:
            has = "lacks it" if found is None else f"has shape {tuple(found.shape)}"
            needs = "has no such weight" if wanted is None else f"needs shape {tuple(wanted.shape)}"
            raise CheckpointError(
                f"The checkpoint {folder} does not fit the model: for '{name}' the file {has}, the model {needs}."
            )
    model.load_state_dict(weights, strict=False, assign=shares_file)
    if shares_file and model.config.tie_weights and model.config.quantization == "none":
        model.head.weight = model.token_embedding.weight


def load_pretrained(folder: Path, device: torch.device | str = "cpu") -> TransformerModel:
    """Build the model of a checkpoint folder, ready to evaluate or generate.

    Raises:
        CheckpointError: the folder is damaged or not a checkpoint.
    """
    with verified_meanwhile(folder):
        return read_model(folder, device)


def read_model(folder: Path, device: torch.device | str = "cpu", *, shares_file: bool = False) -> TransformerModel:
    """Do what `load_pretrained` does, within `verified_meanwhile`; `shares_file` as in `load_weights`."""
    model = TransformerModel(read_settings(folder).model, initialize=False)
    load_weights(model, folder, shares_file=shares_file)
    return model.to(device).eval()
