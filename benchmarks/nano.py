"""Training at nanoGPT's CPU setting (4 layers, width 128, context 64, batch 12, characters): speed and loss.

    python benchmarks/nano.py --text input.txt --steps 2000
    python benchmarks/nano.py --text input.txt --nanogpt FOLDER --steps 300     # nanoGPT beside ours, in turn

Speed is tokens per second of the training steps alone, loading their batches included, from each program's own clock:
the median over stretches of 50 steps, the first left out. Loss is over the whole last tenth of the text.
`FOLDER` is a checkout of nanoGPT; its own `train.py` runs, with its documented CPU settings.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import alternate, median, show
from peers import train_nanogpt

TOKENS_A_STEP = 12 * 64
STRETCH = 50  # steps whose times are averaged before the median is taken, in both programs


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


def speed_of_nanogpt(checkout: Path, text: Path, steps: int) -> float:
    """Return nanoGPT's tokens per second, by the step times that it prints."""
    run = train_nanogpt(checkout, text, max_iters=steps, lr_decay_iters=steps, eval_iters=1)
    milliseconds = [float(time) for time in re.findall(r"time ([\d.]+)ms", run.output)]
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
            "nanoGPT": lambda: speed_of_nanogpt(options.nanogpt, options.text, options.steps),
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
