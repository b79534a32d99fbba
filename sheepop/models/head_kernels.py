"""The softmax of the head and its gradients, compiled by numba.

Of bf16, logits become the gradient of the loss where they lie. PyTorch's operators turn them into a copy of twice the
size, pass over that five times, and turn it back; here a row becomes fp32 in a near cache only, of which nothing but
the result is written to memory. In fp32 the products are made here, too, in blocks of 256 entries by 128 tokens, whose
logits are still in a cache when they become powers of e. Entries come first, so that every product reads the weight as
it lies, and none a copy in another order.
Shape letters: N tokens, a multiple of 128, V entries, L of them in the last block, if that is not a whole one, rounded
up to a multiple of 4, D width, P width of a panel.
"""

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from sheepop.models.rounding_kernels import SIXTEEN, round_to_bf16
from sheepop.models.squares import PANEL, add_panels
from sheepop.models.vector_exp import IN_ANY_ORDER, LOWEST, NOTHING, ONE, exp_fp32, power
from sheepop.utils.threads import on_all_threads

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

TOKENS, ENTRIES = 128, 256  # of a block
FAR = np.float32(40)
HIDDEN = np.float32(-3e38)
QUIET_NAN = np.uint16(0x7FC0)
# The bits of fp32 numbers, read as integers, are in their order, once those of negative ones are turned round but for
# the sign. The largest of integers is found by vectors; that of numbers, for the sake of NaN, is not.
WITHOUT_SIGN, SIGN, FIRST = np.int32(0x7FFFFFFF), np.int32(31), np.int32(-(2**31))


def turn_into_errors(logits: Tensor, targets: Tensor) -> Tensor:
    """Replace logits by the gradient of the loss at each: the probability, less one at the target.

    Args:
        logits: (n, V) in bf16, in one piece; all between is fp32.
        targets: (n,) int64, 0 to V - 1.

    Returns:
        -ln p(target) in nats, (n,) fp32.
    """
    losses = torch.empty(len(logits))
    bits, wanted, found = logits.view(torch.uint16).numpy(), targets.numpy(), losses.numpy()
    on_all_threads(lambda part: fill_errors(bits[part], wanted[part], found[part]), rows=len(logits))
    return losses


@njit(nogil=True, fastmath=IN_ANY_ORDER, error_model="numpy", cache=True)
def fill_errors(logits: NDArray[np.uint16], targets: Integers, losses: Floats) -> None:
    """Do what `turn_into_errors` does on one thread."""
    powers = np.empty(logits.shape[1], dtype=np.float32)
    bits, unsigned = powers.view(np.int32), powers.view(np.uint32)
    largest = np.empty(1, dtype=np.int32)
    for n in range(len(logits)):
        row = logits[n]
        most = FIRST
        for v in range(len(row)):
            number = np.int32(np.uint32(row[v]) << SIXTEEN)
            bits[v] = number
            place = number ^ ((number >> SIGN) & WITHOUT_SIGN)
            most = place if place > most else most
        largest[0] = most ^ ((most >> SIGN) & WITHOUT_SIGN)
        highest = largest.view(np.float32)[0]
        wanted = powers[targets[n]] - highest
        total = NOTHING
        for v in range(len(row)):
            powers[v] = exp_fp32(powers[v] - highest)
            total += powers[v]
        losses[n] = np.log(total) - wanted
        if not np.isfinite(total):  # the rounding below would make numbers of NaN
            row[:] = QUIET_NAN
            continue
        share = ONE / total
        for v in range(len(row)):
            powers[v] *= share
        powers[targets[n]] -= ONE
        round_to_bf16(unsigned)
        for v in range(len(row)):
            row[v] = np.uint16(unsigned[v] >> SIXTEEN)


