"""What attention and the head do with squares of 64 by 64 numbers, written as vectors for the compiler behind numba.

Products are added up in as many sums as the registers hold, so that they take the time of their multiplications alone
(Goto and van de Geijn 2008). Their factors are items of 32 bits: numbers of fp32, or on a processor that multiplies
bf16, pairs of neighbours along the dimension that is added up. The right one of larger products is read in panels of
as many columns as the registers hold sums of, best where their rows follow each other: those far apart meet in few sets
of the first cache.
Shape letters: B batch, T time, H heads, C head width, I items that are added up: T or C, or half of it in pairs; P the
width of a panel.
"""

from itertools import chain
from typing import Any, NamedTuple

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sheepop.models.vectors import (
    FLOAT,
    HAS_AVX512,
    INT,
    LANES,
    LONG,
    SHORT,
    arrays_of,
    call,
    constant,
    item_of,
    load,
    multiply_add,
    row_of,
    size_of,
    splat,
    steps,
    store,
    sum_of_lanes,
    transpose,
)

SIDE = 64  # of a square
MULTIPLIES_BF16 = HAS_AVX512 and bool(get_host_cpu_features().get("avx512bf16"))
# The sums that registers hold: rows, and vectors of each.
MANY = (4, 4) if HAS_AVX512 else (4, 2)
FEW = (8, 1)
PANEL = 2 * LANES
# Rows of sums for a panel, and for rows that are left over of units of that many; both divide the unit, LOW all rows.
TALL, LOW, TALL_UNIT = (8, 4, 8) if HAS_AVX512 else (6, 4, 12)

FLOATS, INTS, SHORTS = (ir.VectorType(item, LANES) for item in (FLOAT, INT, SHORT))


class BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's type of bf16, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


BF16S = ir.VectorType(BFloat(), 2 * LANES)


def widened(builder: Any, numbers: Any) -> Any:
    """Return numbers as fp32: they are that, or the bits of bf16, which are the upper half."""
    if numbers.type == FLOATS:
        return numbers
    return builder.bitcast(builder.shl(builder.zext(numbers, INTS), constant(INTS, 16)), FLOATS)


def narrowed(builder: Any, numbers: Any) -> Any:
    """Return the bits of fp32 as bf16, rounded to the nearest, of two to the even one."""
    bits = builder.bitcast(numbers, INTS)
    is_odd = builder.and_(builder.lshr(bits, constant(INTS, 16)), constant(INTS, 1))
    bits = builder.add(builder.add(bits, constant(INTS, 0x7FFF)), is_odd)
    return builder.trunc(builder.lshr(bits, constant(INTS, 16)), SHORTS)


@intrinsic
def read_head(typing: Any, heads: Any, b: Any, h: Any, rows: Any) -> Any:  # noqa: ARG001 - numba's signature
    """Set the first T of rows to those of heads (B, H, T, C) at `b` and `h`: fp32 (T, C), or pairs of bf16 (T, C/2)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        heads, b, h, rows = arrays_of(context, builder, signature, arguments)
        in_pairs = rows.data.type.pointee == INT
        width = builder.mul(size_of(builder, rows, 1), LONG(2 if in_pairs else 1))
        with steps(builder, size_of(builder, heads, 2)) as t:
            begin, own = item_of(builder, heads, b, h, t), row_of(builder, rows, t)
            if in_pairs:
                own = builder.bitcast(own, begin.type)
            with steps(builder, width, LANES) as place:
                numbers = load(builder, begin, place, LANES)
                store(builder, numbers if in_pairs else widened(builder, numbers), own, place)
        return context.get_dummy_value()

    return types.void(heads, types.int64, types.int64, rows), generate


@intrinsic
def write_head(typing: Any, heads: Any, b: Any, h: Any, rows: Any, factor: Any) -> Any:  # noqa: ARG001
    """Set heads (B, H, T, C), fp32 or bf16, at `b` and `h` to the first T of rows (at least T, C), times a factor."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        heads, b, h, rows, factor = arrays_of(context, builder, signature, arguments)
        factors = splat(builder, factor, LANES)
        with steps(builder, size_of(builder, heads, 2)) as t:
            begin, own = item_of(builder, heads, b, h, t), row_of(builder, rows, t)
            with steps(builder, size_of(builder, rows, 1), LANES) as place:
                numbers = builder.fmul(load(builder, own, place, LANES), factors)
                store(builder, narrowed(builder, numbers) if begin.type.pointee == SHORT else numbers, begin, place)
        return context.get_dummy_value()

    return types.void(heads, types.int64, types.int64, rows, types.float32), generate


