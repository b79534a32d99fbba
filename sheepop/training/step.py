"""One optimizer step: the algorithm of training, in the open."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from sheepop.training.distributed import full, gradient_exchange, sum_over_processes
from sheepop.training.guard import Verdict, allows_update
from sheepop.training.late_steps import QueuedNumbers, Refusals, StepNumbers
from sheepop.training.profiling import begin_part
from sheepop.training.signals import StopRequest
from sheepop.training.state import Learner
from sheepop.utils.seeds import derive_seed


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees.

    Attributes:
        index: the number of the micro-batch inside its step, over all processes.
        token_ids, targets: (B, T) on the model's device; targets without a token hold `IGNORE_INDEX`.
        num_targets: how many targets hold a token.
        document_ids: (B, T), or None where documents see each other.
    """

    index: int
    token_ids: Tensor
    targets: Tensor
    num_targets: int
    document_ids: Tensor | None = None


@dataclass(frozen=True)
class StepResult:
    """What a step says about itself.

    Attributes:
        loss: nats per token over the whole step, before the update.
        grad_norm: before clipping.
        num_targets: tokens looked at, over all processes.
        verdict: of the guard.
        is_updated: whether the step was made; if not, no weight and no moment was changed.
        overflowed: the gradients were not finite, but a smaller loss scale may mend that.
        stop_asked: a signal came to one of the processes before the end of the backward pass.
    """

    loss: float
    grad_norm: float
    num_targets: int
    verdict: Verdict
    is_updated: bool
    overflowed: bool = False
    stop_asked: bool = False


def micro_batch_loss(learner: Learner, batch: MicroBatch) -> Tensor:
    """Return the loss of a micro-batch, summed over its real targets in nats, as an fp32 scalar with a gradient.

    A sum, not a mean: micro-batches and processes hold different numbers of real targets, and only the division
    by the total of the step makes the update independent of how the step was cut.
    """
    dtype = learner.precision.autocast_dtype
    with torch.autocast(learner.model.device.type, dtype, enabled=dtype is not None):
        return learner.forward(batch.token_ids, targets=batch.targets, document_ids=batch.document_ids)  # type: ignore[no-any-return]


def result_of(learner: Learner, numbers: StepNumbers | QueuedNumbers, *, update: bool = True) -> StepResult:
    """Wait for a step's numbers and judge them; `update` as of `train_step`."""
    loss, stops, grad_norm, num_targets = numbers.read()
    training, guard, loss_scale = learner.config.training, learner.state.guard, learner.state.loss_scale
    verdict = guard.judge(loss, grad_norm, training)
    # The loss itself was never scaled: one that is not finite is no overflow.
    needs_scaling = learner.precision.needs_loss_scaling
    overflowed = verdict == "bad" and math.isfinite(loss) and needs_scaling and loss_scale.can_shrink
    is_updated = update and allows_update(verdict, training)
    return StepResult(loss, grad_norm, num_targets, verdict, is_updated, overflowed, stops > 0)


@overload
def train_step(
    learner: Learner,
    micro_batches: Sequence[MicroBatch],
    *,
    step: int,
    learning_rate: float,
    stop: StopRequest | None = ...,
    update: bool = ...,
    refusals: None = ...,
) -> StepResult | None: ...


@overload
def train_step(
    learner: Learner,
    micro_batches: Sequence[MicroBatch],
    *,
    step: int,
    learning_rate: float,
    stop: StopRequest | None = ...,
    refusals: Refusals,
) -> QueuedNumbers | None: ...


def train_step(
    learner: Learner,
    micro_batches: Sequence[MicroBatch],
    *,
    step: int,
    learning_rate: float,
    stop: StopRequest | None = None,
    update: bool = True,
    refusals: Refusals | None = None,
) -> StepResult | QueuedNumbers | None:
    """Forward and backward over this process's micro-batches, then one update that all processes share.

    A loss or gradient that is not finite changes no weight and no moment, on any process.

    Args:
        learner: whose model and optimizer change; its state is only read.
        micro_batches: as many on every process.
        step: number of the step, from 0.
        learning_rate: of this step.
        stop: where a single process learns that it should leave the step in the middle.
        update: whether to make the update; False to find out how long the rest takes.
        refusals: decides on the device whether the update is made; None: Python does, which waits for the device.

    Returns:
        What became of the step, or with `refusals` what will tell it (`result_of`); None if it was left in the middle,
        which changes nothing.
    """
    begin_part("other")
    model, optimizer, world, precision = learner.model, learner.optimizer, learner.world, learner.precision
    max_grad_norm, device = learner.config.training.max_grad_norm, model.device
    scale = learner.state.loss_scale.value if precision.needs_loss_scaling else 1.0
    factor = scale * (world.size if learner.parallel == "ddp" else 1)  # which takes the mean over the processes
    own_targets = sum(batch.num_targets for batch in micro_batches)
    num_targets: int | Tensor = own_targets
    if world.size > 1:  # alone, nothing has to come back from the device
        num_targets = sum_over_processes(torch.full((), own_targets, device=device), world)
    loss_sum = torch.zeros((), device=device)
    for number, batch in enumerate(micro_batches, start=1):
        begin_part("forward")
        if stop is not None and stop.is_made and world.size == 1:
            optimizer.zero_grad(set_to_none=True)
            return None
        # Dropout depends on where in training we are and on nothing else: not on what ran before, nor on which
        # process runs it.
        if model.config.dropout or model.config.dropped_attention:
            torch.manual_seed(derive_seed(learner.config.seed, "dropout", step, batch.index))
        with gradient_exchange(learner.forward, learner.parallel, is_last=number == len(micro_batches)):
            loss = micro_batch_loss(learner, batch) / num_targets
            begin_part("backward")
            (loss * factor if factor != 1.0 else loss).backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.detach()

    begin_part("clip")
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if scale != 1.0:
        for gradient in gradients:
            gradient.mul_(1 / scale)
    total_norm = torch.nn.utils.get_total_norm(gradients)
    begin_part("gradient exchange")
    # One message for both, and one wait for the device for all three.
    stop_flag = torch.full_like(loss_sum, float(stop is not None and stop.is_made))
    sums = sum_over_processes(torch.stack((loss_sum, stop_flag)), world)
    norm = full(total_norm).to(sums)
    numbers = StepNumbers(torch.cat((sums, norm[None])), num_targets)

    begin_part("clip")
    result: StepResult | QueuedNumbers
    if refusals is None:
        result = result_of(learner, numbers, update=update)
        is_updated = result.is_updated
        is_long = max_grad_norm is not None and result.grad_norm > max_grad_norm
    else:  # the same, as far as Python knows
        result = QueuedNumbers(numbers)
        is_updated, is_long = True, True
        optimizer.found_inf = refusals.judge(sums[0], norm)  # type: ignore[attr-defined]
    if is_updated:
        if max_grad_norm is not None and is_long:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, total_norm)
        begin_part("optimizer")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)
        optimizer.step()
    begin_part("other")
    optimizer.zero_grad(set_to_none=True)
    return result
