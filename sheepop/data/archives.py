"""Compressed files and archives → byte streams, bounded so that a small file cannot fill memory or disk."""

import errno
import io
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from bz2 import BZ2Decompressor
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from sheepop.data.kinds import HEAD_BYTES, Kind
from sheepop.utils.errors import DataError, NoSpaceError

MAX_RATIO = 200  # text shrinks to a tenth at best; what grows more than this is made to
FREE_BYTES = 100 * 2**20  # below this the ratio does not matter
MAX_BYTES = 2**40
MAX_MEMBERS = 1_000_000
MAX_DEPTH = 4  # an archive in an archive, compressed, and once more
XZ_MEMORY_BYTES = 256 * 2**20
INPUT_BYTES = 4096  # at once: the worst of the formats makes some 100 MB of this
SPOOL_BYTES = 32 * 2**20
ARCHIVE_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


class Budget:
    """How many bytes may still be unpacked from one file on disk, over all of its layers and members."""

    def __init__(self, where: str, file_bytes: int) -> None:
        self.where = where
        self.limit = min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * file_bytes))
        self.used = 0

    def charge(self, num_bytes: int) -> None:
        """Count bytes that came out; raises DataError beyond the limit."""
        self.used += num_bytes
        if self.used > self.limit:
            raise DataError(
                f"{self.where} unpacks to more than {self.limit:,} bytes, over {MAX_RATIO} times its size: it looks "
                "like a decompression bomb. If it is really text, unpack it yourself and name the unpacked files."
            )


@contextmanager
def damage_explained(where: str) -> Iterator[None]:
    """Turn what the readers of archives raise into a DataError about `where`."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoSpaceError(f"There is no space left to unpack {where}. Free some, or set TMPDIR.") from None
        raise DataError(f"{where} cannot be read: {error.strerror or error}.") from None
    except (NotImplementedError, RuntimeError) as error:
        raise DataError(f"{where} cannot be unpacked: {error}. Unpack it yourself and name the files.") from None
    except ARCHIVE_ERRORS as error:
        raise DataError(
            f"{where} is damaged or cut off: {str(error) or 'it ends too early'}. Fetch or make the file again."
        ) from None


class _Guarded(io.RawIOBase):
    """A reader whose errors are explained and whose bytes are counted."""

    def __init__(self, read: Callable[[int], bytes], where: str, budget: Budget | None) -> None:
        self._read = read
        self._where = where
        self._budget = budget

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled = 0
        with damage_explained(self._where):
            while filled < len(buffer) and (data := self._read(len(buffer) - filled)):
                buffer[filled : filled + len(data)] = data
                filled += len(data)
        if self._budget:
            self._budget.charge(filled)
        return filled


def guarded(read: Callable[[int], bytes], where: str, budget: Budget | None) -> BinaryIO:
    """Return a buffered stream over a `read(n)`: its `peek` gives HEAD_BYTES, its errors are DataErrors."""
    return io.BufferedReader(_Guarded(read, where, budget), HEAD_BYTES)


class _Decompressed:
    """Streams of one of the compressions, one behind the other, as a `read(n)`; a missing end is an error."""

    def __init__(self, stream: BinaryIO, start: Callable[[], Any]) -> None:
        self._stream = stream
        self._start = start
        self._decompressor: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def read(self, size: int) -> bytes:
        while not self._output:
            self._input = self._input or self._stream.read(INPUT_BYTES)
            if not self._input:
                if self._decompressor is not None:
                    raise EOFError
                return b""
            if self._decompressor is None:
                self._decompressor = self._start()
            self._output = memoryview(self._decompressor.decompress(self._input))
            self._input = b""
            if self._decompressor.eof:
                # Some writers fill up with zero bytes.
                self._input = self._decompressor.unused_data.lstrip(b"\0")
                self._decompressor = None
        data = bytes(self._output[:size])
        self._output = self._output[size:]
        return data


def decompressed(stream: BinaryIO, kind: Kind, where: str, budget: Budget) -> BinaryIO:
    """Return what is inside a stream of the kind gzip, zstd, xz or bzip2, checksums checked where the format has them.

    Raises (also while reading):
        DataError: damaged, cut off, beyond the budget, or the library for it is missing.
    """
    starts: dict[str, Callable[[], Any]] = {
        "gzip": lambda: zlib.decompressobj(wbits=31),
        "xz": lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY_BYTES),
        "bzip2": BZ2Decompressor,
        "zstd": _start_zstd,
    }
    return guarded(_Decompressed(stream, starts[kind]).read, where, budget)


def _start_zstd() -> Any:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise DataError("Reading .zst needs zstandard. Install it: `pip install 'sheepop[formats]'`.") from None

    class Frame:
        """One frame, with the errors of its library as those that the others raise."""

        def __init__(self) -> None:
            self._frame = zstandard.ZstdDecompressor(max_window_size=2**27).decompressobj()

        def decompress(self, data: bytes) -> bytes:
            try:
                return self._frame.decompress(data)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None

        @property
        def eof(self) -> bool:
            return bool(self._frame.eof)

        @property
        def unused_data(self) -> bytes:
            return self._frame.unused_data

    return Frame()


def seekable(stream: BinaryIO, where: str) -> BinaryIO:
    """Return the stream if it can seek, else a temporary copy that can (in memory while small, then on disk)."""
    if stream.seekable():
        return stream
    copy = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - it lives as long as its reader
    with damage_explained(where):
        while block := stream.read(2**20):
            copy.write(block)
        copy.seek(0)
    return cast(BinaryIO, copy)


def zip_members(stream: BinaryIO, where: str, budget: Budget) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the name and the bytes of each file in a zip archive that can seek, in the archive's order.

    Raises (also while reading a member):
        DataError: damaged, cut off, encrypted, beyond the budget or MAX_MEMBERS.
    """
    with damage_explained(where):
        archive = zipfile.ZipFile(stream)
    with archive:
        infos = archive.infolist()
        _check_members(len(infos), where)
        if "[Content_Types].xml" in archive.NameToInfo:
            raise DataError(f"{where} is an office document. Save it as text, HTML or PDF, and name that file.")
        for info in infos:
            if info.is_dir() or _is_hidden(info.filename):
                continue
            source = f"{where}!{info.filename}"
            yield info.filename, guarded(_zip_reader(archive, info, source), source, budget)


