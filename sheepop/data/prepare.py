"""Documents → a prepared corpus: token shards, a tokenizer and a manifest, published whole or not at all."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sheepop.data.dataset import Tokens, num_windows, open_tokens
from sheepop.data.documents import Document, iter_documents, list_files
from sheepop.data.tokenizer import KINDS, TOKENIZER_FILE, Tokenizer
from sheepop.utils.errors import ConfigError, DataError, did_you_mean
from sheepop.utils.files import atomic_folder, read_json, sha256_of_file, to_json, write_json
from sheepop.utils.logging import format_count, log
from sheepop.utils.seeds import derive_seed

MANIFEST_FILE = "manifest.json"
FORMAT = "sheepop-corpus"
VERSION = 1
SPLITS = ("train", "val")
ENCODE_AT_ONCE = 4_000_000  # characters: enough to keep all cores busy, little enough to hold in memory


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


@dataclass
class _Counts:
    """What a split holds, counted while it is written."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0


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


def prepare_corpus(
    sources: Sequence[Path],
    output: Path,
    *,
    tokenizer: str,
    vocab_size: int,
    val_fraction: float,
    seed: int,
    separator: str | None,
    overwrite: bool = False,
) -> Corpus:
    """Tokenize documents into `output`: `train.bin`, `val.bin`, `tokenizer.json`, `manifest.json`.

    Every document begins with the end-of-text token, and one more closes the split. Where there are two or more
    different documents the split is by document, identical ones on the same side; a single one is cut by position,
    its end held out. A tokenizer is trained on the training side alone.

    Args:
        sources: text files and folders.
        output: must not exist yet, unless `overwrite` and it is a prepared folder.
        tokenizer: `bpe`, `char`, `word`, or the path of a tokenizer.
        vocab_size: entries of a tokenizer that is trained; lowered where the text cannot fill it.
        val_fraction: share of the bytes to hold out.
        seed: of the split.
        separator: text that ends a document inside a file, or None.
        overwrite: replace a prepared folder.

    Raises:
        DataError: there is no text, or too little.
        ConfigError: a setting is out of range, or `output` is in use.
    """
    if not 0 < val_fraction < 1:
        raise ConfigError(f"The validation share is {val_fraction}, but must lie between 0 and 1, for instance 0.1.")
    for source in sources:
        if is_prepared(source):
            raise ConfigError(f"{source} is prepared already; train on it as it is, or name the text it was made from.")
    if tokenizer not in KINDS and not Path(tokenizer).exists():
        raise ConfigError(
            f"There is no tokenizer '{tokenizer}', neither a kind nor a path.{did_you_mean(tokenizer, KINDS)} "
            f"Choose {', '.join(KINDS)}, or the path of a {TOKENIZER_FILE}."
        )
    _check_output(output, overwrite=overwrite)
    sides = split_documents(iter_documents(sources, separator=separator), val_fraction=val_fraction, seed=seed)

    def documents_of(side: str) -> Iterator[str]:
        return sides.texts(iter_documents(sources, separator=separator), side)

    if tokenizer in KINDS:
        trained = Tokenizer.train(tokenizer, documents_of("train"), vocab_size=vocab_size)
        if trained.vocab_size < vocab_size:
            log(f"the text fills {trained.vocab_size} of the {vocab_size} entries that were asked for")
    else:
        trained = Tokenizer.load(Path(tokenizer))
    dtype = "uint16" if trained.vocab_size <= 2**16 else "uint32"

    with atomic_folder(output) as folder:
        counts = {side: _write_tokens(folder / f"{side}.bin", documents_of(side), trained, dtype) for side in SPLITS}
        for side, counted in counts.items():
            if counted.tokens - counted.documents < 2:  # the separators do not count
                raise DataError(
                    f"The text is too short: its {side} split has {counted.characters} characters. Add more text, or "
                    "change the share that is held out (data.val_fraction)."
                )
        trained.save(folder / TOKENIZER_FILE)
        names = [f"{side}.bin" for side in SPLITS] + [TOKENIZER_FILE]
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype,
            "vocab_size": trained.vocab_size,
            "end_of_text_id": trained.end_of_text_id,
            "splits": {side: asdict(counted) for side, counted in counts.items()},
            "files": {name: sha256_of_file(folder / name) for name in names},
            "sources": [
                {"path": str(path), "bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
                for path in list_files(sources)
            ],
            "settings": {
                "tokenizer": tokenizer,
                "vocab_size": vocab_size,
                "val_fraction": val_fraction,
                "seed": seed,
                "separator": separator,
            },
        }
        write_json(folder / MANIFEST_FILE, manifest)
    corpus = open_corpus(output)
    _tell(corpus, how=sides.how)
    return corpus


