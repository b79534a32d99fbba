"""Products with int8 weights in integers, compiled by numba, on processors that have the instructions for it.

They do what `matmul_int8` of `decode_kernels` and of `batch_kernels` does, for few rows and for many, but for the
rounding of the inputs to 16 bits (`vector_integers.py`). Unlike those they leave no order to the compiler: both give
the same to the last bit, so that a text does not depend on what else is written at the time.
"""

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from sheepop.generation.decode_kernels import AT_ONCE, NOTHING, Floats
from sheepop.generation.vector_integers import (
    PAIR,
    fill_integer_panel,
    integer_dot,
    integer_dot_4,
    integer_tile,
    round_row,
)
from sheepop.generation.vector_tiles import TILE

Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]
UInt8 = NDArray[np.uint8]


@njit(parallel=True, cache=True)
def matmul_few(
    inputs: Floats, values: Int8, scale: Floats, totals: Int32, bias: Floats, outputs: Floats, adds: bool
) -> None:
    """Do what `decode_kernels.matmul_int8` does, for I a multiple of 64 and at most `MOST_INPUTS`.

    Args:
        inputs: (N, I).
        values: (O, I), int8.
        scale, totals: (O,), of each row of values the scale and the sum.
        bias: (O,), or (0,) for none.
        outputs: (N, O).
        adds: whether the result is added to what is there.
    """
    rows, width = inputs.shape
    rounded, steps = np.empty((rows, 2, width), dtype=np.uint8), np.empty(rows, dtype=np.float32)
    for n in range(rows):
        round_row(inputs, n, rounded, steps)
    for o in prange(len(values)):
        offset = bias[o] if len(bias) else NOTHING
        for n in range(0, rows - AT_ONCE + 1, AT_ONCE):
            for m, total in enumerate(integer_dot_4(rounded, n, values, totals, o)):
                before = outputs[n + m, o] if adds else NOTHING
                outputs[n + m, o] = total * (steps[n + m] * scale[o]) + offset + before
        for n in range(rows - rows % AT_ONCE, rows):
            before = outputs[n, o] if adds else NOTHING
            outputs[n, o] = integer_dot(rounded, n, values, totals, o) * (steps[n] * scale[o]) + offset + before


@njit(parallel=True, cache=True)
def matmul_many(
    inputs: Floats, values: Int8, scale: Floats, totals: Int32, bias: Floats, outputs: Floats, adds: bool
) -> None:
    """Do what `matmul_few` does, for at least TILE outputs, and faster for many rows."""
    rows, width = inputs.shape
    num_panels = -(-rows // TILE)
    panels = np.empty((num_panels, width // 4, PAIR), dtype=np.int32)
    steps = np.zeros(num_panels * TILE, dtype=np.float32)
    if num_panels == 1:
        fill_rounded_panel(inputs, 0, panels[0], steps)
    else:
        fill_panels(inputs, panels, steps)
    for block in prange(-(-len(values) // TILE)):
        first = min(block * TILE, len(values) - TILE)  # the last block may begin in the one before
        for p in range(num_panels):
            integer_tile(panels[p], steps, p * TILE, values, first, block * TILE, totals, scale, bias, outputs, adds)


@njit(parallel=True, cache=True)
def fill_panels(inputs: Floats, panels: Int32, steps: Floats) -> None:
    """Fill panels (P, I/4, 32) and steps (P times TILE,) with what inputs (N, I) are rounded to."""
    for p in prange(len(panels)):
        fill_rounded_panel(inputs, p * TILE, panels[p], steps)


@njit(cache=True)
def fill_rounded_panel(inputs: Floats, first: int, panel: Int32, steps: Floats) -> None:
    """Fill a panel (I/4, 32), and steps (N,) from `first` on, with what TILE rows of inputs (N, I) are rounded to."""
    rounded = np.zeros((TILE, 2, inputs.shape[1]), dtype=np.uint8)
    some = inputs[first : first + TILE]
    for n in range(len(some)):
        round_row(some, n, rounded, steps[first : first + TILE])
    fill_integer_panel(rounded, 0, panel)
