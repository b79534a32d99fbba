"""Products of inputs with int8 weights in integers, by the instructions of AVX512-VNNI, for the compiler behind numba.

Each of them adds four products of bytes to each of 16 sums, where one of fp32 adds one. An input is rounded to 16 bits,
in steps of its row's largest number over 32,767, and each of its two bytes is multiplied: half the arithmetic of fp32.
What is lost is at most sqrt(I) / 2^16 of a row's length, a tenth of what the rounding of the weights costs; inputs of 8
bits would cost much more (`docs/log.md`). Sums of integers are exact, whatever their order: what a row gives depends
neither on the other rows nor on which of the kernels computes it, to the last bit.
"""

from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sheepop.generation.vector_dots import AHEAD, GROUP
from sheepop.generation.vector_tiles import TILE
from sheepop.models.vectors import (
    BYTE,
    FLOAT,
    INT,
    LONG,
    arrays_of,
    call,
    constant,
    fetch,
    load,
    row_of,
    size_of,
    splat,
    store,
    transpose,
)

HAS_INTEGERS = TILE == 16 and bool(get_host_cpu_features().get("avx512vnni"))  # what the functions here need
MOST_INPUTS = 2**16  # of which a sum of products of bytes is within 32 bits
LEVELS = 2**15 - 1  # the largest integer that an input becomes; 2^15 is added, so that its two bytes have no sign
SMALLEST_STEP = 2.0**-120  # the inverse of which is finite
SHIFT = 1.5 * 2**23  # with this added, the last bits of a number of fp32 are the nearest integer
LANES = 16
PAIR = 2 * LANES  # lanes of a panel's step: four inputs' upper bytes of each of a tile's rows, and their lower ones
WEIGHTS_AT_ONCE = 8  # rows of weights whose sums, two vectors each, are in registers at one time

INTS, FLOATS = ir.VectorType(INT, LANES), ir.VectorType(FLOAT, LANES)


def add_byte_products(builder: Any, total: Any, inputs: Any, weights: Any) -> Any:
    """Add to each lane of a total the products of four bytes of inputs, without a sign, and four of weights, with."""
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, total, inputs, weights)


def joined(builder: Any, upper: Any, lower: Any) -> Any:
    """Return as fp32 what the sums with the upper bytes and those with the lower ones make together."""
    upper, lower = builder.sitofp(upper, FLOATS), builder.sitofp(lower, FLOATS)
    return builder.fadd(builder.fmul(upper, constant(FLOATS, 256.0)), lower)


@intrinsic
def round_row(typing: Any, inputs: Any, row: Any, rounded: Any, steps: Any) -> Any:  # noqa: ARG001 - numba's signature
    """Set rounded (N, 2, I), uint8, to the upper and lower bytes of a row of inputs (N, I), and steps (N,) to its step.

    I is a multiple of 16. The step of a row with what is not a finite number is NaN, which all that it gives will be.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        inputs, row, rounded, steps = arrays_of(context, builder, signature, arguments)
        width = size_of(builder, inputs, 1)
        numbers, place = row_of(builder, inputs, row), row_of(builder, rounded, row)
        vectors = builder.udiv(width, LONG(LANES))
        # Without the sign, the bits of fp32 are in the order of the numbers, and behind all of them infinity and NaN.
        largest = cgutils.alloca_once_value(builder, constant(INTS, 0))
        with cgutils.for_range(builder, vectors, intp=LONG) as loop:
            vector = load(builder, numbers, builder.mul(loop.index, LONG(LANES)), LANES)
            bits = builder.and_(builder.bitcast(vector, INTS), constant(INTS, 0x7FFFFFFF))
            builder.store(call(builder, "llvm.umax.v16i32", INTS, bits, builder.load(largest)), largest)
        bits = call(builder, "llvm.vector.reduce.umax.v16i32", INT, builder.load(largest))
        is_finite = builder.icmp_unsigned("<", bits, INT(0x7F800000))
        step = builder.fdiv(builder.bitcast(bits, FLOAT), FLOAT(LEVELS))
        step = builder.select(builder.fcmp_ordered(">", step, FLOAT(SMALLEST_STEP)), step, FLOAT(SMALLEST_STEP))
        builder.store(builder.select(is_finite, step, FLOAT(float("nan"))), builder.gep(steps.data, [row]))
        inverse = splat(builder, builder.fdiv(FLOAT(1.0), step), LANES)
        lowest = constant(INTS, 0x4B400000 - (LEVELS + 1))  # the bits of SHIFT, less what is added
        bytes_of = ir.VectorType(BYTE, LANES)
        with cgutils.for_range(builder, vectors, intp=LONG) as loop:
            at = builder.mul(loop.index, LONG(LANES))
            scaled = builder.fmul(load(builder, numbers, at, LANES), inverse)
            whole = builder.bitcast(builder.fadd(scaled, constant(FLOATS, SHIFT)), INTS)
            whole = builder.sub(whole, lowest)
            store(builder, builder.trunc(builder.lshr(whole, constant(INTS, 8)), bytes_of), place, at)
            store(builder, builder.trunc(whole, bytes_of), place, builder.add(width, at))
        return context.get_dummy_value()

    return types.void(inputs, types.int64, rounded, steps), generate


@intrinsic
def fill_integer_panel(typing: Any, rounded: Any, first: Any, panel: Any) -> Any:  # noqa: ARG001
    """Set panel (I/4, 32), int32, to TILE rows of rounded (N, 2, I) from `first` on, four neighbours to a lane.

    I is a multiple of 64.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rounded, first, panel = arrays_of(context, builder, signature, arguments)
        width = size_of(builder, rounded, 2)
        rows = [row_of(builder, rounded, builder.add(first, LONG(row))) for row in range(TILE)]
        with cgutils.for_range(builder, builder.udiv(width, LONG(GROUP)), intp=LONG) as loop:
            at = builder.mul(loop.index, LONG(GROUP))
            begin = builder.mul(loop.index, LONG(LANES * PAIR))
            for lane, start in ((0, at), (LANES, builder.add(width, at))):
                square = [builder.bitcast(load(builder, row, start, GROUP), INTS) for row in rows]
                for step, vector in enumerate(transpose(builder, square)):
                    store(builder, vector, panel.data, builder.add(begin, LONG(step * PAIR + lane)))
        return context.get_dummy_value()

    return types.void(rounded, types.int64, panel), generate


