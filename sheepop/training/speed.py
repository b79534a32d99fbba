"""What a training step of any size takes, from a few that were measured: work by formula over the machine's speed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sheepop.config import Config
from sheepop.models.sizing import (
    activation_bytes,
    count_parameters,
    inner_matrices,
    logits_bytes,
    training_flops_per_token,
)
from sheepop.utils.devices import choose_precision

LEAST_PRODUCTS = 0.7  # share of the measured time that elementwise work may explain


@dataclass(frozen=True)
class MachineFacts:
    """How fast steps are: seconds = overhead · (layers + 1) + FLOPs / speed + bytes / bandwidth.

    Attributes:
        device: as PyTorch names it.
        overhead: seconds a layer and step, whatever the number of tokens.
        speeds: FLOP/s inside of matrix products, by the name of the precision.
        bandwidth: bytes of activations a second, which stands for all elementwise work.
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
    model, training = config.model, config.training
    precision = choose_precision(
        torch.device(machine.device), use_amp=training.use_amp, d_model=model.d_model, asked=training.precision
    )
    speed = machine.speeds.get(precision.name) or max(machine.speeds.values())
    flops, traffic = step_work(config, precision.name, machine.device)
    work = (flops / speed + traffic / machine.bandwidth) / machine.num_processes
    return machine.overhead * (model.num_layers + 1) + work


def fit_machine(probes: Sequence[Probe], *, device: str, memory: int, num_processes: int = 1) -> MachineFacts:
    """Return the facts that explain measured steps.

    Args:
        probes: two of one model with few and with more tokens; a larger one, which with the second tells products from
            elementwise work; and others, the last of each precision telling its speed.
        device, memory, num_processes: see `MachineFacts`.
    """
    work = [step_work(probe.config, probe.precision, device) for probe in probes]
    batches = [probe.config.training.batch_size for probe in probes]
    few, more = probes[0].seconds, probes[1].seconds
    calls = (few * batches[1] - more * batches[0]) / (batches[1] - batches[0])  # at no tokens at all
    overhead = min(max(calls, 0.0), 0.9 * few) / (probes[0].config.model.num_layers + 1)
    # What is left of the second and the third: FLOPs · a + bytes · b, with a and b above zero.
    rest = [
        max(probe.seconds - overhead * (probe.config.model.num_layers + 1), 0.1 * probe.seconds) for probe in probes
    ]
    (flops_1, bytes_1), (flops_2, bytes_2) = work[1:3]
    determinant = flops_1 * bytes_2 - flops_2 * bytes_1
    per_byte = (flops_1 * rest[2] - flops_2 * rest[1]) / determinant if determinant else 0.0
    per_byte = min(max(per_byte, 0.0), LEAST_PRODUCTS * min(rest[1] / bytes_1, rest[2] / bytes_2))
    speeds = {
        probe.precision: flops / max(left - per_byte * size, (1 - LEAST_PRODUCTS) * left)
        for probe, (flops, size), left in list(zip(probes, work, rest, strict=True))[1:]
    }
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
    )
    logits = logits_bytes(model, batch_size=training.batch_size, context=context, bytes_per_number=size)
    traffic = (kept + logits) * training.gradient_accumulation_steps
    if training.optimizer == "muon":
        # Five rounds of Newton-Schulz, for pieces of about D x D: 3 products of 2 D³ each.
        flops += 5 * 6 * model.d_model * inner_matrices(model)
    return flops, traffic + 4 * 6 * count_parameters(model).total


def tokens_of_step(config: Config) -> int:
    """Return the tokens of a full step."""
    return config.training.batch_size * config.training.gradient_accumulation_steps * config.data.max_length
