"""Named corpora: fetched from the Hugging Face hub, or taken from packages that are installed, and written as text."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sheepop.data.corpora import INSTALLED, package_version, write_corpus
from sheepop.data.hub import HubFile, bytes_to_fetch, describe, fetch, find_paths, local_copy, open_remote
from sheepop.data.hub_corpora import HUB, SEPARATOR, HubCorpus
from sheepop.utils.errors import ConfigError, DataError, NoSpaceError, did_you_mean
from sheepop.utils.files import flush_to_disk, full_disk_is_a_clear_error, read_json, to_json, write_json
from sheepop.utils.logging import format_count, log, warn

SECONDS_BETWEEN_LINES = 10
DESCRIBED_AT_ONCE = 8  # requests of some hundred bytes, which wait for the network most of the time
# A Parquet file of English holds two to three times its size in text. A slice that still lacks more than this many
# times a file's size takes the file whole, which checks its SHA-256 and goes on after a broken transfer.
MOST_TEXT_A_BYTE = 3
SPARE_BYTES = 64 * 2**20  # what else is written meanwhile


@dataclass(frozen=True)
class Slice:
    """How much of a corpus is wanted: it ends with the document that reaches a limit; None is no limit."""

    max_bytes: int | None = None
    max_documents: int | None = None

    @property
    def is_whole(self) -> bool:
        """Say whether nothing is cut."""
        return self.max_bytes is None and self.max_documents is None


@dataclass
class Written:
    """What has been written so far."""

    num_bytes: int = 0
    num_documents: int = 0
    is_cut: bool = False


def download(
    name: str,
    *,
    version: str | None = None,
    data_dir: Path,
    max_bytes: int | None = None,
    max_documents: int | None = None,
) -> Path:
    """Write a named corpus below `data_dir` as text and return its file, or its folder for an installed one.

    Documents are separated by a line `<|endoftext|>`. Beside the text, `NAME.json` records where it came from, its
    licence, counts and SHA-256. What is there already is not fetched again. A transfer that broke goes on where it
    stopped, and `HF_ENDPOINT` names another hub, as in all programs that use the hub. Of a slice, only what it needs is
    fetched; what is read of a file in part cannot be checked against its SHA-256, and starts anew after a break.

    Args:
        name: one that `list_corpora` shows.
        version: which version; None for the corpus's first.
        data_dir: the folder to write to.
        max_bytes: end after the document that reaches this many bytes of text; None for all of it.
        max_documents: end after this many documents; None for all of them.

    Raises:
        ConfigError: there is no such corpus or version, or a limit is not positive.
        DataError: the hub cannot be reached, does not have what is asked for, or sends something else; the packages to
            fetch it are missing; or a different slice is there already.
        NoSpaceError: there is too little space, as is seen before anything is fetched; no part of the text is left.
    """
    wanted = Slice(max_bytes, max_documents)
    for option, limit in (("--max-bytes", max_bytes), ("--max-documents", max_documents)):
        if limit is not None and limit <= 0:
            raise ConfigError(f"{option} is {limit}, but must be at least 1.")
    if name in INSTALLED:
        if version is not None or not wanted.is_whole:
            raise ConfigError(
                f"The corpus '{name}' comes whole and in one version; leave out --version, --max-bytes and "
                "--max-documents."
            )
        return _write_installed(name, data_dir)
    if name not in HUB:
        known = (*HUB, *INSTALLED)
        raise ConfigError(f"There is no corpus '{name}'.{did_you_mean(name, known)} There are: {', '.join(known)}.")
    corpus = HUB[name]
    version = version or next(iter(corpus.versions))
    if version not in corpus.versions:
        raise ConfigError(
            f"The corpus '{name}' has no version '{version}'.{did_you_mean(version, corpus.versions)} "
            f"There are: {', '.join(corpus.versions)}."
        )
    output = data_dir / corpus.versions[version].output
    with _one_process(output):
        if not _is_there(output, wanted):
            _download_from_hub(name, version, output, wanted)
    return output


def list_corpora() -> str:
    """Return a table of the named corpora: name, versions, licence, description."""
    rows = [("name", "versions", "licence", "what it is")]
    rows += [(name, ", ".join(hub.versions), hub.licence, hub.description) for name, hub in HUB.items()]
    rows += [(name, "", installed.licence, installed.description) for name, installed in INSTALLED.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def record_path(output: Path) -> Path:
    """Return where the record of a corpus lies: `NAME.json` beside its text."""
    return output.with_name(f"{output.name.removesuffix('.txt')}.json")


def _write_installed(name: str, data_dir: Path) -> Path:
    corpus, folder = INSTALLED[name], data_dir / name
    files = write_corpus(name, folder)
    contents = [file.read_bytes() for file in files]
    record = {
        "corpus": name,
        "source": f"package {corpus.requirement.partition('==')[0]}" if corpus.requirement else "Python's library",
        "revision": package_version(name),
        "licence": corpus.licence,
        "bytes": sum(map(len, contents)),
        "documents": len(files),
        "sha256": hashlib.sha256(b"".join(contents)).hexdigest(),
    }
    write_json(record_path(folder), record)
    log(f"wrote {len(files)} file(s) to {folder} (licence: {corpus.licence})")
    return folder


@contextmanager
def _one_process(output: Path) -> Iterator[None]:
    """Let one process at a time fetch a text; others wait, and then find it there."""
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        raise DataError(
            "Fetching a corpus needs the package filelock. Install it: pip install 'sheepop[corpora]'"
        ) from None
    with full_disk_is_a_clear_error(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        path = output.with_name(f".{output.name}.lock")
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"another process is fetching {output}; waiting for it")
            lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: who waits sees that its file is gone, and makes a new one
        lock.release()


def _is_there(output: Path, wanted: Slice) -> bool:
    """Say whether the text is there as it is wanted, by its record.

    Raises:
        DataError: another slice of it is there, or the place of the record is taken.
    """
    path = record_path(output)
    record = read_json(path, DataError) if path.exists() else None
    if record is not None and "corpus" not in record:
        raise DataError(f"{path} is not the record of a corpus. Move it away, or choose another --data-dir.")
    if not output.exists():
        return False
    if record is not None and record["bytes"] == output.stat().st_size:
        there = Slice(record["max_bytes"], record["max_documents"])
        if wanted != there and not (wanted.is_whole and record["complete"]):
            raise DataError(
                f"{output} is there already, but is {_in_words(there)}, while {_in_words(wanted)} is asked for. Remove "
                "it, or choose another --data-dir."
            )
    elif record is not None:
        warn(f"{output} has changed since it was fetched")
    log(f"{output} is there already; remove it to fetch it again")
    return True


def _in_words(part: Slice) -> str:
    limits = [
        f"{option} {limit}"
        for option, limit in (("--max-bytes", part.max_bytes), ("--max-documents", part.max_documents))
        if limit is not None
    ]
    return f"the slice of {' '.join(limits)}" if limits else "the whole corpus"


def _download_from_hub(name: str, version: str, output: Path, wanted: Slice) -> None:
    corpus = HUB[name]
    parts = output.with_name(f".{output.name}.parts")
    for left_over in output.parent.glob(f".{output.name}.*.tmp"):  # of a process that was killed; this one has the lock
        shutil.rmtree(left_over, ignore_errors=True)
    log(f"{name} {version} from the data set {corpus.repository}; licence: {corpus.licence}")
    paths = find_paths(corpus.repository, corpus.versions[version].files)
    first = describe(corpus.repository, paths[0])
    if wanted.is_whole:
        with ThreadPoolExecutor(DESCRIBED_AT_ONCE) as pool:
            files = [first, *pool.map(lambda path: describe(corpus.repository, path, first.revision), paths[1:])]
        text_bytes = round(_text_share(corpus, first, parts) * sum(file.size for file in files))
        _check_space(output, sum(bytes_to_fetch(file, parts) for file in files) + text_bytes)
    elif wanted.max_bytes is not None:
        _check_space(output, wanted.max_bytes)

    written = Written()
    used: list[dict[str, Any]] = []

    def rows() -> Iterator[str]:
        for number, path in enumerate(paths):
            file = first if number == 0 else describe(corpus.repository, path, first.revision)
            lacking = None if wanted.max_bytes is None else wanted.max_bytes - written.num_bytes
            needs_all = lacking > MOST_TEXT_A_BYTE * file.size if lacking is not None else wanted.is_whole
            take_whole = needs_all or local_copy(file, parts) is not None
            log(f"file {number + 1} of {len(paths)}: {path} ({format_count(file.size)} bytes)")
            used.append({"path": path, "bytes": file.size, "sha256": file.sha256, "fetched": "in part"})
            if take_whole:
                used[-1]["fetched"] = "whole" if file.sha256 else "whole, but the hub announced no SHA-256"
            ahead = corpus.format.read_ahead
            with fetch(file, parts).open("rb") if take_whole else open_remote(file, read_ahead=ahead) as stream:
                yield from corpus.format.rows(stream)

    with (
        full_disk_is_a_clear_error(output),
        tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp") as folder,
    ):
        text = Path(folder) / output.name
        sha256 = _write_text(text, corpus.documents(rows()), wanted, written)
        record = {
            "corpus": name,
            "version": version,
            "source": corpus.repository,
            "revision": first.revision,
            "files": used,
            "licence": corpus.licence,
            "max_bytes": wanted.max_bytes,
            "max_documents": wanted.max_documents,
            "complete": not written.is_cut,
            "bytes": written.num_bytes,
            "documents": written.num_documents,
            "sha256": sha256,
        }
        _publish(text, output, record)
    shutil.rmtree(parts, ignore_errors=True)
    log(
        f"wrote {format_count(written.num_documents)} documents, {format_count(written.num_bytes)} bytes, to {output} "
        f"(licence: {corpus.licence})"
    )


def _text_share(corpus: HubCorpus, file: HubFile, parts: Path) -> float:
    """Return the bytes of text for each byte of a file, from its footer alone where it has one."""
    local = local_copy(file, parts)
    with local.open("rb") if local else open_remote(file, read_ahead=corpus.format.read_ahead) as stream:
        return corpus.format.text_share(stream)


def _check_space(output: Path, num_bytes: int) -> None:
    """Refuse what will not fit, before time and traffic are spent on it."""
    free = shutil.disk_usage(output.parent).free
    if num_bytes + SPARE_BYTES > free:
        raise NoSpaceError(
            f"{output} needs about {format_count(num_bytes)} bytes, for the files to fetch and the text together, but "
            f"{format_count(free)} are free in {output.parent}. Nothing was fetched. Free some space, choose another "
            "--data-dir, or take a slice with --max-bytes."
        )


def _write_text(path: Path, documents: Iterable[str], wanted: Slice, written: Written) -> str:
    """Write documents up to the limits, counting in `written`, and return the SHA-256 of the file."""
    digest = hashlib.sha256()
    next_line = time.monotonic() + SECONDS_BETWEEN_LINES
    with path.open("wb") as file:
        for document in documents:
            if not document.strip():
                continue
            start = f"\n{SEPARATOR}\n" if written.num_documents else ""
            content = (start + document).encode("utf-8", errors="replace")
            file.write(content)
            digest.update(content)
            written.num_bytes += len(content)
            written.num_documents += 1
            if time.monotonic() >= next_line:
                log(f"{format_count(written.num_documents)} documents, {format_count(written.num_bytes)} bytes of text")
                next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            if (wanted.max_bytes is not None and written.num_bytes >= wanted.max_bytes) or (
                wanted.max_documents is not None and written.num_documents >= wanted.max_documents
            ):
                # Not after a look at whether more follows, which could fetch another file.
                written.is_cut = True
                break
    if not written.num_documents:
        raise DataError("There is no text in the files of this corpus. Nothing was published.")
    flush_to_disk(path)
    return digest.hexdigest()


def _publish(text: Path, output: Path, record: dict[str, Any]) -> None:
    """Put the record in its place and then the text, so that whoever finds a text finds its record."""
    path = text.with_name("record")
    path.write_text(to_json(record) + "\n", encoding="utf-8")
    flush_to_disk(path)
    os.replace(path, record_path(output))
    os.replace(text, output)
    flush_to_disk(output.parent)
