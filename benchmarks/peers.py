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
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data" / "bench"
        data.mkdir(parents=True)
        content = text.read_text(encoding="utf-8")
        characters = sorted(set(content))
        ids = np.array([characters.index(character) for character in content], dtype=np.uint16)
        cut = int(len(ids) * 0.9)
        ids[:cut].tofile(data / "train.bin")
        ids[cut:].tofile(data / "val.bin")
        (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))
        for name in FILES:
            (Path(scratch) / name).write_text((checkout / name).read_text())
        words = [f"--{key}={value}" for key, value in {**CPU_SETTINGS, **settings, "dataset": "bench"}.items()]
        began = time.perf_counter()
        command = [sys.executable, "train.py", *words]
        output = subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, env=os.environ).stdout
        return NanoGptRun(output, time.perf_counter() - began)
