"""Which of PyTorch's two matrix libraries makes the gradients of weights on a CPU: the one that is faster on this one.

Where oneDNN makes a layer's other products (`models/linear.py`) it takes two thirds to one and a half times as long
as MKL for these, which depends on the processor and on what of it a virtual machine is shown (`docs/log.md`). Decided
once, before the first step, and written into the run's settings as `onednn` or `blas`: the two add up in another
order, so that a resumed run must go the way it began.
"""

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
    is_fp32 = run.precision.autocast_dtype is None
    hidden, gradient = product_to_time(run.model, run.config.training.batch_size * run.config.data.max_length)
    if not is_fp32 or not goes_to_onednn(hidden, gradient) or is_over_soon(run):
        return "onednn"
    seconds = measure(hidden, gradient)
    log(
        f"weight gradients: {faster(seconds)} (of {len(hidden)} tokens for {hidden.shape[1]} x {gradient.shape[1]}: "
        f"oneDNN {seconds['onednn'] * 1000:.3g} ms, BLAS {seconds['blas'] * 1000:.3g} ms)"
    )
    return faster(seconds)


def product_to_time(model: TransformerModel, tokens: int) -> tuple[Tensor, Tensor]:
    """Return an input (N, I) and a gradient (N, O) for the largest weight in the blocks, of at most `MOST_TOKENS`."""
    outputs, inputs = max((layer.weight.shape for layer in layers_of_blocks(model)), key=lambda shape: shape.numel())
    rows = min(MOST_TOKENS, tokens)
    return torch.ones(rows, inputs, device=model.device), torch.ones(rows, outputs, device=model.device)


def goes_to_onednn(hidden: Tensor, gradient: Tensor) -> bool:
    """Say whether the gradient of a weight between these, in fp32, may be oneDNN's."""
    weight = torch.empty(gradient.shape[1], hidden.shape[1], device="meta")
    return weight.numel() >= LEAST_WEIGHTS and prefers_onednn(hidden, weight)


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
    return {way: sorted(seconds)[len(seconds) // 2] for way, seconds in times.items()}
