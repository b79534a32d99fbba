"""Checkpoints of nanoGPT (karpathy/nanoGPT, `train.py` and `model.py`): GPT-2 with plain linear layers, in a `.pt`."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sheepop.config import ModelConfig
from sheepop.data.tokenizer import load_model_tokenizer
from sheepop.interop.imported import checked_settings, write_imported
from sheepop.interop.moves import same, weights_from
from sheepop.interop.stock_classes import gpt2_moves
from sheepop.utils.errors import CheckpointError

SETTINGS = {
    "n_embd": "d_model",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "block_size": "max_seq_len",
    "vocab_size": "vocab_size",
    "bias": "bias",
}
LARGEST_PICKLE = 2**20  # bytes of an archive's list of files, and of a pickle; objects take fifty times as much
END_OF_ARCHIVE, LONGEST_END = b"PK\x05\x06", 2**16 + 22  # the record at the end of a zip archive
COMPILED = "_orig_mod."  # what torch.compile puts before each name


def import_nanogpt(file: Path, output: Path, tokenizer: Path | None) -> None:
    """Write a `ckpt.pt` as a checkpoint. The file is read by PyTorch's weights-only loader, which runs nothing.

    Raises:
        CheckpointError: the file is damaged, holds more than weights and settings, or there is no tokenizer.
    """
    if tokenizer is None:
        raise CheckpointError(
            f"{file} holds no tokenizer, and nanoGPT's meta.pkl is a pickle, which may run code. Name the one that the "
            "text was prepared with: --tokenizer PATH (for GPT-2's, a folder with encoder.json and vocab.bpe)."
        )
    settings, weights = read_model(file)
    write_imported(output, settings, weights, load_model_tokenizer(tokenizer, settings.vocab_size))


def read_model(file: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the settings and our weights of a model.

    Raises:
        CheckpointError: the file is not such a checkpoint.
    """
    check_archive(file)
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError, KeyError, IndexError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{file} cannot be read as weights alone ({reason}).") from None
    given, model = (content.get(key) if isinstance(content, dict) else None for key in ("model_args", "model"))
    if not isinstance(given, dict) or not isinstance(model, dict) or not SETTINGS.keys() <= given.keys():
        raise CheckpointError(f"{file} is not a checkpoint of nanoGPT: it lacks 'model' or 'model_args'.")
    weights = {
        str(name).removeprefix(COMPILED): tensor for name, tensor in model.items() if isinstance(tensor, torch.Tensor)
    }
    misfit = next((name for name, tensor in weights.items() if not is_plain(tensor)), None)
    if misfit is not None:
        raise CheckpointError(f"{file} does not hold plain numbers of its own for the weight {misfit}.")
    ours = {SETTINGS[key]: value for key, value in given.items() if key in SETTINGS}
    fixed = {"positions": "learned", "activation": "gelu", "tie_weights": True, "dropout": given.get("dropout", 0.0)}
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in weights.values()}
    stored = sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in storages.values())
    settings = checked_settings(lambda: ours | fixed, stored, str(file))
    return settings, weights_from(gpt2_moves(settings, matrix=same), weights, settings, str(file))


def check_archive(file: Path) -> None:
    """Check that a `.pt`, which is a zip archive, does not become larger than it is when it is read.

    Raises:
        CheckpointError: it would, or is no archive.
    """
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, file.stat().st_size - LONGEST_END))
            end = opened.read()
        place = end.rindex(END_OF_ARCHIVE)
        [listing] = struct.unpack_from("<I", end, place + 12)
        if listing > LARGEST_PICKLE:
            raise ValueError(f"a list of files of {listing} bytes")
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        largest = max((entry.file_size for entry in entries if entry.filename.endswith(".pkl")), default=0)
        if sum(entry.file_size for entry in entries) > file.stat().st_size or largest > LARGEST_PICKLE:
            raise ValueError("it holds more than it is large, or a pickle of more than a megabyte")
    except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{file} is not an archive as torch.save writes it ({error}).") from None


def is_plain(tensor: Tensor) -> bool:
    """Say whether a tensor holds numbers in memory, each in a place of its own."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    )
