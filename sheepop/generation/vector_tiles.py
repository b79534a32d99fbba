"""Products of many rows of inputs with many rows of weights, written as vectors for the compiler behind numba.

A tile is as many rows of weights as inputs: the products of each weight with all of the inputs, which lie side by side
in a vector, are added up in one register a row. Nothing is read twice and no lanes are added up, so that the
multiplications alone take time (Goto and van de Geijn 2008).
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sheepop.generation.vector_dots import (
    FAST,
    FLOAT,
    GROUP,
    INT,
    LONG,
    fetch,
    load,
    multiply_add,
    splat,
    unpack_fp32,
    unpack_int4,
    unpack_int8,
)

TILE = 16 if get_host_cpu_features().get("avx512f") else 8  # rows of a tile, which have to fit into the registers


def transpose(builder: Any, rows: list[Any]) -> list[Any]:
    """Return the columns of a square of vectors, which are as many as their lanes: a power of two."""
    size = len(rows)
    halves = [
        ir.Constant(ir.VectorType(INT, size), [place for lane in lanes for place in (lane, size + lane)])
        for lanes in (range(size // 2), range(size // 2, size))
    ]
    for _ in range(size.bit_length() - 1):  # each time the rows of the two halves are interleaved
        pairs = zip(rows[: size // 2], rows[size // 2 :], strict=True)
        rows = [builder.shuffle_vector(one, other, half) for one, other in pairs for half in halves]
    return rows


def store(builder: Any, vector: Any, pointer: Any, index: Any) -> None:
    """Write a vector to `pointer[index]` and its neighbours."""
    place = builder.bitcast(builder.gep(pointer, [index]), vector.type.as_pointer())
    builder.store(vector, place, align=4)


@intrinsic
def fill_panel(typing: Any, inputs: Any, first: Any, start: Any, panel: Any) -> Any:  # noqa: ARG001 - numba's signature
    """Set panel (I, TILE), from row `start` on, to TILE columns of inputs (N, I), turned, of rows from `first` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        inputs, panel = (context.make_array(signature.args[at])(context, builder, arguments[at]) for at in (0, 3))
        _, first, start, _ = arguments
        rows = [row_of(builder, inputs, builder.add(first, LONG(row))) for row in range(TILE)]
        columns = transpose(builder, [load(builder, row, start, TILE) for row in rows])
        for column, vector in enumerate(columns):
            store(builder, vector, panel.data, builder.mul(builder.add(start, LONG(column)), LONG(TILE)))
        return context.get_dummy_value()

    return types.void(inputs, types.int64, types.int64, panel), generate


