"""The softmax of the head and its gradients, compiled by numba.

Of bf16, logits become the gradient of the loss where they lie. PyTorch's operators turn them into a copy of twice the
size, pass over that five times, and turn it back; here a row becomes fp32 in a near cache only, of which nothing but
the result is written to memory. In fp32 the products are made here, too, in blocks of 128 tokens by 256 entries, whose
logits are still in a cache when they become powers of e.
Shape letters: N tokens, a multiple of 128, V entries, W of them with those that fill the last block, D width, P width
of a panel.
"""

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from sheepop.models.rounding_kernels import SIXTEEN, round_to_bf16
from sheepop.models.squares import SIDE, add_panels, largest_of, turn
from sheepop.models.vector_exp import IN_ANY_ORDER, LOWEST, NOTHING, ONE, exp_fp32, power
from sheepop.models.vectors import LINE
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
    """Return memory for the powers of at least so many tokens and entries, in blocks (N / 128, W / 256, 128, 272).

    What is beyond the 256th of a row keeps the numbers of a column, which are read, too, from meeting in few sets of a
    cache.
    """
    return torch.empty(-(-tokens // TOKENS), -(-entries // ENTRIES), TOKENS, ENTRIES + LINE // 4)


@njit(nogil=True, fastmath=IN_ANY_ORDER, error_model="numpy", cache=True)
def find_powers(
    inputs: Floats,
    entries: Floats,
    targets: Integers,
    powers: Floats,
    scores: Floats,
    bases: Floats,
    totals: Floats,
    num_entries: int,
    begin: int,
    end: int,
) -> None:
    """Make the powers of e of the logits of blocks of tokens, from `begin` to `end`, over a base of each token's own.

    The base is the largest logit of the first entries, and a later one where that is so much larger that its power
    would come near to the largest number: then what was made before is changed. So each block is in a near cache still.

    Args:
        inputs: (N, D), what the head reads.
        entries: (W / P, D, P), its weight, turned.
        targets: (N,), 0 to V - 1.
        powers: what `new_powers` returns, comes out, zero for what is no entry.
        scores, bases, totals: (N,), the logit of each target, the base, and the sum of the powers come out.
        num_entries: V.
    """
    panels = len(entries) // powers.shape[1]  # of a block
    for t in range(begin, end):
        here = slice(t * TOKENS, (t + 1) * TOKENS)
        base, total, wanted = bases[here], totals[here], targets[here]
        base[:], total[:] = HIDDEN, NOTHING
        for v in range(powers.shape[1]):
            block = powers[t, v]
            add_panels(inputs[here], entries[v * panels : (v + 1) * panels], block, True)
            block[:, max(0, num_entries - v * ENTRIES) : ENTRIES] = HIDDEN
            for i in range(TOKENS):
                if v * ENTRIES <= wanted[i] < (v + 1) * ENTRIES:
                    scores[t * TOKENS + i] = block[i, wanted[i] % ENTRIES]
                largest = HIDDEN
                for first in range(0, ENTRIES, SIDE):
                    largest = max(largest, largest_of(block[:, first : first + SIDE], i))
                if largest > base[i] + FAR:
                    rescale(powers[t, :v, i, :ENTRIES], total[i : i + 1], base[i] - largest)
                    base[i] = largest
                soften(block[i, :ENTRIES], total[i : i + 1], base[i])


@njit(nogil=True, error_model="numpy", cache=True)
def rescale(powers: Floats, total: Floats, exponent: np.float32) -> None:
    """Multiply powers and their sum by a power of e."""
    factor = NOTHING if exponent <= LOWEST else np.exp(exponent)
    powers *= factor
    total *= factor


@njit(nogil=True, fastmath=IN_ANY_ORDER, error_model="numpy", cache=True)
def soften(scores: Floats, total: Floats, base: np.float32) -> None:
    """Turn the scores of a token into powers of e, over a base, and add them to their sum."""
    added = NOTHING
    for j in range(len(scores)):
        scores[j] = power(scores[j] - base)
        added += scores[j]
    total[0] += added


@njit(nogil=True, error_model="numpy", cache=True)
def find_hidden_gradient(
    powers: Floats, entries: Floats, factors: Floats, gradient: Floats, begin: int, end: int
) -> None:
    """Set the gradient (N, D) of what the head read, for blocks of tokens from `begin` to `end`.

    Args:
        powers: those of `find_powers`, that of each target less what makes it an error.
        entries: (D / P, W, P), the head's weight.
        factors: (N,), times which powers are the gradients of the logits.
    """
    for t in range(begin, end):
        here = gradient[t * TOKENS : (t + 1) * TOKENS]
        for v in range(powers.shape[1]):
            add_panels(powers[t, v], entries[:, v * ENTRIES : (v + 1) * ENTRIES], here, v == 0)
        for i in range(TOKENS):
            factor = factors[t * TOKENS + i]
            for d in range(here.shape[1]):
                here[i, d] *= factor


@njit(nogil=True, error_model="numpy", cache=True)
def add_to_weight_gradient(
    powers: Floats, inputs: Floats, gradient: Floats, is_first: bool, begin: int, end: int
) -> None:
    """Add to the gradient (W, D) of the head's weight, or set it if it is the first, for blocks of entries.

    Args:
        powers: as of `find_hidden_gradient`.
        inputs: (D / P, N, P), what the head read, times the factors of the tokens.
    """
    turned = np.empty((ENTRIES, TOKENS + LINE // 4), dtype=np.float32)
    for v in range(begin, end):
        here = gradient[v * ENTRIES : (v + 1) * ENTRIES]
        for t in range(len(powers)):
            for first in range(0, TOKENS, SIDE):
                turn(powers[t, v, first : first + SIDE, :ENTRIES], turned[:, first : first + SIDE])
            add_panels(turned, inputs[:, t * TOKENS : (t + 1) * TOKENS], here, is_first and t == 0)
