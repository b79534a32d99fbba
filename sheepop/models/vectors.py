"""Vectors for the compiler behind numba, which makes them of plain loops only where it sees through these.

Each function here writes LLVM's code for one small thing; LLVM splits vectors into what the processor has.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils

LINE = 64  # bytes of a cache line
HAS_AVX512 = bool(get_host_cpu_features().get("avx512f"))
LANES = 16 if HAS_AVX512 else 8  # numbers of fp32 that a register holds
FAST = ("contract", "reassoc", "nsz")  # fused, and added in any order

FLOAT = ir.FloatType()
BYTE, SHORT, INT, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
BYTES = {BYTE: 1, SHORT: 2}  # of what is smaller than 4


def constant(kind: Any, number: float) -> Any:
    """Return a vector of which each lane holds the number."""
    return ir.Constant(kind, [number] * kind.count)


def splat(builder: Any, value: Any, lanes: int) -> Any:
    """Return a vector of which each lane holds the value."""
    vector = builder.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, INT(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))


def load(builder: Any, pointer: Any, index: Any, lanes: int) -> Any:
    """Return `lanes` neighbours from `pointer[index]` on."""
    item = pointer.type.pointee
    place = builder.bitcast(builder.gep(pointer, [index]), ir.VectorType(item, lanes).as_pointer())
    return builder.load(place, align=BYTES.get(item, 4))


def store(builder: Any, vector: Any, pointer: Any, index: Any) -> None:
    """Write a vector to `pointer[index]` and its neighbours."""
    place = builder.bitcast(builder.gep(pointer, [index]), vector.type.as_pointer())
    builder.store(vector, place, align=BYTES.get(vector.type.element, 4))


def fetch(builder: Any, pointer: Any, index: Any, lanes: int, ahead: Any) -> None:
    """Begin to read what `load` will want so many bytes later; a processor by itself looks ahead too little."""
    place = builder.ptrtoint(builder.gep(pointer, [index]), LONG)
    for line in range(0, lanes * (4 if pointer.type.pointee == FLOAT else 1), LINE):
        address = builder.inttoptr(builder.add(place, builder.add(ahead, LONG(line))), BYTE.as_pointer())
        prefetch = ir.FunctionType(ir.VoidType(), [address.type, INT, INT, INT])
        function = cgutils.get_or_insert_function(builder.module, prefetch, "llvm.prefetch.p0")
        builder.call(function, [address, INT(0), INT(2), INT(1)])  # to read, into the second cache, data


def multiply_add(builder: Any, left: Any, right: Any, total: Any) -> Any:
    """Return left * right + total."""
    return builder.fadd(builder.fmul(left, right, flags=FAST), total, flags=FAST)


def split(builder: Any, vector: Any, lanes: int) -> list[Any]:
    """Return the parts of a vector that have so many lanes each."""
    if vector.type.count <= lanes:
        return [vector]
    places = [list(range(start, start + lanes)) for start in range(0, vector.type.count, lanes)]
    return [builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(INT, lanes), part)) for part in places]


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


def sum_of_lanes(builder: Any, vector: Any) -> Any:
    """Return the sum of a vector whose number of lanes is a power of two."""
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        halves = (ir.Constant(ir.VectorType(INT, lanes), list(range(at, at + lanes))) for at in (0, lanes))
        first, second = (builder.shuffle_vector(vector, vector, half) for half in halves)
        vector = builder.fadd(first, second, flags=FAST)
    return builder.extract_element(vector, INT(0))


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


def arrays_of(context: Any, builder: Any, signature: Any, arguments: Any) -> list[Any]:
    """Return the arguments of an intrinsic, its arrays as such."""
    return [
        context.make_array(kind)(context, builder, value) if isinstance(kind, types.Array) else value
        for kind, value in zip(signature.args, arguments, strict=True)
    ]


def size_of(builder: Any, array: Any, dimension: int) -> Any:
    """Return the size of an array along a dimension."""
    return cgutils.unpack_tuple(builder, array.shape)[dimension]


def row_of(builder: Any, array: Any, row: Any) -> Any:
    """Return a pointer to a row of an array, the first of its dimensions."""
    begin = builder.ptrtoint(array.data, LONG)
    stride = cgutils.unpack_tuple(builder, array.strides)[0]
    return builder.inttoptr(builder.add(begin, builder.mul(row, stride)), array.data.type)


def item_of(builder: Any, array: Any, *indices: Any) -> Any:
    """Return a pointer to an item of an array, by as many of its indices as are not zero at the end."""
    place = builder.ptrtoint(array.data, LONG)
    for index, stride in zip(indices, cgutils.unpack_tuple(builder, array.strides), strict=False):
        place = builder.add(place, builder.mul(index, stride))
    return builder.inttoptr(place, array.data.type)


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call a function that LLVM itself knows."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@contextmanager
def steps(builder: Any, end: Any, size: int = 1, *, begin: Any = None) -> Iterator[Any]:
    """Write a loop and yield its index, from `begin` or zero up to `end`, both LONG, in steps of a size."""
    start = LONG(0) if begin is None else begin
    with cgutils.for_range_slice(builder, start, end, LONG(size), intp=LONG, inc=True) as (index, _):
        yield index
