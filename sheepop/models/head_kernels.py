"""The softmax of the head and its gradient, compiled by numba: logits become the gradient of the loss where they lie.

PyTorch's operators turn logits of bf16 into a copy of twice the size, pass over that five times, and turn it back. Here
a row becomes fp32 in a near cache only, of which nothing but the result is written to memory. Of fp32 logits, which the
operators change in place, the same takes nine tenths of the time, which is not worth a second kernel (`docs/log.md`).
"""

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from sheepop.models.rounding_kernels import SIXTEEN, round_to_bf16
from sheepop.models.vector_exp import ONE, exp_fp32
from sheepop.utils.threads import on_all_threads

NOTHING = np.float32(0)
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


# A sum in any order becomes vectors; infinities and NaN are kept, as a loss that is not finite must be noticed.
@njit(nogil=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", cache=True)
def fill_errors(logits: NDArray[np.uint16], targets: NDArray[np.int64], losses: NDArray[np.float32]) -> None:
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
