"""What a training step of any size takes, from a few that were measured: work by formula over the machine's speed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sheepop.config import Config
from sheepop.models.sizing import (
    activation_bytes,
    count_parameters,
    inner_matrices,
    logits_bytes,
    training_flops_per_token,
)
from sheepop.utils.devices import Precision, choose_precision


@dataclass(frozen=True)
class MachineFacts:
    """How fast steps are: seconds = overhead · (layers + 1) + FLOPs / speed + bytes / bandwidth.

    Attributes:
        device: as PyTorch names it.
        overhead: seconds a layer and step, whatever the number of tokens.
        speeds: FLOP/s of large matrix products, by the name of the precision.
        bandwidth: bytes of activations a second, which stands for all elementwise work, and for what narrow products
            take more than large ones.
        memory: bytes that a run may take.
        num_processes: that share the work of a step.
    """

    device: str
    overhead: float
    speeds: Mapping[str, float]
    bandwidth: float
    memory: int = 2**62
    num_processes: int = 1


@dataclass(frozen=True)
class Probe:
    """The measured seconds of a training step with these settings, and the precision that it computed in."""

    config: Config
    precision: str
    seconds: float


def step_seconds(config: Config, machine: MachineFacts) -> float:
    """Return about how long a step of a model takes."""
    precision = precision_of(config, torch.device(machine.device)).name
    speed = machine.speeds.get(precision) or max(machine.speeds.values())
    flops, traffic = step_work(config, precision, machine.device)
    work = (flops / speed + traffic / machine.bandwidth) / machine.num_processes
    return machine.overhead * (config.model.num_layers + 1) + work


def precision_of(config: Config, device: torch.device) -> Precision:
    """Return the precision that a run with these settings computes in."""
    training = config.training
    return choose_precision(device, use_amp=training.use_amp, d_model=config.model.d_model, asked=training.precision)


def with_step_time(machine: MachineFacts, config: Config, seconds: float) -> MachineFacts:
    """Return the machine slowed or quickened in all it does, so that a step with these settings takes so long."""
    factor = seconds / step_seconds(config, machine)
    return replace(
        machine,
        overhead=machine.overhead * factor,
        speeds={name: speed / factor for name, speed in machine.speeds.items()},
        bandwidth=machine.bandwidth / factor,
    )


def fit_machine(
    probes: Sequence[Probe], *, speeds: Mapping[str, float], device: str, memory: int, num_processes: int = 1
) -> MachineFacts:
    """Return the facts that explain measured steps best, by their relative errors.

    The speed of products is given, since steps of small models do not show it: their narrow products run below it by
    about as much as they have more bytes for each operation, and that is counted as bytes.

    Args:
        probes: of several sizes; two of one model with few and with more tokens tell calls from work.
        speeds, device, memory, num_processes: see `MachineFacts`.
    """
    calls, traffics, rests = [], [], []  # a second of each probe's step
    for probe in probes:
        flops, traffic = step_work(probe.config, probe.precision, device)
        calls.append((probe.config.model.num_layers + 1) / probe.seconds)
        traffics.append(traffic / probe.seconds)
        rests.append(max(0.0, 1 - flops / speeds[probe.precision] / probe.seconds))
    # Least squares of calls · a + traffics · b = rests, with neither a nor b below zero.
    aa, ab, bb = _dot(calls, calls), _dot(calls, traffics), _dot(traffics, traffics)
    a, b = _dot(calls, rests), _dot(traffics, rests)
    overhead, per_byte = (a * bb - b * ab) / (aa * bb - ab**2), (b * aa - a * ab) / (aa * bb - ab**2)
    if overhead < 0:
        overhead, per_byte = 0.0, b / bb
    elif per_byte < 0:
        overhead, per_byte = a / aa, 0.0
    return MachineFacts(device, overhead, speeds, 1 / per_byte if per_byte else math.inf, memory, num_processes)


def step_work(config: Config, precision: str, device: str) -> tuple[float, float]:
    """Return the FLOPs of a step's matrix products, and the bytes that its elementwise operations work on."""
    model, training, context = config.model, config.training, config.data.max_length
    sequences = training.batch_size * training.gradient_accumulation_steps
    flops = sequences * context * training_flops_per_token(model, context)
    size = 4 if precision == "fp32" else 2
    kept = activation_bytes(
        model,
        batch_size=training.batch_size,
        context=context,
        bytes_per_number=size,
        document_mask=config.data.document_mask,
        on_gpu=torch.device(device).type != "cpu",
        by_kernels=training.attention_kernels == "on",
    )
    logits = logits_bytes(model, batch_size=training.batch_size, context=context, bytes_per_number=size)
    traffic = (kept + logits) * training.gradient_accumulation_steps
    if training.optimizer == "muon":
        # Rounds of Newton-Schulz, for pieces of about D x D: 3 products of 2 D³ each.
        flops += training.muon_rounds * 6 * model.d_model * inner_matrices(model)
    return flops, traffic + 4 * 6 * count_parameters(model).total


def tokens_of_step(config: Config) -> int:
    """Return the tokens of a full step."""
    return config.training.batch_size * config.training.gradient_accumulation_steps * config.data.max_length


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
