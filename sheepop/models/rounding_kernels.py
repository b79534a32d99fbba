"""The rounding of `quantized_layers`, compiled by numba: the same numbers to the last bit, on all cores.

PyTorch's operators pass over a row six times and over a group of 4 bits some eighty times. Here they are read once and
stay in the nearest cache. Groups lie side by side, a lane each, so that the compiler makes vectors without a licence to
reorder what is computed.
"""

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from sheepop.models.quantized_layers import GROUP, LARGEST, LEVELS, PARTS, SHRINKS, SMALLEST
from sheepop.utils.threads import on_all_threads

Floats = NDArray[np.float32]
Bits = NDArray[np.uint32]

LANES = 64  # groups that are rounded side by side, of whose weights the nearest cache holds 8 KiB
WEIGHTS_OF_A_TASK = 2**17  # at the least, for one core: some hundred microseconds
SHIFT = np.float32(1.5 * 2**23)  # with this added, the last bits of a number of fp32 are the nearest even integer
NOTHING, TWO, TOP, FURTHEST = np.float32(0), np.float32(2), np.float32(LEVELS), np.float32(LARGEST)
LEAST, INFINITE = np.float32(SMALLEST), np.float32(np.inf)
SHARES = np.array(SHRINKS, dtype=np.float32)
SIXTEEN, LAST_BIT, BELOW_HALF, UPPER_HALF = (np.uint32(bits) for bits in (16, 1, 0x7FFF, 0xFFFF0000))
WITHOUT_SIGN = np.uint32(0x7FFFFFFF)


def fill_rows(weight: Tensor, values: Tensor, scale: Tensor) -> None:
    """Do what `round_rows` does with weight (O, I), fp32, into values (O, I), int8, and scale (O,), fp32."""
    weights, kept, scales = weight.detach().contiguous().numpy(), values.numpy(), scale.numpy()
    bits = weights.view(np.uint32)
    on_all_threads(
        lambda part: round_rows(weights[part], bits[part], kept[part], scales[part]),
        rows=len(weight),
        most=weight.numel() // WEIGHTS_OF_A_TASK,
    )


