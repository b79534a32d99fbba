"""What each part of the recipe is worth: validation loss of equally many steps with one setting changed.

    python benchmarks/ablations.py --data FOLDER [FOLDER ...]              # prepared folders
    python benchmarks/ablations.py --data FOLDER --only base ngrams --sizes small --steps 100

Losses are over the whole validation split, so that seeds and not samples are the noise (some 0.005); a step's time is
the median of the run's own clock, and compares within one run of this script only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import median, show

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
    "cosine to zero": {"training.schedule": "cosine"},
    "decay over the last half": {"training.schedule": "wsd", "training.decay_fraction": 0.5},
    "decay to a tenth": {"training.min_learning_rate_ratio": 0.1},
    "beta1 0.8": {"training.beta1": 0.8},
    "rate 0.006": {"training.learning_rate": 0.006},
    "rate 0.025": {"training.learning_rate": 0.025},
    "no weight decay": {"training.weight_decay": 0.0},
    "weight decay 0.3": {"training.weight_decay": 0.3},
}


def train(data: Path, settings: dict[str, object], steps: int) -> dict[str, object]:
    """Train once and return loss, bits per byte and milliseconds a step."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "training.max_steps": steps,
            "training.warmup_steps": max(1, steps // 16),
            "training.eval_interval": steps,
            "training.eval_max_tokens": 10**9,
            "training.sample_tokens": 0,
            **settings,
        }
        options = [part for key, value in settings.items() for part in (f"--{key}", json.dumps(value).strip('"'))]
        command = [sys.executable, "-m", "sheepop", "train", "--data", str(data), "--preset", "nano", *options]
        subprocess.run([*command, "--output", folder + "/run"], check=True, capture_output=True)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["type"] == "val"][-1]
    speeds = [line["tokens_per_second"] for line in lines if line["type"] == "train"][1:]
    tokens = last["tokens"] / last["step"]
    return {"loss": last["loss"], "bits/byte": last["bits_per_byte"], "ms a step": 1e3 * tokens / median(speeds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, nargs="+", help="prepared folders")
    parser.add_argument("--sizes", choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("--only", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    for size in options.sizes:
        for data in options.data:
            rows: list[dict[str, object]] = []
            for name in options.only:
                settings = BASE | SIZES[size] | VARIANTS[name]
                rows.append({"variant": name, **train(data, settings, options.steps)})
            show(f"{size}, {data.name}, {options.steps} steps", rows)


if __name__ == "__main__":
    main()
