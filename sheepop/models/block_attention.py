"""Attention for training on a CPU: blocks of queries by plain matrix products, with a backward pass of its own.

A block of queries multiplies all keys that it sees at once, and those behind it not at all, which is half of the work.
Its weights are kept for the backward pass, as a CPU has the memory for them and exponentials cost it more than reading
them back. PyTorch's fused kernel for the CPU works through small tiles, in bf16 at a third of the speed of a product
(`docs/log.md`, 2026-11-28). The formulas are those of FlashAttention's appendix (Dao et al. 2022, section B.2).
Shape letters: B batch, T time, S keys of a block, H query heads, K key/value heads, G = H/K, C head width, n queries.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sheepop.models.attention import visible

LEAST_QUERIES = 64  # of a block
MOST_BLOCKS = 8  # each is some ten calls, and compiled code grows with them
# For fewer tokens the fused kernel makes fewer calls, which only its bf16 tiles do not repay.
LEAST_TIME = {2: 64, 4: 256}  # by the bytes of a number
MOST_TIME = 1024  # beyond, the weights would be most of what a layer keeps


def suits_blocks(time: int, bytes_per_number: int) -> bool:
    """Say whether a CPU learns faster from texts of so many tokens in blocks, and has the memory for it."""
    return LEAST_TIME.get(bytes_per_number, time + 1) <= time <= MOST_TIME


def learns_in_blocks(query: Tensor, key: Tensor) -> bool:
    """Say whether these are queries and keys to learn from, in blocks."""
    if not (torch.is_grad_enabled() and query.requires_grad and query.device.type == "cpu"):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return query.shape[2] == key.shape[2] and suits_blocks(query.shape[2], dtype.itemsize)


def weights_in_blocks(time: int, window: int, sinks: int) -> int:
    """Return how many weights a head keeps for a text of so many tokens, those that are zero included."""
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
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
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
    """Forward keeps the weights of each block, backward goes through the blocks again."""

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
        (B, H, T, C), K = query.shape, key.shape[1]
        queries = by_group(query, K)  # (B, K, G, T, C)
        key, value = key.reshape(B * K, T, C), value.reshape(B * K, T, C)
        mixed = query.new_empty(B, T, H, C).transpose(1, 2)
        mixed_by_group = by_group(mixed, K)
        all_weights, all_kept = [], []
        for here, seen in blocks(T, window, sinks):
            rows = queries[:, :, :, here].reshape(B * K, -1, C)  # (BK, Gn, C)
            scores = torch.baddbmm(
                rows.new_empty(()), rows, key[:, seen].transpose(1, 2), beta=0, alpha=1 / math.sqrt(C)
            )
            hide(scores.view(B, H, -1, scores.shape[-1]), seen, window, sinks, document_ids)
            weights = scores.softmax(-1)  # (BK, Gn, S)
            all_weights.append(weights)
            if dropout:
                weights, kept = torch.native_dropout(weights, dropout, True)
                all_kept.append(kept)
            mixed_by_group[:, :, :, here] = (weights @ value[:, seen]).view(B, K, H // K, -1, C)
        ctx.save_for_backward(query, key, value, *all_weights, *all_kept)
        ctx.bounds, ctx.dropout = list(blocks(T, window, sinks)), dropout
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value for the gradient (B, H, T, C) of what came out."""
        query, key, value, *rest = ctx.saved_tensors
        (B, H, T, C), K = query.shape, key.shape[0] // query.shape[0]
        all_weights, all_kept = rest[: len(ctx.bounds)], rest[len(ctx.bounds) :]
        queries, gradients = by_group(query, K), by_group(gradient, K)  # (B, K, G, T, C) each
        query_gradient = query.new_empty(B, T, H, C).transpose(1, 2)
        query_gradient_by_group = by_group(query_gradient, K)
        key_gradient, value_gradient = torch.zeros_like(key), torch.zeros_like(value)  # (BK, T, C) each
        scale = 1 / math.sqrt(C)
        for number, (here, seen) in enumerate(ctx.bounds):
            rows = queries[:, :, :, here].reshape(B * K, -1, C)  # (BK, Gn, C)
            errors = gradients[:, :, :, here].reshape(B * K, -1, C)
            weights = dropped = all_weights[number]  # (BK, Gn, S)
            weight_errors = errors @ value[:, seen].transpose(1, 2)
            if ctx.dropout:
                kept = (all_kept[number] / (1 - ctx.dropout)).to(weights.dtype)
                dropped, weight_errors = weights * kept, weight_errors * kept
            value_gradient[:, seen].baddbmm_(dropped.transpose(1, 2), errors)
            score_errors = torch._softmax_backward_data(weight_errors, weights, -1, weights.dtype)
            key_gradient[:, seen].baddbmm_(score_errors.transpose(1, 2), rows, alpha=scale)
            moved = (score_errors @ key[:, seen]).mul_(scale)
            query_gradient_by_group[:, :, :, here] = moved.view(B, K, H // K, -1, C)
        keys = (gradient.view(B, K, T, C) for gradient in (key_gradient, value_gradient))
        return query_gradient, *keys, None, None, None, None


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
