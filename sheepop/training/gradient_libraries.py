"""Which of PyTorch's two matrix libraries makes a linear layer's gradients on a CPU: the faster one on this processor.

Where oneDNN makes the products of the forward pass (`models/linear.py`) it may be the slower one for gradients: on AMD
processors of which a virtual machine is shown AVX2 alone it took 1.2 to 1.8 times as long as MKL for those of weights,
and on one of them 1.2 times for those of what the layer reads (`docs/log.md`, 2026-11-30 and 2026-12-01). Decided once,
before the first step, and written into the run's settings as `onednn` or `blas`: the two add up in another order, so
that a resumed run must go the way it began.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sheepop.models.linear import (
    LEAST_WEIGHTS,
    Linear,
    hidden_gradient_by_blas,
    hidden_gradient_by_onednn,
    prefers_onednn,
    weight_gradient_by_blas,
    weight_gradient_by_onednn,
)
from sheepop.models.transformer import TransformerModel
from sheepop.training.compiling import is_over_soon
from sheepop.training.distributed import on_main
from sheepop.training.state import Run
from sheepop.utils.logging import log

# By setting: how each library makes it, of inputs (N, I) or a weight (O, I), and the gradient (N, O) of what came out.
Way = Callable[[Tensor, Tensor], Tensor]
WAYS: dict[str, dict[str, Way]] = {
    "weight_gradients": {"onednn": weight_gradient_by_onednn, "blas": weight_gradient_by_blas},
    "hidden_gradients": {"onednn": hidden_gradient_by_onednn, "blas": hidden_gradient_by_blas},
}
LEAST_SAVED = 0.05  # of oneDNN's time, else the difference is noise
MEASURED_SECONDS = 0.4
LEAST_ROUNDS, MOST_ROUNDS = 3, 9
MOST_TOKENS = 4096  # of the product that is timed: more take as long each


def decide_gradient_libraries(run: Run) -> None:
    """Settle `training.weight_gradients` and `hidden_gradients`: measure what is open and matters, tell the layers."""
    training = run.config.training
    is_open = [name for name in WAYS if getattr(training, name) == "auto"]
    if is_open:
        run.config = run.config.with_training(**on_main(run.world, lambda: choose(run, is_open)))
    make_gradients_by({name: getattr(run.config.training, name) for name in WAYS}, run.model)


def make_gradients_by(libraries: dict[str, str], model: TransformerModel) -> None:
    """Let the model's blocks go these ways where oneDNN makes their other products; it does the head's well."""
    for layer in layers_of_blocks(model):
        layer.weight_gradient_by_onednn = libraries["weight_gradients"] == "onednn"
        layer.hidden_gradient_by_onednn = libraries["hidden_gradients"] == "onednn"


def layers_of_blocks(model: TransformerModel) -> list[Linear]:
    """Return the linear layers but for the head, whose gradient `head_loss.py` makes of some tokens at a time."""
    return [module for module in model.blocks.modules() if isinstance(module, Linear)]


def choose(run: Run, settings: list[str]) -> dict[str, str]:
    """Return the faster library for each setting, measured where the run is long enough, and say so; else oneDNN."""
    tokens = run.config.training.batch_size * run.config.data.max_length
    factors = factors_to_time(run.model, tokens) if run.precision.autocast_dtype is None else None
    if factors is None or is_over_soon(run):
        return dict.fromkeys(settings, "onednn")
    return {setting: faster(setting, factors) for setting in settings}


def factors_to_time(model: TransformerModel, tokens: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return inputs (N, I), a weight (O, I) and a gradient (N, O) for the largest weight, of at most `MOST_TOKENS`.

    None where oneDNN has nothing to do with its gradients.
    """
    weight = max((layer.weight for layer in layers_of_blocks(model)), key=Tensor.numel)
    outputs, inputs = weight.shape
    hidden = torch.empty(min(MOST_TOKENS, tokens), inputs, device=model.device)
    if weight.numel() < LEAST_WEIGHTS or not prefers_onednn(hidden, weight):
        return None
    return torch.ones_like(hidden), torch.ones(outputs, inputs), torch.ones(len(hidden), outputs)


def faster(setting: str, factors: tuple[Tensor, Tensor, Tensor]) -> str:
    """Return the faster library for what a setting is about, oneDNN if they are about equal, and say so."""
    hidden, weight, gradient = factors
    seconds = measure(setting, hidden if setting == "weight_gradients" else weight, gradient)
    library = "blas" if seconds["blas"] < (1 - LEAST_SAVED) * seconds["onednn"] else "onednn"
    log(
        f"{setting.replace('_', ' ')}: {library} (of {len(hidden)} tokens for {hidden.shape[1]} x {gradient.shape[1]}: "
        f"oneDNN {seconds['onednn'] * 1000:.3g} ms, BLAS {seconds['blas'] * 1000:.3g} ms)"
    )
    return library


def measure(setting: str, factor: Tensor, gradient: Tensor) -> dict[str, float]:
    """Return the median seconds of the product of a factor and a gradient by each library, made in turn."""
    times: dict[str, list[float]] = {library: [] for library in WAYS[setting]}
    began = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - began > MEASURED_SECONDS:
            break
        for library, make in WAYS[setting].items():
            started = time.perf_counter()
            make(factor, gradient)
            times[library].append(time.perf_counter() - started)
    return {library: statistics.median(seconds) for library, seconds in times.items()}
