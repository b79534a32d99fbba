"""Files that are whole or absent: written beside their place, flushed to disk, then renamed.

The order (write, flush the file, rename, flush the folder) is the one that survives a power cut on a POSIX
file system; see Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.
"""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sheepop.utils.errors import NoSpaceError, SheepopError

HASHED_AT_ONCE = 2**23  # bytes; after each piece a thread may have to wait until another one has run some Python


@contextmanager
def full_disk_is_a_clear_error(path: Path) -> Iterator[None]:
    """Turn "no space left" (also when a quota says it) while writing `path` into a `NoSpaceError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"No space is left on the disk while writing {path}. What was there before is untouched. "
                "Free some space, or choose another folder, and run the command again."
            ) from error
        raise


def flush_to_disk(path: Path) -> None:
    """Ask the system to bring a file's content, or a folder's entries, to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield the path of an empty file beside `target`; when the block ends well, flush it and rename it to `target`.

    A reader sees the old file or the new one. When the block raises, the new one goes away.

    Raises:
        NoSpaceError: the disk is full; the old file is untouched.
    """
    with full_disk_is_a_clear_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(descriptor)
        temporary = Path(name)
        try:
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner may read
            yield temporary
            flush_to_disk(temporary)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        flush_to_disk(target.parent)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace the file at `path` by `content` in one step; a reader sees the old file or the new one.

    Raises:
        NoSpaceError: the disk is full; the old file is untouched.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when the block ends well, flush it all and rename it to `target`.

    A reader of `target` sees the whole folder or none. When the block raises, the temporary folder goes away.
    An existing `target` is replaced only after the new one is complete; where the system can exchange two names (Linux)
    there is no moment without it, elsewhere `recover_replaced` puts back what a kill between two renames took away.

    Raises:
        NoSpaceError: the disk is full; nothing was published.
    """
    with full_disk_is_a_clear_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
        try:
            os.chmod(temporary, 0o777 & ~_umask())
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    flush_to_disk(Path(folder) / name)
                flush_to_disk(Path(folder))
            if target.exists():
                _replace_folder(temporary, target)
            else:
                os.replace(temporary, target)
            flush_to_disk(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _replace_folder(new: Path, target: Path) -> None:
    if _exchange(new, target):
        os.replace(new, new.with_suffix(".old"))  # what it holds now may go
        shutil.rmtree(new.with_suffix(".old"))
        return
    discarded = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
    os.replace(target, discarded / target.name)
    os.replace(new, target)
    shutil.rmtree(discarded)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (`renameat2` of Linux); say whether the system can."""
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return bool(rename(current_folder, os.fsencode(one), current_folder, os.fsencode(other), exchange) == 0)


def recover_replaced(folder: Path, pattern: str) -> None:
    """Put back folders that a kill between the two renames of a replacement left under no name."""
    for kept in folder.glob(f".{pattern}.old/{pattern}"):
        if not (folder / kept.name).exists():
            os.replace(kept, folder / kept.name)


def to_json(value: object, *, indent: int | None = 2) -> str:
    """Serialise to strict JSON: NaN and infinity, which JSON does not have, raise `ValueError`."""
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path` atomically as indented JSON."""
    write_atomic(path, to_json(value) + "\n")


def read_json(path: Path, error: type[SheepopError], *, most_bytes: int | None = None) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Args:
        path: the file.
        error: what is raised.
        most_bytes: a larger file is refused; as objects of Python some JSON takes twenty times its size.

    Raises:
        error: the file is missing, unreadable, too large, not JSON, or not an object; says where in the file.
    """
    try:
        if most_bytes is not None and path.stat().st_size > most_bytes:
            raise error(f"{path} has {path.stat().st_size} bytes; no such file has more than {most_bytes}.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"There is no file {path}.") from None
    except json.JSONDecodeError as problem:
        raise error(
            f"{path} is not valid JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}."
        ) from None
    except (OSError, ValueError, RecursionError) as problem:  # not UTF-8, or a number of thousands of digits
        raise error(f"{path} cannot be read as JSON: {problem}.") from None
    if not isinstance(value, dict):
        raise error(f"{path} must hold a JSON object in braces, but holds a {type(value).__name__}.")
    return value


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        piece = memoryview(bytearray(min(HASHED_AT_ONCE, path.stat().st_size + 1)))
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