def new_powers(tokens: int, entries: int) -> Tensor:
    """Return memory for the powers of at least so many tokens and entries: blocks of both, each (256, 128)."""
    return torch.empty(-(-tokens // TOKENS), -(-entries // ENTRIES), ENTRIES, TOKENS)


@njit(nogil=True, error_model="numpy", cache=True)
def find_powers(
    inputs: Floats,
    weight: Floats,
    last: Floats,
    targets: Integers,
    powers: Floats,
    scores: Floats,
    bases: Floats,
    totals: Floats,
    begin: int,
    end: int,
) -> None:
    """Make the powers of e of the logits of blocks of tokens, from `begin` to `end`, over a base of each token's own.

    The base is the largest logit of the first entries, and a later one where that is so much larger that its power
    would come near to the largest number: then what was made before is changed. So each block is in a near cache still.

    Args:
        inputs: (N / 128, 128 / P, D, P), what the head reads, turned.
        weight, last: (V, D), and (L, D), its rows in the last block if that is not a whole one.
        targets: (N,), 0 to V - 1.
        powers: what `new_powers` returns, comes out.
        scores, bases, totals: (N,), the logit of each target, the base, and the sum of the powers come out.
    """
    bases[begin * TOKENS : end * TOKENS], totals[begin * TOKENS : end * TOKENS] = HIDDEN, NOTHING
    largest = np.empty(TOKENS, dtype=np.float32)
    for v in range(powers.shape[1]):
        entries = entries_of(weight, last, v)
        for t in range(begin, end):
            here = slice(t * TOKENS, (t + 1) * TOKENS)
            base, total, wanted = bases[here], totals[here], targets[here]
            block = powers[t, v, : len(entries)]
            add_panels(entries, inputs[t], block, True)
            block[len(weight) - v * ENTRIES :] = HIDDEN
            for i in range(TOKENS):
                if v * ENTRIES <= wanted[i] < (v + 1) * ENTRIES:
                    scores[t * TOKENS + i] = block[wanted[i] % ENTRIES, i]
            find_largest(block, largest)
            for i in range(TOKENS):
                if largest[i] > base[i] + FAR:
                    rescale(powers[t, :v, :, i], total[i : i + 1], base[i] - largest[i])
                    base[i] = largest[i]
            soften(block, base, total)


@njit(nogil=True, error_model="numpy", cache=True)
def entries_of(rows: Floats, last: Floats, v: int) -> Floats:
    """Return the rows of a block of entries, whose last ones lie in `last` if they fill no block."""
    return rows[v * ENTRIES : (v + 1) * ENTRIES] if (v + 1) * ENTRIES <= len(rows) else last


@njit(nogil=True, fastmath=IN_ANY_ORDER, error_model="numpy", cache=True)
def find_largest(scores: Floats, largest: Floats) -> None:
    """Set the largest (128,) of a block of scores (n, 128) for each token, which is not NaN unless all are."""
    largest[:] = HIDDEN
    for v in range(len(scores)):
        for i in range(TOKENS):
            score = scores[v, i]
            largest[i] = score if score > largest[i] else largest[i]


@njit(nogil=True, error_model="numpy", cache=True)
def rescale(powers: Floats, total: Floats, exponent: np.float32) -> None:
    """Multiply powers and their sum by a power of e."""
    factor = NOTHING if exponent <= LOWEST else np.exp(exponent)
    powers *= factor
    total *= factor


@njit(nogil=True, fastmath=IN_ANY_ORDER, error_model="numpy", cache=True)
def soften(scores: Floats, base: Floats, total: Floats) -> None:
    """Turn a block of scores (n, 128) into powers of e, over a base of each token, and add them to their sums."""
    for v in range(len(scores)):
        for i in range(TOKENS):
            scores[v, i] = power(scores[v, i] - base[i])
            total[i] += scores[v, i]


@njit(nogil=True, error_model="numpy", cache=True)
def find_hidden_gradient(
    powers: Floats, weight: Floats, last: Floats, factors: Floats, gradient: Floats, begin: int, end: int
) -> None:
    """Set the gradient (N, D) of what the head read, for blocks of tokens from `begin` to `end`.

    Args:
        powers: those of `find_powers`, that of each target less what makes it an error.
        weight, last: as of `find_powers`.
        factors: (N,), times which powers are the gradients of the logits.
    """
    for v in range(powers.shape[1]):
        entries = entries_of(weight, last, v)
        panels = entries.reshape(len(entries), -1, PANEL).transpose(1, 0, 2)  # a view, here as fast as a copy
        for t in range(begin, end):
            here = gradient[t * TOKENS : (t + 1) * TOKENS]
            add_panels(powers[t, v, : len(entries)].T, panels, here, v == 0)
    for i in range(begin * TOKENS, end * TOKENS):
        gradient[i] *= factors[i]


@njit(nogil=True, error_model="numpy", cache=True)
def add_to_weight_gradient(
    powers: Floats, inputs: Floats, gradient: Floats, last: Floats, is_first: bool, begin: int, end: int
) -> None:
    """Add to the gradient (V, D) of the head's weight, or set it if it is the first, for blocks of entries.

    Args:
        powers: as of `find_hidden_gradient`.
        inputs: (D / P, N, P), what the head read, times the factors of the tokens.
        last: (L, D), the gradient's rows in the last block if that is not a whole one.
    """
    for v in range(begin, end):
        here = entries_of(gradient, last, v)
        for t in range(len(powers)):
            tokens = inputs[:, t * TOKENS : (t + 1) * TOKENS]
            add_panels(powers[t, v, : len(here)], tokens, here, is_first and t == 0)
