"""The output head and its cross-entropy in one pass over chunks of rows: the logits of all tokens never exist at once.

Logits of B·T·V numbers are most of the memory of a small model with a real vocabulary, and reading and writing them
some eight times is a good part of its time. Here the gradient of a chunk's logits is formed where the logits were,
right after them, and goes at once into the gradients of the hidden states and of the head's weight.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from sheepop.models.linear import add_weight_gradient, product

# Small vocabularies: one chunk of up to 16 MiB of fp32 logits, less than a processor's last cache and large enough that
# the calls do not count. Large ones: each chunk reads and writes the weight's whole gradient, which so many rows repay
# (512 rows took as long as 1,024 and 2,048, 256 rows a tenth longer, 128 a quarter: `docs/log.md`).
LOGITS_AT_ONCE = 2**22
LEAST_ROWS = {"cpu": 512}
LEAST_ROWS_ELSEWHERE = 4096  # a GPU needs more rows to be busy; an estimate, not measured
KERNEL_FROM = 2**19  # logits, of which PyTorch's operators take two thirds of a millisecond


def rows_at_once(vocab_size: int, device_type: str) -> int:
    """Return of how many tokens the logits exist at one time."""
    return max(LOGITS_AT_ONCE // vocab_size, LEAST_ROWS.get(device_type, LEAST_ROWS_ELSEWHERE))


def has_kernel(logits: Tensor) -> bool:
    """Say whether compiled code makes the gradient of these logits faster than PyTorch's operators do."""
    are_halves = logits.dtype == torch.bfloat16 and logits.device.type == "cpu"
    return are_halves and logits.numel() >= KERNEL_FROM and importlib.util.find_spec("numba") is not None


def summed_head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of -ln p(target) in nats over the targets that hold a token, as an fp32 scalar.

    The same as `summed_cross_entropy` of the logits, and so are its gradients; under autocast the products are in
    its type, and the softmax and all sums over chunks in fp32.

    Args:
        hidden: (B, T, D), what the head reads.
        weight: (V, D).
        targets: (B, T) integers; negative ones hold no token.
    """
    device_type = hidden.device.type
    is_mixed = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_mixed else hidden.dtype
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    with torch.autocast(device_type, enabled=False):
        return HeadLoss.apply(hidden.flatten(0, 1), weight, targets.flatten(), dtype)  # type: ignore[no-untyped-call, no-any-return]


class HeadLoss(torch.autograd.Function):
    """The forward pass makes the gradients too, for a loss whose own gradient is 1; the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Map hidden (N, D), weight (V, D) and targets (N,) to the summed loss; products are in `dtype`."""
        wants_hidden, wants_weight, _, _ = ctx.needs_input_grad
        device, (V, D) = hidden.device, weight.shape
        on_cpu, is_fp32 = device.type == "cpu", dtype == torch.float32
        makes_errors = wants_hidden or wants_weight
        matrix = weight.to(dtype)  # (V, D)
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        weight_gradient = torch.empty(V, D, device=device) if wants_weight else None
        loss = torch.zeros((), device=device)
        rows = min(len(hidden), rows_at_once(V, device.type))
        # Many logits: the same memory for every chunk. Few are not worth oneDNN's copy into what it is given.
        memory = torch.empty(rows, V, device=device) if is_fp32 and rows * V > LOGITS_AT_ONCE else None
        for start in range(0, len(hidden), rows):
            inputs, wanted = (
                hidden[start : start + rows].to(dtype),
                targets[start : start + rows, None],
            )  # (n, D), (n, 1)
            is_real, wanted = wanted >= 0, wanted.clamp(min=0)
            scores = product(inputs, matrix, out=None if memory is None else memory[: len(inputs)])  # (n, V)
            if makes_errors and has_kernel(scores):
                from sheepop.models.head_kernels import turn_into_errors  # numba, which takes half a second to load

                errors = scores
                loss += turn_into_errors(errors, wanted[:, 0]).where(is_real[:, 0], 0.0).sum()
            else:
                # In place on a CPU, whose kernel goes row by row and has read a number before it writes there.
                scores = scores.float()
                scores = torch.log_softmax(scores, 1, out=scores if on_cpu else None)
                loss -= scores.gather(1, wanted).where(is_real, 0.0).sum()
                if not makes_errors:
                    continue
                # The gradient of the logits: the probabilities, less one at the target.
                minus_one = torch.full_like(wanted, -1.0, dtype=torch.float32)
                errors = scores.exp_().scatter_add_(1, wanted, minus_one).to(dtype)
            if hidden_gradient is not None:
                torch.mul(product(errors, matrix.t()), is_real, out=hidden_gradient[start : start + rows])
            if weight_gradient is not None:
                add_weight_gradient(weight_gradient, inputs * is_real, errors, is_first=start == 0)
            del scores, errors  # before the next ones are made
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients of hidden and weight for the gradient () of the loss."""
        hidden_gradient, weight_gradient = (None if made is None else made.mul_(gradient) for made in ctx.saved_tensors)
        return hidden_gradient, weight_gradient, None, None
