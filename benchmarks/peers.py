"""nanoGPT beside ours: its own `train.py`, from a checkout that the user names, on the same characters."""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

FILES = ("train.py", "model.py", "configurator.py")
# Its documented settings for a CPU.
CPU_SETTINGS = {
    "device": "cpu",
    "compile": False,
    "eval_iters": 20,
    "log_interval": 1,
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "dropout": 0.0,
    "max_iters": 2000,
    "lr_decay_iters": 2000,
    "eval_interval": 2000,
    "always_save_checkpoint": False,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "min_lr": 1e-4,
    "beta2": 0.99,
    "warmup_iters": 100,
}


@dataclass(frozen=True)
class NanoGptRun:
    """What nanoGPT printed, and the seconds from the start of its process to its end."""

    output: str
    seconds: float


def train_nanogpt(checkout: Path, text: Path, **settings: object) -> NanoGptRun:
    """Train nanoGPT on the characters of a text, whose last tenth is held out, with its CPU settings but for these."""
    content = text.read_text(encoding="utf-8")
    characters = sorted(set(content))
    ids = np.array([characters.index(character) for character in content], dtype=np.uint16)
    cut = int(len(ids) * 0.9)
    with tempfile.TemporaryDirectory() as scratch:
        return train_nanogpt_on(checkout, Path(scratch), ids[:cut], ids[cut:], len(characters), **settings)


def train_nanogpt_on(
    checkout: Path,
    scratch: Path,
    train: NDArray[np.uint16],
    val: NDArray[np.uint16],
    vocab_size: int,
    **settings: object,
) -> NanoGptRun:
    """Train nanoGPT in the folder `scratch` on token ids; a checkpoint that it saves is there as `out/ckpt.pt`."""
    data = scratch / "data" / "bench"
    data.mkdir(parents=True, exist_ok=True)
    train.tofile(data / "train.bin")
    val.tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    for name in FILES:
        (scratch / name).write_text((checkout / name).read_text())
    words = [f"--{key}={value}" for key, value in {**CPU_SETTINGS, **settings, "dataset": "bench"}.items()]
    began = time.perf_counter()
    command = [sys.executable, "train.py", *words]
    output = subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, env=os.environ).stdout
    return NanoGptRun(output, time.perf_counter() - began)


def nanogpt_nats(checkout: Path, checkpoint: Path, tokens: NDArray[np.uint16]) -> float:
    """Return the summed loss in nats of nanoGPT's checkpoint over tokens, in windows without overlap."""
    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig

    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict({name.removeprefix("_orig_mod."): weight for name, weight in saved["model"].items()})
    ids, context, nats = torch.from_numpy(tokens.astype(np.int64)), saved["model_args"]["block_size"], 0.0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, context):
            inputs, targets = ids[start : start + context], ids[start + 1 : start + 1 + context]
            logits, _ = model(inputs[: len(targets)][None], targets[None])
            nats += torch.nn.functional.cross_entropy(logits[0], targets, reduction="sum").item()
    return nats
