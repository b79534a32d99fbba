"""The arithmetic of one decoding step on a CPU, compiled by numba: the newest token of each of a few sequences.

At this size a step takes as long as it takes to read the weights. So they are read once, in the form in which they are
kept, and become fp32 in registers only. Sums may be taken in any order, but infinities and NaN are kept: a model whose
scores are not finite must be noticed.

Shape letters: N sequences, I inputs, O outputs, G groups of inputs, H query heads, K key/value heads, C head width,
S tokens a page, M pages of a sequence.
"""

import math
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from sheepop.generation.vector_dots import (
    HALF,
    dot_fp32,
    dot_fp32_4,
    dot_int4,
    dot_int4_4,
    dot_int8,
    dot_int8_4,
)
from sheepop.generation.vector_tiles import TILE, add_scores, add_values, fetch_rows
from sheepop.models.vector_exp import ONE, exp_fp32

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

ANY_ORDER = {"reassoc", "contract", "nsz", "arcp"}
AT_ONCE = 4  # sequences for which a weight is read and turned into fp32 once
ACTIVATED_AT_ONCE = 256  # features that one core takes at a time
TOKENS_AHEAD = 2 * TILE  # whose keys or values are on their way while others are used
NOTHING, SMALLEST = np.float32(0), np.finfo(np.float32).tiny


@njit(parallel=True, fastmath=ANY_ORDER, cache=True)
def matmul_fp32(inputs: Floats, weight: Floats, bias: Floats, outputs: Floats, adds: bool) -> None:
    """Set outputs (N, O) to inputs (N, I) times weight (O, I), plus bias (O,), or (0,) for none.

    With `adds` the result is added to what is there.
    """
    rows = len(inputs)
    for o in prange(len(weight)):
        offset = bias[o] if len(bias) else NOTHING
        for n in range(0, rows - AT_ONCE + 1, AT_ONCE):
            a, b, c, d = inputs[n], inputs[n + 1], inputs[n + 2], inputs[n + 3]
            for m, total in enumerate(dot_fp32_4(a, b, c, d, weight[o])):
                outputs[n + m, o] = total + offset + (outputs[n + m, o] if adds else NOTHING)
        for n in range(rows - rows % AT_ONCE, rows):
            total = dot_fp32(inputs[n], weight[o])
            outputs[n, o] = total + offset + (outputs[n, o] if adds else NOTHING)


@njit(parallel=True, fastmath=ANY_ORDER, cache=True)
def matmul_int8(
    inputs: Floats, values: NDArray[np.int8], scale: Floats, bias: Floats, outputs: Floats, adds: bool
) -> None:
    """Do what `matmul_fp32` does for the weight values (O, I), int8, times scale (O,)."""
    rows = len(inputs)
    for o in prange(len(values)):
        offset = bias[o] if len(bias) else NOTHING
        for n in range(0, rows - AT_ONCE + 1, AT_ONCE):
            a, b, c, d = inputs[n], inputs[n + 1], inputs[n + 2], inputs[n + 3]
            for m, total in enumerate(dot_int8_4(a, b, c, d, values[o])):
                outputs[n + m, o] = total * scale[o] + offset + (outputs[n + m, o] if adds else NOTHING)
        for n in range(rows - rows % AT_ONCE, rows):
            total = dot_int8(inputs[n], values[o])
            outputs[n, o] = total * scale[o] + offset + (outputs[n, o] if adds else NOTHING)


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
    """Do what `matmul_fp32` does for 4 bits: values (O, G/2, 32), of each group scale and lowest value (O, G), bf16.

    Byte j of the first two groups holds weights j and j + 32.
    """
    rows, summed = len(inputs), with_sums(inputs)
    for o in prange(len(values)):
        offset = bias[o] if len(bias) else NOTHING
        for n in range(0, rows - AT_ONCE + 1, AT_ONCE):
            a, b, c, d = summed[n], summed[n + 1], summed[n + 2], summed[n + 3]
            for m, total in enumerate(dot_int4_4(a, b, c, d, values[o], scale[o], lowest[o])):
                outputs[n + m, o] = total + offset + (outputs[n + m, o] if adds else NOTHING)
        for n in range(rows - rows % AT_ONCE, rows):
            total = dot_int4(summed[n], values[o], scale[o], lowest[o])
            outputs[n, o] = total + offset + (outputs[n, o] if adds else NOTHING)


