"""Whether attention and the head of a run learn by compiled kernels: where these are faster and the run long enough.

Decided once, before the first step, and written into the run's settings as `on` or `off`: the kernels add up in another
order, so that a resumed run must go the way it began.
"""

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from sheepop.config import Config, ModelConfig
from sheepop.models import kernel_attention, kernel_copying, kernel_head
from sheepop.models.copying import copy_sums
from sheepop.models.head_loss import summed_head_loss
from sheepop.models.optimized_attention import optimized_attention
from sheepop.models.sizing import training_flops_per_token
from sheepop.training.compiling import steps_left
from sheepop.training.distributed import on_main
from sheepop.training.speed import precision_of
from sheepop.training.state import Run
from sheepop.utils.errors import ConfigError
from sheepop.utils.logging import log
from sheepop.utils.runtime import has_numba, load_numba_alone

# The kernels take some ten seconds to compile where that was never done, else half a second to load, and save some 5 to
# 15 of 100 seconds (`docs/log.md`, 2026-12-01).
LEAST_MINUTES = 3.0
LEAST_FLOPS = 3e13  # as many minutes at 170 GFLOP/s
LEAST_SAVED = 0.05  # of the time without them, else the difference is noise
MEASURED_TOKENS = 4096  # of a layer that is timed, about
ROUNDS, LEAST_ROUNDS = 5, 2
MEASURED_SECONDS = 2.0
# A head that is timed: few tokens of a large vocabulary, of at least as many as it takes at a time.
MEASURED_FLOPS, LEAST_TOKENS = 4e10, 512
# A size whose head is timed where the size is not known yet.
PROBED_ENTRIES, PROBED_WIDTH = 4096, 128

SETTINGS = ("attention_kernels", "head_kernels")


def decide_kernels(run: Run) -> None:
    """Settle `training.attention_kernels` and `training.head_kernels`, and tell the model.

    Raises:
        ConfigError: `on` without numba.
    """
    decided = on_main(run.world, lambda: use_of_kernels(run.config, run.model.device, steps=steps_left(run)))
    run.config, kernels = decided, by_kernels(decided)
    if any(kernels.values()):
        load_numba_alone()
    run.model.learn_by_kernels(**kernels)


def by_kernels(config: Config) -> dict[str, bool]:
    """Return what learns by kernels, of settings that are decided."""
    return {"attention": config.training.attention_kernels == "on", "head": config.training.head_kernels == "on"}


def use_of_kernels(config: Config, device: torch.device, *, steps: int | None, has_size: bool = True) -> Config:
    """Return the settings with what these two come to, `on` or `off`; where one is open, measure and say so.

    Args:
        steps: that the run makes; None: its minutes decide, if any are given.
        has_size: whether the model is the run's; else it is one of the sizes that the dial may choose.

    Raises:
        ConfigError: `on` without numba.
    """
    for name in SETTINGS:
        if getattr(config.training, name) == "on" and not has_numba():
            raise ConfigError(
                f"training.{name} is on, but numba, which compiles them, is not installed. Install it with "
                f"`pip install 'sheepop[fast]'`, or say --training.{name} off (auto uses them where it can). A run "
                "that began with them needs --accept-changes for that: it will round in other places."
            )
    model, context = config.model, config.data.max_length
    dtype = precision_of(config, device).autocast_dtype or torch.float32
    head = model if has_size else model.model_copy(update={"vocab_size": PROBED_ENTRIES, "d_model": PROBED_WIDTH})
    is_possible = has_numba() and device.type == "cpu" and is_long(config, steps)
    suits: dict[str, Callable[[], str]] = {}
    if model.attention == "optimized" and kernel_attention.suits_kernels(context, model.head_dim):
        suits["attention_kernels"] = lambda: faster_attention(model, context, dtype)
    if kernel_head.suits_kernels(head.d_model, dtype) or kernel_copying.suits_kernels(context, model.copy_width):
        suits["head_kernels"] = lambda: faster_head(head, context, dtype)
    decided = {
        name: suits[name]() if is_possible and name in suits else "off"
        for name in SETTINGS
        if getattr(config.training, name) == "auto"
    }
    return config.with_training(**decided)


