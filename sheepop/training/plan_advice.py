"""What would fit where a run does not: settings from mild to severe, each verified by the plan's own estimate."""

import itertools
import math
from collections.abc import Iterator

import torch

from sheepop.config import Config
from sheepop.data.corpus import Corpus
from sheepop.training.plan import MemoryPlan, changed, memory_now, plan_memory, with_vocabulary
from sheepop.utils.errors import ConfigError
from sheepop.utils.logging import format_bytes, warn

LEAST_CONTEXT = 32  # that is advised


def warn_if_too_large(config: Config, corpus: Corpus, device: torch.device) -> None:
    """Say before a run that it will not fit, with settings that would.

    Raises:
        ConfigError: weights, gradients and moments alone do not fit, so that no batch does.
    """
    config = with_vocabulary(config, corpus)
    memory = memory_now(config, device)
    if memory.fits:
        return
    advice = " ".join(describe_advice(settings_that_fit(config, device, memory)))
    message = f"{describe_shortage(memory)} {advice}".strip()
    if not memory.state_fits:
        raise ConfigError(message)
    warn(message)


def describe_shortage(memory: MemoryPlan) -> str:
    """Say in a sentence that a run does not fit, and what takes the memory."""
    tensors = memory.tensors
    if not memory.state_fits:
        return (
            f"The model does not fit: its weights, gradients and optimizer moments alone take "
            f"{format_bytes(tensors.state)}, and {format_bytes(memory.available - memory.process)} of memory are free."
        )
    return (
        f"This run needs about {format_bytes(memory.peak)} of memory, and {format_bytes(memory.available)} can be had: "
        f"{format_bytes(tensors.activations)} of that are activations, {format_bytes(tensors.logits)} logits and "
        f"{format_bytes(tensors.state)} weights, gradients and moments."
    )


def describe_advice(advice: list[tuple[dict[str, object], int]]) -> Iterator[str]:
    """Say each of the settings that would fit in a sentence that can be typed."""
    for settings, peak in advice:
        words = " ".join(f"--{key} {str(value).lower()}" for key, value in settings.items())
        yield f"It would fit ({format_bytes(peak)}) with {words}."
    if not advice:
        yield "No smaller batch, context or model of this shape was found that fits; free some memory."


def settings_that_fit(config: Config, device: torch.device, memory: MemoryPlan) -> list[tuple[dict[str, object], int]]:
    """Return for each way of saving memory the mildest settings that fit by the same estimate, with their peaks.

    Cheapest for the result first: a smaller micro-batch with the same batch of a step, activations computed twice,
    both, a shorter context, a smaller model.
    """
    found: list[tuple[dict[str, object], int]] = []
    for way in ways_to_save(config, state_fits=memory.state_fits):
        for settings in way:
            peak = plan_memory(
                changed(config, settings), device, process=memory.process, available=memory.available
            ).estimate
            if peak <= memory.available:
                found.append((settings, peak))
                break
    return found


def ways_to_save(config: Config, *, state_fits: bool) -> Iterator[Iterator[dict[str, object]]]:
    """Yield the ways of saving memory, each as its settings from mild to severe."""
    checkpointing: dict[str, object] = {"training.activation_checkpointing": True}
    if state_fits:
        yield smaller_micro_batches(config)
        if not config.training.activation_checkpointing:
            yield iter([checkpointing])
            yield (checkpointing | smaller for smaller in smaller_micro_batches(config))
        yield shorter_contexts(config)
    *_, least_batch = ({}, *smaller_micro_batches(config))
    alone = smaller_models(config)
    yield itertools.chain(alone, (smaller | least_batch for smaller in smaller_models(config)))


def smaller_micro_batches(config: Config) -> Iterator[dict[str, object]]:
    """Yield batch sizes that divide the present one, largest first, the batch of a step unchanged."""
    training = config.training
    for size in range(training.batch_size // 2, 0, -1):
        if training.batch_size % size == 0:
            accumulation = training.batch_size // size * training.gradient_accumulation_steps
            yield {"training.batch_size": size, "training.gradient_accumulation_steps": accumulation}


def shorter_contexts(config: Config) -> Iterator[dict[str, object]]:
    """Yield contexts of a half, a quarter and so on, with as many more sequences a step."""
    context, halvings = config.data.max_length, 1
    while context >> halvings >= LEAST_CONTEXT:
        length = context >> halvings
        yield {"data.max_length": length, "data.stride": min(config.data.stride, length)}
        halvings += 1


def smaller_models(config: Config) -> Iterator[dict[str, object]]:
    """Yield models of fewer layers, then also of half the width and heads, and so on; the width of a head stays."""
    model = config.model
    layers = model.num_layers // 2
    while layers:
        yield {"model.num_layers": layers}
        layers //= 2
    heads, share = model.num_heads, 1
    while heads % 2 == 0 and model.d_model % (2 * share) == 0:
        heads, share = heads // 2, 2 * share
        yield {
            "model.num_layers": max(1, model.num_layers // 2),
            "model.d_model": model.d_model // share,
            "model.num_heads": heads,
            "model.num_kv_heads": math.gcd(heads, model.num_kv_heads),
            "model.d_ff": max(1, model.d_ff // share),
        }
