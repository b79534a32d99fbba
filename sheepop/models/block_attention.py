"""Attention for training on a CPU: blocks of queries by plain matrix products, with a backward pass of its own.

A block of queries multiplies all keys that it sees at once, and those behind it not at all, which is half of the work.
Its weights are kept for the backward pass where they are few, as exponentials cost a CPU more than reading them back;
beyond, they would be most of what a layer keeps, and are made again. PyTorch's fused kernel for the CPU works through
small tiles, in bf16 at a third of the speed of a product (`docs/log.md`, 2026-11-28). The formulas are those of
FlashAttention's appendix (Dao et al. 2022, section B.2), but for the sums of the softmax: making them again takes less
time than subtracting them when they are kept.
Shape letters: B batch, T time, S keys of a block, H query heads, K key/value heads, G = H/K, C head width, n queries.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sheepop.models.attention import visible
from sheepop.models.dropout import kept_entries

LEAST_QUERIES = 64  # of a block
MOST_BLOCKS = 16  # each is some ten calls
# For fewer tokens the fused kernel makes fewer calls, which only its bf16 tiles do not repay.
LEAST_TIME = {2: 64, 4: 256}  # by the bytes of a number
# For more, fp32 products gain less by their size than the tiles by staying in the processor's cache.
MOST_TIME = {2: 8192, 4: 1024}
MOST_KEPT = 256  # keys that a token sees: weights kept cost a sixth less time than weights made again


def suits_blocks(time: int, bytes_per_number: int, *, drops: bool) -> bool:
    """Say whether a CPU learns faster from texts of so many tokens in blocks.

    Args:
        drops: some of the weights are dropped. The fused kernel cannot, and what PyTorch does instead keeps all
            weights of a text three times.
    """
    if bytes_per_number not in LEAST_TIME:
        return False
    return drops or LEAST_TIME[bytes_per_number] <= time <= MOST_TIME[bytes_per_number]


def keeps(time: int, window: int, sinks: int) -> bool:
    """Say whether the weights of a text of so many tokens are kept for the backward pass, not made again in it.

    They are the same to the bit. Which of them were dropped is kept in any case.
    """
    return (time if not window or sinks else min(time, window)) <= MOST_KEPT


def learns_in_blocks(query: Tensor, key: Tensor, *, drops: bool) -> bool:
    """Say whether these are queries and keys to learn from, in blocks; with `drops` some weights are dropped."""
    dtype = learning_dtype(query, key)
    return dtype is not None and suits_blocks(query.shape[2], dtype.itemsize, drops=drops)


def learning_dtype(query: Tensor, key: Tensor) -> torch.dtype | None:
    """Return the type in which a CPU is to learn from as many queries as keys; None if these are no such ones."""
    if not (torch.is_grad_enabled() and query.requires_grad and query.device.type == "cpu"):
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return dtype if query.shape[2] == key.shape[2] else None


def as_computed(*parts: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys and values in the type of autocast on a CPU, if that is on."""
    if not torch.is_autocast_enabled("cpu"):
        return parts
    return tuple(part.to(torch.get_autocast_dtype("cpu")) for part in parts)


def weights_in_blocks(time: int, window: int, sinks: int) -> int:
    """Return how many weights a head has for a text of so many tokens, those that are zero in its blocks included."""
    return sum((here.stop - here.start) * (seen.stop - seen.start) for here, seen in blocks(time, window, sinks))


