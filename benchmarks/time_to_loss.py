"""Seconds from the start of the process to a validation loss, over the whole last tenth of a text's characters.

    python benchmarks/time_to_loss.py --text input.txt --config configs/tinyshakespeare_fast.json --target 1.88
    python benchmarks/time_to_loss.py --text input.txt --config … --nanogpt FOLDER --rounds 3     # in turn with nanoGPT

Ours reads the text itself: preparing it, imports and the validations are inside. nanoGPT's text is prepared beforehand;
its run is its CPU setting, 2,000 steps, whose loss at the end is the target; two short validations are inside.
`FOLDER` is a checkout of nanoGPT.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import alternate, median, show
from peers import train_nanogpt


def time_ours(text: Path, config: Path, target: float, options: list[str]) -> tuple[float, float]:
    """Return the seconds to the first validation at or below the target (infinite if none), and the last loss."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "sheepop", "train", "--data", str(text), "--config", str(config)]
        command += ["--output", str(run), "--data.data_dir", folder, "--training.eval_max_tokens", "100000000"]
        began = time.perf_counter()
        process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        reached, loss = float("inf"), float("inf")
        while process.poll() is None or reached == float("inf"):
            ended = process.poll() is not None
            lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
            losses = [record["loss"] for record in map(json.loads, lines) if record["type"] == "val"]
            if losses and reached == float("inf") and min(losses) <= target:
                reached = time.perf_counter() - began
            loss = losses[-1] if losses else loss
            if ended:
                break
            time.sleep(0.01)
        assert process.returncode == 0
    return reached, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--target", type=float, default=1.88)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to run in turn with ours")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("settings", nargs="*", help="more settings of ours, behind --")
    options = parser.parse_args()
    losses: dict[str, list[float]] = {"sheepop": [], "nanoGPT": []}

    def ours() -> float:
        seconds, loss = time_ours(options.text, options.config, options.target, options.settings)
        losses["sheepop"].append(loss)
        return seconds

    def nanogpt() -> float:
        run = train_nanogpt(options.nanogpt, options.text)
        losses["nanoGPT"].append(float(re.findall(r"val loss ([\d.]+)", run.output)[-1]))
        return run.seconds

    results = alternate({"sheepop": ours} | ({"nanoGPT": nanogpt} if options.nanogpt else {}), options.rounds)
    rows: list[dict[str, object]] = [
        {
            "who": who,
            "seconds": median(seconds),
            "all": " ".join(f"{value:.1f}" for value in seconds),
            "last loss": " ".join(f"{loss:.3f}" for loss in losses[who]),
        }
        for who, seconds in results.items()
    ]
    if options.nanogpt:
        ratios = [theirs / ours for ours, theirs in zip(results["sheepop"], results["nanoGPT"], strict=True)]
        rows.append(
            {
                "who": "ratio of neighbours",
                "seconds": median(ratios),
                "all": " ".join(f"{ratio:.1f}" for ratio in ratios),
                "last loss": "",
            }
        )
    show(f"to a validation loss of {options.target}", rows)


if __name__ == "__main__":
    main()
