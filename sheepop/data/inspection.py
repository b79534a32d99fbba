"""What is in a text, before anything is paid for training on it: one pass over the documents, in little memory.

Sizes, lengths, encodings, exact duplicates and recurring lines are those of all documents. What costs more is measured
on an even sample of them, whose size stands beside the figure; of near duplicates, pairs inside the sample are found.
"""

import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sheepop.data.cleaning import clean
from sheepop.data.documents import Document, iter_documents, list_files
from sheepop.data.duplicates import content_hash, minhash_signature, similar_earlier
from sheepop.data.inspection_advice import advise, warnings_about
from sheepop.data.inspection_tokens import TokenSample
from sheepop.data.languages import language_of, parts_of
from sheepop.data.pii import find_pii
from sheepop.data.plan import first_occurrences, make_plan
from sheepop.data.quality import quality_problem
from sheepop.data.sketches import EvenSample, FrequentCounter
from sheepop.utils.errors import ConfigError, DataError
from sheepop.utils.logging import format_count, log

SIMILAR = 0.8  # as `sheepop prepare --deduplicate near`
# Characters of the samples: compressing, searching and comparing take about a second for 3 MB, the rules of quality
# for 2 MB.
DEEP_CHARACTERS = 32_000_000
QUALITY_CHARACTERS = 6_000_000
COMPARED_DOCUMENTS = 50_000  # a signature is 512 bytes
LANGUAGE_DOCUMENTS = 1_000
LINE_COUNTERS = 200_000
LINE_CHARACTERS = (15, 200)  # shorter lines recur by chance; of longer ones the beginning is compared
RECURS = (3, 0.002)  # a line of so many documents, and so large a share of them, is boilerplate
EXAMPLES = 5
EXAMPLE_CHARACTERS = 90
QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
BINS_PER_DECADE = 4
TELL_EVERY = 250_000_000  # bytes


def inspect_sources(
    sources: Sequence[Path],
    *,
    tokenizers: Sequence[Path] = (),
    separator: str | None,
    max_bytes: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    val_fraction: float = 0.1,
    seed: int = 42,
) -> dict[str, Any]:
    """Return what is in the documents of files and folders, as values that JSON can hold.

    Args:
        sources: files and folders.
        tokenizers: paths of tokenizers to compare with those that are trained on a sample.
        separator: text that ends a document inside a file, or None.
        max_bytes: read about so many bytes of text, in the order of the files; None for all.
        include: patterns of the files to read below folders; none for all.
        exclude: patterns of the files not to read below folders.
        val_fraction: share that `sheepop prepare` would hold out.
        seed: of its split.

    Raises:
        DataError: there is no text, a source does not exist, or a library is missing.
        ConfigError: a value is out of range.
    """
    if not 0 < val_fraction < 1:
        raise ConfigError(f"The validation share is {val_fraction}, but must lie between 0 and 1, for instance 0.1.")
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"The number of bytes to read is {max_bytes}, but must be at least 1.")
    files = list_files(sources, include=include, exclude=exclude)
    file_bytes = sum(path.stat().st_size for path in files)
    about = min(file_bytes, max_bytes or file_bytes)
    skipped: list[str] = []
    counted = _Counted(about, TokenSample(about, tokenizers))
    documents = iter_documents(sources, separator=separator, include=include, exclude=exclude, skipped=skipped)
    is_complete = counted.read(documents, max_bytes)

    hashes, sizes = counted.arrays()
    is_first = first_occurrences(hashes)
    plan = make_plan(hashes, sizes, is_first.astype(np.uint8), val_fraction=val_fraction, seed=seed)
    used = plan.copies > 0
    near = counted.near_duplicates(hashes, plan.held_out if plan.train_share is None else None)
    result: dict[str, Any] = {
        "sources": [str(source) for source in sources],
        "complete": is_complete,
        "files": {
            "number": len(files),
            "bytes": file_bytes,
            "kinds": dict(Counter(kind_of(path.name) for path in files).most_common()),
            "unreadable": skipped,
        },
        "documents": len(hashes),
        "bytes": int(sizes.sum()),
        "characters": counted.characters,
        "words": counted.words,
        "lengths": lengths_of(np.frombuffer(counted.lengths, dtype=np.uint64).astype(np.int64)),
        "encodings": dict(counted.encodings.most_common()),
        "languages": counted.languages(),
        "duplicates": {
            "exact": {
                "documents": int((~is_first).sum()),
                "share": float((~is_first).mean()),
                "bytes": int(sizes[~is_first].sum()),
            },
            "near": near["near"],
        },
        "boilerplate": counted.boilerplate(),
        "pii": counted.pii_found(),
        "quality": counted.quality_found(),
        "split": {
            "how": plan.how,
            "train_bytes": int(sizes[used & ~plan.held_out].sum()),
            "val_bytes": int(sizes[used & plan.held_out].sum()),
            "near_duplicates_across": near["across"],
            "share_of_validation": near["share_of_validation"],
        },
        "compression": counted.compression(),
        "tokenizers": counted.tokens.measure(int(sizes.sum())),
    }
    result["advice"] = advise(result)
    result["warnings"] = warnings_about(result)
    return result


