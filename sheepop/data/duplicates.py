"""Equal and nearly equal documents: hashes of content, MinHash signatures, and pairs found without comparing all."""

import functools
import hashlib
import re
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sheepop.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasketch import MinHash

NUM_HASHES = 128  # length of a signature: the standard error of a similarity s is sqrt(s (1 - s) / 128), at most 0.045
SHINGLE_WORDS = 5
# What is found at the threshold itself; above it, more.
RECALL = 0.99
# A long chain of documents in one bucket is compared with its first and with this many before it, not all with all.
REACH = 8
SHINGLES_AT_ONCE = 4096
# Scripts without spaces between words count each character as a word: Thai and Lao, kana, Chinese characters.
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
# Odd multipliers that spread bits, from splitmix64 (Steele et al. 2014).
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def content_hash(text: str) -> int:
    """Return 64 bits of the text's BLAKE2b: equal texts have equal hashes, on every machine and in every version.

    Two different ones of n texts share a hash with a probability of about n² / 2^65: one in 37 million for a million.
    """
    digest = hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return WORD.findall(text.lower())


def hash_words(words: Sequence[str]) -> NDArray[np.uint64]:
    """Return a 32-bit number for each word, the same on every machine, as 64-bit integers of shape [words]."""
    numbers = {word: zlib.crc32(word.encode("utf-8", errors="surrogatepass")) for word in set(words)}
    return np.fromiter((numbers[word] for word in words), dtype=np.uint64, count=len(words))


def shingles(hashes: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """Return a 64-bit number for each run of `length` words, shape [words - length + 1]; none where there are fewer."""
    if len(hashes) < length:
        return np.empty(0, dtype=np.uint64)
    count = len(hashes) - length + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for offset in range(length):  # a polynomial modulo 2^64 of the words' numbers: their order counts
        mixed = mixed * MULTIPLIER + hashes[offset : offset + count] + np.uint64(1)
    for shift, factor in zip((30, 27), MIX, strict=True):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * factor
    return mixed ^ (mixed >> np.uint64(31))


def minhash_signature(text: str) -> NDArray[np.uint32]:
    """Return the MinHash signature of a text over its runs of five words (Broder 1997), shape [128].

    The share of equal entries of two signatures estimates the Jaccard similarity of the two sets of runs. Case,
    punctuation and white space do not count. A text of fewer than five words is one run; texts without a word all
    have one signature.

    Raises:
        DataError: the library is not installed.
    """
    hashes = hash_words(words_of(text))
    runs = np.unique(shingles(hashes, min(SHINGLE_WORDS, max(1, len(hashes)))) >> np.uint64(32))
    sketch = _empty_sketch().copy()
    for begin in range(0, len(runs), SHINGLES_AT_ONCE):
        sketch.update_batch(runs[begin : begin + SHINGLES_AT_ONCE].tolist())
    return np.asarray(sketch.hashvalues, dtype=np.uint32)


def near_duplicates(signatures: NDArray[np.uint32], *, threshold: float) -> NDArray[np.bool_]:
    """Say for each document whether it nearly equals an earlier one, shape [documents] from [documents, hashes].

    Raises:
        ConfigError: the threshold is not above 0 and at most 1.
    """
    return similar_earlier(signatures, threshold=threshold) >= 0


def similar_earlier(signatures: NDArray[np.uint32], *, threshold: float) -> NDArray[np.int64]:
    """Return for each document the number of an earlier one that nearly equals it, or -1, shape [documents].

    Candidates agree on all rows of one band of their signatures (locality-sensitive hashing, Indyk and Motwani 1998;
    Leskovec et al., "Mining of Massive Datasets", section 3.4); they count where at least `threshold` of all entries
    agree. Where very many documents share a band, each is compared with the first of them and with the eight before
    it. Memory grows with the number of documents, not of pairs.

    Raises:
        ConfigError: the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"The similarity of near duplicates is {threshold}, but must be above 0 and at most 1.")
    num_documents, num_hashes = signatures.shape
    partner = np.full(num_documents, -1, dtype=np.int64)
    bands, rows = band_sizes(threshold, num_hashes)
    for band in range(bands):
        keys = _band_keys(signatures[:, band * rows : (band + 1) * rows])
        order = np.argsort(keys, kind="stable")  # equal keys stand in the order of the documents
        begins = np.append(True, np.diff(keys[order]) != 0)[:num_documents]
        starts = np.maximum.accumulate(np.where(begins, np.arange(num_documents), 0))
        place = np.arange(num_documents) - starts  # in its bucket
        for distance in range(1, REACH + 1):
            later = np.flatnonzero(place >= distance)
            if not len(later):
                break
            _confirm(signatures, order[later - distance], order[later], threshold, partner)
        later = np.flatnonzero(place > REACH)
        _confirm(signatures, order[later - place[later]], order[later], threshold, partner)
    return partner


def band_sizes(threshold: float, num_hashes: int) -> tuple[int, int]:
    """Return bands and rows: the longest rows for which documents at the threshold share a band almost surely.

    Two documents of similarity s share one of b bands of r rows with probability 1 - (1 - s^r)^b. Longer rows leave
    fewer candidates that turn out to differ.
    """
    fitting = (rows for rows in range(num_hashes, 1, -1) if 1 - (1 - threshold**rows) ** (num_hashes // rows) >= RECALL)
    rows = next(fitting, 1)
    return num_hashes // rows, rows


@functools.cache
def _empty_sketch() -> "MinHash":
    try:
        from datasketch import MinHash
    except ImportError:
        raise DataError(
            "Finding near duplicates needs the package datasketch, which is not installed. Install it with "
            "`pip install 'sheepop[quality]'`."
        ) from None
    # The runs are hashed already. The scheme and the seed are named, since signatures must stay comparable.
    return MinHash(num_perm=NUM_HASHES, seed=1, hashfunc=int, scheme="affine32")


def _band_keys(columns: NDArray[np.uint32]) -> NDArray[np.uint64]:
    keys = np.zeros(len(columns), dtype=np.uint64)
    for row in range(columns.shape[1]):
        keys = (keys ^ (keys >> np.uint64(29))) * MULTIPLIER + columns[:, row].astype(np.uint64)
    return keys


def _confirm(
    signatures: NDArray[np.uint32],
    earlier: NDArray[np.intp],
    later: NDArray[np.intp],
    threshold: float,
    partner: NDArray[np.int64],
) -> None:
    """Note the earlier of each pair whose signatures agree on at least `threshold`; a slice of the pairs at a time."""
    unknown = np.flatnonzero(partner[later] < 0)
    for begin in range(0, len(unknown), SHINGLES_AT_ONCE):
        pairs = unknown[begin : begin + SHINGLES_AT_ONCE]
        equal = np.count_nonzero(signatures[earlier[pairs]] == signatures[later[pairs]], axis=1)
        alike = pairs[equal >= threshold * signatures.shape[1]]
        partner[later[alike]] = earlier[alike]
