"""Products of many rows of inputs with many rows of weights, written as vectors for the compiler behind numba.

A tile is as many rows of weights as inputs: the products of each weight with all of the inputs, which lie side by side
in a vector, are added up in one register a row. Nothing is read twice and no lanes are added up, so that the
multiplications alone take time (Goto and van de Geijn 2008).
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sheepop.generation.vector_dots import GROUP, unpack_fp32, unpack_int4, unpack_int8
from sheepop.models.vectors import (
    FAST,
    FLOAT,
    HAS_AVX512,
    LANES,
    LONG,
    arrays_of,
    fetch,
    item_of,
    load,
    multiply_add,
    row_of,
    size_of,
    splat,
    store,
    sums_of_lanes,
    transpose,
)

# What the registers hold: vectors of so many numbers, as many of them at once as the sums of a tile are.
TILE = LANES
PANEL = 16  # inputs, and rows of weights, whose products are made together
ROWS_AT_ONCE = 16 if HAS_AVX512 else 4  # of a panel, whose sums the registers hold


@intrinsic
def fill_panel(typing: Any, inputs: Any, first: Any, start: Any, panel: Any) -> Any:  # noqa: ARG001 - numba's signature
    """Set panel (I, PANEL), from row `start` on, to PANEL columns of inputs (N, I), turned, of rows from `first` on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        inputs, panel = (context.make_array(signature.args[at])(context, builder, arguments[at]) for at in (0, 3))
        _, first, start, _ = arguments
        rows = [row_of(builder, inputs, builder.add(first, LONG(row))) for row in range(PANEL)]
        columns = transpose(builder, [load(builder, row, start, PANEL) for row in rows])
        for column, vector in enumerate(columns):
            store(builder, vector, panel.data, builder.mul(builder.add(start, LONG(column)), LONG(PANEL)))
        return context.get_dummy_value()

    return types.void(inputs, types.int64, types.int64, panel), generate


def code_of(unpack: Callable[..., list[Any]]) -> Callable[..., Any]:
    """Return the code generator of a tile: sums (PANEL inputs, PANEL rows) of panel (I, PANEL) and the weights' arrays.

    `unpack` makes fp32 of a row of weights, 64 at a time; I is a multiple of 64. Weights become fp32 in a block that
    the first cache holds, from which the processor multiplies them.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        panel, first, sums, *weights = (
            context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        )
        groups = builder.udiv(cgutils.unpack_tuple(builder, panel.shape)[0], LONG(GROUP))
        begins = [[row_of(builder, array, builder.add(first, LONG(row))) for array in weights] for row in range(PANEL)]
        ahead = builder.ptrtoint(row_of(builder, weights[0], LONG(PANEL)), LONG)  # the next tile's weights
        ahead = builder.sub(ahead, builder.ptrtoint(weights[0].data, LONG))
        zero = ir.Constant(ir.VectorType(FLOAT, PANEL), [0.0] * PANEL)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(PANEL)]
        block = builder.bitcast(cgutils.alloca_once(builder, ir.ArrayType(FLOAT, PANEL * GROUP)), FLOAT.as_pointer())
        with cgutils.for_range(builder, groups, intp=LONG) as loop:
            for row, begin in enumerate(begins):
                at = row * GROUP
                for numbers in unpack(builder, loop.index, ahead, *begin):
                    store(builder, numbers, block, LONG(at))
                    at += numbers.type.count
            start = builder.mul(loop.index, LONG(GROUP))
            for part in range(0, PANEL, ROWS_AT_ONCE):
                with cgutils.for_range(builder, LONG(GROUP), intp=LONG) as inner:
                    place = builder.mul(builder.add(start, inner.index), LONG(PANEL))
                    inputs = load(builder, panel.data, place, PANEL)
                    for row in range(part, part + ROWS_AT_ONCE):
                        weight = builder.load(builder.gep(block, [builder.add(LONG(row * GROUP), inner.index)]))
                        product = multiply_add(
                            builder, splat(builder, weight, PANEL), inputs, builder.load(totals[row])
                        )
                        builder.store(product, totals[row])
        for row, vector in enumerate(transpose(builder, [builder.load(total) for total in totals])):
            store(builder, vector, sums.data, LONG(row * PANEL))
        return context.get_dummy_value()

    return generate


@intrinsic
def tile_fp32(typing: Any, panel: Any, first: Any, sums: Any, values: Any) -> Any:  # noqa: ARG001
    """Set sums (PANEL, PANEL) to products of inputs in panel (I, PANEL) and rows of values (O, I) from `first` on."""
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
def add_scores(
    typing: Any,  # noqa: ARG001
    projected: Any,
    row: Any,  # noqa: ARG001
    head: Any,  # noqa: ARG001
    keys: Any,
    page: Any,  # noqa: ARG001
    kv_head: Any,  # noqa: ARG001
    begin: Any,  # noqa: ARG001
    scores: Any,
    place: Any,  # noqa: ARG001
) -> Any:
    """Add to TILE scores (G, T) of G heads, from `place` on, the products of queries and keys.

    What is behind the last multiple of TILE of C is left out.

    Args:
        projected: (N, at least `head` + G, C), of which `row` has the queries from `head` on.
        keys: (all pages, K, S, C), of which those of `page` and `kv_head` from `begin` on are taken.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        projected, row, head, keys, page, kv_head, begin, scores, place = arrays_of(
            context, builder, signature, arguments
        )
        places = [item_of(builder, keys, page, kv_head, builder.add(begin, LONG(key))) for key in range(TILE)]
        parts = builder.udiv(size_of(builder, projected, 2), LONG(TILE))
        zero = ir.Constant(ir.VectorType(FLOAT, TILE), [0.0] * TILE)
        totals = [cgutils.alloca_once(builder, zero.type) for _ in range(TILE)]
        with cgutils.for_range(builder, size_of(builder, scores, 0), intp=LONG) as heads:
            query = item_of(builder, projected, row, builder.add(head, heads.index))
            for total in totals:
                builder.store(zero, total)
            with cgutils.for_range(builder, parts, intp=LONG) as loop:
                start = builder.mul(loop.index, LONG(TILE))
                part = load(builder, query, start, TILE)
                for key, total in zip(places, totals, strict=True):
                    product = multiply_add(builder, part, load(builder, key, start, TILE), builder.load(total))
                    builder.store(product, total)
            sums = sums_of_lanes(builder, [builder.load(total) for total in totals])
            before = item_of(builder, scores, heads.index)
            store(builder, builder.fadd(sums, load(builder, before, place, TILE), flags=FAST), before, place)
        return context.get_dummy_value()

    whole = types.int64
    return types.void(projected, whole, whole, keys, whole, whole, whole, scores, whole), generate