def kind_of(name: str) -> str:
    """Return the ending of a file's name with what it is compressed by, such as `.txt.gz`, or "no ending"."""
    endings = Path(name.lower()).suffixes
    compressed = len(endings) > 1 and endings[-1] in (".gz", ".zst", ".xz", ".bz2")
    return "".join(endings[-2:] if compressed else endings[-1:]) or "no ending"


def lengths_of(characters: NDArray[np.int64]) -> dict[str, Any]:
    """Return mean, quantiles and a histogram of documents' lengths in characters; bins grow by a constant factor."""
    top = int(np.ceil(np.log10(max(2, int(characters.max()) + 1)) * BINS_PER_DECADE))
    edges = np.unique(np.round(10 ** (np.arange(top + 1) / BINS_PER_DECADE)).astype(np.int64))
    documents, _ = np.histogram(characters, bins=edges)
    text, _ = np.histogram(characters, bins=edges, weights=characters)
    values = np.quantile(characters, QUANTILES, method="inverted_cdf")
    return {
        "mean": float(characters.mean()),
        "quantiles": {f"{share:g}": int(value) for share, value in zip(QUANTILES, values, strict=True)},
        "histogram": {
            "edges": edges.tolist(),
            "documents": documents.tolist(),
            "characters": text.astype(np.int64).tolist(),
        },
    }