def _zip_reader(archive: zipfile.ZipFile, info: zipfile.ZipInfo, source: str) -> Callable[[int], bytes]:
    member: list[Any] = []

    def read(size: int) -> bytes:
        if info.flag_bits & 1:
            raise DataError(f"{source} is locked with a password. Unpack the archive and name the files.")
        if not member:
            member.append(archive.open(info))
        return cast(bytes, member[0].read(size))

    return read


class _Forward:
    """A stream that only goes forward, with the `tell` and `seek` that tarfile uses when members are read in order."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._position = 0
        self.last_block = b""

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._position += len(data)
        self.last_block = data
        return data

    def seek(self, position: int) -> int:
        while position > self._position and self.read(min(2**20, position - self._position)):
            pass
        return self._position


def tar_members(stream: BinaryIO, where: str) -> Iterator[tuple[str, BinaryIO]]:
    """Yield the name and the bytes of each regular file in a tar archive; each must be read before the next.

    Raises (also while reading a member):
        DataError: damaged or cut off, or more than MAX_MEMBERS.
    """
    forward = _Forward(stream)
    with damage_explained(where):
        archive = tarfile.open(fileobj=cast(BinaryIO, forward), mode="r:")  # noqa: SIM115 - closed with its stream
    count = 0
    while True:
        with damage_explained(where):
            info = archive.next()
        if info is None:
            break
        archive.members = []  # type: ignore[attr-defined]  # it would remember all of them
        count += 1
        _check_members(count, where)
        if not info.isfile() or _is_hidden(info.name):
            continue
        with damage_explained(where):
            member = archive.extractfile(info)
        assert member is not None  # a regular file
        yield info.name, guarded(member.read, f"{where}!{info.name}", None)
    if forward.last_block.strip(b"\0"):
        # tarfile takes a header that it cannot read for the end.
        raise DataError(f"{where} is damaged or cut off behind its member {count}. Fetch or make the file again.")


def _check_members(count: int, where: str) -> None:
    if count > MAX_MEMBERS:
        raise DataError(f"{where} holds more than {MAX_MEMBERS:,} files. Unpack it, and name the folder.")


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)