def is_long(config: Config, steps: int | None) -> bool:
    """Say whether the run is long enough to repay loading the kernels, and a first time compiling them."""
    training, context = config.training, config.data.max_length
    if steps is None:
        return training.max_minutes is not None and training.max_minutes >= LEAST_MINUTES
    tokens = steps * training.batch_size * training.gradient_accumulation_steps * context
    return tokens * training_flops_per_token(config.model, context) >= LEAST_FLOPS


def faster_attention(model: ModelConfig, context: int, dtype: torch.dtype) -> str:
    """Return the faster way for attention and say what was measured."""
    rows = max(1, MEASURED_TOKENS // context)
    heads = model.num_heads, model.num_kv_heads, model.head_dim
    seconds = measure_attention(
        (rows, context, *heads), dtype, model.sliding_window, model.attention_sinks, model.dropped_attention
    )
    return decision("attention kernels", f"{rows} x {context} tokens of a layer", seconds)


def faster_head(model: ModelConfig, context: int, dtype: torch.dtype) -> str:
    """Return the faster way for the head and what it copies, and say what was measured."""
    per_token = 6 * model.vocab_size * model.d_model
    tokens = min(MEASURED_TOKENS, max(LEAST_TOKENS, int(MEASURED_FLOPS / per_token)))
    rows = max(1, tokens // context)
    seconds = measure_head((rows, context), model.vocab_size, model.d_model, model.copy_width, dtype)
    size = f"{model.vocab_size} entries at width {model.d_model}"
    return decision("head kernels", f"{rows} x {context} tokens, {size}", seconds)


def decision(what: str, of: str, seconds: tuple[float, float]) -> str:
    """Return the faster way, `on` or `off`, and say so; without kernels if they are about equal."""
    with_kernels, without = seconds
    choice = "on" if with_kernels < (1 - LEAST_SAVED) * without else "off"
    log(f"{what}: {choice} ({of}: {with_kernels * 1000:.3g} ms with, {without * 1000:.3g} ms without)")
    return choice


@cache
def measure_attention(
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

    def learn(by_kernels: bool) -> None:
        mixed = optimized_attention(*parts, window=window, sinks=sinks, dropout=dropout, by_kernels=by_kernels)
        torch.autograd.grad(mixed, parts, gradient)

    with torch.random.fork_rng(devices=[]):
        return in_turn(learn)


@cache
def measure_head(
    shape: tuple[int, int], num_entries: int, width: int, copy_width: int, dtype: torch.dtype
) -> tuple[float, float]:
    """Return the same for the loss of a head that reads (B, T, width), with products in a type."""
    hidden, weight = torch.ones(*shape, width, requires_grad=True), torch.zeros(num_entries, width, requires_grad=True)
    token_ids = torch.arange(shape[0] * shape[1]).view(shape) % num_entries
    pair = torch.zeros(2, *shape, max(1, copy_width), dtype=dtype, requires_grad=True)

    def learn(by_kernels: bool) -> None:
        copied: Tensor | None = None
        if copy_width:
            copied = copy_sums(pair[0], pair[1], token_ids, token_ids, by_kernels=by_kernels)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = summed_head_loss(hidden, weight, token_ids, copied, by_kernels=by_kernels)
        torch.autograd.grad(loss, (hidden, weight, *([pair] if copy_width else [])))

    return in_turn(learn)


def in_turn(learn: Callable[[bool], None]) -> tuple[float, float]:
    """Return the median seconds of a function with kernels and without."""
    load_numba_alone()
    times: dict[bool, list[float]] = {True: [], False: []}
    for by_kernels in times:
        learn(by_kernels)  # loads and compiles
    began = time.perf_counter()
    for number in range(ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - began > MEASURED_SECONDS:
            break
        for by_kernels, seconds in times.items():
            started = time.perf_counter()
            learn(by_kernels)
            seconds.append(time.perf_counter() - started)
    return statistics.median(times[True]), statistics.median(times[False])