class _Counted:
    """What is counted while the documents go by."""

    def __init__(self, about_bytes: int, tokens: TokenSample) -> None:
        self.tokens = tokens
        self.characters = self.words = 0
        # 64 bits each a document: its content's hash, its bytes, its characters.
        self.hashes, self.sizes, self.lengths = array("Q"), array("Q"), array("Q")
        self.encodings: Counter[str] = Counter()
        self._deep_share = min(1.0, DEEP_CHARACTERS / max(1, about_bytes))
        self._quality_share = min(1.0, QUALITY_CHARACTERS / max(1, about_bytes))
        self._compressor = zlib.compressobj()
        self._compressed = self._uncompressed = 0
        self._pii: Counter[str] = Counter()
        self._pii_documents = self._deep_documents = self._deep_characters = 0
        self._quality: Counter[str] = Counter()
        self._quality_documents = 0
        self._languages: EvenSample[tuple[str, int]] = EvenSample(LANGUAGE_DOCUMENTS)
        self._compared: EvenSample[tuple[int, NDArray[np.uint32], str, str]] = EvenSample(COMPARED_DOCUMENTS)
        self._lines: FrequentCounter[str] = FrequentCounter(LINE_COUNTERS)

    def read(self, documents: Iterator[Document], max_bytes: int | None) -> bool:
        """Count documents and say whether they were all; about `max_bytes` are read, the last document whole."""
        total = told = 0
        for document in documents:
            if max_bytes is not None and total >= max_bytes:
                return False
            total += self._add(document)
            if total - told >= TELL_EVERY:
                told = total
                log(f"read {format_count(total)} bytes in {format_count(len(self.hashes))} documents")
        return True

    def _add(self, document: Document) -> int:
        text = document.text
        raw = text.encode("utf-8", errors="surrogatepass")
        number = len(self.hashes)
        self.encodings[document.encoding] += 1
        self.characters += len(text)
        self.words += len(text.split())
        digest = content_hash(clean(text, "standard"))  # what `sheepop prepare` compares
        self.hashes.append(digest)
        self.sizes.append(len(raw))
        self.lengths.append(len(text))
        self._lines.update(_long_lines(text))
        if self._languages.wants_next():
            self._languages.add((parts_of(text), len(text)))
        else:
            self._languages.skip()
        self.tokens.add(text, digest)
        if _is_taken(number, self._quality_share):
            self._quality_documents += 1
            self._quality[quality_problem(text) or ""] += 1
        if _is_taken(number, self._deep_share):
            self._look_closely(number, document, raw)
        return len(raw)

    def _look_closely(self, number: int, document: Document, raw: bytes) -> None:
        self._deep_documents += 1
        self._deep_characters += len(document.text)
        self._uncompressed += len(raw)
        self._compressed += len(self._compressor.compress(raw))
        found = find_pii(document.text)
        self._pii.update(found)
        self._pii_documents += bool(found)
        if self._compared.wants_next():
            signature = minhash_signature(document.text)
            self._compared.add((number, signature, document.source, _beginning(document.text)))
        else:
            self._compared.skip()

    def arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return hash and bytes of each document.

        Raises:
            DataError: there was none.
        """
        if not self.hashes:
            raise DataError("There is no text in the sources. Name files with text inside.")
        hashes = np.frombuffer(self.hashes, dtype=np.uint64)
        return hashes, np.frombuffer(self.sizes, dtype=np.uint64).astype(np.int64)

    def near_duplicates(self, hashes: NDArray[np.uint64], held_out: NDArray[np.bool_] | None) -> dict[str, Any]:
        """Return the near duplicates among the sample's different documents, and those that cross the split."""
        sample = self._compared.items
        numbers = np.array([number for number, _, _, _ in sample], dtype=np.int64)
        rows = np.flatnonzero(first_occurrences(hashes[numbers]))
        across: int | None = None
        share: float | None = None
        if held_out is not None:  # what is trained on first, so that what is held out finds its partner there
            rows = rows[np.argsort(held_out[numbers[rows]], kind="stable")]
        partner = similar_earlier(np.stack([sample[row][1] for row in rows]), threshold=SIMILAR)
        if held_out is not None:
            is_val = held_out[numbers[rows]]
            first = _first_of_kin(partner)
            across = int((is_val & ~is_val[first]).sum())
            share = across / max(1, int(is_val.sum()))
        similar = np.flatnonzero(partner >= 0)
        pairs = [(sample[rows[later]], sample[rows[partner[later]]]) for later in similar[:EXAMPLES]]
        return {
            "across": across,
            "share_of_validation": share,
            "near": {
                "documents": len(similar),
                "share": len(similar) / len(sample),
                "compared": len(sample),
                "threshold": SIMILAR,
                "examples": [
                    {"text": later[3], "source": later[2], "like": earlier[3], "like_source": earlier[2]}
                    for later, earlier in pairs
                ],
            },
        }

    def languages(self) -> dict[str, Any]:
        """Return the share of the sample's characters in documents of each language."""
        counts: Counter[str] = Counter()
        for parts, characters in self._languages.items:
            counts[language_of(parts)] += characters
        shares = {code: count / max(1, counts.total()) for code, count in counts.most_common()}
        return {"documents": len(self._languages.items), "shares": shares}

    def boilerplate(self) -> dict[str, Any]:
        """Return the lines that recur in many documents, and the share of all characters in them, repeats only."""
        documents = len(self.hashes)
        least = max(RECURS[0], int(RECURS[1] * documents))
        lines = [(line, count) for line, count in self._lines.most_common(LINE_COUNTERS) if count >= least]
        repeated = sum((count - 1) * len(line) for line, count in lines)
        return {
            "share_of_characters": repeated / max(1, self.characters),
            "lines": [
                {"line": _beginning(line), "documents": count, "share": count / documents}
                for line, count in lines[:EXAMPLES]
            ],
            "missed_at_most": self._lines.missed,
        }

    def pii_found(self) -> dict[str, Any]:
        """Return how much personal data the sample holds."""
        return {
            "found": dict(self._pii.most_common()),
            "documents_with": self._pii_documents,
            "documents": self._deep_documents,
            "characters": self._deep_characters,
        }

    def quality_found(self) -> dict[str, Any]:
        """Return how many of the sample's documents break a rule of `quality.py`, by rule."""
        broken = {rule: count for rule, count in self._quality.most_common() if rule}
        return {"documents": self._quality_documents, "broken": broken}

    def compression(self) -> dict[str, Any]:
        """Return the sample's bytes, and as zlib compresses them one behind the other."""
        compressed = self._compressed + len(self._compressor.flush())
        return {"bytes": self._uncompressed, "compressed": compressed, "ratio": self._uncompressed / compressed}


def _is_taken(number: int, share: float) -> bool:
    """Say whether document `number` is in an even sample of that share; the first always is."""
    return int(number * share) > int((number - 1) * share) or number == 0


def _first_of_kin(partner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Follow the earlier similar documents to the first of each chain."""
    first = np.where(partner >= 0, partner, np.arange(len(partner)))
    while not np.array_equal(first, first[first]):
        first = first[first]
    return first


def _long_lines(text: str) -> set[str]:
    least, most = LINE_CHARACTERS
    stripped = (line.strip() for line in text.split("\n"))
    return {line[:most] for line in stripped if len(line) >= least and not line.isspace()}


def _beginning(text: str) -> str:
    shown = " ".join(text[: 4 * EXAMPLE_CHARACTERS].split())[:EXAMPLE_CHARACTERS]
    return shown.encode("utf-8", errors="replace").decode("utf-8")
