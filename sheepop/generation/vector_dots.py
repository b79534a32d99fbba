"""Products of one row of weights with one or four rows of inputs, written as vectors for the compiler behind numba.

numba compiles a plain loop over such a row, too, but in short vectors and adding up each group of weights by itself,
at half the speed. Here 64 weights are read, become fp32 and are multiplied, lane by lane; the lanes are added up once,
at the end of the row. The vectors are those of LLVM, which splits them into what the processor has.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sheepop.models.vectors import (
    FAST,
    FLOAT,
    HAS_AVX512,
    INT,
    LONG,
    fetch,
    load,
    multiply_add,
    splat,
    split,
    sum_of_lanes,
)

GROUP, HALF = 64, 32  # weights that are taken at a time, and their bytes in 4 bits (`models/quantized_layers.py`)
AHEAD = 2048  # bytes that a row of weights is read ahead of the arithmetic
FETCHES_FP32 = HAS_AVX512  # without, fetching plain fp32 costs a sixth of the time (`docs/log.md`)
LANES_OF_SEVERAL = GROUP if HAS_AVX512 else 16  # of the sums of each of several rows, which the registers hold
PAIR = ir.VectorType(FLOAT, 2)


def unpack_fp32(builder: Any, group: Any, ahead: Any, values: Any) -> list[Any]:
    """Return the 64 weights of a group as vectors of fp32, which they are."""
    start = builder.mul(group, LONG(GROUP))
    if FETCHES_FP32:
        fetch(builder, values, start, GROUP, ahead)
    return [load(builder, values, start, GROUP)]


def unpack_int8(builder: Any, group: Any, ahead: Any, values: Any) -> list[Any]:
    """Return the 64 weights of a group as vectors of fp32: bytes as they are."""
    start = builder.mul(group, LONG(GROUP))
    fetch(builder, values, start, GROUP, ahead)
    numbers = load(builder, values, start, GROUP)
    return [builder.sitofp(numbers, ir.VectorType(FLOAT, GROUP))]


def unpack_int4(builder: Any, group: Any, ahead: Any, values: Any, scale: Any, lowest: Any) -> list[Any]:
    """Return the 64 weights of two groups as vectors of fp32: halves of bytes, times a scale, plus the lowest value."""
    start = builder.mul(group, LONG(HALF))
    fetch(builder, values, start, HALF, ahead)
    pairs = load(builder, values, start, HALF)
    vector = ir.VectorType(FLOAT, HALF)
    unpacked = []
    for half, numbers in enumerate(
        (
            builder.and_(pairs, ir.Constant(pairs.type, [15] * HALF)),
            builder.lshr(pairs, ir.Constant(pairs.type, [4] * HALF)),
        )
    ):
        place = builder.add(builder.mul(group, LONG(2)), LONG(half))
        step, low = (splat(builder, load_bf16(builder, array, place), HALF) for array in (scale, lowest))
        unpacked.append(multiply_add(builder, builder.uitofp(numbers, vector), step, low))
    return unpacked


def load_two_bf16(builder: Any, pointer: Any, index: Any) -> Any:
    """Do what `load_bf16` does for two neighbours."""
    place = builder.bitcast(builder.gep(pointer, [index]), ir.VectorType(pointer.type.pointee, 2).as_pointer())
    bits = builder.zext(builder.load(place, align=2), ir.VectorType(INT, 2))
    return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, [16] * 2)), PAIR)


def load_bf16(builder: Any, pointer: Any, index: Any) -> Any:
    """Return a number of bf16, which numba knows as 16 bits, as fp32: it is the upper half of one."""
    bits = builder.zext(builder.load(builder.gep(pointer, [index])), INT)
    return builder.bitcast(builder.shl(bits, INT(16)), FLOAT)


def code_of(unpack: Callable[..., list[Any]], rows: int) -> Callable[..., Any]:
    """Return the code generator of the products of `rows` rows of inputs (I,) with one row of weights (I,).

    `unpack` makes fp32 of 64 weights of the array that comes after those of the inputs; what is behind the last
    multiple of 64 is added one by one.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = signature.args
        arrays = [
            context.make_array(kind)(context, builder, value) for kind, value in zip(kinds, arguments, strict=True)
        ]
        inputs, weights = arrays[:rows], arrays[rows].data
        width = cgutils.unpack_tuple(builder, inputs[0].shape)[0]
        groups = builder.udiv(width, LONG(GROUP))
        lanes = GROUP if rows == 1 else LANES_OF_SEVERAL
        zero = ir.Constant(ir.VectorType(FLOAT, lanes), [0.0] * lanes)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(rows)]
        with cgutils.for_range(builder, groups, intp=LONG) as loop:
            at = builder.mul(loop.index, LONG(GROUP))
            for unpacked in unpack(builder, loop.index, LONG(AHEAD), weights):
                for numbers in split(builder, unpacked, lanes):
                    for row, total in zip(inputs, totals, strict=True):
                        seen = load(builder, row.data, at, lanes)
                        builder.store(multiply_add(builder, numbers, seen, builder.load(total)), total)
                    at = builder.add(at, LONG(lanes))
        sums = [cgutils.alloca_once_value(builder, sum_of_lanes(builder, builder.load(total))) for total in totals]
        add_rest(builder, builder.mul(groups, LONG(GROUP)), width, inputs, weights, sums)
        results = [builder.load(total) for total in sums]
        return results[0] if rows == 1 else context.make_tuple(builder, signature.return_type, results)

    return generate


