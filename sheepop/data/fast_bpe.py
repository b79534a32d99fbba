"""Byte-level BPE through `gigatoken`, many times as fast as the general library, wherever both give the same tokens.

It keeps the tokens of the words that it has seen (text has few different words) and splits text with vector
instructions. What it cannot be relied on for goes to the general library: see `has_unassigned`.
"""

import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sheepop.data.characters import UNASSIGNED, character_classes
from sheepop.data.tokenizer_parts import CL100K, O200K, splitting_pattern
from sheepop.utils.runtime import return_freed_memory

# The engine never forgets a word: half a gigabyte of novels leaves 30 MB with it, words drawn at random, which are all
# different, 7 MB for each megabyte. Where the memory of the process has grown by so much, some 30 MB of which are those
# of whatever else it does, the engine is made anew: 75 ms, and as much again until it knows the common words.
GROWTH_KEPT = 90_000_000  # bytes
LOOK_EVERY = 2_000_000  # characters
CHARACTERS_KEPT = 64_000_000  # where the system does not say how much memory there is
# Stands between documents that are encoded in one call. It is no character, so no text that the engine is given has it.
SEPARATOR = "\uffff"
# How the engine names the patterns that it knows, where that is not the pattern itself.
ENGINE_PATTERNS = {
    CL100K: r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s+",
    O200K: O200K,
}


class FastBpe:
    """The engine for one `tokenizer.json`; made by `fast_bpe`. It can be pickled, without the words it has seen.

    `separator_id` is what it gives for SEPARATOR.
    """

    def __init__(self, layout_json: str, separator_id: int) -> None:
        self._layout_json, self.separator_id = layout_json, separator_id
        self._renew()

    def __reduce__(self) -> tuple[type["FastBpe"], tuple[str, int]]:
        return FastBpe, (self._layout_json, self.separator_id)

    def encode(self, text: str | bytes) -> NDArray[np.uint32]:
        """Return the token ids of a text, or of UTF-8, on the calling thread's core; it has no unassigned code points.

        Raises:
            TypeError: the text holds half of a surrogate pair.
        """
        if self._characters > (CHARACTERS_KEPT if self._memory is None else LOOK_EVERY):
            self._renew_if_grown()
        self._characters += len(text)
        ids: NDArray[np.uint32] = self._encoder.encode(text)
        return ids

    def encode_documents(self, documents: Sequence[bytes]) -> NDArray[np.uint32]:
        """Return the token ids of documents in UTF-8, each behind `separator_id`, as `encode` gives them one by one."""
        mark = SEPARATOR.encode("utf-8")
        return self.encode(mark + mark.join(documents))

    def _renew(self) -> None:
        from gigatoken import Tokenizer as Gigatoken

        # The old one goes first, and back to the system, or its memory would count as what the new one begins with.
        self._encoder: Any = None
        return_freed_memory()
        self._encoder = Gigatoken.from_json(self._layout_json)
        self._characters, self._memory = 0, memory_in_use()

    def _renew_if_grown(self) -> None:
        memory = memory_in_use()
        if memory is None or self._memory is None or memory - self._memory > GROWTH_KEPT:
            self._renew()
        self._characters = 0


def memory_in_use() -> int | None:
    """Return the bytes of memory that this process has at present; None where the system does not say."""
    try:
        resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return resident_pages * resource.getpagesize()


def fast_bpe(layout: dict[str, Any]) -> FastBpe | None:
    """Return the engine for a parsed `tokenizer.json`.

    Returns:
        None where the extra `fast` is not installed, or the layout is not one for which its tokens are known to be
        those of the general library: byte-level BPE without dropout, normalizer or plain added tokens, split as
        GPT-2, cl100k or o200k do.
    """
    model, pattern = layout["model"], splitting_pattern(layout)
    is_known = (
        model["type"] == "BPE"
        and not any(model.get(key) for key in ("dropout", "byte_fallback", "unk_token"))
        and not any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix"))
        and all(added["special"] for added in layout["added_tokens"])
        and (pattern == "gpt2" or pattern in ENGINE_PATTERNS)
    )
    if not is_known:
        return None
    # Special tokens are left out, because the engine would find their names in plain text.
    separator_id = 1 + max([*model["vocab"].values(), *(added["id"] for added in layout["added_tokens"])])
    separator = {"id": separator_id, "content": SEPARATOR, "special": True}
    separator |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    layout = {**layout, "added_tokens": [separator], "post_processor": None}
    if pattern in ENGINE_PATTERNS:
        split, as_bytes = layout["pre_tokenizer"]["pretokenizers"]
        split = {**split, "pattern": {"Regex": ENGINE_PATTERNS[pattern]}}
        layout["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, as_bytes]}
    try:
        return FastBpe(json.dumps(layout), separator_id)
    except ImportError:
        return None
    except Exception:  # the library raises bare Exceptions for what it does not support, such as missing bytes
        return None


def has_unassigned(text: str) -> bool:
    """Whether a text has code points without a character in the Unicode of this Python.

    Whether those are letters depends on the version of Unicode, and each library of tokenizers has its own.

    Raises:
        UnicodeEncodeError: the text holds half of a surrogate pair.
    """
    if text.isascii():
        return False
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return bool((character_classes(code_points) & UNASSIGNED).any())
