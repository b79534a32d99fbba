"""The output head and its cross-entropy in one pass over chunks of rows: the logits of all tokens never exist at once.

Logits of B·T·V numbers are most of the memory of a small model with a real vocabulary, and reading and writing them
some eight times is a good part of its time. Here the gradient of a chunk's logits is formed where the logits were,
right after them, and goes at once into the gradients of the hidden states and of the head's weight.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sheepop.models.kernel_head import KernelHead, learns_by_kernels
from sheepop.models.linear import add_weight_gradient, product
from sheepop.utils.runtime import has_numba

# Small vocabularies: one chunk of up to 16 MiB of fp32 logits, less than a processor's last cache and large enough that
# the calls do not count. Large ones: each chunk reads and writes the weight's whole gradient, which so many rows repay
# (512 rows took as long as 1,024 and 2,048, 256 rows a tenth longer, 128 a quarter: `docs/log.md`).
LOGITS_AT_ONCE = 2**22
# Of few rows the weight's gradient is added up more often, which operators do for many logits at little cost.
LEAST_ROWS, LEAST_OF_MANY_LOGITS, MANY_LOGITS = 512, 256, 2**24
LEAST_ROWS_ELSEWHERE = 4096  # a GPU needs more rows to be busy; an estimate, not measured
LEAST_LOG_SCALE = -60.0  # what is divided by it stays a number, and so little is nothing
KERNEL_FROM = 2**19  # logits, of which PyTorch's operators take two thirds of a millisecond


def rows_at_once(vocab_size: int, device_type: str, *, by_kernels: bool = False) -> int:
    """Return of how many tokens the logits exist at one time; of kernels those for fp32 are meant."""
    least = LEAST_ROWS_ELSEWHERE
    if device_type == "cpu":
        is_little = by_kernels or LEAST_ROWS * vocab_size <= MANY_LOGITS
        least = LEAST_ROWS if is_little else LEAST_OF_MANY_LOGITS
    return max(LOGITS_AT_ONCE // vocab_size, least)


def has_kernel(logits: Tensor) -> bool:
    """Say whether compiled code makes the gradient of these logits faster than PyTorch's operators do."""
    are_halves = logits.dtype == torch.bfloat16 and logits.device.type == "cpu"
    return are_halves and logits.numel() >= KERNEL_FROM and has_numba()


