"""Files of data sets on the Hugging Face hub: described, fetched whole with their sums checked, or read in ranges.

Only the addresses that hold files are asked (`/datasets/OWNER/NAME/resolve/REVISION/PATH`), except to expand a
pattern, so that any mirror will do. `HF_ENDPOINT` names one, `HF_TOKEN` an account, as in all programs that use the
hub.
"""

import fnmatch
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from sheepop.utils.errors import DataError, NoSpaceError
from sheepop.utils.files import full_disk_is_a_clear_error, sha256_of_file
from sheepop.utils.logging import is_terminal, log

SHA256_DIGITS = 64


@dataclass(frozen=True)
class HubFile:
    """A file of a data set at one commit.

    Attributes:
        revision: the commit, so that all files of a corpus come from the same one.
        size: in bytes.
        sha256: of the content, in hexadecimal; None for a file that the hub keeps in git itself.
    """

    repository: str
    path: str
    revision: str
    size: int
    sha256: str | None

    def url(self) -> str:
        """Return the address of the content."""
        from huggingface_hub import hf_hub_url

        return str(hf_hub_url(self.repository, self.path, repo_type="dataset", revision=self.revision))


def find_paths(repository: str, patterns: tuple[str, ...]) -> list[str]:
    """Return the sorted paths in a data set that match the first pattern that matches any.

    A pattern has its wildcards in the last part, so that one folder is listed; one without is its own answer.

    Raises:
        DataError: nothing matches, or the hub cannot be asked.
    """
    if not any("*" in pattern for pattern in patterns):
        return list(patterns)
    with hub_problem_is_a_data_error(f"the list of files of the data set {repository}"):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError

        for pattern in patterns:
            folder = str(PurePosixPath(pattern).parent)
            try:
                entries = HfApi().list_repo_tree(repository, None if folder == "." else folder, repo_type="dataset")
                paths = sorted(entry.path for entry in entries if fnmatch.fnmatchcase(entry.path, pattern))
            except EntryNotFoundError:
                continue
            if paths:
                return paths
    raise DataError(
        f"The data set {repository} has no files {' or '.join(patterns)} any more: its owner has changed it. "
        "A newer version of this program may know the new names."
    )


def describe(repository: str, path: str, revision: str | None = None) -> HubFile:
    """Ask the hub for a file's commit, size and SHA-256.

    Raises:
        DataError: the file is not there, needs an account, or the hub cannot be reached.
    """
    with hub_problem_is_a_data_error(f"{path} of the data set {repository}"):
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        found = get_hf_file_metadata(hf_hub_url(repository, path, repo_type="dataset", revision=revision))
        if found.size is None or found.commit_hash is None:
            raise ValueError("the answer does not say how long the file is, or which commit it belongs to")
        etag = found.etag or ""
        sha256 = etag if len(etag) == SHA256_DIGITS else None
        return HubFile(repository, path, found.commit_hash, found.size, sha256)


def local_copy(file: HubFile, folder: Path) -> Path | None:
    """Return where a file lies already, whole: in `folder`, or in the cache that all programs share."""
    mine = folder / _local_name(file)
    if mine.is_file() and mine.stat().st_size == file.size:
        return mine
    with hub_problem_is_a_data_error(f"{file.path} of the data set {file.repository}"):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(file.repository, file.path, revision=file.revision, repo_type="dataset")
    if isinstance(cached, str) and Path(cached).stat().st_size == file.size:
        return Path(cached)
    return None


def bytes_to_fetch(file: HubFile, folder: Path) -> int:
    """Return how many bytes of a file are still missing."""
    if local_copy(file, folder) is not None:
        return 0
    partial = folder / _local_name(file)
    return file.size - min(file.size, partial.stat().st_size if partial.is_file() else 0)


def fetch(file: HubFile, folder: Path) -> Path:
    """Return a file whole and with the right SHA-256, from the shared cache, or into `folder` over the network.

    What an earlier try left in `folder` is gone on with. The hub's own cache starts a file anew after its process was
    killed, and files here are gigabytes long; that is why it is only read.

    Raises:
        DataError: the transfer failed, or the content is not what the hub announced; then nothing of it is left.
        NoSpaceError: the disk is full.
    """
    path = local_copy(file, folder)
    if path is None:
        path = folder / _local_name(file)
        with full_disk_is_a_clear_error(path):
            folder.mkdir(parents=True, exist_ok=True)
            _transfer(file, path)
    if file.sha256 is not None and (found := sha256_of_file(path)) != file.sha256:
        if path.parent == folder:
            path.unlink()
        raise DataError(
            f"{file.path} of the data set {file.repository} is damaged: its SHA-256 is {found}, but the hub announces "
            f"{file.sha256}. Nothing was published. "
            + (
                "The damaged copy was removed; run the command again, or name another hub in HF_ENDPOINT."
                if path.parent == folder
                else f"Remove the copy {path} from the hub's cache, and run the command again."
            )
        )
    return path