def add_rest(builder: Any, start: Any, end: Any, inputs: list[Any], weights: Any, sums: list[Any]) -> None:
    """Add to the sums the products from `start` to `end`, one by one: as vectors, they would take time where none are.

    The code for vectors stands between a row's last sum and the next row's first weights, which the processor would
    begin to read meanwhile.
    """
    with cgutils.for_range_slice(builder, start, end, LONG(1), intp=LONG) as (place, _):
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "", [], side_effect=True)  # which makes no vectors of it
        weight = builder.load(builder.gep(weights, [place]))
        if weight.type != FLOAT:
            weight = builder.sitofp(weight, FLOAT)
        for row, total in zip(inputs, sums, strict=True):
            seen = builder.load(builder.gep(row.data, [place]))
            builder.store(multiply_add(builder, weight, seen, builder.load(total)), total)


def code_of_int4(rows: int) -> Callable[..., Any]:
    """Return the code generator of the products of `rows` rows of inputs with one row of weights of 4 bits.

    With weights n·s + l of a group, Σ(n·s + l)·x = s·Σn·x + l·Σx: each weight is multiplied once, and Σx comes with the
    inputs (`decode_kernels.with_sums`).
    """
    lanes = 16 if HAS_AVX512 else 8
    vector, numbers = ir.VectorType(FLOAT, lanes), ir.VectorType(INT, lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args, arguments, strict=True)
        ]
        inputs, (values, scale, lowest) = [array.data for array in arrays[:rows]], arrays[rows:]
        pairs = cgutils.unpack_tuple(builder, values.shape)[0]  # of groups
        width = builder.mul(pairs, LONG(GROUP))
        totals = [cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * lanes)) for _ in range(rows)]
        lows = [cgutils.alloca_once_value(builder, ir.Constant(PAIR, [0.0] * 2)) for _ in range(rows)]
        with cgutils.for_range(builder, pairs, intp=LONG) as loop:
            start, at = builder.mul(loop.index, LONG(GROUP)), builder.mul(loop.index, LONG(HALF))
            fetch(builder, values.data, at, HALF, LONG(AHEAD))
            group = builder.mul(loop.index, LONG(2))
            steps, lowest_two = (load_two_bf16(builder, array.data, group) for array in (scale, lowest))
            products: list[list[Any]] = [[], []]  # of either group, of each row
            for part in range(0, HALF, lanes):
                both = builder.zext(load(builder, values.data, builder.add(at, LONG(part)), lanes), numbers)
                low = builder.and_(both, ir.Constant(numbers, [15] * lanes))
                high = builder.lshr(both, ir.Constant(numbers, [4] * lanes))
                for half, some in enumerate((low, high)):
                    weights = builder.sitofp(some, vector)
                    place = builder.add(start, LONG(half * HALF + part))
                    seen = [load(builder, row, place, lanes) for row in inputs]
                    products[half] = [
                        multiply_add(builder, weights, each, total)
                        if total
                        else builder.fmul(weights, each, flags=FAST)
                        for each, total in zip(seen, products[half] or [None] * rows, strict=True)
                    ]
            for row, total, low in zip(range(rows), totals, lows, strict=True):
                sums = load(builder, inputs[row], builder.add(width, group), 2)
                builder.store(multiply_add(builder, lowest_two, sums, builder.load(low)), low)
                for half in (0, 1):
                    step = splat(builder, builder.extract_element(steps, INT(half)), lanes)
                    builder.store(multiply_add(builder, step, products[half][row], builder.load(total)), total)
        results = [
            builder.fadd(*(sum_of_lanes(builder, builder.load(part)) for part in parts), flags=FAST)
            for parts in zip(totals, lows, strict=True)
        ]
        return results[0] if rows == 1 else context.make_tuple(builder, signature.return_type, results)

    return generate


@intrinsic
def dot_fp32(typing: Any, inputs: Any, values: Any) -> Any:  # noqa: ARG001 - numba's signature
    """Return the product of inputs (I,) and values (I,)."""
    return types.float32(inputs, values), code_of(unpack_fp32, 1)


@intrinsic
def dot_fp32_4(typing: Any, a: Any, b: Any, c: Any, d: Any, values: Any) -> Any:  # noqa: ARG001
    """Return the products of four inputs (I,) and values (I,)."""
    return types.UniTuple(types.float32, 4)(a, b, c, d, values), code_of(unpack_fp32, 4)


@intrinsic
def dot_int8(typing: Any, inputs: Any, values: Any) -> Any:  # noqa: ARG001 - numba's signature
    """Return the product of inputs (I,) and values (I,), int8."""
    return types.float32(inputs, values), code_of(unpack_int8, 1)


@intrinsic
def dot_int8_4(typing: Any, a: Any, b: Any, c: Any, d: Any, values: Any) -> Any:  # noqa: ARG001
    """Return the products of four inputs (I,) and values (I,), int8."""
    return types.UniTuple(types.float32, 4)(a, b, c, d, values), code_of(unpack_int8, 4)


@intrinsic
def dot_int4(typing: Any, inputs: Any, values: Any, scale: Any, lowest: Any) -> Any:  # noqa: ARG001
    """Return the product of inputs with their sums (I + G,) and weights of 4 bits (`decode_kernels.matmul_int4`)."""
    return types.float32(inputs, values, scale, lowest), code_of_int4(1)


@intrinsic
def dot_int4_4(typing: Any, a: Any, b: Any, c: Any, d: Any, values: Any, scale: Any, lowest: Any) -> Any:  # noqa: ARG001
    """Return the products of four inputs (I + G,) and weights of 4 bits, as `dot_int4` does."""
    return types.UniTuple(types.float32, 4)(a, b, c, d, values, scale, lowest), code_of_int4(4)