@intrinsic
def multiply_heads(typing: Any, heads: Any, others: Any, b: Any, h: Any, products: Any) -> Any:  # noqa: ARG001
    """Set the first T products to those of the rows of two (B, H, T, C) at `b` and `h`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        heads, others, b, h, products = arrays_of(context, builder, signature, arguments)
        with steps(builder, size_of(builder, heads, 2)) as t:
            begins = [item_of(builder, each, b, h, t) for each in (heads, others)]
            total = cgutils.alloca_once_value(builder, constant(FLOATS, 0.0))
            builder.store(constant(FLOATS, 0.0), total)
            with steps(builder, size_of(builder, heads, 3), LANES) as place:
                pair = [widened(builder, load(builder, begin, place, LANES)) for begin in begins]
                builder.store(multiply_add(builder, pair[0], pair[1], builder.load(total)), total)
            builder.store(sum_of_lanes(builder, builder.load(total)), builder.gep(products.data, [t]))
        return context.get_dummy_value()

    return types.void(heads, others, types.int64, types.int64, products), generate


@intrinsic
def turn(typing: Any, rows: Any, columns: Any) -> Any:  # noqa: ARG001
    """Set columns (I, SIDE) to rows (SIDE, I), turned."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, columns = arrays_of(context, builder, signature, arguments)
        with steps(builder, LONG(SIDE), LANES) as first:
            begins = [row_of(builder, rows, builder.add(first, LONG(row))) for row in range(LANES)]
            with steps(builder, size_of(builder, rows, 1), LANES) as place:
                square = transpose(builder, [load(builder, begin, place, LANES) for begin in begins])
                for column, vector in enumerate(square):
                    store(builder, vector, row_of(builder, columns, builder.add(place, LONG(column))), first)
        return context.get_dummy_value()

    return types.void(rows, columns), generate