def fill_groups(weight: Tensor, values: Tensor, scale: Tensor, lowest: Tensor) -> None:
    """Do what `round_groups` does with weight (O, I), fp32, into what `QuantizedLinear` keeps of 4 bits."""
    weights, kept = weight.detach().contiguous().view(len(weight), -1, GROUP).numpy(), values.numpy()
    scales, lows = (each.view(torch.uint16).numpy() for each in (scale, lowest))

    def fill(part: slice) -> None:
        round_groups(
            weights[part].reshape(-1, GROUP),
            kept[part].reshape(-1, GROUP),
            scales[part].reshape(-1),
            lows[part].reshape(-1),
        )

    on_all_threads(fill, rows=len(weight), most=weight.numel() // WEIGHTS_OF_A_TASK)


@njit(nogil=True, error_model="numpy", cache=True)  # a check for a division by zero would keep vectors away
def round_rows(weight: Floats, bits: Bits, values: NDArray[np.int8], scale: Floats) -> None:
    """Round rows of a weight (O, I), whose bits are given too, to values (O, I) and scale (O,)."""
    largest = np.empty(1, dtype=np.uint32)
    for o in range(len(weight)):
        # Without the sign, the bits of fp32 are in the order of the numbers, and behind all of them infinity and NaN.
        found = np.uint32(0)
        for i in range(weight.shape[1]):
            size = bits[o, i] & WITHOUT_SIGN
            found = size if size > found else found
        largest[0] = found
        most = largest.view(np.float32)[0]
        step = (LEAST if most < LEAST else most) / FURTHEST
        scale[o] = step
        for i in range(weight.shape[1]):
            values[o, i] = np.int8(np.int32((weight[o, i] / step + SHIFT) - SHIFT))


@njit(nogil=True, error_model="numpy", cache=True)
def round_groups(
    weight: Floats, values: NDArray[np.uint8], scale: NDArray[np.uint16], lowest: NDArray[np.uint16]
) -> None:
    """Round groups of a weight (N, 32), N even, to values (N/2, 32), scale and lowest (N,), both bf16."""
    groups, numbers = np.empty((GROUP, LANES), dtype=np.float32), np.empty((GROUP, LANES), dtype=np.uint8)
    middle, half = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.float32)
    least, error = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.float32)
    begin, step = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.float32)
    best_begin, best_step = np.empty(LANES, dtype=np.float32), np.empty(LANES, dtype=np.float32)
    for first in range(0, len(weight), LANES):
        count = min(LANES, len(weight) - first)
        for n in range(count):
            for i in range(GROUP):
                groups[i, n] = weight[first + n, i]
        find_range(groups, middle, half)
        for n in range(LANES):
            least[n], best_begin[n], best_step[n] = INFINITE, NOTHING, NOTHING
        for share in SHARES:
            for n in range(LANES):
                begin[n] = middle[n] - share * half[n]
                size = TWO * share * half[n] / TOP
                step[n] = LEAST if size < LEAST else size
            round_to_bf16(begin.view(np.uint32))
            round_to_bf16(step.view(np.uint32))
            measure(groups, begin, step, error)
            for n in range(LANES):
                is_better = error[n] < least[n]
                least[n] = error[n] if is_better else least[n]
                best_begin[n] = begin[n] if is_better else best_begin[n]
                best_step[n] = step[n] if is_better else best_step[n]
        for i in range(GROUP):
            for n in range(LANES):
                number = nearest(groups[i, n], best_begin[n], best_step[n])
                # A step is zero where no error was finite.
                numbers[i, n] = np.uint8(np.int32(number if best_step[n] > NOTHING else NOTHING))
        begin_bits, step_bits = best_begin.view(np.uint32), best_step.view(np.uint32)
        for n in range(count):
            lowest[first + n], scale[first + n] = begin_bits[n] >> SIXTEEN, step_bits[n] >> SIXTEEN
        for n in range(0, count, 2):
            for i in range(GROUP):
                values[(first + n) // 2, i] = numbers[i, n] | numbers[i, n + 1] << np.uint8(4)


@njit(nogil=True, error_model="numpy", cache=True)
def find_range(groups: Floats, middle: Floats, half: Floats) -> None:
    """Set middle and half (LANES,) to those of the range of each group (32, LANES)."""
    low, high = middle, half
    for n in range(LANES):
        low[n] = high[n] = groups[0, n]
    for i in range(1, GROUP):
        for n in range(LANES):
            weight = groups[i, n]
            low[n] = weight if weight < low[n] else low[n]
            high[n] = weight if weight > high[n] else high[n]
    for n in range(LANES):
        begin, end = low[n], high[n]
        middle[n], half[n] = (begin + end) / TWO, (end - begin) / TWO


@njit(nogil=True, error_model="numpy", cache=True)
def round_to_bf16(bits: Bits) -> None:
    """Round numbers of fp32, given as their bits, to the nearest of bf16, of two to the even one."""
    for n in range(len(bits)):
        bits[n] = (bits[n] + BELOW_HALF + ((bits[n] >> SIXTEEN) & LAST_BIT)) & UPPER_HALF


@njit(nogil=True, error_model="numpy", cache=True)
def measure(groups: Floats, begin: Floats, step: Floats, error: Floats) -> None:
    """Set error (LANES,) to the squared error of each group (32, LANES), summed as by `sum_in_order`."""
    for n in range(LANES):
        error[n] = NOTHING
    for j in range(PARTS):
        for n in range(LANES):
            total = NOTHING
            for i in range(GROUP // PARTS):
                weight = groups[j + i * PARTS, n]
                difference = nearest(weight, begin[n], step[n]) * step[n] + begin[n] - weight
                total += difference * difference
            error[n] += total


@njit(nogil=True, error_model="numpy", inline="always", cache=True)
def nearest(weight: np.float32, begin: np.float32, step: np.float32) -> np.float32:
    """Return the number 0 to 15 that a weight is rounded to."""
    number = (weight - begin) / step
    number = number if number > NOTHING else NOTHING
    number = number if number < TOP else TOP
    return (number + SHIFT) - SHIFT
