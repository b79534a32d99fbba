"""One optimizer step: the algorithm of training, in the open."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sheepop.config import TrainingConfig
from sheepop.models.transformer import TransformerModel
from sheepop.training.distributed import World, sum_gradients, sum_over_processes
from sheepop.training.loss import summed_cross_entropy
from sheepop.training.profiling import begin_part
from sheepop.utils.devices import Precision
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
        num_targets: tokens learned from, over all processes.
        is_finite: whether loss and gradients were numbers; if not, nothing was changed.
    """

    loss: float
    grad_norm: float
    num_targets: int
    is_finite: bool


def train_step(
    model: TransformerModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    step: int,
    seed: int,
    learning_rate: float,
    training: TrainingConfig,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    world: World,
) -> StepResult:
    """Forward and backward over this process's micro-batches, then one update that all processes share.

    A loss or gradient that is not finite changes no weight and no moment, on any process.
    """
    begin_part("other")
    device = model.device
    counted = torch.tensor(sum(batch.num_targets for batch in micro_batches), device=device)
    num_targets = int(sum_over_processes(counted, world))
    loss_sum = torch.zeros((), device=device)
    for batch in micro_batches:
        begin_part("forward")
        # Dropout depends on where in training we are and on nothing else: not on what ran before, nor on which
        # process runs it.
        if model.config.dropout:
            torch.manual_seed(derive_seed(seed, "dropout", step, batch.index))
        with torch.autocast(device.type, dtype=precision.autocast_dtype, enabled=precision.autocast_dtype is not None):
            logits = model(batch.token_ids, document_ids=batch.document_ids)  # (B, T, V)
        loss = summed_cross_entropy(logits, batch.targets) / num_targets
        begin_part("backward")
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.detach()
    begin_part("gradient exchange")
    sum_gradients(model, world)
    sum_over_processes(loss_sum, world)

    begin_part("clip")
    scaler.unscale_(optimizer)
    limit = float("inf") if training.max_grad_norm is None else training.max_grad_norm
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(gradients)
    if grad_norm > limit:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), limit, grad_norm)
    is_finite = bool(torch.isfinite(loss_sum) & torch.isfinite(grad_norm))
    begin_part("optimizer")
    if is_finite:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        scaler.step(optimizer)
    scaler.update()
    begin_part("other")
    optimizer.zero_grad(set_to_none=True)
    return StepResult(float(loss_sum), float(grad_norm), num_targets, is_finite)
