"""What a run will take, said before it: parameters, FLOPs, memory by part, time, disk; and what would fit instead.

Bytes and FLOPs follow from the settings (`models/sizing.py`). Two things are measured, because no formula knows them:
what the process and its libraries hold, and how long a step takes.
"""

import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sheepop.config import Config, TrainingConfig, parse_config
from sheepop.data.corpus import Corpus
from sheepop.models.sizing import (
    ParameterCounts,
    TrainingBytes,
    kv_cache_bytes,
    training_bytes,
    training_flops_per_token,
)
from sheepop.training.length import total_steps_without_clock
from sheepop.training.shared_steps import shared_rows
from sheepop.training.speed import precision_of
from sheepop.utils.memory import available_bytes, resident_bytes

# What the allocator holds beyond the tensors, as a share of what comes and goes within a step. glibc (before 2.38)
# seldom fits an aligned block into the hole that an equal one left: 0.2 to 0.63 were measured (`docs/log.md`).
# PyTorch's own allocator for GPUs keeps blocks by size.
ALLOCATOR_SHARE = {"cpu": 0.45, "cuda": 0.1, "mps": 0.1}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak of a step, by part.

    Attributes:
        process: Python and the libraries, in this process; 0 on a GPU, whose memory they do not take.
        tensors: weights, gradients, moments, activations, logits.
        allocator: what is held but not in use.
        copy: the weights that steps are measured on where `max_minutes` sets the length.
        available: what the process may hold in all.
        measured: the peak of real steps, where some were made; without the measurement's own copy of the weights.
    """

    process: int
    tensors: TrainingBytes
    allocator: int
    copy: int
    available: int
    measured: int | None = None

    @property
    def estimate(self) -> int:
        """The peak that follows from the settings."""
        return self.process + self.tensors.peak + self.allocator + self.copy

    @property
    def peak(self) -> int:
        """The peak that is expected: measured where it was."""
        return self.measured or self.estimate

    @property
    def fits(self) -> bool:
        """Whether the peak is available."""
        return self.peak <= self.available

    @property
    def state_fits(self) -> bool:
        """Whether weights, gradients and moments alone are available, whatever the batch."""
        return self.process + self.tensors.state <= self.available


@dataclass(frozen=True)
class Length:
    """How long a run is, and what happens in it beside steps."""

    steps: int
    steps_per_epoch: int
    validations: int
    samples: int
    checkpoints: int
    checkpoints_kept: int


@dataclass(frozen=True)
class Times:
    """Measured seconds of what a run consists of.

    Attributes:
        compiling: of the blocks, where that pays; 0 where they are not compiled.
        is_whole_step: whether whole steps were measured, or fewer sequences and the rest worked out.
        peak_flops: operations a second of the device at best.
        peak_bytes: most memory that was held meanwhile, or None.
    """

    step: float
    compiling: float
    validation: float
    sample: float
    checkpoint: float
    is_whole_step: bool
    peak_flops: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will take; None is what cannot be known from what was given.

    Attributes:
        tokens_per_epoch: targets of an epoch.
        disk_available: bytes free where the run's folder will be.
        advice: settings that would fit, each with its peak in bytes; empty where the run itself does.
        missing: what is not known, and why.
    """

    config: Config
    device: str
    precision: str
    parameters: ParameterCounts
    memory: MemoryPlan
    tokens_per_epoch: int | None
    length: Length | None
    times: Times | None
    disk_available: int
    advice: list[tuple[dict[str, object], int]]
    missing: list[str]

    @property
    def tokens_per_step(self) -> int:
        """Targets of a full step."""
        training = self.config.training
        return training.batch_size * training.gradient_accumulation_steps * self.config.data.max_length

    @property
    def flops_per_token(self) -> float:
        """Operations of one token's forward and backward pass."""
        return training_flops_per_token(self.config.model, self.config.data.max_length)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: weights and moments."""
        return self.memory.tensors.weights + self.memory.tensors.optimizer

    @property
    def generation_cache_bytes(self) -> int:
        """Bytes of keys and values that generating one text of the longest context takes, in fp32."""
        model = self.config.model
        return kv_cache_bytes(model, 1, model.max_seq_len)

    @property
    def disk_needed(self) -> int | None:
        """Bytes of the checkpoints that exist at one time, the one being written among them."""
        return None if self.length is None else (self.length.checkpoints_kept + 1) * self.checkpoint_bytes

    @property
    def tokens(self) -> int | None:
        """Targets of the whole run."""
        if self.length is None:
            return None
        if self.tokens_per_epoch is None:
            return self.length.steps * self.tokens_per_step
        whole, rest = divmod(self.length.steps, self.length.steps_per_epoch)
        return whole * self.tokens_per_epoch + rest * self.tokens_per_step

    @property
    def seconds(self) -> dict[str, float] | None:
        """Seconds of the run by what they are spent on."""
        if self.length is None or self.times is None:
            return None
        return {
            "compiling": self.times.compiling,
            "steps": self.length.steps * self.times.step,
            "validations": self.length.validations * self.times.validation,
            "samples": self.length.samples * self.times.sample,
            "checkpoints": self.length.checkpoints * self.times.checkpoint,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values; bytes and seconds without a unit in the name are said by their section."""
        memory, tensors, length, times, seconds = (
            self.memory,
            self.memory.tensors,
            self.length,
            self.times,
            self.seconds,
        )
        return {
            "preset": self.config.preset,
            "device": self.device,
            "precision": self.precision,
            "parameters": asdict(self.parameters) | {"total": self.parameters.total},
            "flops": {
                "per_token": self.flops_per_token,
                "per_step": self.flops_per_token * self.tokens_per_step,
                "total": None if self.tokens is None else self.flops_per_token * self.tokens,
            },
            "run": {
                "tokens_per_step": self.tokens_per_step,
                "tokens": self.tokens,
                "epochs": length and length.steps / length.steps_per_epoch,
            }
            | (asdict(length) if length else {"steps": None}),
            "memory_bytes": {
                "weights": tensors.weights,
                "gradients": tensors.gradients,
                "optimizer": tensors.optimizer,
                "activations": tensors.activations,
                "logits": tensors.logits,
                "process": memory.process,
                "allocator": memory.allocator,
                "copy": memory.copy,
                "estimate": memory.estimate,
                "measured": memory.measured,
                "peak": memory.peak,
                "available": memory.available,
                "fits": memory.fits,
                "generation_cache": self.generation_cache_bytes,
            },
            "seconds": {
                "step": times and times.step,
                "compiling": times and times.compiling,
                "validation": times and times.validation,
                "sample": times and times.sample,
                "checkpoint": times and times.checkpoint,
                "is_whole_step": times and times.is_whole_step,
                "by_part": seconds,
                "total": seconds and sum(seconds.values()),
            },
            "tokens_per_second": times and self.tokens_per_step / times.step,
            "mfu": times and self.flops_per_token * self.tokens_per_step / times.step / times.peak_flops,
            "disk_bytes": {
                "checkpoint": self.checkpoint_bytes,
                "needed": self.disk_needed,
                "available": self.disk_available,
                "fits": None if self.disk_needed is None else self.disk_needed <= self.disk_available,
            },
            "advice": [{"settings": settings, "peak_bytes": peak} for settings, peak in self.advice],
            "missing": self.missing,
        }