def prepare_on_the_way(sources: Sequence[Path], data_dir: Path, **settings: Any) -> Corpus:
    """Open a prepared folder, or prepare text into `data_dir`, where the same text is found again the next time.

    Args:
        sources: one prepared folder, or text files and folders.
        data_dir: the corpus goes to `data_dir/prepared/NAME-KEY`; the key follows from content and settings.
        settings: those of `prepare_corpus`.

    Raises:
        DataError, ConfigError: as `prepare_corpus`.
    """
    if len(sources) == 1 and is_prepared(sources[0]):
        return open_corpus(sources[0])
    if settings["tokenizer"] not in KINDS:
        settings["tokenizer"] = str(Path(settings["tokenizer"]).resolve())
        how = {**settings, "tokenizer": Tokenizer.load(Path(settings["tokenizer"])).fingerprint}
    else:
        how = settings
    content = [(path.name, sha256_of_file(path)) for path in list_files(sources)]
    key = hashlib.sha256(to_json([VERSION, content, how]).encode()).hexdigest()[:12]
    output = data_dir / "prepared" / f"{sources[0].resolve().stem}-{key}"
    if is_prepared(output):
        log(f"the text was prepared before: {output}")
        return open_corpus(output)
    return prepare_corpus(sources, output, **settings)


@dataclass(frozen=True)
class Sides:
    """Which documents go where: the digests held out, or the place to cut a single document."""

    held_out: frozenset[bytes]
    train_share: float | None
    how: str

    def texts(self, documents: Iterable[Document], side: str) -> Iterator[str]:
        """Yield the texts of one side, in the order of the sources."""
        for document in documents:
            if self.train_share is not None:
                cut = int(len(document.text) * self.train_share)
                yield document.text[:cut] if side == "train" else document.text[cut:]
                if side == "val":
                    return  # copies of the only document would repeat what is held out
            elif (_digest(document.text) in self.held_out) == (side == "val"):
                yield document.text


def split_documents(documents: Iterable[Document], *, val_fraction: float, seed: int) -> Sides:
    """Decide which documents are held out, by a seeded order of their content: file names and order do not matter."""
    sizes: dict[bytes, int] = {}
    for document in documents:
        digest = _digest(document.text)
        sizes[digest] = sizes.get(digest, 0) + len(document.text.encode("utf-8", errors="surrogatepass"))
    if len(sizes) == 1:
        return Sides(frozenset(), 1 - val_fraction, f"by position, the last {val_fraction:.0%} held out")
    target = val_fraction * sum(sizes.values())
    order = sorted(sizes, key=lambda digest: derive_seed(seed, "split", digest.hex()))
    held_out: set[bytes] = set()
    taken = 0
    for digest in order:
        # Taken where that brings the share nearer to what was asked for, and something is left to train on.
        if taken + sizes[digest] / 2 <= target and len(held_out) + 1 < len(sizes):
            held_out.add(digest)
            taken += sizes[digest]
    if not held_out:
        held_out.add(min(order, key=lambda digest: sizes[digest]))
    return Sides(frozenset(held_out), None, f"by document, {len(held_out)} of {len(sizes)} held out")


def _write_tokens(path: Path, texts: Iterable[str], tokenizer: Tokenizer, dtype: str) -> _Counts:
    """Write a split: each document after an end-of-text token, and one more at the end."""
    counts = _Counts()
    little_endian = np.dtype(dtype).newbyteorder("<")
    end_of_text = np.array([tokenizer.end_of_text_id], dtype=little_endian)
    with path.open("wb") as file:
        for batch in _batches(texts, tokenizer):
            token_ids = tokenizer.encode_batch([piece for piece, _ in batch])
            for (piece, begins_document), piece_ids in zip(batch, token_ids, strict=True):
                if begins_document:
                    end_of_text.tofile(file)
                np.array(piece_ids, dtype=little_endian).tofile(file)
                counts.tokens += begins_document + len(piece_ids)
                counts.documents += begins_document
                counts.bytes += len(piece.encode("utf-8"))
                counts.characters += len(piece)
                counts.words += len(piece.split())  # a piece ends with a word
        end_of_text.tofile(file)
        counts.tokens += 1
    return counts


def _batches(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[tuple[str, bool]]]:
    """Yield pieces of the texts, and whether each is the first of its document, in batches to encode at once."""
    batch: list[tuple[str, bool]] = []
    waiting = 0  # characters
    for text in texts:
        for number, piece in enumerate(tokenizer.cut(text)):
            batch.append((piece, number == 0))
            waiting += len(piece)
            if waiting >= ENCODE_AT_ONCE:
                yield batch
                batch, waiting = [], 0
    if batch:
        yield batch


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.is_file():
        raise ConfigError(f"The output {output} is a file. Choose a folder that does not exist yet.")
    if output.is_dir() and any(output.iterdir()):
        if not is_prepared(output):
            raise ConfigError(f"The folder {output} holds other files. Choose a folder that does not exist yet.")
        if not overwrite:
            raise ConfigError(f"{output} is a prepared folder already. Replace it with --overwrite, or choose another.")
    ground = next(folder for folder in output.resolve().parents if folder.exists())
    if not ground.is_dir() or not os.access(ground, os.W_OK):
        raise ConfigError(f"The output {output} cannot be made: {ground} is no folder that you may write to.")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()


def _tell(corpus: Corpus, *, how: str) -> None:
    train, val = corpus.split("train"), corpus.split("val")
    tokens, num_bytes = train.num_tokens + val.num_tokens, train.num_bytes + val.num_bytes
    log(
        f"prepared {train.num_documents + val.num_documents} document(s), {format_count(num_bytes)} bytes, as "
        f"{format_count(tokens)} tokens ({num_bytes / tokens:.2f} bytes a token, {corpus.manifest['vocab_size']} "
        f"entries): "
        f"{format_count(train.num_tokens)} to train on, {format_count(val.num_tokens)} to validate ({how})"
    )