def summed_head_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, copied: Tensor | None = None, *, by_kernels: bool = False
) -> Tensor:
    """Return the sum of -ln p(target) in nats over the targets that hold a token, as an fp32 scalar.

    The same as `summed_cross_entropy` of the logits, and so are its gradients; under autocast the products are in
    its type, and the softmax and all sums over chunks in fp32.

    Args:
        hidden: (B, T, D), what the head reads.
        weight: (V, D).
        targets: (B, T) integers; negative ones hold no token.
        copied: (2, B, T), what `copy_sums` returns; None: nothing is copied.
        by_kernels: make products and softmax by compiled kernels where there are such (`kernel_head.py`).
    """
    device_type = hidden.device.type
    is_mixed = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_mixed else hidden.dtype
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(device_type, enabled=False):
        sums = None if copied is None else copied.flatten(1)
        return HeadLoss.apply(hidden.flatten(0, 1), weight, targets.flatten(), dtype, sums, by_kernels)  # type: ignore[no-untyped-call, no-any-return]


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
        by_kernels: bool,
    ) -> Tensor:
        """Map hidden (N, D), weight (V, D), targets (N,) and copies (2, N) to the summed loss; products in `dtype`."""
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        copied_gradient = None if copied is None else torch.empty_like(copied)
        by_kernels = by_kernels and (wants_hidden or wants_weight) and learns_by_kernels(weight, dtype)
        rows = min(len(hidden), rows_at_once(len(weight), hidden.device.type, by_kernels=by_kernels))
        head: KernelHead | OperatorHead
        if by_kernels:
            head = KernelHead(weight, rows)
        else:
            head = OperatorHead(weight, dtype, rows, wants_hidden=wants_hidden, wants_weight=wants_weight)
        loss = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), rows):
            here = slice(start, start + rows)
            inputs, wanted = hidden[here].to(dtype), targets[here]  # (n, D), (n,)
            is_real, wanted = wanted >= 0, wanted.clamp(min=0)
            losses, wanted_scores = head.score(inputs, wanted)
            weights = is_real.float()  # of the errors of each token; of truth values products take five times as long
            if copied is not None and copied_gradient is not None:
                shared = share_with_copies(losses, wanted_scores, copied[:, here])
                weights = is_real * shared.scale
                copied_gradient[:, here] = is_real * shared.copied_gradient
                head.set_right(torch.exp(-losses) - shared.right_share)
                losses = shared.losses
            loss += losses.where(is_real, 0.0).sum()
            head.weigh(weights)
            if hidden_gradient is not None:
                head.find_hidden_gradient(hidden_gradient[here])
            if wants_weight:
                head.add_weight_gradient(is_first=start == 0)
        weight_gradient = head.weight_gradient if wants_weight else None
        ctx.save_for_backward(hidden_gradient, weight_gradient, copied_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and copies for the gradient () of the loss."""
        hidden_gradient, weight_gradient, copied_gradient = (
            None if made is None else made.mul_(gradient) for made in ctx.saved_tensors
        )
        return hidden_gradient, weight_gradient, None, None, copied_gradient, None


class OperatorHead:
    """The head by PyTorch's operators, some tokens after the other: scores and their softmax, then gradients.

    Errors are the gradients of a token's logits: the probabilities, less one at the target.
    """

    def __init__(
        self, weight: Tensor, dtype: torch.dtype, rows: int, *, wants_hidden: bool, wants_weight: bool
    ) -> None:
        """Get ready for at most so many rows at a time, whose products are in `dtype`."""
        self.makes_errors, self.dtype, device = wants_hidden or wants_weight, dtype, weight.device
        self.matrix = weight.to(dtype)  # (V, D)
        self.weight_gradient = torch.empty(weight.shape, device=device) if wants_weight else None
        # Many logits: the same memory for every chunk. Few are not worth oneDNN's copy into what it is given.
        is_large = dtype == torch.float32 and rows * len(weight) > LOGITS_AT_ONCE
        self.memory = torch.empty(rows, len(weight), device=device) if is_large else None

    def score(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return -ln p(target) in nats and the logit of the target, (n,) each, for inputs (n, D) and targets (n,)."""
        self.inputs, self.targets = inputs, (wanted := targets[:, None])
        memory = None if self.memory is None else self.memory[: len(inputs)]
        self.errors = self.matrix[:0]  # the last ones make room
        scores = product(inputs, self.matrix, out=memory)  # (n, V)
        wanted_scores = scores.gather(1, wanted)[:, 0].float()
        if self.makes_errors and has_kernel(scores):
            from sheepop.models.head_kernels import turn_into_errors  # numba, which takes half a second to load

            self.errors = scores
            return turn_into_errors(scores, targets), wanted_scores
        # In place on a CPU, whose kernel goes row by row and has read a number before it writes there.
        scores = scores.float()
        scores = torch.log_softmax(scores, 1, out=scores if scores.device.type == "cpu" else None)
        losses = -scores.gather(1, wanted)
        if self.makes_errors:
            minus_one = torch.full_like(wanted, -1.0, dtype=torch.float32)
            self.errors = scores.exp_().scatter_add_(1, wanted, minus_one).to(self.dtype)
        return losses[:, 0], wanted_scores

    def set_right(self, errors: Tensor) -> None:
        """Set the errors (n,) of the targets themselves."""
        if self.makes_errors:
            self.errors.scatter_(1, self.targets, errors[:, None].to(self.dtype))

    def weigh(self, weights: Tensor) -> None:
        """Let the errors of each token count so much, (n,)."""
        self.weights = weights[:, None]

    def find_hidden_gradient(self, gradient: Tensor) -> None:
        """Set the gradient (n, D) of the inputs."""
        torch.mul(product(self.errors, self.matrix.t()), self.weights, out=gradient)

    def add_weight_gradient(self, *, is_first: bool) -> None:
        """Add to the gradient (V, D) of the weight; the first replaces what was there."""
        assert self.weight_gradient is not None
        weighed = (self.inputs * self.weights).to(self.dtype)
        add_weight_gradient(self.weight_gradient, weighed, self.errors, is_first=is_first)


class Shared(NamedTuple):
    """How a softmax over the vocabulary changes where copies share in it.

    Attributes:
        losses: (n,), with the copies.
        scale: (n,), what the vocabulary's probabilities are multiplied by.
        right_share: (n,), the entry's part of the right answer's probability, over `scale`.
        copied_gradient: (2, n), of the losses for both sums.
    """

    losses: Tensor
    scale: Tensor
    right_share: Tensor
    copied_gradient: Tensor


def share_with_copies(losses: Tensor, wanted_scores: Tensor, copied: Tensor) -> Shared:
    """Let copies share in a softmax.

    Args:
        losses: (n,), without copies, -ln p(target).
        wanted_scores: (n,), the logit of the target.
        copied: (2, n), what `copy_sums` returns.
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
