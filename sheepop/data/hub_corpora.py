"""Which corpora on the hub have names here, and how their files become documents."""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from sheepop.utils.errors import DataError

SEPARATOR = "<|endoftext|>"  # what `prepare` splits files at
TEXT_COLUMN = "text"
ROWS_AT_ONCE = 1024
# WikiText marks the title of an article by one equals sign on each side, those of its sections by more.
ARTICLE_TITLE = re.compile(r" = [^=\n](?:[^\n]*[^=\n])? = \n?")


@dataclass(frozen=True)
class FileFormat:
    """How a file is read.

    Attributes:
        rows: yields the rows or lines of an open file, from its start and no further than they are asked for.
        text_share: bytes of text for each byte of the open file, to know the space that is needed beforehand.
        read_ahead: bytes to fetch at once at least, where the file is read over the network; 0: what is asked for.
    """

    rows: Callable[[BinaryIO], Iterator[str]]
    text_share: Callable[[BinaryIO], float]
    read_ahead: int


@dataclass(frozen=True)
class Version:
    """Files of a data set, and the name of the text file that they become.

    Attributes:
        files: paths, all of them; or patterns, of which the first that matches any file counts.
    """

    files: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class HubCorpus:
    """A corpus on the Hugging Face hub.

    Attributes:
        repository: the data set's `owner/name`.
        versions: by the name that `--version` takes; the first is the default.
        format: how its files are read.
        documents: makes documents of the rows of all its files, in order.
    """

    description: str
    licence: str
    repository: str
    versions: Mapping[str, Version]
    format: FileFormat
    documents: Callable[[Iterable[str]], Iterator[str]]


def parquet_rows(file: BinaryIO) -> Iterator[str]:
    """Yield the texts of a Parquet file, reading one row group's column at a time.

    Raises:
        DataError: pyarrow is not installed, or the file is damaged or has no column "text".
    """
    with _parquet_problem_is_a_data_error():
        table = _open_parquet(file)
        groups = range(table.num_row_groups)
    for group in groups:
        with _parquet_problem_is_a_data_error():
            batches = list(table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[TEXT_COLUMN]))
        for batch in batches:
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def parquet_text_share(file: BinaryIO) -> float:
    """Return the size of the text column after decompression over the file's size, from the footer alone."""
    with _parquet_problem_is_a_data_error():
        table = _open_parquet(file)
        groups = [table.metadata.row_group(group) for group in range(table.num_row_groups)]
        chunks = (group.column(column) for group in groups for column in range(group.num_columns))
        size: int = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == TEXT_COLUMN)
    return size / max(1, file.seek(0, io.SEEK_END))


def text_lines(file: BinaryIO) -> Iterator[str]:
    """Yield the lines of UTF-8 text with their line feeds; bytes that are no UTF-8 become U+FFFD."""
    # One bad byte among gigabytes that the user cannot mend must not lose the corpus.
    yield from io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="\n")


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Join the lines of WikiText into articles; an article may run over the end of a file."""
    article: list[str] = []
    for line in lines:
        if ARTICLE_TITLE.fullmatch(line) and article:
            yield "".join(article).strip("\n")
            article.clear()
        article.append(line or "\n")
    yield "".join(article).strip("\n")


def stories(lines: Iterable[str]) -> Iterator[str]:
    """Join lines into the stories between separators."""
    story: list[str] = []
    for line in lines:
        before, *others = line.split(SEPARATOR)
        story.append(before)
        for other in others:
            yield "".join(story).strip("\r\n")
            story = [other]
    yield "".join(story).strip("\r\n")


def reviews(lines: Iterable[str]) -> Iterator[str]:
    """Make documents of reviews in JSON Lines: the title, then the text.

    Raises:
        DataError: a line is not a review; says which.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            review = json.loads(line)
            text = f"{review['title']}\n{review['text']}"
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(
                f'Line {number} of the reviews is not a JSON object with "title" and "text". The data set has changed; '
                "a newer version of this program may know how to read it."
            ) from None
        text = re.sub(r"<br\s*/?>", "\n", text)
        yield text.encode("utf-8", errors="replace").decode("utf-8")  # an escape can name half of a surrogate pair


def pages(rows: Iterable[str]) -> Iterator[str]:
    """Take each row as a document."""
    yield from rows


def _open_parquet(file: BinaryIO) -> Any:
    from pyarrow import parquet

    table = parquet.ParquetFile(file)
    if TEXT_COLUMN not in table.schema_arrow.names:
        raise DataError(
            f'The Parquet file has no column "{TEXT_COLUMN}"; it has {", ".join(table.schema_arrow.names)}. The data '
            "set has changed; a newer version of this program may know how to read it."
        )
    return table


@contextmanager
def _parquet_problem_is_a_data_error() -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except ImportError:
        raise DataError(
            "Reading this corpus needs the package pyarrow. Install it: pip install 'sheepop[corpora]'"
        ) from None
    except (ValueError, OSError) as problem:  # pyarrow's own are kinds of these
        reason = str(problem).partition("\n")[0].rstrip(". ")
        raise DataError(f"A Parquet file of the corpus is damaged: {reason}. Run the command again.") from problem


PARQUET = FileFormat(parquet_rows, parquet_text_share, read_ahead=0)  # pyarrow asks for whole chunks of columns
LINES = FileFormat(text_lines, lambda _: 1.0, read_ahead=2**20)

HUB: Mapping[str, HubCorpus] = {
    "wiki": HubCorpus(
        "WikiText, good articles of Wikipedia: 11 MB (2) or 540 MB (103)",
        "CC BY-SA 3.0 and GFDL",
        "Salesforce/wikitext",
        {
            "2": Version(("wikitext-2-raw-v1/train-00000-of-00001.parquet",), "wikitext_2.txt"),
            "103": Version(
                tuple(f"wikitext-103-raw-v1/train-{shard:05d}-of-00002.parquet" for shard in range(2)),
                "wikitext_103.txt",
            ),
        },
        PARQUET,
        articles,
    ),
    "amazon": HubCorpus(
        "reviews of beauty products, 330 MB to fetch",
        "none stated, see amazon-reviews-2023.github.io",
        "McAuley-Lab/Amazon-Reviews-2023",
        {"2023": Version(("raw/review_categories/All_Beauty.jsonl",), "amazon_reviews.txt")},
        LINES,
        reviews,
    ),
    "tinystories": HubCorpus(
        "short stories in a small child's words, written by GPT-4, 2.2 GB",
        "CDLA-Sharing-1.0",
        "roneneldan/TinyStories",
        {"2": Version(("TinyStoriesV2-GPT4-train.txt",), "tinystories.txt")},
        LINES,
        stories,
    ),
    "openwebtext": HubCorpus(
        "8 million web pages that readers recommended, 40 GB; --max-bytes takes a slice",
        "CC0 1.0 for the collection; the pages are their authors'",
        "Skylion007/openwebtext",
        # The owner moved the files from one of these folders to the other.
        {"1": Version(("plain_text/train-*.parquet", "data/train-*.parquet"), "openwebtext.txt")},
        PARQUET,
        pages,
    ),
    "fineweb-edu": HubCorpus(
        "samples of educational web pages, 10, 100 or 350 billion tokens, 45 GB and up; --max-bytes takes a slice",
        "ODC-By 1.0 and Common Crawl's terms of use",
        "HuggingFaceFW/fineweb-edu",
        {
            size: Version((f"sample/{size}/*.parquet",), f"fineweb_edu_{size}.txt")
            for size in ("10BT", "100BT", "350BT")
        },
        PARQUET,
        pages,
    ),
}
