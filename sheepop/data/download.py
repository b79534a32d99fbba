"""Named corpora: fetched from the Hugging Face hub, or taken from packages that are installed, and written as text."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sheepop.data.corpora import INSTALLED, write_corpus
from sheepop.data.documents import iter_documents
from sheepop.utils.errors import ConfigError, DataError, NoSpaceError, did_you_mean
from sheepop.utils.files import flush_to_disk, full_disk_is_a_clear_error
from sheepop.utils.logging import format_count, is_terminal, log

SEPARATOR = "<|endoftext|>"  # what `prepare` splits files at
LINES_AT_ONCE = 4096
# WikiText marks the title of an article by one equals sign on each side, those of its sections by more.
ARTICLE_TITLE = re.compile(r" = [^=\n](?:[^\n]*[^=\n])? = \n?")


@dataclass(frozen=True)
class Version:
    """Files of a data set on the hub, and the name of the text file that they become."""

    files: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class HubCorpus:
    """A corpus on the Hugging Face hub.

    Attributes:
        repository: the data set's `owner/name`.
        versions: by the name that `--version` takes; the first is the default.
        documents: reads a fetched file's documents.
    """

    description: str
    licence: str
    repository: str
    versions: Mapping[str, Version]
    documents: Callable[[Path], Iterator[str]]


def download(name: str, *, version: str | None = None, data_dir: Path, max_bytes: int | None = None) -> Path:
    """Write a named corpus below `data_dir` as text and return its file, or its folder for an installed one.

    Documents are separated by a line `<|endoftext|>`. What is there already is not fetched again. A transfer that
    broke goes on where it stopped, and `HF_ENDPOINT` names another hub, as in all programs that use the hub.

    Args:
        name: one that `list_corpora` shows.
        version: which version; None for the corpus's first.
        data_dir: the folder to write to.
        max_bytes: end after the document that reaches this many bytes of text; None for all of it.

    Raises:
        ConfigError: there is no such corpus or version, or the packages to fetch it are missing.
        DataError: the hub cannot be reached, or does not have what is asked for.
        NoSpaceError: the disk is full; no part of the corpus is left.
    """
    if max_bytes is not None and max_bytes <= 0:
        raise ConfigError(f"--max-bytes is {max_bytes}, but must be at least 1.")
    if name in INSTALLED:
        if version is not None or max_bytes is not None:
            raise ConfigError(
                f"The corpus '{name}' comes whole and in one version; leave out --version and --max-bytes."
            )
        folder = data_dir / name
        files = write_corpus(name, folder)
        log(f"wrote {len(files)} file(s) to {folder}")
        return folder
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
    chosen = corpus.versions[version]
    output = data_dir / chosen.output
    if output.exists():
        log(f"{output} is there already; remove it to fetch it again")
        return output
    documents = (document for file in chosen.files for document in corpus.documents(_fetch(corpus.repository, file)))
    num_bytes = _write_text(output, documents, max_bytes)
    log(f"wrote {format_count(num_bytes)} bytes to {output} (licence: {corpus.licence})")
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


def _fetch(repository: str, file: str) -> Path:
    """Return a file of a data set on the hub, from the cache that all programs share or from the network."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise _missing_extra("huggingface-hub") from None
    if not is_terminal():
        disable_progress_bars()
    log(f"fetching {file} of {repository}")
    try:
        with full_disk_is_a_clear_error(Path(HF_HUB_CACHE)):
            return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except NoSpaceError:
        raise
    except Exception as problem:  # what the hub's client raises differs with its version and its HTTP library
        cause: BaseException = problem
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().partition("\n")[0].rstrip(". ") or type(cause).__name__
        raise DataError(
            f"{file} of the data set {repository} could not be fetched from {ENDPOINT}: {reason}. Check the connection "
            "or name another hub in the environment variable HF_ENDPOINT; the next try goes on where this one stopped."
        ) from problem


def _articles(path: Path) -> Iterator[str]:
    """Yield the articles of a WikiText shard, a Parquet file with one line of text a row."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise _missing_extra("pyarrow") from None
    lines: list[str] = []
    for batch in parquet.ParquetFile(path).iter_batches(LINES_AT_ONCE, columns=["text"]):
        for line in batch.column(0).to_pylist():
            if ARTICLE_TITLE.fullmatch(line) and lines:
                yield "".join(lines).strip("\n")
                lines.clear()
            lines.append(line or "\n")
    yield "".join(lines).strip("\n")


def _stories(path: Path) -> Iterator[str]:
    return (document.text for document in iter_documents([path], separator=SEPARATOR))


def _reviews(path: Path) -> Iterator[str]:
    """Yield the reviews of a JSON Lines file: the title, then the text."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            review = json.loads(line)
            yield f"{review['title']}\n{review['text']}".replace("<br />", "\n")


def _missing_extra(package: str) -> ConfigError:
    return ConfigError(f"Fetching this corpus needs the package {package}. Install it: pip install 'sheepop[corpora]'")


def _write_text(output: Path, documents: Iterable[str], max_bytes: int | None) -> int:
    """Write documents to a file that appears when it is whole, and return how many bytes it has."""
    with full_disk_is_a_clear_error(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.", suffix=".tmp") as folder:
            partial = Path(folder) / output.name
            with partial.open("wb") as file:
                for document in documents:
                    if file.tell():
                        file.write(f"\n{SEPARATOR}\n".encode())
                    file.write(document.encode("utf-8"))
                    if max_bytes is not None and file.tell() >= max_bytes:
                        break
                num_bytes = file.tell()
            flush_to_disk(partial)
            os.replace(partial, output)
        flush_to_disk(output.parent)
    return num_bytes


HUB: Mapping[str, HubCorpus] = {
    "wiki": HubCorpus(
        "WikiText, good articles of Wikipedia: 11 MB (2) or 540 MB (103)",
        "CC BY-SA 3.0",
        "Salesforce/wikitext",
        {
            "2": Version(("wikitext-2-raw-v1/train-00000-of-00001.parquet",), "wikitext_2.txt"),
            "103": Version(
                tuple(f"wikitext-103-raw-v1/train-{shard:05d}-of-00002.parquet" for shard in range(2)),
                "wikitext_103.txt",
            ),
        },
        _articles,
    ),
    "amazon": HubCorpus(
        "reviews of beauty products, 330 MB to fetch",
        "see amazon-reviews-2023.github.io",
        "McAuley-Lab/Amazon-Reviews-2023",
        {"2023": Version(("raw/review_categories/All_Beauty.jsonl",), "amazon_reviews.txt")},
        _reviews,
    ),
    "tinystories": HubCorpus(
        "short stories in a small child's words, written by GPT-4, 2.2 GB",
        "CDLA-Sharing-1.0",
        "roneneldan/TinyStories",
        {"2": Version(("TinyStoriesV2-GPT4-train.txt",), "tinystories.txt")},
        _stories,
    ),
}
