"""Products of more than a few rows with quantized or plain weights on a CPU, compiled by numba.

What `decode_kernels` does where a weight is used so often that arithmetic, not memory, takes the time: a step of many
sequences, and prompts. Shape letters as there.
"""

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from sheepop.generation.decode_kernels import ANY_ORDER, NOTHING, Floats
from sheepop.generation.vector_dots import GROUP
from sheepop.generation.vector_tiles import TILE, fill_panel, tile_fp32, tile_int4, tile_int8


@njit(parallel=True, fastmath=ANY_ORDER, cache=True)
def matmul_fp32(inputs: Floats, weight: Floats, bias: Floats, outputs: Floats, adds: bool) -> None:
    """Do what `decode_kernels.matmul_fp32` does, for at least TILE outputs."""
    panels = panels_of(inputs)
    for block in prange(-(-len(weight) // TILE)):
        first = min(block * TILE, len(weight) - TILE)  # the last block may begin in the one before
        sums, scale = np.empty((TILE, TILE), dtype=np.float32), np.empty(0, dtype=np.float32)
        for p in range(len(panels)):
            tile_fp32(panels[p], first, sums, weight)
            add_rest(inputs, p * TILE, weight, first, sums)
            put(sums, p * TILE, first, block * TILE, scale, bias, outputs, adds)


@njit(parallel=True, fastmath=ANY_ORDER, cache=True)
def matmul_int8(
    inputs: Floats, values: NDArray[np.int8], scale: Floats, bias: Floats, outputs: Floats, adds: bool
) -> None:
    """Do what `decode_kernels.matmul_int8` does, for at least TILE outputs."""
    panels = panels_of(inputs)
    for block in prange(-(-len(values) // TILE)):
        first = min(block * TILE, len(values) - TILE)
        sums = np.empty((TILE, TILE), dtype=np.float32)
        for p in range(len(panels)):
            tile_int8(panels[p], first, sums, values)
            add_rest(inputs, p * TILE, values, first, sums)
            put(sums, p * TILE, first, block * TILE, scale, bias, outputs, adds)


@njit(parallel=True, fastmath=ANY_ORDER, cache=True)
def matmul_int4(
    inputs: Floats,
    values: NDArray[np.uint8],
    scale: NDArray[np.uint16],
    lowest: NDArray[np.uint16],
    bias: Floats,
    outputs: Floats,
    adds: bool,
) -> None:
    """Do what `decode_kernels.matmul_int4` does, for at least TILE outputs."""
    panels = panels_of(inputs)
    for block in prange(-(-len(values) // TILE)):
        first = min(block * TILE, len(values) - TILE)
        sums, no_scale = np.empty((TILE, TILE), dtype=np.float32), np.empty(0, dtype=np.float32)
        for p in range(len(panels)):
            tile_int4(panels[p], first, sums, values, scale, lowest)
            put(sums, p * TILE, first, block * TILE, no_scale, bias, outputs, adds)


@njit(parallel=True, cache=True)
def panels_of(inputs: Floats) -> Floats:
    """Return inputs (N, I) in panels (N/TILE, whole groups of I, TILE), in which TILE inputs lie side by side."""
    rows, width = inputs.shape
    whole = width - width % GROUP
    panels = np.empty((-(-rows // TILE), whole, TILE), dtype=np.float32)
    squares = whole // TILE
    for task in prange(rows // TILE * squares):
        p, column = task // squares, task % squares * TILE
        fill_panel(inputs, p * TILE, column, panels[p])
    if rows % TILE:
        last = np.zeros((TILE, whole), dtype=np.float32)
        last[: rows % TILE] = inputs[rows - rows % TILE :, :whole]
        for square in range(squares):
            fill_panel(last, 0, square * TILE, panels[-1])
    return panels


@njit(fastmath=ANY_ORDER, cache=True)
def add_rest(inputs: Floats, row: int, weight: NDArray[np.generic], first: int, sums: Floats) -> None:
    """Add to sums what the inputs behind the last whole group are multiplied to."""
    rows, width = inputs.shape
    for i in range(width - width % GROUP, width):
        for n in range(min(TILE, rows - row)):
            for o in range(TILE):
                sums[n, o] += inputs[row + n, i] * np.float32(weight[first + o, i])


@njit(fastmath=ANY_ORDER, cache=True)
def put(
    sums: Floats, row: int, first: int, begin: int, scale: Floats, bias: Floats, outputs: Floats, adds: bool
) -> None:
    """Scale sums (TILE, TILE) and put them into outputs (N, O), from `row` on and behind output `begin` - 1.

    Args:
        first: the output that the sums begin with, which may lie before `begin`.
        scale, bias: (O,), or (0,) for none.
        adds: add to what is there.
    """
    for n in range(min(TILE, len(outputs) - row)):
        for o in range(begin, first + TILE):
            total = sums[n, o - first]
            if len(scale):
                total *= scale[o]
            if len(bias):
                total += bias[o]
            outputs[row + n, o] = total + (outputs[row + n, o] if adds else NOTHING)
