"""Attention for training on a CPU by compiled kernels (`attention_kernels.py`), with a backward pass of its own.

Shape letters: B batch, T time, H query heads, K key/value heads, G = H/K, C head width.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from sheepop.models.block_attention import as_computed, learning_dtype, without_others
from sheepop.models.positions import document_starts
from sheepop.utils.threads import on_all_threads

LEAST_TIME = 64  # a square of the kernels; of a shorter text most of it would be empty
WIDTHS = 16  # the head width is a multiple of it
TYPES = (torch.float32, torch.bfloat16)


def suits_kernels(time: int, head_dim: int) -> bool:
    """Say whether kernels are there for such heads, and texts of so many tokens fill their squares."""
    return time >= LEAST_TIME and head_dim % WIDTHS == 0


def learns_by_kernels(query: Tensor, key: Tensor) -> bool:
    """Say whether these are queries and keys to learn from by kernels."""
    return learning_dtype(query, key) in TYPES and suits_kernels(*query.shape[2:])


def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int = 0,
    sinks: int = 0,
    document_ids: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return what `attention` returns for as many queries as keys, without a mask of the caller's.

    All sums are in fp32, whatever the type.

    Args:
        query: (B, H, T, C) in fp32 or bf16, C a multiple of 16.
        key, value: (B, K, T, C).
        window, sinks, document_ids, dropout: see `attention`.

    Returns:
        (B, H, T, C), laid out as (B, T, H, C).
    """
    query, key, value = as_computed(query, key, value)
    return KernelAttention.apply(query, key, value, window, sinks, document_ids, dropout)  # type: ignore[no-untyped-call, no-any-return]


class KernelAttention(torch.autograd.Function):
    """What is kept are the inputs, the output, and a number for each query and head."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        window: int,
        sinks: int,
        document_ids: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """Map (B, H, T, C) and twice (B, K, T, C) to (B, H, T, C)."""
        value = without_others(value, query)
        starts = None if document_ids is None else document_starts(document_ids)
        function = opaque_forward if torch.compiler.is_compiling() else forward_by_kernels
        mixed, logs, seed = function(query, key, value, window, sinks, starts, dropout)
        ctx.save_for_backward(query, key, value, starts, mixed, logs, seed)
        ctx.window, ctx.sinks, ctx.dropout = window, sinks, dropout
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value for the gradient (B, H, T, C) of what came out."""
        query, key, value, starts, mixed, logs, seed = ctx.saved_tensors
        function = opaque_backward if torch.compiler.is_compiling() else backward_by_kernels
        whole = function(gradient, query, key, value, ctx.window, ctx.sinks, starts, ctx.dropout, mixed, logs, seed)
        return *parts_of(whole, query, key), None, None, None, None


def forward_by_kernels(
    query: Tensor, key: Tensor, value: Tensor, window: int, sinks: int, starts: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what was mixed (B, H, T, C), the logarithms (B, H, T) of the softmax's sums, and the seed of what dropped.

    Args:
        starts: (B, T), where the document of each token begins.
    """
    from sheepop.models.attention_kernels import items_for, mix  # numba, which takes half a second to load

    B, H, T, C = query.shape
    mixed, logs = query.new_empty(B, T, H, C).transpose(1, 2), torch.empty(B, H, T)
    seed = torch.randint(2**62, (1,)) if dropout else torch.zeros(1, dtype=torch.int64)
    tensors = query, key, value, starts_of(query, starts), mixed, logs
    arrays, options = [*map(array_of, tensors), items_for(query.dtype, C)], (window, sinks, dropout, seed.item())
    on_all_threads(lambda part: mix(*arrays, part.start, part.stop, *options), rows=B * H)
    return mixed, logs, seed


def backward_by_kernels(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    sinks: int,
    starts: Tensor | None,
    dropout: float,
    mixed: Tensor,
    logs: Tensor,
    seed: Tensor,
) -> Tensor:
    """Return the gradients of query, key and value side by side (B, T, H+2K, C), as they are projected together."""
    from sheepop.models.attention_kernels import find_gradients, items_for  # numba

    (B, H, T, C), K = query.shape, key.shape[1]
    whole = query.new_empty(B, T, H + 2 * K, C)
    of_query, *of_shared = parts_of(whole, query, key)
    # Of keys that several heads share, each head's own come out, and are added up in fp32.
    of_each = of_shared if H == K else [torch.empty(B, T, H, C).transpose(1, 2) for _ in of_shared]
    tensors = gradient, query, key, value, starts_of(query, starts), mixed, logs, of_query, *of_each
    arrays, options = [*map(array_of, tensors), items_for(query.dtype, C)], (window, sinks, dropout, seed.item())
    on_all_threads(lambda part: find_gradients(*arrays, part.start, part.stop, *options), rows=B * H)
    if H != K:
        for total, each in zip(of_shared, of_each, strict=True):
            total.copy_(each.unflatten(1, (K, H // K)).sum(2))  # type: ignore[no-untyped-call]
    return whole


def parts_of(whole: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Return what (B, T, H+2K, C) holds of queries (B, H, T, C), keys and values (B, K, T, C)."""
    H, K = query.shape[1], key.shape[1]
    return whole.transpose(1, 2).split((H, K, K), dim=1)  # type: ignore[no-untyped-call, no-any-return]


def starts_of(query: Tensor, starts: Tensor | None) -> Tensor:
    """Return where the document of each token begins, (B, T): at the first, if nothing else is known."""
    return torch.zeros(query.shape[0], query.shape[2], dtype=torch.int64) if starts is None else starts


def array_of(tensor: Tensor) -> NDArray[Any]:
    """Return a tensor as an array, numbers of a row side by side, bf16 as its bits."""
    tensor = tensor.detach() if tensor.stride(-1) == 1 else tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


# For the compiler each pass is one operation.
opaque_forward = torch.library.custom_op(
    "sheepop::forward_by_kernels", forward_by_kernels, mutates_args=(), tags=torch.Tag.nondeterministic_seeded
)
opaque_backward = torch.library.custom_op("sheepop::backward_by_kernels", backward_by_kernels, mutates_args=())


@opaque_forward.register_fake
def shapes_of_forward(
    query: Tensor, _key: Tensor, _value: Tensor, _window: int, _sinks: int, _starts: Tensor | None, _dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what has the shapes, types and layouts of what `forward_by_kernels` returns, for the compiler."""
    B, H, T, C = query.shape
    logs, seed = query.new_empty(B, H, T, dtype=torch.float32), query.new_empty(1, dtype=torch.int64)
    return query.new_empty(B, T, H, C).transpose(1, 2), logs, seed


@opaque_backward.register_fake
def shapes_of_backward(
    _gradient: Tensor,
    query: Tensor,
    key: Tensor,
    _value: Tensor,
    _window: int,
    _sinks: int,
    _starts: Tensor | None,
    _dropout: float,
    _mixed: Tensor,
    _logs: Tensor,
    _seed: Tensor,
) -> Tensor:
    """Return what has the shape, type and layout of what `backward_by_kernels` returns, for the compiler."""
    (B, H, T, C), K = query.shape, key.shape[1]
    return query.new_empty(B, T, H + 2 * K, C)
