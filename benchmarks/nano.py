"""Training at nanoGPT's CPU setting (4 layers, width 128, context 64, batch 12, characters): speed and loss.

    python benchmarks/nano.py --text input.txt --steps 2000
    python benchmarks/nano.py --text input.txt --nanogpt FOLDER --steps 300     # nanoGPT beside ours, in turn

Speed is tokens per second of the training steps alone, loading their batches included, from each program's own clock:
the median over stretches of 50 steps, the first left out. Loss is over the whole last tenth of the text.
`FOLDER` is a checkout of nanoGPT; its own `train.py` runs, with its documented CPU settings.
"""

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import alternate, median, show

TOKENS_A_STEP = 12 * 64
STRETCH = 50  # steps whose times are averaged before the median is taken, in both programs
NANOGPT_SETTINGS = (
    "--device=cpu --compile=False --eval_iters=1 --log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 "
    "--n_embd=128 --dropout=0.0 --dataset=bench --eval_interval=1000000 --gradient_accumulation_steps=1 "
    "--learning_rate=1e-3 --min_lr=1e-4 --beta2=0.99 --warmup_iters=100 --always_save_checkpoint=False"
).split()


def train_ours(text: Path, steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sheepop", "train", "--data", str(text), "--preset", "nano"]
        command += ["--output", f"{folder}/run", "--data.data_dir", folder, "--training.max_steps", str(steps)]
        command += ["--training.log_interval", str(STRETCH), "--training.eval_interval", str(steps)]
        command += ["--training.eval_max_tokens", "10000000", "--training.sample_tokens", "0", "--device", "cpu"]
        subprocess.run(command, check=True, capture_output=True)
        lines = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines if line["type"] == "train"]
    return {
        "tokens_per_second": median(speeds[1:]),
        "loss": [line["loss"] for line in lines if line["type"] == "val"][-1],
        "seconds": lines[-1]["elapsed_seconds"],
    }


def train_nanogpt(folder: Path, text: Path, steps: int) -> float:
    """Return nanoGPT's tokens per second, by the step times that it prints."""
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
        for name in ("train.py", "model.py", "configurator.py"):
            (Path(scratch) / name).write_text((folder / name).read_text())
        command = [sys.executable, "train.py", *NANOGPT_SETTINGS, f"--max_iters={steps}", f"--lr_decay_iters={steps}"]
        output = subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, env=os.environ).stdout
    milliseconds = [float(time) for time in re.findall(r"time ([\d.]+)ms", output)]
    stretches = [milliseconds[at : at + STRETCH] for at in range(STRETCH, len(milliseconds) - STRETCH + 1, STRETCH)]
    return median([TOKENS_A_STEP * STRETCH / (sum(stretch) / 1000) for stretch in stretches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to run in turn with ours")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.nanogpt is None:
        result = train_ours(options.text, options.steps)
        show(f"nanoGPT's CPU setting, {options.steps} steps", [{"who": "sheepop classic", **result}])
        return
    results = alternate(
        {
            "sheepop classic": lambda: train_ours(options.text, options.steps)["tokens_per_second"],
            "nanoGPT": lambda: train_nanogpt(options.nanogpt, options.text, options.steps),
        },
        options.rounds,
    )
    rows: list[dict[str, object]] = [
        {"who": who, "tokens/s": median(values), "all": " ".join(f"{value:.0f}" for value in values)}
        for who, values in results.items()
    ]
    ratios = [ours / theirs for ours, theirs in zip(results["sheepop classic"], results["nanoGPT"], strict=True)]
    rows.append(
        {"who": "ratio of neighbours", "tokens/s": median(ratios), "all": " ".join(f"{ratio:.2f}" for ratio in ratios)}
    )
    show(f"nanoGPT's CPU setting, {options.steps} steps, in turn", rows)


if __name__ == "__main__":
    main()
