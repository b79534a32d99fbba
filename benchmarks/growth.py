"""Time of a training step per token as the model and the context grow: a table, a fit and a plot.

    python benchmarks/growth.py --output growth.png

The model grows from 1 M to 100 M parameters at a context of 256, the context from 128 to 4,096 at 5 M parameters; fp32,
eager, 4,096 tokens a step (1,024 from 30 M parameters on). The fit is a power of the FLOPs per token;
`over the fit` says where a size is slower than its neighbours let one expect: a cliff. A time is the least of three
steps: another program only ever adds.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # before torch is imported, see `wait_politely`

import numpy as np
import torch
from common import show

from sheepop.config import load_config
from sheepop.models.sizing import count_parameters, training_flops_per_token
from sheepop.models.transformer import TransformerModel
from sheepop.training.distributed import World
from sheepop.training.optimizer import make_optimizer
from sheepop.training.state import Learner, TrainingState
from sheepop.training.step import MicroBatch, train_step
from sheepop.utils.devices import FP32
from sheepop.utils.runtime import keep_freed_memory

# Layers, heads and width.
MODELS = ((4, 4, 128), (6, 4, 192), (6, 4, 256), (8, 6, 384), (8, 8, 512), (10, 10, 640), (12, 12, 768))
OF_CONTEXTS = (6, 4, 256)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
VOCABULARY = 4096
CONTEXT_OF_MODELS = 256
TOKENS, TOKENS_OF_LARGE, LARGE = 4096, 1024, 30e6
STEPS = 3


def measure(shape: tuple[int, int, int], context: int) -> dict[str, float]:
    """Return parameters, context, operations and microseconds per token of one size."""
    layers, heads, width = shape
    settings = {"num_layers": layers, "num_heads": heads, "d_model": width, "max_seq_len": context, "dropout": 0.0}
    overrides = {f"model.{key}": value for key, value in (settings | {"vocab_size": VOCABULARY}).items()}
    config = load_config(overrides=overrides)
    parameters = count_parameters(config.model).total
    rows = max(1, (TOKENS if parameters < LARGE else TOKENS_OF_LARGE) // context)
    model = TransformerModel(config.model)
    state = TrainingState(total_steps=1, data_fingerprint="")
    learner = Learner(config, model, model, make_optimizer(model, config.training), FP32, World(), "none", state)
    token_ids, targets = torch.randint(0, VOCABULARY, (2, rows, context))
    batch = MicroBatch(0, token_ids, targets, targets.numel())
    durations = []
    for _ in range(1 + STEPS):
        began = time.perf_counter()
        train_step(learner, [batch], step=0, learning_rate=1e-4)
        durations.append(time.perf_counter() - began)
    return {
        "parameters": parameters / 1e6,
        "context": context,
        "MFLOPs a token": training_flops_per_token(config.model, context) / 1e6,
        "us a token": min(durations[1:]) / (rows * context) * 1e6,
    }


def add_fit(rows: list[dict[str, float]]) -> None:
    """Fit time = a x FLOPs^b through the logarithms, and add to each row by how much it is over that."""
    flops = np.log([row["MFLOPs a token"] for row in rows])
    times = np.log([row["us a token"] for row in rows])
    exponent, constant = np.polyfit(flops, times, 1)
    for row, x, y in zip(rows, flops, times, strict=True):
        row["GFLOP/s"] = row["MFLOPs a token"] / row["us a token"] * 1000
        row["over the fit"] = float(np.exp(y - (exponent * x + constant)))
        row["exponent"] = float(exponent)


def plot(grown: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw time per token over parameters and over the context, with the fits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogFormatter, NullLocator, ScalarFormatter

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, (key, rows) in zip(axes, grown.items(), strict=True):
        x, times = [row[key] for row in rows], [row["us a token"] for row in rows]
        axis.loglog(x, times, "o-", label="measured")
        axis.loglog(x, [row["us a token"] / row["over the fit"] for row in rows], "--", label="fit over FLOPs")
        axis.set(xlabel={"parameters": "parameters, millions", "context": "context, tokens"}[key])
        axis.set(ylabel="µs a token, forward, backward and update")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks(x, [f"{value:.3g}" if value < 100 else f"{value:,.0f}" for value in x])
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
        axis.grid(visible=True, which="both", alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where the plot is written (PNG)")
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    grown = {
        "parameters": [measure(shape, CONTEXT_OF_MODELS) for shape in MODELS],
        "context": [measure(OF_CONTEXTS, context) for context in CONTEXTS],
    }
    for key, rows in grown.items():
        add_fit(rows)
        show(f"time per token as the {key} grows", rows)
    if options.output:
        plot(grown, options.output)


if __name__ == "__main__":
    main()
