"""Text ↔ token ids: character, word and byte-level BPE tokenizers over one interface.

All of them are saved as a Hugging Face `tokenizer.json`. One special token begins every document and closes the
last; it never comes out of plain text, not even out of text that spells its name.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray

from sheepop.data.characters import NUM_CODE_POINTS
from sheepop.data.fast_bpe import FastBpe, fast_bpe, has_unassigned
from sheepop.data.stream_decoder import StreamDecoder
from sheepop.data.text_marks import KNOWN_END_TOKENS, set_text_marks, text_marks
from sheepop.data.tokenizer_import import TOKENIZER_FILE, load_backend
from sheepop.data.tokenizer_parts import (
    CUT_AT_WHITE_SPACE,
    PIECE_CHARACTERS,
    REPLACEMENT,
    UNKNOWN,
    byte_name,
    cut,
    splitting_pattern,
    surrogate_message,
    token_to_bytes,
)
from sheepop.data.tokenizer_training import SMALLEST_BPE, train_bpe, train_char, train_word
from sheepop.utils.errors import CheckpointError, ConfigError, DataError
from sheepop.utils.files import write_atomic

__all__ = [
    "KINDS",
    "SMALLEST_BPE",
    "TOKENIZER_FILE",
    "Kind",
    "StreamDecoder",
    "Tokenizer",
    "bytes_per_token",
    "load_model_tokenizer",
]

Kind = Literal["bpe", "char", "word"]
KINDS: tuple[Kind, ...] = ("bpe", "char", "word")
# The fast engine takes about a quarter of a second to make: the time in which the general library encodes this much.
# Bytes of a model's tokenizer file, for each entry and for the rest: known ones have up to 130 an entry.
LARGEST_ENTRY, LARGEST_REST = 2**9, 2**21
CHARACTERS_BEFORE_FAST = 300_000
PROBE_TOKENS = 5000
# A piece that has characters only the general library can be asked about.
UNSURE_PIECE_CHARACTERS = 1000


class Tokenizer:
    """A vocabulary and the way from text to its numbers and back.

    Made by `train` or `load`.

    Attributes:
        end_of_text, end_of_text_id: the token between documents, which also ends what a model writes.
        start_ids: what a text begins with: the end of the one before, a token of its own, or nothing.
        marks: both as `tokenizer.json` has them.
        vocab_size: the highest id and one more.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # Without this the library would read `<|endoftext|>` in a user's text as the special token.
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._characters_encoded = 0
        self._layout = json.loads(backend.to_str())
        vocabulary = names_and_ids(self._layout)
        self.marks = marks = text_marks(self._layout, vocabulary)
        if marks.end is None:
            raise DataError(f"The tokenizer has no token that ends a text, none of {', '.join(KNOWN_END_TOKENS)}.")
        start = (marks.end,) if marks.start is None else marks.start
        if not {*start, marks.end} <= vocabulary.keys():
            raise DataError(
                f"The tokenizer begins or ends a text with {', '.join({*start, marks.end})}, unknown to it."
            )
        self.end_of_text = marks.end
        self.end_of_text_id: int = vocabulary[marks.end]
        self.start_ids: list[int] = [vocabulary[name] for name in start]
        self.vocab_size: int = max(vocabulary.values()) + 1  # imported numbers may have gaps

    @property
    def kind(self) -> Kind:
        """`bpe`, `char` or `word`."""
        model = self._layout["model"]
        if model["type"] == "WordLevel":
            return "word"
        is_char = not model.get("merges") and model.get("byte_fallback") and self._layout["normalizer"] is None
        return "char" if is_char else "bpe"

    @property
    def begin_of_text_id(self) -> int:
        """The first token of a text that has no other."""
        return next(iter(self.start_ids), self.end_of_text_id)

    @property
    def special_ids(self) -> dict[str, int]:
        """The tokens that never come out of plain text, with their ids."""
        return {added["content"]: added["id"] for added in self._layout["added_tokens"] if added["special"]}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides how text is encoded."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    @classmethod
    def train(cls, kind: str, texts: Iterable[str], *, vocab_size: int) -> "Tokenizer":
        """Make a tokenizer of at most `vocab_size` entries (bytes of a character tokenizer come on top) from texts.

        Raises:
            ConfigError: there is no such kind, or `vocab_size` is too small for it.
        """
        if kind == "bpe":
            return cls(train_bpe(texts, vocab_size))
        if kind == "char":
            return cls(train_char(texts, vocab_size))
        if kind == "word":
            return cls(train_word(texts, vocab_size))
        raise ConfigError(f"There is no tokenizer '{kind}'. Choose bpe, char, word, or the path of a tokenizer.json.")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Load a tokenizer from a file, or from a folder that holds one.

        Known are `tokenizer.json`, a folder with GPT-2's `encoder.json` and `vocab.bpe`, and tiktoken's files if their
        name begins with their scheme (`cl100k_base.tiktoken`).

        Raises:
            DataError: there is none, or it is damaged.
        """
        return cls(load_backend(path))

    def with_marks(self, start_ids: Sequence[int], end_of_text_id: int) -> "Tokenizer":
        """Return the same tokenizer with other tokens that begin and end a text."""
        backend = tokenizers.Tokenizer.from_str(self.to_json())
        *start, end = (str(backend.id_to_token(number)) for number in (*start_ids, end_of_text_id))
        set_text_marks(backend, start, end)
        return Tokenizer(backend)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json` in one step."""
        write_atomic(path, self.to_json())

    def to_json(self) -> str:
        """Return the content of `tokenizer.json`."""
        return str(self._backend.to_str())

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; special tokens are never among them.

        Raises:
            DataError: the text holds half of a surrogate pair, which is no character.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, encoded in parallel.

        Raises:
            DataError: as `encode`.
        """
        if self._character_table is None and self._fast_for(texts) is None:
            return self._encode_slowly(texts)
        return [self.encode_array(text).tolist() for text in texts]

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """Return the token ids of a text as `encode` does, many times as fast: (num_tokens,).

        Raises:
            DataError: as `encode`.
        """
        try:
            if self._character_table is not None:
                return self._encode_characters(text)
            engine = self._fast_for([text])
            if engine is None:
                return np.array(self._encode_slowly([text])[0], dtype=np.uint32)
            self._characters_encoded += len(text)
            if not has_unassigned(text):
                return engine.encode(text)
            pieces = [
                np.array(self._encode_slowly([piece])[0], dtype=np.uint32)
                if has_unassigned(piece)
                else engine.encode(piece)
                for piece in self.cut(text, UNSURE_PIECE_CHARACTERS)
            ]
        except UnicodeEncodeError as error:
            raise DataError(surrogate_message([text])) from error
        return np.concatenate(pieces)

    def encode_documents(self, documents: Sequence[bytes], *, out_of: int) -> NDArray[np.uint32] | None:
        """Return the token ids of documents, each behind the end-of-text token, in one call: (num_tokens,).

        Args:
            documents: in UTF-8, none of which `has_unassigned`.
            out_of: bytes of all that is going to be encoded, from which follows whether the fast engine is worth it.

        Returns:
            None where this tokenizer has no fast engine, or it is not worth its making.
        """
        if self._characters_encoded + out_of < CHARACTERS_BEFORE_FAST or self._fast is None:
            return None
        ids = self._fast.encode_documents(documents)
        ids[ids == self._fast.separator_id] = self.end_of_text_id
        return ids

    def _encode_slowly(self, texts: Sequence[str]) -> list[list[int]]:
        self._characters_encoded += sum(map(len, texts))
        try:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(surrogate_message(texts)) from error

    def _fast_for(self, texts: Sequence[str]) -> FastBpe | None:
        """Return the fast engine where there is one and it is worth its making."""
        if self._characters_encoded + sum(map(len, texts)) < CHARACTERS_BEFORE_FAST:
            return None
        return self._fast

    @cached_property
    def _fast(self) -> FastBpe | None:
        """The fast engine, if it encodes an even sample of the vocabulary, written as a text, as the library does."""
        engine, table = fast_bpe(self._layout), self.token_bytes
        if engine is None or table is None:
            return None
        sample = table[:: len(table) // PROBE_TOKENS + 1]
        probe = "\n".join(token.decode("utf-8", errors="ignore") for token in sample)
        probe = "".join(piece for piece in cut(probe, UNSURE_PIECE_CHARACTERS) if not has_unassigned(piece))
        return engine if engine.encode(probe).tolist() == self._encode_slowly([probe])[0] else None

    def cut(self, text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
        """Cut a long text into pieces of about `size` characters whose tokens, joined, are those of the whole.

        The text of an imported tokenizer that splits in other ways stays whole.
        """
        return cut(text, size) if self._splits_at_white_space else iter((text,))

    @cached_property
    def _splits_at_white_space(self) -> bool:
        return self.kind == "char" or splitting_pattern(self._layout) in CUT_AT_WHITE_SPACE

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens have none, and bytes that are no character give U+FFFD.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        table = self.token_bytes
        if table is None:
            return str(self._backend.decode(list(token_ids), skip_special_tokens=True))
        try:
            return b"".join([table[token_id] for token_id in token_ids]).decode("utf-8", errors="replace")
        except IndexError:
            raise DataError(f"There are only {self.vocab_size} tokens; {max(token_ids)} is not one of them.") from None

    def token_text(self, token_id: int) -> str:
        """Return a token as it can be shown: its own text, or its name where that is not a whole character."""
        table = self.token_bytes
        if table is not None and table[token_id]:
            try:
                return table[token_id].decode("utf-8")
            except UnicodeDecodeError:
                pass
        return str(self._backend.id_to_token(token_id))

    @cached_property
    def token_texts(self) -> list[str]:
        """The text that each token stands for; empty for special ones and for parts of characters."""
        table = self.token_bytes
        if table is None:
            special = set(self.special_ids.values())
            names = [str(self._backend.id_to_token(token_id)) for token_id in range(self.vocab_size)]
            return ["" if i in special else name.replace("▁", " ") for i, name in enumerate(names)]
        return [text if REPLACEMENT not in (text := each.decode("utf-8", "replace")) else "" for each in table]

    @cached_property
    def token_bytes(self) -> list[bytes] | None:
        """The bytes that each token stands for, or None for an imported tokenizer whose tokens depend on neighbours."""
        to_bytes = token_to_bytes(self._layout["decoder"])
        if to_bytes is None:
            return None
        special = {added["id"] for added in self._layout["added_tokens"] if added["special"]}
        table = [b""] * self.vocab_size
        for name, token_id in names_and_ids(self._layout).items():
            if token_id not in special:
                table[token_id] = to_bytes(name)
        unknown = self._backend.token_to_id(UNKNOWN)
        if unknown is not None:
            table[unknown] = REPLACEMENT.encode()
        return table

    @cached_property
    def _character_table(self) -> NDArray[np.int64] | None:
        """For a character tokenizer the id of each code point, or -1: one look-up instead of a merge loop.

        About ten times faster than the general path on a long text, and tested to equal it.
        """
        if self.kind != "char":
            return None
        table = np.full(NUM_CODE_POINTS, -1, dtype=np.int64)
        for name, token_id in self._layout["model"]["vocab"].items():
            if len(name) == 1:
                table[ord(name)] = token_id
        return table

    def _encode_characters(self, text: str) -> NDArray[np.uint32]:
        assert self._character_table is not None
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids: NDArray[np.int64] = self._character_table[code_points]
        unknown = np.flatnonzero(ids < 0)
        if not len(unknown):
            return ids.astype(np.uint32)
        pieces: list[NDArray[np.int64]] = []
        begin = 0
        vocabulary = self._layout["model"]["vocab"]
        for at in unknown.tolist():
            in_bytes = [vocabulary[byte_name(byte)] for byte in chr(code_points[at]).encode("utf-8")]
            pieces += [ids[begin:at], np.array(in_bytes, dtype=np.int64)]
            begin = at + 1
        return np.concatenate([*pieces, ids[begin:]]).astype(np.uint32)


def names_and_ids(layout: dict[str, Any]) -> dict[str, int]:
    """Return the vocabulary in a `tokenizer.json`, with what was added to it."""
    entries = layout["model"]["vocab"]  # of a unigram model pairs of a name and a score, in order
    names = entries if isinstance(entries, dict) else {name: number for number, (name, _) in enumerate(entries)}
    return names | {added["content"]: added["id"] for added in layout["added_tokens"]}


def load_model_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Load the tokenizer that was saved with a model of `vocab_size` entries.

    Raises:
        CheckpointError: it is missing or damaged, or has more entries than the model.
    """
    file, most = folder / TOKENIZER_FILE if folder.is_dir() else folder, LARGEST_REST + LARGEST_ENTRY * vocab_size
    if file.is_file() and file.stat().st_size > most:
        raise CheckpointError(
            f"{file} has {file.stat().st_size} bytes, far more than the tokenizer of a model with {vocab_size} tokens. "
            "They do not belong together. Use another checkpoint, or the tokenizer that the model was trained with."
        )
    try:
        tokenizer = Tokenizer.load(folder)
    except DataError as error:
        raise CheckpointError(f"The tokenizer of the checkpoint {folder} cannot be used. {error}") from None
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"The tokenizer in {folder} has {tokenizer.vocab_size} entries, but its model knows only {vocab_size}: "
            "they "
            "do not belong together. Use another checkpoint, or the tokenizer.json that the model was trained with."
        )
    return tokenizer


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Return how many UTF-8 bytes of the texts one token stands for on average; 0 where there is no token.

    Raises:
        DataError: as `Tokenizer.encode`.
    """
    num_bytes = num_tokens = 0
    for text in texts:
        for piece in tokenizer.cut(text):
            num_tokens += len(tokenizer.encode_array(piece))
            num_bytes += len(piece.encode("utf-8"))
    return num_bytes / num_tokens if num_tokens else 0.0