@intrinsic
def pair_along_rows(typing: Any, square: Any, pairs: Any) -> Any:  # noqa: ARG001
    """Set pairs (SIDE, SIDE / 2) to fp32 (SIDE, SIDE) as bf16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        square, pairs = arrays_of(context, builder, signature, arguments)
        target = builder.bitcast(pairs.data, SHORT.as_pointer())
        with steps(builder, LONG(SIDE * SIDE), LANES) as place:
            store(builder, narrowed(builder, load(builder, square.data, place, LANES)), target, place)
        return context.get_dummy_value()

    return types.void(square, pairs), generate


@intrinsic
def pair_along_columns(typing: Any, square: Any, pairs: Any) -> Any:  # noqa: ARG001
    """Set pairs (SIDE / 2, SIDE) to fp32 (SIDE, SIDE) as bf16, of each two rows the numbers of a column together."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        square, pairs = arrays_of(context, builder, signature, arguments)
        with steps(builder, LONG(SIDE // 2)) as pair:
            first = row_of(builder, square, builder.mul(pair, LONG(2)))
            own = row_of(builder, pairs, pair)
            with steps(builder, LONG(SIDE), LANES) as place:
                lower, upper = (
                    builder.zext(narrowed(builder, load(builder, first, at, LANES)), INTS)
                    for at in (place, builder.add(place, LONG(SIDE)))
                )
                store(builder, builder.or_(lower, builder.shl(upper, constant(INTS, 16))), own, place)
        return context.get_dummy_value()

    return types.void(square, pairs), generate


@intrinsic
def add_product(typing: Any, left: Any, right: Any, sums: Any, is_lower: Any, is_upper: Any, is_first: Any) -> Any:  # noqa: ARG001
    """Add left (SIDE, I) times right (I, columns) to sums (SIDE, columns), or set these to it if it is the first.

    Args:
        is_lower, is_upper: what is beyond the diagonal of a square `left`, or before it, is zero and left out.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, sums, is_lower, is_upper, is_first = arrays_of(context, builder, signature, arguments)
        numbers = 2 if left.data.type.pointee == INT else 1  # of an item
        inner, columns = (size_of(builder, right, dimension) for dimension in (0, 1))
        done: Any = LONG(0)
        for rows, vectors in (MANY, FEW):
            width = vectors * LANES
            end = builder.mul(builder.udiv(columns, LONG(width)), LONG(width))
            with steps(builder, end, width, begin=done) as column, steps(builder, LONG(SIDE), rows) as row:
                item = builder.udiv(row, LONG(numbers))
                first = builder.select(is_upper, item, LONG(0))
                last = builder.select(is_lower, builder.add(item, LONG(rows // numbers)), inner)
                begin = builder.gep(right.data, [column])
                factors = Factors(begin, cgutils.unpack_tuple(builder, right.strides)[0])
                add_sums(builder, left, factors, sums, (row, rows), (column, vectors), (first, last), is_first)
            done = end
        return context.get_dummy_value()

    return types.void(left, right, sums, types.boolean, types.boolean, types.boolean), generate


@intrinsic
def add_panels(typing: Any, left: Any, right: Any, sums: Any, is_first: Any) -> Any:  # noqa: ARG001
    """Do what `add_product` does with the right factor in panels (columns / P, I, P)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        left, right, sums, is_first = arrays_of(context, builder, signature, arguments)
        inner, num_rows = (LONG(0), size_of(builder, right, 1)), size_of(builder, left, 0)
        with steps(builder, size_of(builder, right, 0)) as panel:
            factors = Factors(row_of(builder, right, panel), cgutils.unpack_tuple(builder, right.strides)[1])
            column = builder.mul(panel, LONG(PANEL))
            most = builder.mul(builder.udiv(num_rows, LONG(TALL_UNIT)), LONG(TALL_UNIT))
            for rows, begin, end in ((TALL, LONG(0), most), (LOW, most, num_rows)):
                with steps(builder, end, rows, begin=begin) as row:
                    add_sums(builder, left, factors, sums, (row, rows), (column, PANEL // LANES), inner, is_first)
        return context.get_dummy_value()

    return types.void(left, right, sums, types.boolean), generate


class Factors(NamedTuple):
    """The columns of a right factor for which registers hold sums: a pointer to the first row, bytes between rows."""

    begin: Any
    stride: Any

    def vectors(self, builder: Any, row: Any, count: int) -> list[Any]:
        """Return the vectors of a row."""
        place = builder.add(builder.ptrtoint(self.begin, LONG), builder.mul(row, self.stride))
        begin = builder.inttoptr(place, self.begin.type)
        return [load(builder, begin, LONG(number * LANES), LANES) for number in range(count)]


def add_sums(
    builder: Any,
    left: Any,
    right: Factors,
    sums: Any,
    rows: tuple[Any, int],
    columns: tuple[Any, int],
    inner: tuple[Any, Any],
    is_first: Any,
) -> None:
    """Write the code of a product for as many sums as registers hold: first row and rows, column and vectors."""
    (row, num_rows), (column, num_vectors) = rows, columns
    places = [builder.add(column, LONG(vector * LANES)) for vector in range(num_vectors)]
    totals = [[cgutils.alloca_once(builder, FLOATS) for _ in places] for _ in range(num_rows)]
    own = [row_of(builder, sums, builder.add(row, LONG(number))) for number in range(num_rows)]
    with builder.if_else(is_first) as (then, otherwise):
        with then:
            for total in chain(*totals):
                builder.store(constant(FLOATS, 0.0), total)
        with otherwise:
            for begin, line in zip(own, totals, strict=True):
                for place, total in zip(places, line, strict=True):
                    builder.store(load(builder, begin, place, LANES), total)
    first, last = inner
    with steps(builder, last, begin=first) as step:
        factors = right.vectors(builder, step, num_vectors)
        for number, line in enumerate(totals):
            item = builder.load(item_of(builder, left, builder.add(row, LONG(number)), step))
            items = splat(builder, item, LANES)
            for factor, total in zip(factors, line, strict=True):
                builder.store(added_product(builder, items, factor, builder.load(total)), total)
    for begin, line in zip(own, totals, strict=True):
        for place, total in zip(places, line, strict=True):
            store(builder, builder.load(total), begin, place)


def added_product(builder: Any, left: Any, right: Any, total: Any) -> Any:
    """Return a total plus the products of items, lane by lane: of a pair, both products."""
    if left.type == FLOATS:
        return multiply_add(builder, left, right, total)
    pairs = (builder.bitcast(items, BF16S) for items in (left, right))
    return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, *pairs)


@intrinsic
def largest_of(typing: Any, scores: Any, row: Any) -> Any:  # noqa: ARG001
    """Return the largest of a row of scores (SIDE, SIDE); where one is NaN, any of them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        scores, row = arrays_of(context, builder, signature, arguments)
        begin = row_of(builder, scores, row)
        vectors = [load(builder, begin, LONG(place), LANES) for place in range(0, SIDE, LANES)]
        while len(vectors) > 1:
            vectors = [larger(builder, *pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
        vector, lanes = vectors[0], LANES
        while lanes > 1:
            lanes //= 2
            halves = (ir.Constant(ir.VectorType(INT, lanes), list(range(at, at + lanes))) for at in (0, lanes))
            vector = larger(builder, *(builder.shuffle_vector(vector, vector, half) for half in halves))
        return builder.extract_element(vector, INT(0))

    return types.float32(scores, types.int64), generate


def larger(builder: Any, one: Any, other: Any) -> Any:
    """Return the larger of each pair of numbers."""
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)