def open_remote(file: HubFile, *, read_ahead: int) -> BinaryIO:
    """Open a file on the hub for reading and seeking; what is read is fetched, `read_ahead` bytes at least.

    Reading raises:
        DataError: the hub cannot be reached, or does not send the range that was asked for.
    """
    remote = _RemoteFile(file)
    return io.BufferedReader(remote, buffer_size=read_ahead) if read_ahead else cast(BinaryIO, remote)


class _RemoteFile(io.RawIOBase):
    """The bytes of a file on the hub, a request for each read."""

    def __init__(self, file: HubFile) -> None:
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size}[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self.position + len(buffer), self.file.size)
        if self.position >= end:
            return 0
        content = _read_range(self.file, self.position, end)
        buffer[: len(content)] = content
        self.position = end
        return len(content)


def _read_range(file: HubFile, start: int, end: int) -> bytes:
    with hub_problem_is_a_data_error(f"{file.path} of the data set {file.repository}"):
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        answer = http_backoff("GET", file.url(), headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        hf_raise_for_status(answer)
        content: bytes = answer.content
        if answer.status_code != 206 or len(content) != end - start:
            raise ValueError(
                f"bytes {start} to {end} were asked for, and {len(content)} came with status {answer.status_code}"
            )
        return content


def _transfer(file: HubFile, path: Path) -> None:
    """Append what is missing of a file to `path`; a connection that breaks is opened again."""
    with hub_problem_is_a_data_error(f"{file.path} of the data set {file.repository}"):
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers, disable_progress_bars

        if not is_terminal():
            disable_progress_bars()
        have = path.stat().st_size if path.exists() else 0
        if have > file.size:
            path.unlink()
            have = 0
        if have:
            log(f"going on with {path.name} at {have / file.size:.0%}")
        try:
            with path.open("ab") as part:
                headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
                http_get(file.url(), part, resume_size=have, headers=headers, expected_size=file.size)
        finally:
            if path.stat().st_size > file.size:  # what came is not this file
                path.unlink()


def _local_name(file: HubFile) -> str:
    """Name the copy by its content, so that a new commit's file never continues an old one's."""
    return f"{(file.sha256 or file.revision)[:16]}-{PurePosixPath(file.path).name}"


@contextmanager
def hub_problem_is_a_data_error(what: str) -> Iterator[None]:
    """Turn what the hub's client raises while it gets `what` into a `DataError` that says what to do.

    Raises:
        DataError: for everything but a full disk, which stays an `OSError` for whoever knows the path.
    """
    try:
        yield
    except (DataError, NoSpaceError):
        raise
    except ImportError as missing:
        raise DataError(
            f"Fetching a corpus needs the package {missing.name}. Install it: pip install 'sheepop[corpora]'"
        ) from None
    except Exception as problem:  # what the client raises differs with its version and its HTTP library
        import errno

        if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(_explain(what, problem)) from problem


def _explain(what: str, problem: BaseException) -> str:
    from huggingface_hub.constants import ENDPOINT

    status = getattr(getattr(problem, "response", None), "status_code", None)
    if status in (401, 403):
        return (
            f"The hub {ENDPOINT} does not give out {what} (status {status}): it is not there under this name, or needs "
            "an account. If it does, accept its terms on its page and put your access token into the environment "
            "variable HF_TOKEN."
        )
    if status == 404:
        return (
            f"The hub {ENDPOINT} does not have {what} (status 404). If HF_ENDPOINT names a mirror, it may be "
            "incomplete; try without it."
        )
    while problem.__cause__ is not None:
        problem = problem.__cause__
    reason = str(problem).strip().partition("\n")[0].rstrip(". ") or type(problem).__name__
    return (
        f"Could not fetch {what} from {ENDPOINT}: {reason}. Check the connection or name another hub in the "
        "environment variable HF_ENDPOINT; the next try goes on where this one stopped."
    )
