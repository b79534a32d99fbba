"""Products of more than a few rows with quantized or plain weights on a CPU, compiled by numba.

What `decode_kernels` does where a weight is used so often that arithmetic, not memory, takes the time: a step of many
sequences, and prompts. Shape letters as there.
"""

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from sheepop.generation.decode_kernels import ANY_ORDER, NOTHING, Floats
from sheepop.generation.vector_dots import GROUP
from sheepop.generation.vector_tiles import PANEL, fill_panel, tile_fp32, tile_int4, tile_int8


@njit(parallel=True, fastmath=ANY_ORDER, cache=True)
def matmul_fp32(inputs: Floats, weight: Floats, bias: Floats, outputs: Floats, adds: bool) -> None:
    """Do what `decode_kernels.matmul_fp32` does, for at least PANEL outputs."""
    panels = panels_of(inputs)
    for block in prange(-(-len(weight) // PANEL)):
        first = min(block * PANEL, len(weight) - PANEL)  # the last block may begin in the one before
        sums, scale = np.empty((PANEL, PANEL), dtype=np.float32), np.empty(0, dtype=np.float32)
        for p in range(len(panels)):
            tile_fp32(panels[p], first, sums, weight)
            add_rest(inputs, p * PANEL, weight, first, sums)
            put(sums, p * PANEL, first, block * PANEL, scale, bias, outputs, adds)


@njit(parallel=True, fastmath=ANY_ORDER, cache=True)
def matmul_int8(
    inputs: Floats, values: NDArray[np.int8], scale: Floats, bias: Floats, outputs: Floats, adds: bool
) -> None:
    """Do what `decode_kernels.matmul_int8` does, for at least PANEL outputs."""
    panels = panels_of(inputs)
    for block in prange(-(-len(values) // PANEL)):
        first = min(block * PANEL, len(values) - PANEL)
        sums = np.empty((PANEL, PANEL), dtype=np.float32)
        for p in range(len(panels)):
            tile_int8(panels[p], first, sums, values)
            add_rest(inputs, p * PANEL, values, first, sums)
            put(sums, p * PANEL, first, block * PANEL, scale, bias, outputs, adds)


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
    """Do what `decode_kernels.matmul_int4` does, for at least PANEL outputs."""
    panels = panels_of(inputs)
    for block in prange(-(-len(values) // PANEL)):
        first = min(block * PANEL, len(values) - PANEL)
        sums, no_scale = np.empty((PANEL, PANEL), dtype=np.float32), np.empty(0, dtype=np.float32)
        for p in range(len(panels)):
            tile_int4(panels[p], first, sums, values, scale, lowest)
            put(sums, p * PANEL, first, block * PANEL, no_scale, bias, outputs, adds)


@njit(parallel=True, cache=True)
def panels_of(inputs: Floats) -> Floats:
    """Return inputs (N, I) in panels (N/PANEL, whole groups of I, PANEL), in which PANEL inputs lie side by side."""
    rows, width = inputs.shape
    whole = width - width % GROUP
    panels = np.empty((-(-rows // PANEL), whole, PANEL), dtype=np.float32)
    squares = whole // PANEL
    for task in prange(rows // PANEL * squares):
        p, column = task // squares, task % squares * PANEL
        fill_panel(inputs, p * PANEL, column, panels[p])
    if rows % PANEL:
        last = np.zeros((PANEL, whole), dtype=np.float32)
        last[: rows % PANEL] = inputs[rows - rows % PANEL :, :whole]
        for square in range(squares):
            fill_panel(last, 0, square * PANEL, panels[-1])
    return panels


@njit(fastmath=ANY_ORDER, cache=True)
def add_rest(inputs: Floats, row: int, weight: NDArray[np.generic], first: int, sums: Floats) -> None:
    """Add to sums what the inputs behind the last whole group are multiplied to."""
    rows, width = inputs.shape
    for i in range(width - width % GROUP, width):
        for n in range(min(PANEL, rows - row)):
            for o in range(PANEL):
                sums[n, o] += inputs[row + n, i] * np.float32(weight[first + o, i])


@njit(fastmath=ANY_ORDER, cache=True)
def put(
    sums: Floats, row: int, first: int, begin: int, scale: Floats, bias: Floats, outputs: Floats, adds: bool
) -> None:
    """Scale sums (PANEL, PANEL) and put them into outputs (N, O), from `row` on and behind output `begin` - 1.

    Args:
        first: the output that the sums begin with, which may lie before `begin`.
        scale, bias: (O,), or (0,) for none.
        adds: add to what is there.
    """
    for n in range(min(PANEL, len(outputs) - row)):
        for o in range(begin, first + PANEL):
            total = sums[n, o - first]
            if len(scale):
                total *= scale[o]
            if len(bias):
                total += bias[o]
            outputs[row + n, o] = total + (outputs[row + n, o] if adds else NOTHING)
