"""The output head and its cross-entropy in one pass over chunks of rows: the logits of all tokens never exist at once.

Logits of B·T·V numbers are most of the memory of a small model with a real vocabulary, and reading and writing them
some eight times is a good part of its time. Here the gradient of a chunk's logits is formed where the logits were,
right after them, and goes at once into the gradients of the hidden states and of the head's weight.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sheepop.models.linear import add_weight_gradient, product
from sheepop.utils.runtime import has_numba

# Small vocabularies: one chunk of up to 16 MiB of fp32 logits, less than a processor's last cache and large enough that
# the calls do not count. Large ones: each chunk reads and writes the weight's whole gradient, which so many rows repay
# (512 rows took as long as 1,024 and 2,048, 256 rows a tenth longer, 128 a quarter: `docs/log.md`).
LOGITS_AT_ONCE = 2**22
LEAST_ROWS = {"cpu": 512}
LEAST_ROWS_ELSEWHERE = 4096  # a GPU needs more rows to be busy; an estimate, not measured
LEAST_LOG_SCALE = -60.0  # what is divided by it stays a number, and so little is nothing
KERNEL_FROM = 2**19  # logits, of which PyTorch's operators take two thirds of a millisecond


def rows_at_once(vocab_size: int, device_type: str) -> int:
    """Return of how many tokens the logits exist at one time."""
    return max(LOGITS_AT_ONCE // vocab_size, LEAST_ROWS.get(device_type, LEAST_ROWS_ELSEWHERE))


def has_kernel(logits: Tensor) -> bool:
    """Say whether compiled code makes the gradient of these logits faster than PyTorch's operators do."""
    are_halves = logits.dtype == torch.bfloat16 and logits.device.type == "cpu"
    return are_halves and logits.numel() >= KERNEL_FROM and has_numba()


def summed_head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, copied: Tensor | None = None) -> Tensor:
    """Return the sum of -ln p(target) in nats over the targets that hold a token, as an fp32 scalar.

    The same as `summed_cross_entropy` of the logits, and so are its gradients; under autocast the products are in
    its type, and the softmax and all sums over chunks in fp32.

    Args:
        hidden: (B, T, D), what the head reads.
        weight: (V, D).
        targets: (B, T) integers; negative ones hold no token.
        copied: (2, B, T), what `copy_sums` returns; None: nothing is copied.
    """
    device_type = hidden.device.type
    is_mixed = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_mixed else hidden.dtype
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(device_type, enabled=False):
        sums = None if copied is None else copied.flatten(1)
        return HeadLoss.apply(hidden.flatten(0, 1), weight, targets.flatten(), dtype, sums)  # type: ignore[no-untyped-call, no-any-return]


class HeadLoss(torch.autograd.Function):
    """The forward pass makes the gradients too, for a loss whose own gradient is 1; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        copied: Tensor | None,
    ) -> Tensor:
        """Map hidden (N, D), weight (V, D), targets (N,) and copies (2, N) to the summed loss; products in `dtype`."""
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        device, (V, D) = hidden.device, weight.shape
        on_cpu, is_fp32 = device.type == "cpu", dtype == torch.float32
        makes_errors = wants_hidden or wants_weight
        matrix = weight.to(dtype)  # (V, D)
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        weight_gradient = torch.empty(V, D, device=device) if wants_weight else None
        copied_gradient = None if copied is None else torch.empty_like(copied)
        loss = torch.zeros((), device=device)
        rows = min(len(hidden), rows_at_once(V, device.type))
        # Many logits: the same memory for every chunk. Few are not worth oneDNN's copy into what it is given.
        memory = torch.empty(rows, V, device=device) if is_fp32 and rows * V > LOGITS_AT_ONCE else None
        for start in range(0, len(hidden), rows):
            here = slice(start, start + rows)
            inputs, wanted = hidden[here].to(dtype), targets[here, None]  # (n, D), (n, 1)
            is_real, wanted = wanted >= 0, wanted.clamp(min=0)
            scores = product(inputs, matrix, out=None if memory is None else memory[: len(inputs)])  # (n, V)
            wanted_scores = scores.gather(1, wanted).float()  # (n, 1)
            errors: Tensor | None = None
            if makes_errors and has_kernel(scores):
                from sheepop.models.head_kernels import turn_into_errors  # numba, which takes half a second to load

                errors = scores
                losses = turn_into_errors(errors, wanted[:, 0]).unsqueeze(1)  # (n, 1)
            else:
                # In place on a CPU, whose kernel goes row by row and has read a number before it writes there.
                scores = scores.float()
                scores = torch.log_softmax(scores, 1, out=scores if on_cpu else None)
                losses = -scores.gather(1, wanted)
                if makes_errors:
                    # The gradient of the logits: the probabilities, less one at the target.
                    minus_one = torch.full_like(wanted, -1.0, dtype=torch.float32)
                    errors = scores.exp_().scatter_add_(1, wanted, minus_one).to(dtype)
            weights: Tensor = is_real  # of the rows of errors
            if copied is not None and copied_gradient is not None:
                shared = share_with_copies(losses, wanted_scores, copied[:, here, None])
                weights = is_real * shared.scale
                copied_gradient[:, here] = (is_real * shared.copied_gradient)[..., 0]
                if errors is not None:
                    errors.scatter_(1, wanted, (torch.exp(-losses) - shared.right_share).to(dtype))
                losses = shared.losses
            loss += losses.where(is_real, 0.0).sum()
            if errors is not None and hidden_gradient is not None:
                torch.mul(product(errors, matrix.t()), weights, out=hidden_gradient[here])
            if errors is not None and weight_gradient is not None:
                add_weight_gradient(weight_gradient, (inputs * weights).to(dtype), errors, is_first=start == 0)
            del scores, errors  # before the next ones are made
        ctx.save_for_backward(hidden_gradient, weight_gradient, copied_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and copies for the gradient () of the loss."""
        hidden_gradient, weight_gradient, copied_gradient = (
            None if made is None else made.mul_(gradient) for made in ctx.saved_tensors
        )
        return hidden_gradient, weight_gradient, None, None, copied_gradient


class Shared(NamedTuple):
    """How a softmax over the vocabulary changes where copies share in it.

    Attributes:
        losses: (n, 1), with the copies.
        scale: (n, 1), what the vocabulary's probabilities are multiplied by.
        right_share: (n, 1), the entry's part of the right answer's probability, over `scale`.
        copied_gradient: (2, n, 1), of the losses for both sums.
    """

    losses: Tensor
    scale: Tensor
    right_share: Tensor
    copied_gradient: Tensor


def share_with_copies(losses: Tensor, wanted_scores: Tensor, copied: Tensor) -> Shared:
    """Let copies share in a softmax.

    Args:
        losses: (n, 1), without copies, -ln p(target).
        wanted_scores: (n, 1), the logit of the target.
        copied: (2, n, 1), what `copy_sums` returns.
    """
    of_entries, (of_all, of_right) = losses + wanted_scores, copied
    total, right = torch.logaddexp(of_entries, of_all), torch.logaddexp(wanted_scores, of_right)
    log_scale = (of_entries - total).clamp(min=LEAST_LOG_SCALE)
    return Shared(
        losses=total - right,
        scale=torch.exp(log_scale),
        right_share=torch.exp(wanted_scores - right - log_scale),
        copied_gradient=torch.stack((torch.exp(of_all - total), -torch.exp(of_right - right))),
    )