@njit(fastmath=ANY_ORDER, cache=True)
def with_sums(inputs: Floats) -> Floats:
    """Return inputs (N, I), followed by the sums of each HALF of them: (N, I + G)."""
    rows, width = inputs.shape
    summed = np.empty((rows, width + width // HALF), dtype=np.float32)
    for n in range(rows):
        summed[n, :width] = inputs[n]
        for group in range(width // HALF):
            summed[n, width + group] = inputs[n, group * HALF : (group + 1) * HALF].sum()
    return summed


@njit(fastmath=ANY_ORDER, cache=True)
def layer_norm(inputs: Floats, weight: Floats, bias: Floats, epsilon: float, outputs: Floats) -> None:
    """Set outputs (N, I) to the LayerNorm of inputs (N, I); bias is (I,), or (0,) for none."""
    width = inputs.shape[1]
    for n in range(len(inputs)):
        total = NOTHING
        for i in range(width):
            total += inputs[n, i]
        mean = total / np.float32(width)
        squares = NOTHING
        for i in range(width):
            squares += (inputs[n, i] - mean) ** 2
        factor = np.float32(1 / math.sqrt(squares / width + epsilon))
        for i in range(width):
            outputs[n, i] = (inputs[n, i] - mean) * factor * weight[i] + (bias[i] if len(bias) else NOTHING)


@njit(fastmath=ANY_ORDER, cache=True)
def rms_norm(inputs: Floats, weight: Floats, epsilon: float, outputs: Floats) -> None:
    """Set outputs (N, I) to the RMSNorm of inputs (N, I)."""
    width = inputs.shape[1]
    for n in range(len(inputs)):
        squares = NOTHING
        for i in range(width):
            squares += inputs[n, i] * inputs[n, i]
        factor = np.float32(1 / math.sqrt(squares / width + epsilon))
        for i in range(width):
            outputs[n, i] = inputs[n, i] * factor * weight[i]


@njit(fastmath=ANY_ORDER, cache=True)
def convolve(hidden: Floats, weight: Floats, site: int, positions: Integers, stored: Floats, pages: Integers) -> None:
    """Store hidden (N, D) and add what tokens before each stored, weighted (`short_convolution.py`), where it is.

    Args:
        weight: (back, D), of the token before first.
        site: which of a block's convolutions it is.
        positions, pages: as in `place_heads`.
        stored: (all pages, sites, S, D).
    """
    page_size = stored.shape[2]
    for n in range(len(hidden)):  # all before any is read: several may be of one sequence
        stored[pages[n, positions[n] // page_size], site, positions[n] % page_size] = hidden[n]
    for n in range(len(hidden)):
        for distance in range(1, min(len(weight), positions[n]) + 1):
            at = positions[n] - distance
            earlier = stored[pages[n, at // page_size], site, at % page_size]
            for d in range(hidden.shape[1]):
                hidden[n, d] += weight[distance - 1, d] * earlier[d]


@njit(parallel=True, fastmath=ANY_ORDER, cache=True)
def add_copies(
    queries: Floats, positions: Integers, keys: Floats, tokens: Integers, pages: Integers, logits: Floats
) -> None:
    """Add to logits (N, V) what each sequence's newest token may copy, as `Copies.add_to` does.

    Args:
        queries: (N, W).
        positions, pages: as in `place_heads`.
        keys: (all pages, S, W), what the tokens of each place are found by.
        tokens: (all pages, S).
    """
    page_size = keys.shape[1]
    for n in prange(len(queries)):
        if not positions[n]:
            continue
        scores = np.zeros(positions[n], dtype=np.float32)
        for s in range(len(scores)):
            key = keys[pages[n, s // page_size], s % page_size]
            for w in range(len(key)):
                scores[s] += queries[n, w] * key[w]
        highest = scores.max()
        sums = np.zeros(logits.shape[1], dtype=np.float32)
        for s in range(len(scores)):
            offered = tokens[pages[n, (s + 1) // page_size], (s + 1) % page_size]
            sums[offered] += exp_fp32(scores[s] - highest)
        for v in range(len(sums)):
            if not sums[v] < SMALLEST:  # what is no number stays none
                copied = np.log(sums[v]) + highest
                most = max(logits[n, v], copied)
                logits[n, v] = most + np.log(np.exp(logits[n, v] - most) + np.exp(copied - most))


@njit(fastmath=ANY_ORDER, cache=True)
def place_heads(
    projected: Floats,
    query_norm: Floats,
    key_norm: Floats,
    epsilon: float,
    turns: Floats,
    positions: Integers,
    keys: Floats,
    values: Floats,
    pages: Integers,
) -> None:
    """Normalise and turn queries and keys where they are, and store keys and values in their pages.

    Args:
        projected: (N, H + 2K, C), the heads of queries, keys and values.
        query_norm, key_norm: (C,), or (0,) for none.
        turns: (T, C/2, 2), cosine and sine of each pair at each position (`rotary_table`); T is 0 for none.
        positions: (N,), the place of each sequence's newest token.
        keys, values: (all pages, K, S, C).
        pages: (N, M), which pages hold the sequence, in order.
    """
    kv_heads, page_size, width = keys.shape[1:]
    heads = projected.shape[1] - 2 * kv_heads
    for n in range(len(projected)):
        for h in range(heads + kv_heads):
            head, norm = projected[n, h], query_norm if h < heads else key_norm
            if len(norm):
                squares = NOTHING
                for c in range(width):
                    squares += head[c] * head[c]
                factor = np.float32(1 / math.sqrt(squares / width + epsilon))
                for c in range(width):
                    head[c] *= factor * norm[c]
            if len(turns):
                table = turns[positions[n]]
                for c in range(width // 2):
                    first, second = head[2 * c], head[2 * c + 1]
                    head[2 * c] = first * table[c, 0] - second * table[c, 1]
                    head[2 * c + 1] = first * table[c, 1] + second * table[c, 0]
        page, at = pages[n, positions[n] // page_size], positions[n] % page_size
        for k in range(kv_heads):
            for c in range(width):
                keys[page, k, at, c] = projected[n, heads + k, c]
                values[page, k, at, c] = projected[n, heads + kv_heads + k, c]


@njit(parallel=True, fastmath=ANY_ORDER, cache=True)
def attend(
    projected: Floats,
    positions: Integers,
    keys: Floats,
    values: Floats,
    pages: Integers,
    window: int,
    sinks: int,
    outputs: Floats,
) -> None:
    """Set outputs (N, H, C) to the attention of each sequence's newest token over its tokens (`attention.py`).

    Args:
        projected, positions, keys, values, pages: as in `place_heads`, after it.
        window: how many tokens back are seen, the newest included; 0 means all.
        sinks: how many of the first tokens are seen beside the window.
    """
    kv_heads, page_size, width = keys.shape[1:]
    group = (projected.shape[1] - 2 * kv_heads) // kv_heads
    whole = width - width % TILE
    factor = np.float32(1 / math.sqrt(width))
    for task in prange(len(projected) * kv_heads):
        n, k = task // kv_heads, task % kv_heads
        head, end = k * group, positions[n] + 1
        start = max(0, end - window) if window else 0
        sunk = min(sinks, start)
        num_seen = sunk + end - start
        scores = np.zeros((group, num_seen + TILE), dtype=np.float32)
        for begin, stop, shift in ((0, sunk, 0), (start, end, start - sunk)):  # token t's score is at t - shift
            for index in range(begin // page_size, (stop - 1) // page_size + 1):
                page, first = pages[n, index], index * page_size
                t, last = max(begin - first, 0), min(stop, first + page_size) - first
                while t < last:
                    ahead = first + t + TOKENS_AHEAD
                    if ahead < stop:
                        fetch_rows(keys, pages[n, ahead // page_size], k, ahead % page_size)
                    elif stop == end and start + ahead - end < end:  # after the last key comes the first value
                        ahead += start - end
                        fetch_rows(values, pages[n, ahead // page_size], k, ahead % page_size)
                    at_once = TILE if t + TILE <= page_size else 1
                    if at_once == TILE:  # keys behind the last one may be read, and are not used
                        add_scores(projected, n, head, keys, page, k, t, scores, first + t - shift)
                    if at_once == 1 or whole < width:
                        for h in range(group):
                            for place in range(t, min(t + at_once, last)):
                                at = first + place - shift
                                for c in range(whole if at_once == TILE else 0, width):
                                    scores[h, at] += projected[n, head + h, c] * keys[page, k, place, c]
                    t += at_once
            if stop < end:  # the window's scores are added where those of keys behind the sinks were
                scores[:, sunk : sunk + TILE] = NOTHING
        for h in range(group):
            seen = scores[h, :num_seen]  # from 0 on: where an index may be negative the compiler makes no vectors
            highest, total = seen.max(), NOTHING
            for t in range(len(seen)):
                seen[t] = exp_fp32((seen[t] - highest) * factor)
                total += seen[t]
            for t in range(len(seen)):
                seen[t] /= total
            outputs[n, head + h] = NOTHING
        for begin, stop, shift in ((0, sunk, 0), (start, end, start - sunk)):
            for index in range(begin // page_size, (stop - 1) // page_size + 1):
                page, first = pages[n, index], index * page_size
                t, last = max(begin - first, 0), min(stop, first + page_size) - first
                while t < last:
                    ahead, until = first + t + TOKENS_AHEAD, min(t + TILE, last)
                    if ahead < stop:
                        fetch_rows(values, pages[n, ahead // page_size], k, ahead % page_size)
                    add_values(scores, first + t - shift, values, page, k, t, until, outputs, n, head)
                    if whole < width:
                        for h in range(group):
                            for place in range(t, until):
                                weight = scores[h, first + place - shift]
                                for c in range(whole, width):
                                    outputs[n, head + h, c] += weight * values[page, k, place, c]
                    t = until


@njit(fastmath=ANY_ORDER, error_model="numpy", cache=True)  # a check for a division by zero would keep vectors away
def normal_share(x: Any) -> Any:
    """Return how much of the normal distribution is below x, of fp32, to 1e-7 (Abramowitz and Stegun 1964, 7.1.26)."""
    t = ONE / (ONE + ERF_SCALE * abs(x))
    beyond = t * (A1 + t * (A2 + t * (A3 + t * (A4 + t * A5)))) * exp_fp32(np.float32(-0.5) * x * x)
    return beyond if x < NOTHING else ONE - beyond


@njit(parallel=True, fastmath=ANY_ORDER, cache=True)
def activate(hidden: Floats, activation: int, is_gated: bool, outputs: Floats) -> None:
    """Set outputs (N, F) to the activation of hidden (N, F), or with a gate of hidden (N, 2F): gates, then linear."""
    rows, width = outputs.shape
    parts = -(-width // ACTIVATED_AT_ONCE)
    for task in prange(rows * parts):
        n, start = task // parts, task % parts * ACTIVATED_AT_ONCE
        end = min(start + ACTIVATED_AT_ONCE, width)
        part, found = hidden[n, start:end], outputs[n, start:end]
        for f in range(len(found)):  # from 0 on: where an index may be negative the compiler makes no vectors
            x = part[f]
            if activation == GELU:
                found[f] = x * normal_share(x)
            elif activation == GELU_TANH:  # (1 + tanh(z)) / 2 = 1 - 1 / (1 + exp(2z))
                z = TANH_SCALE * (x + np.float32(0.044715) * x * x * x)
                found[f] = x - x / (ONE + exp_fp32(z + z))
            elif activation == SILU:
                found[f] = x / (ONE + exp_fp32(-x))
            else:
                y = max(x, NOTHING)
                found[f] = y * y if activation == RELU_SQUARED else y
        if is_gated:
            gates = hidden[n, width + start : width + end]
            for f in range(len(found)):
                found[f] *= gates[f]


GELU, GELU_TANH, SILU, RELU, RELU_SQUARED = range(5)
ACTIVATION = {
    "gelu": GELU,
    "gelu_tanh": GELU_TANH,
    "relu": RELU,
    "silu": SILU,
    "relu_squared": RELU_SQUARED,
    "swiglu": SILU,
    "geglu": GELU,
}
TANH_SCALE = np.float32(math.sqrt(2 / math.pi))
ERF_SCALE = np.float32(0.3275911 * math.sqrt(0.5))
A1, A2, A3, A4, A5 = (np.float32(0.5 * a) for a in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))