def block_attention(
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

    Args:
        query: (B, H, T, C).
        key, value: (B, K, T, C).
        window, sinks, document_ids, dropout: see `attention`.

    Returns:
        (B, H, T, C), laid out as (B, T, H, C).
    """
    query, key, value = as_computed(query, key, value)
    with torch.autocast("cpu", enabled=False):
        return BlockAttention.apply(query, key, value, window, sinks, document_ids, dropout)  # type: ignore[no-untyped-call, no-any-return]


def blocks(time: int, window: int, sinks: int) -> Iterator[tuple[slice, slice]]:
    """Yield for each block its queries and the keys that any of them sees: with sinks, which are in front, all."""
    is_short = window and not sinks
    size = max(LEAST_QUERIES, -(-time // MOST_BLOCKS))
    for start in range(0, time, size):
        stop = min(time, start + size)
        yield slice(start, stop), slice(max(0, start - window + 1) if is_short else 0, stop)


class BlockAttention(torch.autograd.Function):
    """Forward goes through the blocks of queries, and backward goes through them again."""

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
        function = opaque_forward if torch.compiler.is_compiling() else forward_in_blocks
        mixed, weights, masks = function(query, key, value, window, sinks, document_ids, dropout)
        ctx.save_for_backward(query, key, value, document_ids, *weights, *masks)
        ctx.window, ctx.sinks, ctx.dropout, ctx.num_weights = window, sinks, dropout, len(weights)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value for the gradient (B, H, T, C) of what came out."""
        query, key, value, document_ids, *rest = ctx.saved_tensors
        weights, masks = rest[: ctx.num_weights], rest[ctx.num_weights :]
        function = opaque_backward if torch.compiler.is_compiling() else backward_in_blocks
        gradients = function(
            gradient, query, key, value, ctx.window, ctx.sinks, document_ids, ctx.dropout, weights, masks
        )
        return *gradients, None, None, None, None


def forward_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    sinks: int,
    document_ids: Tensor | None,
    dropout: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return what was mixed (B, H, T, C), and of each block the weights, if kept, and which were not dropped."""
    (B, H, T, C), K = query.shape, key.shape[1]
    queries = by_group(query, K)  # (B, K, G, T, C)
    keys, values = key.reshape(B * K, T, C), value.reshape(B * K, T, C)
    mixed = query.new_empty(B, T, H, C).transpose(1, 2)
    mixed_by_group = by_group(mixed, K)
    all_weights, masks = [], []
    for here, seen in blocks(T, window, sinks):
        rows = queries[:, :, :, here].reshape(B * K, -1, C)  # (BK, Gn, C)
        weights = weights_of(rows, keys, B, here, seen, window, sinks, document_ids)  # (BK, Gn, S)
        if keeps(T, window, sinks):
            all_weights.append(weights)
        if dropout:
            masks.append(kept_entries(weights, dropout))
            weights = weights * masks[-1]
        mixed_here = weights @ values[:, seen]
        if dropout:
            mixed_here.mul_(1 / (1 - dropout))
        mixed_by_group[:, :, :, here] = mixed_here.view(B, K, H // K, -1, C)
    return mixed, all_weights, masks


def backward_in_blocks(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    sinks: int,
    document_ids: Tensor | None,
    dropout: float,
    all_weights: list[Tensor],
    masks: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; the weights are made again where none are given."""
    (B, H, T, C), K = query.shape, key.shape[1]
    queries, gradients = by_group(query, K), by_group(gradient, K)  # (B, K, G, T, C) each
    keys, values = key.reshape(B * K, T, C), value.reshape(B * K, T, C)
    query_gradient = query.new_empty(B, T, H, C).transpose(1, 2)
    query_gradient_by_group = by_group(query_gradient, K)
    key_gradient, value_gradient = keys.new_zeros(keys.shape), values.new_zeros(values.shape)  # (BK, T, C)
    scale = 1 / math.sqrt(C)
    for number, (here, seen) in enumerate(blocks(T, window, sinks)):
        rows = queries[:, :, :, here].reshape(B * K, -1, C)  # (BK, Gn, C)
        errors = gradients[:, :, :, here].reshape(B * K, -1, C)
        if all_weights:
            weights = all_weights[number]  # (BK, Gn, S)
        else:
            weights = weights_of(rows, keys, B, here, seen, window, sinks, document_ids)
        dropped = weights
        weight_errors = errors @ values[:, seen].transpose(1, 2)
        if dropout:
            kept = masks[number].to(weights.dtype)  # once for two products
            dropped, weight_errors = weights * kept, weight_errors.mul_(kept).mul_(1 / (1 - dropout))
        value_gradient[:, seen].baddbmm_(dropped.transpose(1, 2), errors, alpha=1 / (1 - dropout))
        score_errors = torch._softmax_backward_data(weight_errors, weights, -1, weights.dtype, grad_input=weight_errors)
        key_gradient[:, seen].baddbmm_(score_errors.transpose(1, 2), rows, alpha=scale)
        moved = (score_errors @ keys[:, seen]).mul_(scale)
        query_gradient_by_group[:, :, :, here] = moved.view(B, K, H // K, -1, C)
    return query_gradient, key_gradient.view(B, K, T, C), value_gradient.view(B, K, T, C)


# For the compiler each pass is one operation: what it would make of the blocks is no faster and takes more memory.
opaque_forward = torch.library.custom_op(
    "sheepop::forward_in_blocks", forward_in_blocks, mutates_args=(), tags=torch.Tag.nondeterministic_seeded
)
opaque_backward = torch.library.custom_op("sheepop::backward_in_blocks", backward_in_blocks, mutates_args=())


@opaque_forward.register_fake
def shapes_of_forward(
    query: Tensor,
    key: Tensor,
    _value: Tensor,
    window: int,
    sinks: int,
    _document_ids: Tensor | None,
    dropout: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return what has the shapes, types and layouts of what `forward_in_blocks` returns, for the compiler."""
    (B, H, T, C), K = query.shape, key.shape[1]
    sizes = [
        (B * K, H // K * (here.stop - here.start), seen.stop - seen.start) for here, seen in blocks(T, window, sinks)
    ]
    weights = [query.new_empty(size) for size in sizes] if keeps(T, window, sinks) else []
    masks = [query.new_empty(size, dtype=torch.bool) for size in sizes] if dropout else []
    return query.new_empty(B, T, H, C).transpose(1, 2), weights, masks


@opaque_backward.register_fake
def shapes_of_backward(
    _gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _window: int,
    _sinks: int,
    _document_ids: Tensor | None,
    _dropout: float,
    _all_weights: list[Tensor],
    _masks: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what has the shapes, types and layouts of what `backward_in_blocks` returns, for the compiler."""
    B, H, T, C = query.shape
    return query.new_empty(B, T, H, C).transpose(1, 2), key.new_empty(key.shape), value.new_empty(value.shape)


def weights_of(
    rows: Tensor,
    keys: Tensor,
    batch_size: int,
    here: slice,
    seen: slice,
    window: int,
    sinks: int,
    document_ids: Tensor | None,
) -> Tensor:
    """Return the weights (BK, Gn, S) of a block's queries (BK, Gn, C) for those of the keys (BK, T, C) it sees."""
    scores = torch.baddbmm(
        rows.new_empty(()), rows, keys[:, seen].transpose(1, 2), beta=0, alpha=1 / math.sqrt(rows.shape[-1])
    )
    by_head = scores.view(batch_size, -1, here.stop - here.start, scores.shape[-1])
    hide(by_head, seen, window, sinks, document_ids)
    return torch.softmax(scores, -1, out=scores)


def without_others(value: Tensor, query: Tensor) -> Tensor:
    """Return values in memory of their own if they are a view of more that would be kept for their sake alone.

    Queries that were turned or normalised are no view of what was projected, as values then still are.
    """
    return value if value.stride(2) == query.stride(2) else value.contiguous()


def by_group(heads: Tensor, num_kv_heads: int) -> Tensor:
    """View (B, H, T, C) as (B, K, G, T, C): the query heads that share keys together."""
    return heads.unflatten(1, (num_kv_heads, -1))  # type: ignore[no-untyped-call, no-any-return]


def hide(scores: Tensor, seen: slice, window: int, sinks: int, document_ids: Tensor | None) -> None:
    """Set the scores (B, H, n, S) of the last n tokens of `seen` to -∞ where they do not see the key."""
    if not window and document_ids is None:
        scores = scores[..., -scores.shape[2] :]  # all keys before the block are seen
    elif document_ids is not None:
        document_ids = document_ids[:, seen]
    mask = visible(*scores.shape[-2:], window=window, sinks=sinks, document_ids=document_ids, device=scores.device)
    scores.masked_fill_(~mask, -math.inf)
