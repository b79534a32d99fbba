"""What is in a GGUF file (ggml-org/ggml, `docs/gguf.md`): a header of keys and values, and tensors in many encodings.

The header is read here, in one pass that no damaged file can lead astray: the library's own reader follows counts
beyond the end of the file, and makes an object of some 600 bytes for each entry of each list. What the types are, how
numbers are packed into blocks, and writing are the library's.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sheepop.utils.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# The numbers that a value can be, by the code of its type.
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
STRING, LIST = 8, 9
TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")
MOST_STRINGS = 2**20  # of all lists together; the largest vocabularies and their merges have some 780,000
MOST_NAMES = 2**16  # of values, and of tensors
MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Encoded:
    """A tensor as it is stored.

    Attributes:
        kind: its type, one of TENSOR_TYPES.
        shape: of its numbers, rows first, as in PyTorch.
        rows: the bytes of each row, (number of rows, bytes of a row).
    """

    kind: str
    shape: tuple[int, ...]
    rows: NDArray[np.uint8]


class GgufFile(Mapping[str, Tensor]):
    """A file's tensors by their names, in fp32, made when they are asked for.

    Attributes:
        fields: values of the header by their keys: numbers, strings, lists of strings, arrays of numbers.
        encoded: the tensors as they are stored.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: the file is damaged, or a tensor has a type that we do not know.
        """
        content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        try:
            self.fields, self.encoded = read_header(content)
        except (ValueError, OverflowError) as error:
            raise CheckpointError(f"{path} is not a whole GGUF file: {error}. Get it again from its source.") from None

    def __getitem__(self, name: str) -> Tensor:
        stored, gguf = self.encoded[name], gguf_library()
        numbers = gguf.dequantize(stored.rows, gguf.GGMLQuantizationType[stored.kind])
        return torch.from_numpy(np.array(numbers, np.float32)).view(stored.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.encoded

    def __iter__(self) -> Iterator[str]:
        return iter(self.encoded)

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def num_stored(self) -> int:
        """How many numbers all tensors have."""
        return sum(prod(tensor.shape) for tensor in self.encoded.values())


def gguf_library() -> ModuleType:
    """Return the library `gguf`.

    Raises:
        CheckpointError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise CheckpointError("GGUF files need the package gguf. Install it: pip install 'sheepop[interop]'.") from None
    return gguf


class Cursor:
    """A place in a file that moves behind what is read, and never behind the end."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        self.content, self.at = content.data, 0
        self.strings_left = MOST_STRINGS

    def take(self, size: int) -> memoryview:
        """Return the next bytes."""
        if size > len(self.content) - self.at:
            raise ValueError(
                f"at byte {self.at} it says that {size} more follow, but it has {len(self.content)} in all"
            )
        self.at += size
        return self.content[self.at - size : self.at]

    def number(self, layout: str) -> int:
        """Return the next integer, of a layout of `struct`."""
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        return int(value)

    def string(self) -> str:
        """Return the next string."""
        return str(self.take(self.number("<Q")), "utf-8")

    def strings(self, count: int) -> list[str]:
        """Return the next strings, maybe a million: by `string` one by one they take four times as long."""
        content, size, length_at = self.content, len(self.content), struct.Struct("<Q").unpack_from
        found, end = [], self.at
        for _ in range(count):
            if end + 8 > size:
                self.at = end
                self.take(8)  # says what is wrong
            begin = end + 8
            end = begin + length_at(content, end)[0]
            if end > size:
                self.at = begin
                self.take(end - begin)
            found.append(str(content[begin:end], "utf-8"))
        self.at = end
        return found

    def value(self) -> Any:
        """Return the next value, whatever its type."""
        kind = self.number("<I")
        if kind == STRING:
            return self.string()
        if kind != LIST:
            return self.numbers(kind, 1)[0].item()
        kind, count = self.number("<I"), self.number("<Q")
        if kind != STRING:
            return self.numbers(kind, count)
        self.strings_left -= count
        if self.strings_left < 0:
            raise ValueError(f"it says that a list has {count} strings, more than any model needs")
        return self.strings(count)

    def numbers(self, kind: int, count: int) -> NDArray[Any]:
        """Return an array of numbers of a type."""
        if kind not in NUMBERS:
            raise ValueError(f"a value has the type {kind}, which there is not")
        layout = np.dtype(NUMBERS[kind])
        return np.frombuffer(self.take(count * layout.itemsize), layout)


def read_header(content: NDArray[np.uint8]) -> tuple[dict[str, Any], dict[str, Encoded]]:
    """Return the values and the tensors of a file.

    Raises:
        ValueError: it is damaged; says how.
        CheckpointError: a tensor has a type that we do not know.
    """
    cursor = Cursor(content)
    if bytes(cursor.take(4)) != MAGIC:
        raise ValueError(f"it does not begin with {MAGIC.decode()}")
    version = cursor.number("<I")
    if version not in VERSIONS:
        raise ValueError(f"it has version {version} of the format; known are {' and '.join(map(str, VERSIONS))}")
    num_tensors, num_fields = cursor.number("<Q"), cursor.number("<Q")
    fields = named(cursor, num_fields, cursor.value)
    places = named(cursor, num_tensors, lambda: tensor_place(cursor))
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
        raise ValueError(f"its tensors are aligned to {alignment} bytes")
    begin = -(-cursor.at // alignment) * alignment
    tensors = {name: encoded(content[begin:], name, *place) for name, place in places.items()}
    if sum(tensor.rows.nbytes for tensor in tensors.values()) > len(content):  # else a small file could fill memory
        raise ValueError("its tensors lie one over the other")
    return fields, tensors


def named(cursor: Cursor, count: int, read: Callable[[], Any]) -> dict[str, Any]:
    """Return so many things by the names that stand before them."""
    if count > MOST_NAMES:
        raise ValueError(f"it says that it has {count} entries, more than any model")
    found: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.string()
        if name in found:
            raise ValueError(f"it has two entries {name}")
        found[name] = read()
    return found


def tensor_place(cursor: Cursor) -> tuple[tuple[int, ...], int, int]:
    """Return the shape of the next tensor, rows first, the code of its type, and where its bytes begin."""
    dimensions = cursor.number("<I")
    if not 0 < dimensions <= MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))[::-1]
    return shape, cursor.number("<I"), cursor.number("<Q")


def encoded(content: NDArray[np.uint8], name: str, shape: tuple[int, ...], code: int, begin: int) -> Encoded:
    """Return the tensor whose bytes begin at `begin` of what follows the header.

    Raises:
        ValueError: there is no such place.
        CheckpointError: we do not know the type.
    """
    gguf = gguf_library()
    kind = next((kind.name for kind in gguf.GGMLQuantizationType if kind.value == code), f"number {code}")
    if kind not in TENSOR_TYPES:
        raise CheckpointError(
            f"The tensor {name} has the type {kind}, which sheepop cannot read; known are {', '.join(TENSOR_TYPES)}. "
            "Get the model in one of these."
        )
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    num_rows, width = prod(shape[:-1]), shape[-1]
    size = num_rows * (width // block) * block_bytes
    if not size or width % block or begin + size > len(content):
        raise ValueError(f"its tensor {name} of shape {shape} in {kind} does not lie within it")
    return Encoded(kind, shape, content[begin : begin + size].reshape(num_rows, -1))
