"""Which of PyTorch's two matrix libraries makes the gradients of weights on a CPU: the one that is faster on this one.

Where oneDNN makes a layer's other products (`models/linear.py`) it may be the slower one for these: on an AMD processor
of which a virtual machine is shown AVX2 alone it took 1.2 to 1.4 times as long as MKL (`benchmarks/linear.py`,
`docs/log.md`, 2026-11-30). Decided once, before the first step, and written into the run's settings as `onednn` or
`blas`: the two add up in another order, so that a resumed run must go the way it began.
"""

import statistics
import time

import torch
from torch import Tensor

from sheepop.models.linear import (
    LEAST_WEIGHTS,
    Linear,
    prefers_onednn,
    weight_gradient_by_blas,
    weight_gradient_by_onednn,
)
from sheepop.models.transformer import TransformerModel
from sheepop.training.compiling import is_over_soon
from sheepop.training.distributed import on_main
from sheepop.training.state import Run
from sheepop.utils.logging import log

WAYS = {"onednn": weight_gradient_by_onednn, "blas": weight_gradient_by_blas}
LEAST_SAVED = 0.05  # of oneDNN's time, else the difference is noise
MEASURED_SECONDS = 0.4
LEAST_ROUNDS, MOST_ROUNDS = 3, 9
MOST_TOKENS = 4096  # of the product that is timed: more take as long each


def decide_weight_gradients(run: Run) -> None:
    """Settle `training.weight_gradients`: measure where that is left open and matters, and tell the layers."""
    decision: str = run.config.training.weight_gradients
    if decision == "auto":
        decision = on_main(run.world, lambda: choose(run))
    make_weight_gradients_by(decision, run.model)
    run.config = run.config.with_training(weight_gradients=decision)


def make_weight_gradients_by(way: str, model: TransformerModel) -> None:
    """Let the model's blocks go this way where oneDNN makes their other products; it does the head's well."""
    for layer in layers_of_blocks(model):
        layer.gradient_by_onednn = way == "onednn"


def layers_of_blocks(model: TransformerModel) -> list[Linear]:
    """Return the linear layers but for the head, whose gradient `head_loss.py` makes of some tokens at a time."""
    return [module for module in model.blocks.modules() if isinstance(module, Linear)]


def choose(run: Run) -> str:
    """Return the faster way, measured where the run is long enough, and say so; oneDNN's where it is not."""
    tokens = run.config.training.batch_size * run.config.data.max_length
    product = product_to_time(run.model, tokens) if run.precision.autocast_dtype is None else None
    if product is None or is_over_soon(run):
        return "onednn"
    hidden, gradient = product
    seconds = measure(hidden, gradient)
    log(
        f"weight gradients: {faster(seconds)} (of {len(hidden)} tokens for {hidden.shape[1]} x {gradient.shape[1]}: "
        f"oneDNN {seconds['onednn'] * 1000:.3g} ms, BLAS {seconds['blas'] * 1000:.3g} ms)"
    )
    return faster(seconds)


def product_to_time(model: TransformerModel, tokens: int) -> tuple[Tensor, Tensor] | None:
    """Return an input (N, I) and a gradient (N, O) for the largest weight in the blocks, of at most `MOST_TOKENS`.

    None where oneDNN has nothing to do with its gradient.
    """
    weight = max((layer.weight for layer in layers_of_blocks(model)), key=Tensor.numel)
    outputs, inputs = weight.shape
    hidden = torch.empty(min(MOST_TOKENS, tokens), inputs, device=model.device)
    if weight.numel() < LEAST_WEIGHTS or not prefers_onednn(hidden, weight):
        return None
    return torch.ones_like(hidden), torch.ones(len(hidden), outputs)


def faster(seconds: dict[str, float]) -> str:
    """Return the faster way, oneDNN's if they are about equal."""
    return "blas" if seconds["blas"] < (1 - LEAST_SAVED) * seconds["onednn"] else "onednn"


def measure(hidden: Tensor, gradient: Tensor) -> dict[str, float]:
    """Return the median seconds of a weight's gradient each way, made in turn."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    began = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - began > MEASURED_SECONDS:
            break
        for way, make in WAYS.items():
            started = time.perf_counter()
            make(hidden, gradient)
            times[way].append(time.perf_counter() - started)
    return {way: statistics.median(seconds) for way, seconds in times.items()}