def sums_of_lanes(builder: Any, vectors: list[Any]) -> Any:
    """Return the sum of each of some vectors, which are as many as their lanes, as the lanes of one."""
    lanes = len(vectors)
    halves = [
        ir.Constant(ir.VectorType(INT, lanes), [place for lane in half for place in (lane, lanes + lane)])
        for half in (range(lanes // 2), range(lanes // 2, lanes))
    ]
    while len(vectors) > 1:  # each time every vector's halves are added up, beside those of another
        middle = len(vectors) // 2
        vectors = [
            builder.fadd(*(builder.shuffle_vector(one, other, half) for half in halves), flags=FAST)
            for one, other in zip(vectors[:middle], vectors[middle:], strict=True)
        ]
    return vectors[0]


def row_of(builder: Any, array: Any, row: Any) -> Any:
    """Return a pointer to a row of an array, the first of its dimensions."""
    begin = builder.ptrtoint(array.data, LONG)
    stride = cgutils.unpack_tuple(builder, array.strides)[0]
    return builder.inttoptr(builder.add(begin, builder.mul(row, stride)), array.data.type)


def code_of(unpack: Callable[..., list[Any]]) -> Callable[..., Any]:
    """Return the code generator of a tile: sums (TILE inputs, TILE rows) from panel (I, TILE) and the weights' arrays.

    `unpack` makes fp32 of a row of weights, 64 at a time; I is a multiple of 64. Weights become fp32 in a block that
    the first cache holds, from which the processor multiplies them.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        panel, first, sums, *weights = (
            context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        )
        groups = builder.udiv(cgutils.unpack_tuple(builder, panel.shape)[0], LONG(GROUP))
        begins = [[row_of(builder, array, builder.add(first, LONG(row))) for array in weights] for row in range(TILE)]
        ahead = builder.ptrtoint(row_of(builder, weights[0], LONG(TILE)), LONG)  # the next tile's weights
        ahead = builder.sub(ahead, builder.ptrtoint(weights[0].data, LONG))
        zero = ir.Constant(ir.VectorType(FLOAT, TILE), [0.0] * TILE)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(TILE)]
        block = builder.bitcast(cgutils.alloca_once(builder, ir.ArrayType(FLOAT, TILE * GROUP)), FLOAT.as_pointer())
        with cgutils.for_range(builder, groups, intp=LONG) as loop:
            for row, begin in enumerate(begins):
                at = row * GROUP
                for numbers in unpack(builder, loop.index, ahead, *begin):
                    store(builder, numbers, block, LONG(at))
                    at += numbers.type.count
            start = builder.mul(loop.index, LONG(GROUP))
            with cgutils.for_range(builder, LONG(GROUP), intp=LONG) as inner:
                inputs = load(builder, panel.data, builder.mul(builder.add(start, inner.index), LONG(TILE)), TILE)
                for row, total in enumerate(totals):
                    weight = builder.load(builder.gep(block, [builder.add(LONG(row * GROUP), inner.index)]))
                    product = multiply_add(builder, splat(builder, weight, TILE), inputs, builder.load(total))
                    builder.store(product, total)
        for row, vector in enumerate(transpose(builder, [builder.load(total) for total in totals])):
            store(builder, vector, sums.data, LONG(row * TILE))
        return context.get_dummy_value()

    return generate


@intrinsic
def tile_fp32(typing: Any, panel: Any, first: Any, sums: Any, values: Any) -> Any:  # noqa: ARG001
    """Set sums (TILE, TILE) to products of the inputs in panel (I, TILE) and rows of values (O, I) from `first` on."""
    return types.void(panel, types.int64, sums, values), code_of(unpack_fp32)


@intrinsic
def tile_int8(typing: Any, panel: Any, first: Any, sums: Any, values: Any) -> Any:  # noqa: ARG001
    """Do what `tile_fp32` does for int8."""
    return types.void(panel, types.int64, sums, values), code_of(unpack_int8)


@intrinsic
def tile_int4(typing: Any, panel: Any, first: Any, sums: Any, values: Any, scale: Any, lowest: Any) -> Any:  # noqa: ARG001
    """Do what `tile_fp32` does for 4 bits, as in `decode_kernels.matmul_int4`."""
    return types.void(panel, types.int64, sums, values, scale, lowest), code_of(unpack_int4)


@intrinsic
def add_scores(typing: Any, query: Any, page: Any, begin: Any, scores: Any, place: Any) -> Any:  # noqa: ARG001
    """Add to TILE scores (T,), from `place` on, the products of a query (C,) and keys of a page (S, C) behind `begin`.

    What is behind the last multiple of TILE of C is left out.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        query, page, begin, scores, place = (
            context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        )
        keys = [row_of(builder, page, builder.add(begin, LONG(key))) for key in range(TILE)]
        zero = ir.Constant(ir.VectorType(FLOAT, TILE), [0.0] * TILE)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(TILE)]
        parts = builder.udiv(cgutils.unpack_tuple(builder, query.shape)[0], LONG(TILE))
        with cgutils.for_range(builder, parts, intp=LONG) as loop:
            start = builder.mul(loop.index, LONG(TILE))
            part = load(builder, query.data, start, TILE)
            for key, total in zip(keys, totals, strict=True):
                product = multiply_add(builder, part, load(builder, key, start, TILE), builder.load(total))
                builder.store(product, total)
        sums = sums_of_lanes(builder, [builder.load(total) for total in totals])
        store(builder, builder.fadd(sums, load(builder, scores.data, place, TILE), flags=FAST), scores.data, place)
        return context.get_dummy_value()

    return types.void(query, page, types.int64, scores, types.int64), generate


@intrinsic
def fetch_rows(typing: Any, page: Any, begin: Any) -> Any:  # noqa: ARG001
    """Begin to read TILE rows of a page (S, C) from `begin` on; what lies behind the page does no harm."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        page = context.make_array(signature.args[0])(context, builder, arguments[0])
        rows = row_of(builder, page, arguments[1])
        width = cgutils.unpack_tuple(builder, page.shape)[1]
        lines = builder.udiv(builder.mul(width, LONG(TILE)), LONG(TILE))
        with cgutils.for_range(builder, lines, intp=LONG) as loop:
            fetch(builder, rows, builder.mul(loop.index, LONG(TILE)), TILE, LONG(0))
        return context.get_dummy_value()

    return types.void(page, types.int64), generate


@intrinsic
def add_values(typing: Any, shares: Any, place: Any, page: Any, begin: Any, end: Any, mixed: Any) -> Any:  # noqa: ARG001
    """Add to mixed (C,) the values of a page (S, C) from `begin` to `end`, times shares (T,) from `place` on.

    What is behind the last multiple of TILE of C is left out.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        shares, place, page, begin, end, mixed = (
            context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        )
        width = cgutils.unpack_tuple(builder, mixed.shape)[0]
        first = row_of(builder, page, begin)
        share = builder.gep(shares.data, [place])
        done: Any = LONG(0)
        for lanes in (GROUP, TILE):  # many first: each vector's sum waits for its own last one
            parts = builder.udiv(builder.sub(width, done), LONG(lanes))
            with cgutils.for_range(builder, parts, intp=LONG) as part:
                start = builder.add(done, builder.mul(part.index, LONG(lanes)))
                total = cgutils.alloca_once_value(builder, load(builder, mixed.data, start, lanes))
                with cgutils.for_range(builder, builder.sub(end, begin), intp=LONG) as loop:
                    value = load(builder, first, builder.add(builder.mul(loop.index, width), start), lanes)
                    factor = splat(builder, builder.load(builder.gep(share, [loop.index])), lanes)
                    builder.store(multiply_add(builder, factor, value, builder.load(total)), total)
                store(builder, builder.load(total), mixed.data, start)
            done = builder.add(done, builder.mul(parts, LONG(lanes)))
        return context.get_dummy_value()

    signature = types.void(shares, types.int64, page, types.int64, types.int64, mixed)
    return signature, generate
