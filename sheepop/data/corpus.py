"""A prepared folder: token shards, a tokenizer and a manifest, as they are read."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sheepop.data.dataset import Tokens, num_windows, open_tokens
from sheepop.data.tokenizer import TOKENIZER_FILE, Tokenizer
from sheepop.utils.errors import DataError
from sheepop.utils.files import read_json, sha256_of_file, to_json

MANIFEST_FILE = "manifest.json"
FORMAT = "sheepop-corpus"
VERSION = 1
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Split:
    """One side of a corpus: a file of token ids, and what they were made from."""

    path: Path
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    num_characters: int
    num_words: int

    @property
    def tokens(self) -> Tokens:
        """The token ids, mapped from the disk."""
        return open_tokens(self.path, self.dtype)

    def num_windows(self, length: int, stride: int) -> int:
        """Return how many windows cover the split; see `dataset.num_windows`."""
        return num_windows(self.num_tokens, length, stride)


@dataclass(frozen=True)
class Corpus:
    """A prepared folder."""

    path: Path
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the sums of the corpus's files: it changes whenever a token or the tokenizer does."""
        return hashlib.sha256(to_json(sorted(self.manifest["files"].items())).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """Load the corpus's tokenizer."""
        return Tokenizer.load(self.path / TOKENIZER_FILE)

    def split(self, name: str) -> Split:
        """Return a split by its name.

        Raises:
            DataError: the corpus has no such split; says which it has.
        """
        splits = self.manifest["splits"]
        if name not in splits:
            raise DataError(f"{self.path} has no split '{name}'; it has {', '.join(splits)}.")
        counts = {f"num_{key}": value for key, value in splits[name].items()}
        return Split(path=self.path / f"{name}.bin", dtype=self.manifest["dtype"], **counts)

    def verify(self) -> None:
        """Compare every file with its SHA-256 sum.

        Raises:
            DataError: a file differs; it is named.
        """
        for name, expected in self.manifest["files"].items():
            if sha256_of_file(self.path / name) != expected:
                raise DataError(f"{self.path / name} was changed after it was written. Prepare the corpus again.")


def is_prepared(path: Path) -> bool:
    """Say whether a path is a prepared folder."""
    return (path / MANIFEST_FILE).is_file() and (path / "train.bin").is_file()


def open_corpus(path: Path) -> Corpus:
    """Open a prepared folder.

    Raises:
        DataError: it is not one, or its files do not fit its manifest.
    """
    if not is_prepared(path):
        raise DataError(f"{path} is not a prepared folder. Make one with `sheepop prepare SOURCE --output {path}`.")
    manifest = read_json(path / MANIFEST_FILE, DataError)
    try:
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise DataError(
                f"{path / MANIFEST_FILE} is of format {manifest['format']} {manifest['version']}, this program reads "
                f"{FORMAT} {VERSION}. Prepare the text again."
            )
        corpus = Corpus(path, manifest)
        for name in manifest["splits"]:
            split = corpus.split(name)
            expected = split.num_tokens * np.dtype(split.dtype).itemsize
            found = split.path.stat().st_size if split.path.is_file() else 0
            if found != expected:
                raise DataError(f"{split.path} has {found} bytes instead of {expected}: it is damaged. Prepare again.")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path / MANIFEST_FILE} is not a corpus manifest ({error!r}). Prepare the text again."
        ) from None
    return corpus