@intrinsic
def fetch_rows(typing: Any, pages: Any, page: Any, kv_head: Any, begin: Any) -> Any:  # noqa: ARG001
    """Begin to read TILE keys or values (all pages, K, S, C) from `begin` on; what lies behind them does no harm."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pages, page, kv_head, begin = arrays_of(context, builder, signature, arguments)
        rows = item_of(builder, pages, page, kv_head, begin)
        with cgutils.for_range(builder, size_of(builder, pages, 3), intp=LONG) as loop:
            fetch(builder, rows, builder.mul(loop.index, LONG(TILE)), TILE, LONG(0))
        return context.get_dummy_value()

    return types.void(pages, types.int64, types.int64, types.int64), generate


@intrinsic
def add_values(
    typing: Any,  # noqa: ARG001
    shares: Any,
    place: Any,  # noqa: ARG001
    values: Any,
    page: Any,  # noqa: ARG001
    kv_head: Any,  # noqa: ARG001
    begin: Any,  # noqa: ARG001
    end: Any,  # noqa: ARG001
    mixed: Any,
    row: Any,  # noqa: ARG001
    head: Any,  # noqa: ARG001
) -> Any:
    """Add to what G heads have mixed the values from `begin` to `end`, times shares (G, T) from `place` on.

    What is behind the last multiple of TILE of C is left out.

    Args:
        values: (all pages, K, S, C), of which those of `page` and `kv_head` are taken.
        mixed: (N, H, C), of which `row` has these heads from `head` on.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        shares, place, values, page, kv_head, begin, end, mixed, row, head = arrays_of(
            context, builder, signature, arguments
        )
        width, count = size_of(builder, mixed, 2), builder.sub(end, begin)
        first = item_of(builder, values, page, kv_head, begin)
        with cgutils.for_range(builder, size_of(builder, shares, 0), intp=LONG) as heads:
            share = item_of(builder, shares, heads.index, place)
            own = item_of(builder, mixed, row, builder.add(head, heads.index))
            done: Any = LONG(0)
            for lanes in (GROUP, TILE):  # many first: each vector's sum waits for its own last one
                parts = builder.udiv(builder.sub(width, done), LONG(lanes))
                with cgutils.for_range(builder, parts, intp=LONG) as part:
                    start = builder.add(done, builder.mul(part.index, LONG(lanes)))
                    total = cgutils.alloca_once(builder, ir.VectorType(FLOAT, lanes))
                    builder.store(load(builder, own, start, lanes), total)
                    with cgutils.for_range(builder, count, intp=LONG) as loop:
                        value = load(builder, first, builder.add(builder.mul(loop.index, width), start), lanes)
                        factor = splat(builder, builder.load(builder.gep(share, [loop.index])), lanes)
                        builder.store(multiply_add(builder, factor, value, builder.load(total)), total)
                    store(builder, builder.load(total), own, start)
                done = builder.add(done, builder.mul(parts, LONG(lanes)))
        return context.get_dummy_value()

    whole = types.int64
    return types.void(shares, whole, values, whole, whole, whole, whole, mixed, whole, whole), generate