def plan_memory(config: Config, device: torch.device, *, process: int, available: int) -> MemoryPlan:
    """Return the memory of training with these settings, by part.

    Args:
        config: with the vocabulary of the tokenizer.
        process: bytes that the process holds without a model; ignored on a GPU.
        available: bytes that the process may hold in all.
    """
    training = config.training
    precision = precision_of(config, device)
    tensors = training_bytes(
        config.model,
        batch_size=training.batch_size,
        context=config.data.max_length,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        bytes_per_number=precision.autocast_dtype.itemsize if precision.autocast_dtype else 4,
        document_mask=config.data.document_mask,
        on_gpu=device.type == "cuda",
        by_kernels=training.attention_kernels == "on",
        head_by_kernels=training.head_kernels == "on",
        activation_checkpointing=training.activation_checkpointing,
        optimizer=training.optimizer,
        shared_rows=shared_rows(config),
    )
    process = process if device.type == "cpu" else 0
    allocator = round(ALLOCATOR_SHARE[device.type] * tensors.transient)
    copy = tensors.weights if training.max_minutes else 0
    return MemoryPlan(process=process, tensors=tensors, allocator=allocator, copy=copy, available=available)


def memory_now(config: Config, device: torch.device) -> MemoryPlan:
    """Return the memory of a run that this process is about to make, before it builds its model."""
    process = resident_bytes() if device.type == "cpu" else 0
    return plan_memory(config, device, process=process, available=process + available_bytes(device))


def with_vocabulary(config: Config, corpus: Corpus) -> Config:
    """Return the settings with the size of the corpus's vocabulary."""
    return changed(config, {"model.vocab_size": corpus.tokenizer().vocab_size})


def changed(config: Config, settings: dict[str, object]) -> Config:
    """Return checked settings in which some have other values."""
    values = config.model_dump()
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        values[section][name] = value
    return parse_config(values, source="the settings")


def plan_length(training: TrainingConfig, steps_per_epoch: int, steps: int) -> Length:
    """Count what happens in a run of `steps`, by the rules of `trainer.train`.

    Each validation may turn out to be the best yet, which saves; that is counted.
    """
    eval_interval = training.eval_interval or max(1, math.ceil(steps / 10))
    sample_interval = training.sample_interval or eval_interval
    epochs = steps // steps_per_epoch
    # Under a time budget, epochs shorter than the interval end without a validation and a checkpoint.
    are_epochs_pauses = training.max_minutes is None or steps_per_epoch >= eval_interval
    pauses = [eval_interval, *([steps_per_epoch] if are_epochs_pauses else [])]
    validations = count_multiples(steps, *pauses)
    saves = [*pauses, *([training.save_interval] if training.save_interval else [])]
    return Length(
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        validations=validations,
        samples=count_multiples(steps, sample_interval) if training.sample_tokens else 0,
        checkpoints=count_multiples(steps, *saves),
        checkpoints_kept=min(count_multiples(steps, *saves), epochs + training.keep_last + 1),
    )


def count_multiples(last: int, *intervals: int) -> int:
    """Count the numbers from 1 to `last` that are a multiple of any interval, or `last` itself."""
    if len(intervals) == 1:
        return -(-last // intervals[0])
    return len({last, *(number for interval in intervals for number in range(interval, last + 1, interval))})


def plan_steps(training: TrainingConfig, steps_per_epoch: int | None) -> int | None:
    """Return the run's number of steps, or None where only a clock or a text can tell."""
    if steps_per_epoch is None and training.max_steps is None:
        return None
    return total_steps_without_clock(training, steps_per_epoch or 1)


def free_disk_bytes(folder: Path) -> int:
    """Return the bytes that are free where `folder` is or will be."""
    ground = next(place for place in (folder, *folder.resolve().parents) if place.exists())
    return shutil.disk_usage(ground).free


def with_measurements(plan: Plan, times: Times, length: Length | None) -> Plan:
    """Return the plan with what was measured in it."""
    return replace(plan, times=times, length=length, memory=replace(plan.memory, measured=times.peak_bytes))
