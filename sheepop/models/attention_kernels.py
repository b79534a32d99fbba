"""Attention and its gradients in squares of 64 queries by 64 keys, compiled by numba, which the nearest caches hold.

Scores and weights are never written to memory: the backward pass makes them again from the logarithms of the softmax's
sums. Squares of which nothing is seen are left out. The formulas are those of FlashAttention (Dao et al. 2022,
algorithm 1 and section B.2).
Shape letters: B batch, T time, H query heads, K key/value heads, C head width, N numbers of an item.
"""

import math
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from numpy.typing import NDArray

from sheepop.models.squares import (
    MULTIPLIES_BF16,
    SIDE,
    add_product,
    largest_of,
    multiply_heads,
    pair_along_columns,
    pair_along_rows,
    read_head,
    turn,
    write_head,
)
from sheepop.models.vector_exp import IN_ANY_ORDER, NOTHING, ONE, power
from sheepop.models.vectors import LANES

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Numbers = NDArray[Any]  # fp32, or the 16 bits of bf16
Items = NDArray[Any]  # fp32, or pairs of bf16 in 32 bits

HIDDEN = np.float32(-1e30)
UNSEEN, PARTLY, WHOLE = 0, 1, 2
ODD = np.uint32(0x9E3779B1)  # the golden ratio's fraction: neighbours become far apart
MIX_1, MIX_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)  # of MurmurHash3's last step
SHIFT_1, SHIFT_2 = np.uint32(16), np.uint32(13)
SIXTEEN, LOWER_HALF, UPPER_HALF = np.int32(16), np.int32(0xFFFF), np.int32(-0x10000)


def items_for(dtype: torch.dtype, width: int) -> Items:
    """Return an empty array whose rows are items in which heads of a type and width are multiplied, by the item."""
    in_pairs = dtype == torch.bfloat16 and MULTIPLIES_BF16 and width % (2 * LANES) == 0
    return np.empty((0, 2), dtype=np.int32) if in_pairs else np.empty((0, 1), dtype=np.float32)


