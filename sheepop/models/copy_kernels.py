"""The sums over what may be copied (`copying.py`) and their gradients in squares of 64 queries by 64 places, by numba.

Scores are never written to memory: the backward pass makes them again. Each text is work for two threads.
Shape letters: B batch, T time, S of it that fills the last square, W width.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from sheepop.models.attention_kernels import (
    HIDDEN,
    PARTLY,
    UNSEEN,
    new_square,
    sight_of,
    turn_squares,
)
from sheepop.models.squares import SIDE, add_product, largest_of
from sheepop.models.vector_exp import IN_ANY_ORDER, NOTHING, power

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Tokens = NDArray[np.int32]

PARTS = 2  # of a text
FIRST_SHARE = 0.7071  # of the queries is the first part: a later query sees more


@njit(cache=True)
def queries_of(part: int, wide: int) -> tuple[int, int]:
    """Return where the queries of a part of a text of so many begin and end."""
    cut = int(FIRST_SHARE * (wide // SIDE) + 0.5) * SIDE
    return (0, cut) if part == 0 else (cut, wide)


@njit(nogil=True, error_model="numpy", cache=True)
def find_sums(
    query: Floats,
    key: Floats,
    offered: Tokens,
    targets: Tokens,
    starts: Integers,
    totals: Floats,
    most: Floats,
    begin: int,
    end: int,
) -> None:
    """Find the sums for parts of texts, from `begin` to `end` of B x PARTS.

    Args:
        query, key: (B, S, W).
        offered, targets: (B, S), the token that followed each place, and what each query is to copy.
        starts: (B, T), where the document of each token begins.
        totals: (2, B, S), the sums of all powers of e and of those of places that offer the target come out.
        most: (B, S), over which scores the powers are comes out: the largest that a query sees.
    """
    wide, W = query.shape[1:]
    turned, scores = np.empty((wide // SIDE, W, SIDE), dtype=np.float32), new_square()
    for unit in range(begin, end):
        b, part = unit // PARTS, unit % PARTS
        turn_squares(key[b], turned)
        first, last = queries_of(part, wide)
        for t in range(first, last, SIDE):
            here = slice(t, t + SIDE)
            most[b, here], totals[:, b, here] = HIDDEN, NOTHING
            for s in range(0, t + SIDE, SIDE):
                sight = sight_of(starts[b], t, s, 0, 0)
                if sight == UNSEEN:
                    continue
                add_product(query[b, here], turned[s // SIDE], scores, False, False, True)
                if sight == PARTLY:
                    hide(scores, starts[b], t, s)
                add_powers(scores, offered[b, s : s + SIDE], targets[b, here], most[b, here], totals[:, b, here])


@njit(nogil=True, error_model="numpy", cache=True)
def find_gradients(
    query: Floats,
    key: Floats,
    offered: Tokens,
    targets: Tokens,
    starts: Integers,
    most: Floats,
    shares: Floats,
    query_gradient: Floats,
    key_gradients: Floats,
    begin: int,
    end: int,
) -> None:
    """Add to the gradients of queries and keys, for parts of texts.

    Args:
        query, key, offered, targets, starts, most: as of `find_sums`.
        shares: (2, B, S), times which a power is the gradient of its score: of each place, and what is added where it
            offers the target.
        query_gradient: (B, S, W).
        key_gradients: (PARTS, B, S, W), of each part; their sum is the gradient.
    """
    wide, W = query.shape[1:]
    turned, errors = np.empty((wide // SIDE, W, SIDE), dtype=np.float32), new_square()
    for unit in range(begin, end):
        b, part = unit // PARTS, unit % PARTS
        turn_squares(key[b], turned)
        first, last = queries_of(part, wide)
        for t in range(first, last, SIDE):
            here = slice(t, t + SIDE)
            for s in range(0, t + SIDE, SIDE):
                sight, seen, is_diagonal = sight_of(starts[b], t, s, 0, 0), slice(s, s + SIDE), s == t
                if sight == UNSEEN:
                    continue
                add_product(query[b, here], turned[s // SIDE], errors, False, False, True)
                if sight == PARTLY:
                    hide(errors, starts[b], t, s)
                find_errors(errors, offered[b, seen], targets[b, here], most[b, here], shares[:, b, here])
                add_product(errors, key[b, seen], query_gradient[b, here], is_diagonal, False, False)
                add_product(errors.T, query[b, here], key_gradients[part, b, seen], False, is_diagonal, False)


@njit(nogil=True, error_model="numpy", cache=True)
def hide(scores: Floats, starts: Integers, t: int, s: int) -> None:
    """Set scores (SIDE, SIDE) to HIDDEN where a query, from `t` on, does not see a place, from `s` on."""
    for i in range(SIDE):
        own = t + i - s  # itself, which it does not see; places count from the first of the square
        start = (starts[t + i] if t + i < len(starts) else 0) - s
        for j in range(SIDE):
            scores[i, j] = scores[i, j] if (j < own) & (j >= start) else HIDDEN


@njit(nogil=True, error_model="numpy", fastmath=IN_ANY_ORDER, cache=True)
def add_powers(scores: Floats, offered: Tokens, targets: Tokens, most: Floats, totals: Floats) -> None:
    """Add powers of e of scores (SIDE, SIDE), over the largest of each query so far, to its sums, (2, SIDE)."""
    for i in range(SIDE):
        largest = largest_of(scores, i)
        if largest > most[i]:
            share = power(most[i] - largest)
            most[i] = largest
            totals[0, i] *= share
            totals[1, i] *= share
        if most[i] <= HIDDEN and largest <= HIDDEN:  # of NaN neither is more nor less
            continue
        base, target, total, right = most[i], targets[i], NOTHING, NOTHING
        for j in range(SIDE):
            made = power(scores[i, j] - base)
            total += made
            right += made if offered[j] == target else NOTHING
        totals[0, i] += total
        totals[1, i] += right


@njit(nogil=True, error_model="numpy", fastmath=IN_ANY_ORDER, cache=True)
def find_errors(scores: Floats, offered: Tokens, targets: Tokens, most: Floats, shares: Floats) -> None:
    """Turn scores (SIDE, SIDE) into their gradients, by the shares (2, SIDE) of each query."""
    for i in range(SIDE):
        base, target, share = most[i], targets[i], shares[0, i]
        right_share = share + shares[1, i]
        for j in range(SIDE):
            made = power(scores[i, j] - base)
            scores[i, j] = made * (right_share if offered[j] == target else share)
