"""Whether a run's attention learns by compiled kernels: where they are the faster and the run is long enough.

Decided once, before the first step, and written into the run's settings as `on` or `off`: the kernels add up in another
order, so that a resumed run must go the way it began.
"""

import statistics
import time
from functools import cache

import torch

from sheepop.config import Config, ModelConfig
from sheepop.models.kernel_attention import suits_kernels
from sheepop.models.optimized_attention import optimized_attention
from sheepop.models.sizing import training_flops_per_token
from sheepop.training.compiling import steps_left
from sheepop.training.distributed import on_main
from sheepop.training.speed import precision_of
from sheepop.training.state import Run
from sheepop.utils.errors import ConfigError
from sheepop.utils.logging import log
from sheepop.utils.runtime import has_numba

# The kernels take some ten seconds to compile where that was never done, else half a second to load, and save some 5 to
# 15 of 100 seconds (`docs/log.md`, 2026-12-01).
LEAST_MINUTES = 3.0
LEAST_FLOPS = 3e13  # as many minutes at 170 GFLOP/s
LEAST_SAVED = 0.05  # of the time without them, else the difference is noise
MEASURED_TOKENS = 4096  # of a layer that is timed, about
ROUNDS = 5


def decide_attention_kernels(run: Run) -> None:
    """Settle `training.attention_kernels`, and tell the layers.

    Raises:
        ConfigError: `on` without numba.
    """
    decision = on_main(run.world, lambda: use_of_kernels(run.config, run.model.device, steps=steps_left(run)))
    run.model.learn_by_kernels(decision == "on")
    run.config = run.config.with_training(attention_kernels=decision)


def use_of_kernels(config: Config, device: torch.device, *, steps: int | None) -> str:
    """Return what `training.attention_kernels` comes to, `on` or `off`; where that is open, measure and say so.

    Args:
        steps: that the run makes; None: its minutes decide, if any are given.

    Raises:
        ConfigError: `on` without numba.
    """
    asked = config.training.attention_kernels
    if asked == "on" and not has_numba():
        raise ConfigError(
            "training.attention_kernels is on, but numba, which compiles them, is not installed. Install it with "
            "`pip install 'sheepop[fast]'`, or say --training.attention_kernels off (auto uses them where it can). A "
            "run that began with them needs --accept-changes for that: it will round in other places."
        )
    if asked != "auto":
        return asked
    model, context = config.model, config.data.max_length
    is_possible = has_numba() and device.type == "cpu" and model.attention == "optimized"
    if not (is_possible and suits_kernels(context, model.head_dim) and is_long(config, steps)):
        return "off"
    return faster(model, context, precision_of(config, device).autocast_dtype or torch.float32)


def is_long(config: Config, steps: int | None) -> bool:
    """Say whether the run is long enough to repay loading the kernels, and a first time compiling them."""
    training, context = config.training, config.data.max_length
    if steps is None:
        return training.max_minutes is not None and training.max_minutes >= LEAST_MINUTES
    tokens = steps * training.batch_size * training.gradient_accumulation_steps * context
    return tokens * training_flops_per_token(config.model, context) >= LEAST_FLOPS


def faster(model: ModelConfig, context: int, dtype: torch.dtype) -> str:
    """Return the faster way, `on` or `off`, and say what was measured; without kernels if they are about equal."""
    rows = max(1, MEASURED_TOKENS // context)
    heads = model.num_heads, model.num_kv_heads, model.head_dim
    with_kernels, without = measure(
        (rows, context, *heads), dtype, model.sliding_window, model.attention_sinks, model.dropped_attention
    )
    decision = "on" if with_kernels < (1 - LEAST_SAVED) * without else "off"
    log(
        f"attention kernels: {decision} ({rows} x {context} tokens of a layer: {with_kernels * 1000:.3g} ms with, "
        f"{without * 1000:.3g} ms without)"
    )
    return decision


@cache
def measure(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, window: int, sinks: int, dropout: float
) -> tuple[float, float]:
    """Return the median seconds of attention with its gradients by kernels and without, made in turn.

    Args:
        sizes: B, T, H, K, C, see `attention`.
    """
    B, T, H, K, C = sizes
    projected = torch.ones(B, T, H + 2 * K, C, dtype=dtype).transpose(1, 2).requires_grad_()
    parts = projected.split((H, K, K), dim=1)  # type: ignore[no-untyped-call]
    gradient = torch.ones(B, T, H, C, dtype=dtype).transpose(1, 2)
    times: dict[bool, list[float]] = {True: [], False: []}
    with torch.random.fork_rng(devices=[]):
        for number in range(1 + ROUNDS):
            for by_kernels, seconds in times.items():
                began = time.perf_counter()
                mixed = optimized_attention(*parts, window=window, sinks=sinks, dropout=dropout, by_kernels=by_kernels)
                torch.autograd.grad(mixed, parts, gradient)
                if number:  # the first loads and compiles
                    seconds.append(time.perf_counter() - began)
    return statistics.median(times[True]), statistics.median(times[False])
