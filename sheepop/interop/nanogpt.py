"""Checkpoints of nanoGPT (karpathy/nanoGPT, `train.py` and `model.py`): GPT-2 with plain linear layers, in a `.pt`."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sheepop.config import ModelConfig, parse_config
from sheepop.data.tokenizer import load_model_tokenizer
from sheepop.interop.imported import write_imported
from sheepop.interop.moves import same, weights_from
from sheepop.interop.stock_classes import gpt2_moves
from sheepop.utils.errors import CheckpointError, ConfigError

SETTINGS = {
    "n_embd": "d_model",
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "block_size": "max_seq_len",
    "vocab_size": "vocab_size",
    "bias": "bias",
}
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
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError, KeyError, IndexError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{file} cannot be read as weights alone ({reason}).") from None
    given, stored = (content.get(key) if isinstance(content, dict) else None for key in ("model_args", "model"))
    if not isinstance(given, dict) or not isinstance(stored, dict) or not SETTINGS.keys() <= given.keys():
        raise CheckpointError(f"{file} is not a checkpoint of nanoGPT: it lacks 'model' or 'model_args'.")
    weights = {
        str(name).removeprefix(COMPILED): tensor for name, tensor in stored.items() if isinstance(tensor, torch.Tensor)
    }
    ours = {SETTINGS[key]: value for key, value in given.items() if key in SETTINGS}
    fixed = {"positions": "learned", "activation": "gelu", "tie_weights": True, "dropout": given.get("dropout", 0.0)}
    try:
        settings = parse_config({"model": ours | fixed}, source=str(file)).model
    except ConfigError as error:
        raise CheckpointError(f"The model's settings cannot be used. {error}") from None
    if settings.num_layers > len(weights):
        raise CheckpointError(f"{file} says it has {settings.num_layers} layers, but holds {len(weights)} weights.")
    return settings, weights_from(gpt2_moves(settings, matrix=same), weights, settings, str(file))