@njit(nogil=True, error_model="numpy", cache=True)
def mix(
    query: Numbers,
    key: Numbers,
    value: Numbers,
    starts: Integers,
    mixed: Numbers,
    logs: Floats,
    items: Items,
    begin: int,
    end: int,
    window: int,
    sinks: int,
    dropout: float,
    seed: int,
) -> None:
    """Attend with the heads from `begin` to `end`, of B x H.

    Args:
        query: (B, H, T, C); as all of this shape, with numbers of a row side by side.
        key, value: (B, K, T, C).
        starts: (B, T), where the document of each token begins.
        mixed: (B, H, T, C), what comes out.
        logs: (B, H, T), the logarithm of each softmax's sum, comes out, too.
        items: what `items_for` returns.
        seed: of the weights that are dropped.
    """
    H, T, C = query.shape[1:]
    N, wide = items.shape[1], -(-T // SIDE) * SIDE
    queries, keys, values = new_rows(wide, C // N, items), new_rows(wide, C // N, items), new_rows(wide, C // N, items)
    turned, paired_values = np.empty((wide // SIDE, C // N, SIDE), items.dtype), new_rows(wide // N, C, items)
    scores, kept, pairs = new_square(), new_square(), new_rows(SIDE, SIDE // N, items)
    sums = np.empty((wide, C), dtype=np.float32)
    most, total = np.empty(SIDE, dtype=np.float32), np.empty(SIDE, dtype=np.float32)
    scale = np.float32(1 / math.sqrt(C))
    for head in range(begin, end):
        b, h = head // H, head % H
        group = h // (H // key.shape[1])
        read_head(query, b, h, queries)
        read_head(key, b, group, keys)
        read_head(value, b, group, values)
        turn_squares(keys, turned)
        along_time = paired(values, paired_values)
        sums[:] = NOTHING
        for t in range(0, wide, SIDE):
            mixed_here = sums[t : t + SIDE]
            most[:], total[:] = HIDDEN, NOTHING
            for s in range(0, t + SIDE, SIDE):
                sight = sight_of(starts[b], t, s, window, sinks)
                if sight == UNSEEN:
                    continue
                add_product(queries[t : t + SIDE], turned[s // SIDE], scores, False, False, True)
                if sight == PARTLY:
                    hide(scores, starts[b], t, s, window, sinks)
                soften(scores, scale, most, total, mixed_here)
                if dropout:
                    draw(kept, seed, head * wide + t, s, dropout)
                    multiply(scores, kept)
                seen = along_time[s // N : (s + SIDE) // N]
                add_product(by_query(scores, pairs), seen, mixed_here, s == t, False, False)
            for i in range(min(SIDE, T - t)):
                logs[b, h, t + i] = most[i] + np.log(total[i])
                share = ONE / total[i]
                for c in range(C):
                    mixed_here[i, c] *= share
        write_head(mixed, b, h, sums, ONE)


@njit(nogil=True, error_model="numpy", cache=True)
def find_gradients(
    gradient: Numbers,
    query: Numbers,
    key: Numbers,
    value: Numbers,
    starts: Integers,
    mixed: Numbers,
    logs: Floats,
    query_gradient: Numbers,
    key_gradient: Numbers,
    value_gradient: Numbers,
    items: Items,
    begin: int,
    end: int,
    window: int,
    sinks: int,
    dropout: float,
    seed: int,
) -> None:
    """Set the gradients of what `mix` was given, for the gradient (B, H, T, C) of what came out.

    Args:
        key_gradient, value_gradient: (B, H, T, C), each query head's own.
    """
    H, T, C = query.shape[1:]
    N, wide = items.shape[1], -(-T // SIDE) * SIDE
    queries, keys, values = new_rows(wide, C // N, items), new_rows(wide, C // N, items), new_rows(wide, C // N, items)
    errors = new_rows(wide, C // N, items)
    turned_keys, turned_values = (
        np.empty((wide // SIDE, C // N, SIDE), items.dtype),
        np.empty((wide // SIDE, C // N, SIDE), items.dtype),
    )
    paired_queries, paired_keys, paired_errors = (
        new_rows(wide // N, C, items),
        new_rows(wide // N, C, items),
        new_rows(wide // N, C, items),
    )
    query_errors, key_errors, value_errors = (
        np.empty((wide, C), dtype=np.float32),
        np.empty((wide, C), dtype=np.float32),
        np.empty((wide, C), dtype=np.float32),
    )
    weights, weight_errors, kept = new_square(), new_square(), new_square()
    pairs, columns = new_rows(SIDE, SIDE // N, items), new_rows(SIDE // N, SIDE, items)
    means, sums = np.zeros(wide, dtype=np.float32), np.zeros(wide, dtype=np.float32)
    scale = np.float32(1 / math.sqrt(C))
    for head in range(begin, end):
        b, h = head // H, head % H
        group = h // (H // key.shape[1])
        multiply_heads(gradient, mixed, b, h, means)
        sums[:T] = logs[b, h]
        read_head(gradient, b, h, errors)
        read_head(query, b, h, queries)
        read_head(key, b, group, keys)
        read_head(value, b, group, values)
        turn_squares(keys, turned_keys)
        turn_squares(values, turned_values)
        queries_along_time = paired(queries, paired_queries)
        keys_along_time, errors_along_time = paired(keys, paired_keys), paired(errors, paired_errors)
        query_errors[:], key_errors[:], value_errors[:] = NOTHING, NOTHING, NOTHING
        for t in range(0, wide, SIDE):
            here, here_along_time = slice(t, t + SIDE), slice(t // N, (t + SIDE) // N)
            for s in range(0, t + SIDE, SIDE):
                sight = sight_of(starts[b], t, s, window, sinks)
                if sight == UNSEEN:
                    continue
                seen, seen_along_time, is_diagonal = slice(s, s + SIDE), slice(s // N, (s + SIDE) // N), s == t
                add_product(queries[here], turned_keys[s // SIDE], weights, False, False, True)
                add_product(errors[here], turned_values[s // SIDE], weight_errors, False, False, True)
                if sight == PARTLY:
                    hide(weights, starts[b], t, s, window, sinks)
                if dropout:
                    draw(kept, seed, head * wide + t, s, dropout)
                    multiply(weight_errors, kept)
                find_errors(weights, weight_errors, scale, sums[here], means[here])
                if dropout:
                    multiply(weights, kept)
                by_key = by_keys(weights, columns)
                add_product(by_key, errors_along_time[here_along_time], value_errors[seen], False, is_diagonal, False)
                by_key = by_keys(weight_errors, columns)
                add_product(by_key, queries_along_time[here_along_time], key_errors[seen], False, is_diagonal, False)
                by_one = by_query(weight_errors, pairs)
                add_product(by_one, keys_along_time[seen_along_time], query_errors[here], is_diagonal, False, False)
        write_head(query_gradient, b, h, query_errors, scale)
        write_head(key_gradient, b, h, key_errors, scale)
        write_head(value_gradient, b, h, value_errors, ONE)


@njit(cache=True)
def new_rows(rows: int, columns: int, items: Items) -> Items:
    """Return zeros in the type of `items`."""
    return np.zeros((rows, columns), items.dtype)


@njit(cache=True)
def new_square() -> Floats:
    """Return memory for SIDE x SIDE numbers."""
    return np.empty((SIDE, SIDE), dtype=np.float32)


@njit(nogil=True, error_model="numpy", cache=True)
def turn_squares(rows: Items, turned: Items) -> None:
    """Set turned (T / SIDE, I, SIDE) to rows (T, I), each SIDE of them turned."""
    for square in range(len(turned)):
        turn(rows[square * SIDE : (square + 1) * SIDE], turned[square])


# What the next three do depends on the type of `pairs` alone, by which numba chooses when it compiles.


def paired(rows: Items, pairs: Items) -> Items:
    """Return rows (T, C) as what is added up along T: pairs of bf16 (T, C/2) as pairs (T/2, C), fp32 as it is."""
    raise NotImplementedError


def by_query(square: Floats, pairs: Items) -> Items:
    """Return a square (queries, keys) as what is added up along the keys: as pairs (SIDE, SIDE/2), or as it is."""
    raise NotImplementedError


def by_keys(square: Floats, pairs: Items) -> Items:
    """Return a square (queries, keys), turned, as what is added up along the queries; `pairs` is (SIDE/2, SIDE)."""
    raise NotImplementedError


@overload(paired, strict=False)
def paired_by_type(rows: Any, pairs: Any) -> Any:  # noqa: ARG001
    """Return `paired` for a type."""
    if rows.dtype == types.float32:
        return lambda rows, pairs: rows  # noqa: ARG005

    def pair(rows: Items, pairs: Items) -> Items:
        for r in range(len(pairs)):
            for i in range(rows.shape[1]):
                one, other = rows[2 * r, i], rows[2 * r + 1, i]
                pairs[r, 2 * i] = (one & LOWER_HALF) | (other << SIXTEEN)
                pairs[r, 2 * i + 1] = ((one >> SIXTEEN) & LOWER_HALF) | (other & UPPER_HALF)
        return pairs

    return pair


@overload(by_query, strict=False)
def by_query_of_type(square: Any, pairs: Any) -> Any:  # noqa: ARG001
    """Return `by_query` for a type."""
    if pairs.dtype == types.float32:
        return lambda square, pairs: square  # noqa: ARG005

    def pair(square: Floats, pairs: Items) -> Items:
        pair_along_rows(square, pairs)
        return pairs

    return pair


@overload(by_keys, strict=False)
def by_keys_of_type(square: Any, pairs: Any) -> Any:  # noqa: ARG001
    """Return `by_keys` for a type."""
    if pairs.dtype == types.float32:
        return lambda square, pairs: square.T  # noqa: ARG005

    def pair(square: Floats, pairs: Items) -> Items:
        pair_along_columns(square, pairs)
        return pairs.T

    return pair


@njit(nogil=True, error_model="numpy", cache=True)
def sight_of(starts: Integers, t: int, s: int, window: int, sinks: int) -> int:
    """Say whether SIDE queries from `t` on see none, a part or all of what SIDE keys from `s` on, not behind, are."""
    first, last = starts[t], starts[min(t + SIDE, len(starts)) - 1]
    if s + SIDE <= first or (window and s + SIDE <= t - window + 1 and s >= last + sinks):
        return UNSEEN
    if s == t or s < last:
        return PARTLY
    in_sinks = first == last and s + SIDE <= first + sinks
    return WHOLE if not window or s >= t + SIDE - window or in_sinks else PARTLY


@njit(nogil=True, error_model="numpy", cache=True)
def hide(scores: Floats, starts: Integers, t: int, s: int, window: int, sinks: int) -> None:
    """Set scores (SIDE, SIDE) to HIDDEN where a query, from `t` on, does not see a key, from `s` on."""
    for i in range(SIDE):
        own = t + i - s  # places count from the first of the keys
        start = (starts[t + i] if t + i < len(starts) else 0) - s
        sunk = start + sinks if window else start
        near = max(start, own - window + 1) if window else start
        for j in range(SIDE):
            is_seen = (j <= own) & (j >= start) & ((j >= near) | (j < sunk))
            scores[i, j] = scores[i, j] if is_seen else HIDDEN


@njit(nogil=True, error_model="numpy", fastmath=IN_ANY_ORDER, cache=True)
def soften(scores: Floats, scale: np.float32, most: Floats, total: Floats, mixed: Floats) -> None:
    """Turn scores (SIDE, SIDE) into powers of e, over the largest score of a query so far; rescale what was before.

    Args:
        scale: times which products are scores.
        most, total: (SIDE,), the largest score of each query and the sum of its powers.
        mixed: (SIDE, C), their sum with values.
    """
    for i in range(SIDE):
        largest = largest_of(scores, i)
        if largest > HIDDEN and largest * scale > most[i]:
            share = power(most[i] - largest * scale)
            most[i] = largest * scale
            total[i] *= share
            for c in range(mixed.shape[1]):
                mixed[i, c] *= share
        base, added = most[i] if most[i] > HIDDEN else NOTHING, NOTHING
        for j in range(SIDE):
            scores[i, j] = power(scores[i, j] * scale - base)
            added += scores[i, j]
        total[i] += added


@njit(nogil=True, error_model="numpy", fastmath=IN_ANY_ORDER, cache=True)
def find_errors(weights: Floats, errors: Floats, scale: np.float32, sums: Floats, means: Floats) -> None:
    """Turn products (SIDE, SIDE) into weights, and the gradients of these into the gradients of the scores."""
    for i in range(SIDE):
        log, mean = sums[i], means[i]
        for j in range(SIDE):
            weights[i, j] = power(weights[i, j] * scale - log)
            errors[i, j] = weights[i, j] * (errors[i, j] - mean)


@njit(nogil=True, error_model="numpy", cache=True)
def multiply(numbers: Floats, factors: Floats) -> None:
    """Multiply a square by another in place."""
    for i in range(SIDE):
        for j in range(SIDE):
            numbers[i, j] *= factors[i, j]


@njit(nogil=True, error_model="numpy", cache=True)
def draw(kept: Floats, seed: int, first: int, s: int, dropout: float) -> None:
    """Set kept (SIDE, SIDE) to what weights are multiplied by: nothing, or 1 / (1 - dropout).

    A weight's number depends on the seed, on its query, of those from `first` on, and on its key, of those from `s` on.
    """
    least, factor = np.uint32(min(round(dropout * 2**32), 2**32 - 1)), np.float32(1 / (1 - dropout))
    upper, lower = np.uint32(seed >> 32), np.uint32(seed & 0xFFFFFFFF)
    for i in range(SIDE):
        row = first + i
        own = scrambled(
            np.uint32(scrambled(np.uint32(lower ^ np.uint32(row))) ^ np.uint32(upper + np.uint32(row >> 32)))
        )
        for j in range(SIDE):
            number = scrambled(np.uint32(own + np.uint32(np.uint32(s + j) * ODD)))
            kept[i, j] = factor if number >= least else NOTHING


@njit(inline="always", cache=True)
def scrambled(bits: np.uint32) -> np.uint32:
    """Return 32 bits each of which depends on each of those given (the last step of MurmurHash3)."""
    bits = np.uint32(np.uint32(bits ^ (bits >> SHIFT_1)) * MIX_1)
    bits = np.uint32(np.uint32(bits ^ (bits >> SHIFT_2)) * MIX_2)
    return np.uint32(bits ^ (bits >> SHIFT_1))
