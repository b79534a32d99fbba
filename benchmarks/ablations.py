"""What each part of the recipe is worth: validation loss of equally many steps with one setting changed.

    python benchmarks/ablations.py --data FOLDER [FOLDER ...] --results runs.jsonl      # prepared folders
    python benchmarks/ablations.py --data FOLDER --results runs.jsonl --only base "RMSNorm" --sizes small --steps 100

What the results file has already is not trained again. Losses are over the whole validation split, so that seeds, not
samples are the noise (some 0.005); a step's time is the median of the run's own clock, and compares within one run of
this script only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Container
from itertools import product
from pathlib import Path

from common import median, show
from patched import PATCHES

PATCH = "patch"  # in place of a setting: the name of an idea in `patched.py`

BASE: dict[str, object] = {
    "model.qk_norm": True,
    "training.optimizer": "muon",
    "training.learning_rate": 0.015,
    "training.schedule": "linear",
    "training.min_learning_rate_ratio": 0.0,
}
SIZES: dict[str, dict[str, object]] = {
    "small": {"model.max_seq_len": 128, "training.batch_size": 16},  # 4 layers of width 128, from the preset
    "medium": {
        "model.num_layers": 6,
        "model.d_model": 256,
        "model.max_seq_len": 256,
        "training.batch_size": 16,
        "training.learning_rate": 0.01,
    },
}
VARIANTS: dict[str, dict[str, object]] = {
    "base": {},
    "adamw at 4e-3": {"training.optimizer": "adamw", "training.learning_rate": 0.004},
    "no QK-norm": {"model.qk_norm": False},
    "RMSNorm": {"model.norm": "rmsnorm"},
    "RMSNorm, SwiGLU": {"model.norm": "rmsnorm", "model.activation": "swiglu"},
    "RMSNorm, squared ReLU": {"model.norm": "rmsnorm", "model.activation": "relu_squared"},
    "outputs begin at zero": {"model.zero_init_outputs": True},
    "head not tied": {"model.tie_weights": False},
    "half the key/value heads": {"model.num_kv_heads": 2},
    "groups of 2 tokens": {"model.ngram_order": 2},
    "groups of 2 to 4": {"model.ngram_order": 4},
    "groups of 2 to 4, 65,536 rows": {"model.ngram_order": 4, "model.ngram_entries": 65536},
    "short convolutions of 4": {"model.conv_width": 4},
    "a head that copies": {"model.copy_width": 64},
    "rows of updates of equal size": {"training.muon_beta2": 0.95},
    "three rounds of Muon": {"training.muon_rounds": 3},
    "cosine to zero": {"training.schedule": "cosine"},
    "decay over the last half": {"training.schedule": "wsd", "training.decay_fraction": 0.5},
    "decay to a tenth": {"training.min_learning_rate_ratio": 0.1},
    "beta1 0.8": {"training.beta1": 0.8},
    "rate 0.006": {"training.learning_rate": 0.006},
    "rate 0.025": {"training.learning_rate": 0.025},
    "no weight decay": {"training.weight_decay": 0.0},
    "weight decay 0.3": {"training.weight_decay": 0.3},
    **{name: {PATCH: name} for name in PATCHES},
}
MORE_STEPS = {"batch warm-up": 1.25}  # for as many tokens


def train(data: Path, settings: dict[str, object], steps: int) -> dict[str, object]:
    """Train once and return loss, bits per byte and milliseconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "training.warmup_steps": max(1, steps // 16),
            "training.eval_interval": steps,
            "training.eval_max_tokens": 10**9,
            "training.sample_tokens": 0,
            **settings,
        }
        patch = settings.pop(PATCH, None)
        settings["training.max_steps"] = round(steps * MORE_STEPS.get(str(patch), 1.0))
        options = [part for key, value in settings.items() for part in (f"--{key}", json.dumps(value).strip('"'))]
        program = ["-m", "sheepop"] if patch is None else [str(Path(__file__).with_name("patched.py")), str(patch)]
        command = [sys.executable, *program, "train", "--data", str(data), "--preset", "nano", *options]
        subprocess.run([*command, "--output", folder + "/run"], check=True, capture_output=True)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["type"] == "val"][-1]
    speeds = [line["tokens_per_second"] for line in lines if line["type"] == "train"][1:]
    tokens = last["tokens"] / last["step"]
    return {"loss": last["loss"], "bits/byte": last["bits_per_byte"], "ms a step": 1e3 * tokens / median(speeds)}


def drop(row: dict[str, object], names: Container[str]) -> dict[str, object]:
    return {name: value for name, value in row.items() if name not in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, nargs="+", help="prepared folders")
    parser.add_argument("--results", required=True, type=Path, help="where each run's result is added as a line")
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("--only", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    options.results.touch()
    results = [json.loads(line) for line in options.results.read_text().splitlines()]
    for size, name, data in product(options.sizes, options.only, options.data):
        run: dict[str, object] = {"size": size, "text": data.name, "steps": options.steps, "variant": name}
        if not any(run.items() <= result.items() for result in results):
            results.append(run | train(data, BASE | SIZES[size] | VARIANTS[name], options.steps))
            with options.results.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
    for size, data in product(options.sizes, options.data):
        shown = {"size": size, "text": data.name, "steps": options.steps}
        rows = [result for result in results if shown.items() <= result.items()]
        show(f"{size}, {data.name}, {options.steps} steps", [drop(row, shown) for row in rows])


if __name__ == "__main__":
    main()