@intrinsic
def integer_tile(
    typing: Any,  # noqa: ARG001
    panel: Any,
    steps: Any,
    row: Any,  # noqa: ARG001
    values: Any,
    first: Any,  # noqa: ARG001
    begin: Any,  # noqa: ARG001
    totals: Any,
    scale: Any,
    bias: Any,
    outputs: Any,
    adds: Any,  # noqa: ARG001
) -> Any:
    """Set a tile of outputs (N, O), rows from `row` on and columns from `begin` on.

    Args:
        panel: (I/4, 32), the rows from `row` on (`fill_integer_panel`).
        steps: (at least `row` + TILE,), of all rows (`round_row`).
        values: (O, I), int8.
        first: the column that the tile begins with; what lies before `begin` stays as it is.
        totals: (O,), int32, the sum of each row of values.
        scale, bias: (O,); bias may be (0,), for none.
        adds: whether the tile is added to what is there.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        panel, steps, row, values, first, begin, totals, scale, bias, outputs, adds = arrays_of(
            context, builder, signature, arguments
        )
        groups = builder.udiv(size_of(builder, panel, 0), LONG(LANES))
        ahead = builder.ptrtoint(row_of(builder, values, LONG(TILE)), LONG)  # the next tile's weights
        ahead = builder.sub(ahead, builder.ptrtoint(values.data, LONG))
        sums: list[Any] = []
        for part in range(0, TILE, WEIGHTS_AT_ONCE):
            places = [builder.add(first, LONG(part + at)) for at in range(WEIGHTS_AT_ONCE)]
            rows = [row_of(builder, values, place) for place in places]
            fours = [builder.bitcast(each, INT.as_pointer()) for each in rows]
            uppers, lowers = [], []
            for place in places:  # what was added to the inputs is 128 in their upper bytes
                total = builder.mul(builder.load(builder.gep(totals.data, [place])), INT(-128))
                uppers.append(cgutils.alloca_once_value(builder, splat(builder, total, LANES)))
                lowers.append(cgutils.alloca_once_value(builder, constant(INTS, 0)))
            with cgutils.for_range(builder, groups, intp=LONG) as loop:
                for each in rows:
                    fetch(builder, each, builder.mul(loop.index, LONG(GROUP)), GROUP, ahead)
                start = builder.mul(loop.index, LONG(LANES))
                with cgutils.for_range(builder, LONG(LANES), intp=LONG) as inner:
                    step = builder.add(start, inner.index)
                    at = builder.mul(step, LONG(PAIR))
                    upper_bytes = load(builder, panel.data, at, LANES)
                    lower_bytes = load(builder, panel.data, builder.add(at, LONG(LANES)), LANES)
                    for each, upper, lower in zip(fours, uppers, lowers, strict=True):
                        weights = splat(builder, builder.load(builder.gep(each, [step]), align=1), LANES)
                        for sum_of, inputs in ((upper, upper_bytes), (lower, lower_bytes)):
                            builder.store(add_byte_products(builder, builder.load(sum_of), inputs, weights), sum_of)
            sums += [
                joined(builder, builder.load(upper), builder.load(lower))
                for upper, lower in zip(uppers, lowers, strict=True)
            ]
        lanes = ir.Constant(ir.VectorType(LONG, LANES), list(range(LANES)))
        is_new = builder.icmp_signed(
            ">=", builder.add(splat(builder, first, LANES), lanes), splat(builder, begin, LANES)
        )
        has_bias = builder.icmp_signed(">", size_of(builder, bias, 0), LONG(0))
        factors = load(builder, scale.data, first, LANES)
        offsets = load_if(builder, bias.data, first, splat(builder, has_bias, LANES))
        adds = splat(builder, builder.trunc(adds, ir.IntType(1)), LANES)
        count = size_of(builder, outputs, 0)
        for n, vector in enumerate(transpose(builder, sums)):
            place = builder.add(row, LONG(n))
            exists = splat(builder, builder.icmp_signed("<", place, count), LANES)
            step = splat(builder, builder.load(builder.gep(steps.data, [place])), LANES)
            result = builder.fadd(builder.fmul(vector, builder.fmul(step, factors)), offsets)
            output = row_of(builder, outputs, place)
            mask = builder.and_(is_new, exists)
            result = builder.fadd(result, load_if(builder, output, first, builder.and_(mask, adds)))
            store_if(builder, result, output, first, mask)
        return context.get_dummy_value()

    signature = types.void(
        panel, steps, types.int64, values, types.int64, types.int64, totals, scale, bias, outputs, types.boolean
    )
    return signature, generate


def load_if(builder: Any, pointer: Any, index: Any, mask: Any) -> Any:
    """Return the lanes from `pointer[index]` on that the mask names, and zeros in place of the others."""
    place = builder.bitcast(builder.gep(pointer, [index]), FLOATS.as_pointer())
    return call(builder, "llvm.masked.load.v16f32.p0", FLOATS, place, INT(4), mask, constant(FLOATS, 0.0))


def store_if(builder: Any, vector: Any, pointer: Any, index: Any, mask: Any) -> None:
    """Write the lanes that the mask names to `pointer[index]` and its neighbours."""
    place = builder.bitcast(builder.gep(pointer, [index]), FLOATS.as_pointer())
    call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), vector, place, INT(4), mask)


def dots_of(rows: int) -> Any:
    """Return the code generator of the products of `rows` rows of inputs with one row of weights, without the scales.

    Its arguments are rounded (N, 2, I), the first of the rows, values (O, I) and totals (O,), and which row of these;
    I is a multiple of 64.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rounded, first, values, totals, output = arrays_of(context, builder, signature, arguments)
        width = size_of(builder, values, 1)
        weights = row_of(builder, values, output)
        halves = []  # each row's upper bytes, its lower ones, and so on
        for row in range(rows):
            upper = row_of(builder, rounded, builder.add(first, LONG(row)))
            halves += [upper, builder.gep(upper, [width])]
        sums = [cgutils.alloca_once_value(builder, constant(INTS, 0)) for _ in halves]
        with cgutils.for_range(builder, builder.udiv(width, LONG(GROUP)), intp=LONG) as loop:
            at = builder.mul(loop.index, LONG(GROUP))
            fetch(builder, weights, at, GROUP, LONG(AHEAD))
            group = builder.bitcast(load(builder, weights, at, GROUP), INTS)
            for half, total in zip(halves, sums, strict=True):
                inputs = builder.bitcast(load(builder, half, at, GROUP), INTS)
                builder.store(add_byte_products(builder, builder.load(total), inputs, group), total)
        added = builder.mul(builder.load(builder.gep(totals.data, [output])), INT(128))
        products = []
        for upper, lower in zip(sums[::2], sums[1::2], strict=True):
            high, low = (
                call(builder, "llvm.vector.reduce.add.v16i32", INT, builder.load(each)) for each in (upper, lower)
            )
            high, low = (builder.sitofp(each, FLOAT) for each in (builder.sub(high, added), low))
            products.append(builder.fadd(builder.fmul(high, FLOAT(256.0)), low))
        return products[0] if rows == 1 else context.make_tuple(builder, signature.return_type, products)

    return generate


@intrinsic
def integer_dot(typing: Any, rounded: Any, first: Any, values: Any, totals: Any, output: Any) -> Any:  # noqa: ARG001
    """Return the product of a row of inputs, rounded (N, 2, I), and one of values (O, I) whose sums are totals (O,)."""
    return types.float32(rounded, types.int64, values, totals, types.int64), dots_of(1)


@intrinsic
def integer_dot_4(typing: Any, rounded: Any, first: Any, values: Any, totals: Any, output: Any) -> Any:  # noqa: ARG001
    """Return the products of four rows of inputs, from `first` on, as `integer_dot` does."""
    result = types.UniTuple(types.float32, 4)
    return result(rounded, types.int64, values, totals, types.int64), dots_of(4)
