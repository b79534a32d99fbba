"""Many documents behind each other in UTF-8, and what is asked of each, by vector instructions for all at once.

Most text needs no cleaning and has few characters beyond ASCII. So bytes are compared a megabyte at a time, and only
the characters beyond ASCII are decoded; the documents in which anything unusual was found are looked at by themselves.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sheepop.data.characters import SPACE, SURROGATE, UNASSIGNED, UNSEEN, character_classes

# Lines that leakage is looked for by: shorter ones recur by chance; one length in eight keeps it cheap and does not
# depend on the side.
LONG_LINE = 60
EVERY, WHICH = 8, 3
BITS_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)  # of each byte


@dataclass(frozen=True)
class Batch:
    """D documents, none of them empty, as `raw` bytes of UTF-8 that end at `ends` (D,).

    Halves of surrogate pairs may be in them, encoded as if they were characters.
    """

    raw: bytes
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, documents: Sequence[bytes]) -> "Batch":
        """Put documents behind each other."""
        return cls(b"".join(documents), np.cumsum([len(raw) for raw in documents], dtype=np.int64))

    @cached_property
    def begins(self) -> NDArray[np.int64]:
        """Where documents begin, (D,)."""
        return np.concatenate(([0], self.ends[:-1]))

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.raw, dtype=np.uint8)

    @cached_property
    def _controls(self) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Where the control characters of ASCII are, and which they are; most are newlines."""
        places = np.flatnonzero(self._bytes < 0x20)
        return places, self._bytes[places]

    @cached_property
    def _beyond(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
        """Where characters beyond ASCII begin and where they go on, and the classes of the former."""
        places = np.flatnonzero(self._bytes > 0x7F)
        units = self._bytes[places]
        is_first = units >= 0xC0
        characters = units.tobytes().decode("utf-8", errors="surrogatepass")
        code_points = np.frombuffer(characters.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
        return places[is_first], places[~is_first], character_classes(code_points)

    def _has(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say of each document whether one of the sorted places is inside, (D,)."""
        return self._count(places) > 0

    def _count(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many of the sorted places are inside of each document, (D,)."""
        return np.diff(np.searchsorted(places, self.ends), prepend=0)

    def _count_flags(self, flags: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return how many of the flags, one a byte, are set in each document, (D,); for many, this beats `_count`."""
        eights = np.packbits(flags, bitorder="little")
        before = np.concatenate(([0], np.cumsum(BITS_SET[eights], dtype=np.int64)))
        full, rest = np.divmod(self.ends, 8)
        begun = np.concatenate((eights, [0]))[full] & ((1 << rest) - 1)
        counts: NDArray[np.int64] = np.diff(before[full] + BITS_SET[begun], prepend=0)
        return counts

    def _has_class(self, wanted: int) -> NDArray[np.bool_]:
        first, _, classes = self._beyond
        return self._has(first[classes & wanted != 0])

    def characters(self) -> NDArray[np.int64]:
        """Return the number of characters of each document, (D,)."""
        return self.ends - self.begins - self._count(self._beyond[1])

    def words(self) -> NDArray[np.int64]:
        """Return `len(text.split())` of each document, (D,)."""
        units = self._bytes
        is_space = units <= 0x20
        places, controls = self._controls
        is_space[places] = (controls - np.uint8(0x09) < 5) | (controls >= 0x1C)
        first, _, classes = self._beyond
        spaces = first[classes & SPACE != 0]
        is_space[spaces] = is_space[spaces + 1] = True
        is_space[spaces[units[spaces] >= 0xE0] + 2] = True  # none is longer than three bytes
        begins_word = ~is_space
        begins_word[1:] &= is_space[:-1]
        begins_word[self.begins] = ~is_space[self.begins]
        return self._count_flags(begins_word)

    def hashes(self) -> NDArray[np.uint64]:
        """Return `duplicates.content_hash` of each document, (D,)."""
        view = memoryview(self.raw)
        digests = [
            hashlib.blake2b(view[begin:end], digest_size=8).digest()
            for begin, end in zip(self.begins.tolist(), self.ends.tolist(), strict=True)
        ]
        return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)

    def has_unassigned(self) -> NDArray[np.bool_]:
        """Say of each document whether it has code points without a character, see `fast_bpe.has_unassigned`, (D,)."""
        return self._has_class(UNASSIGNED)

    def has_surrogates(self) -> NDArray[np.bool_]:
        """Say of each document whether it has half of a surrogate pair, (D,)."""
        return self._has_class(SURROGATE)

    def may_need_cleaning(self) -> NDArray[np.bool_]:
        """Say of each document whether `clean` with `standard` may change it, (D,); of few others too."""
        places, controls = self._controls
        is_newline = controls == 0x0A
        last = np.concatenate((places[is_newline & (places > 0)], self.ends)) - 1  # of lines and documents
        is_blank = (self._bytes[last] == 0x20) | (self._bytes[last] == 0x09)
        found = self._has_class(UNSEEN) | self._has(places[~is_newline & (controls != 0x09)])
        found |= self._has(np.sort(last[is_blank]))
        if b"\x7f" in self.raw:
            found |= self._has(np.flatnonzero(self._bytes == 0x7F))
        newlines = places[is_newline]
        found |= self._has(newlines[:-3][newlines[3:] - newlines[:-3] == 3])
        return found

    def long_lines(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return the hashes of the lines that leakage is looked for by, and the number of the document of each."""
        places, controls = self._controls
        newlines = places[controls == 0x0A]
        begins = np.sort(np.concatenate((self.begins, newlines + 1)))
        ends = np.sort(np.concatenate((newlines, self.ends)))
        is_long = ends - begins >= LONG_LINE
        begins, ends = begins[is_long], ends[is_long]
        later_bytes = self._beyond[1]
        lengths = ends - begins - (np.searchsorted(later_bytes, ends) - np.searchsorted(later_bytes, begins))
        is_wanted = (lengths >= LONG_LINE) & (lengths % EVERY == WHICH)
        begins, ends = begins[is_wanted], ends[is_wanted]
        digests = [
            hashlib.blake2b(self.raw[begin:end], digest_size=8).digest()
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        ]
        hashes = np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)
        return hashes, np.searchsorted(self.ends, begins, side="right")
