"""Parts of a tensor whose gradients are joined without a copy where they already lie side by side."""

from typing import Any

import torch
from torch import Tensor


def split(whole: Tensor, sizes: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
    """Return `whole.split(sizes, dim)`, for a backward pass that may write the gradients into one tensor.

    Compiled code joins them in the pass that makes them.
    """
    if torch.compiler.is_compiling() or not whole.requires_grad:
        return whole.split(sizes, dim)  # type: ignore[no-untyped-call, no-any-return]
    return Split.apply(whole, sizes, dim)  # type: ignore[no-untyped-call, no-any-return]


class Split(torch.autograd.Function):
    """PyTorch's own gradient of a split copies the parts in any case."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, sizes: tuple[int, ...], dim: int) -> tuple[Tensor, ...]:
        """Return views of the whole."""
        ctx.dim = dim
        return whole.split(sizes, dim)  # type: ignore[no-untyped-call, no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of the whole."""
        return join(gradients, ctx.dim), None, None


def join(parts: tuple[Tensor, ...], dim: int) -> Tensor:
    """Return `torch.cat(parts, dim)`, as a view of the memory of neighbours."""
    first, place = parts[0], parts[0].storage_offset()
    for part in parts:
        has_layout = part.stride() == first.stride() and part.dtype == first.dtype
        if not has_layout or part.storage_offset() != place or not shares_memory(part, first):
            return torch.cat(parts, dim)
        place += part.shape[dim] * part.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(shape, first.stride(), first.storage_offset())


def shares_memory(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors are views of one block of memory."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
