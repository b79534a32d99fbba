"""Text ↔ token ids: character, word and byte-level BPE tokenizers over one interface.

All of them are saved as a Hugging Face `tokenizer.json`. One special token begins every document and closes the
last; it never comes out of plain text, not even out of text that spells its name.
"""

import codecs
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from sheepop.utils.errors import CheckpointError, ConfigError, DataError
from sheepop.utils.files import write_atomic
from sheepop.utils.logging import log

Kind = Literal["bpe", "char", "word"]
KINDS: tuple[Kind, ...] = ("bpe", "char", "word")
TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"
REPLACEMENT = "\ufffd"
# The names that others give to the token between documents, in the order in which they are looked for.
KNOWN_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|bos|>", "<s>")
SMALLEST_BPE = 257  # every byte, and the end of text
# A word takes the space before it along; punctuation and white space stand for themselves.
WORDS = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s"
NUM_CODE_POINTS = 0x110000
# Encoding takes hundreds of bytes of memory a token and one core a text, so long texts are encoded in pieces. White
# space after a letter or digit begins a new token in GPT-2's splitting and in `WORDS`, whatever stands around it.
PIECE_CHARACTERS = 100_000
PIECE_END = re.compile(r"(?<=[^\W_])(?=[ \n])")


class Tokenizer:
    """A vocabulary and the way from text to its numbers and back.

    Made by `train` or `load`.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        # Without this the library would read `<|endoftext|>` in a user's text as the special token.
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._layout = json.loads(backend.to_str())
        end = next((name for name in KNOWN_END_TOKENS if backend.token_to_id(name) is not None), None)
        if end is None:
            raise DataError(f"The tokenizer has no token that ends a text, none of {', '.join(KNOWN_END_TOKENS)}.")
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.end_of_text_id: int = vocabulary[end]
        self.vocab_size: int = max(vocabulary.values()) + 1  # imported numbers may have gaps

    @property
    def kind(self) -> Kind:
        """`bpe`, `char` or `word`."""
        model = self._layout["model"]
        if model["type"] == "WordLevel":
            return "word"
        return "char" if model["type"] == "BPE" and not model["merges"] else "bpe"

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
            return cls(_train_bpe(texts, vocab_size))
        if kind == "char":
            return cls(_train_char(texts, vocab_size))
        if kind == "word":
            return cls(_train_word(texts, vocab_size))
        raise ConfigError(f"There is no tokenizer '{kind}'. Choose bpe, char, word, or the path of a tokenizer.json.")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Load a `tokenizer.json`, a folder that holds one, or a folder with GPT-2's `encoder.json` and `vocab.bpe`.

        Raises:
            DataError: there is none, or it is damaged.
        """
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if path.is_dir() and (path / "encoder.json").is_file() and (path / "vocab.bpe").is_file():
            return cls(_load_gpt2(path / "encoder.json", path / "vocab.bpe"))
        if not file.is_file():
            raise DataError(
                f"There is no tokenizer at {path}. Name a {TOKENIZER_FILE}, a folder that holds one, or a folder with "
                "GPT-2's encoder.json and vocab.bpe."
            )
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"{file} is not a whole tokenizer.json: {error}.") from None
        if all(backend.token_to_id(name) is None for name in KNOWN_END_TOKENS):
            backend.add_special_tokens([_special(END_OF_TEXT)])
            log(f"{file} has no token that ends a text; {END_OF_TEXT} was added as {backend.token_to_id(END_OF_TEXT)}")
        return cls(backend)

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
        if self._character_table is not None:
            return [self._encode_characters(text) for text in texts]
        try:
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(_surrogate_message(texts)) from error

    def cut(self, text: str, size: int = PIECE_CHARACTERS) -> Iterator[str]:
        """Cut a long text into pieces of about `size` characters whose tokens, joined, are those of the whole.

        The text of an imported tokenizer that splits in other ways stays whole.
        """
        return cut(text, size) if self._splits_at_white_space else iter((text,))

    @cached_property
    def _splits_at_white_space(self) -> bool:
        splitter = self._layout["pre_tokenizer"] or {"type": "none"}
        is_ours = (
            self.kind == "char"
            or (splitter["type"] == "ByteLevel" and splitter["use_regex"] and not splitter["add_prefix_space"])
            or splitter.get("pattern") == {"Regex": WORDS}
        )
        return self._layout["normalizer"] is None and is_ours

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
    def token_bytes(self) -> list[bytes] | None:
        """The bytes that each token stands for, or None for an imported tokenizer whose tokens depend on neighbours."""
        to_bytes = _token_to_bytes(self._layout["decoder"])
        if to_bytes is None:
            return None
        special = {added["id"] for added in self._layout["added_tokens"] if added["special"]}
        table = [b""] * self.vocab_size
        for name, token_id in self._backend.get_vocab(with_added_tokens=True).items():
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

    def _encode_characters(self, text: str) -> list[int]:
        assert self._character_table is not None
        try:
            code_points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        except UnicodeEncodeError as error:
            raise DataError(_surrogate_message([text])) from error
        ids: NDArray[np.int64] = self._character_table[code_points]
        unknown = np.flatnonzero(ids < 0)
        if not len(unknown):
            known: list[int] = ids.tolist()
            return known
        pieces: list[int] = []
        begin = 0
        vocabulary = self._layout["model"]["vocab"]
        for at in unknown.tolist():
            pieces += ids[begin:at].tolist()
            pieces += [vocabulary[_byte_name(byte)] for byte in chr(code_points[at]).encode("utf-8")]
            begin = at + 1
        pieces += ids[begin:].tolist()
        return pieces


def load_model_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Load the tokenizer that was saved with a model of `vocab_size` entries.

    Raises:
        CheckpointError: it is missing or damaged, or has more entries than the model.
    """
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
            num_tokens += len(tokenizer.encode(piece))
            num_bytes += len(piece.encode("utf-8"))
    return num_bytes / num_tokens if num_tokens else 0.0


class StreamDecoder:
    """Text from tokens as they come, never half a character: a character's last byte brings it out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._table = tokenizer.token_bytes
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # For tokenizers without a byte table: the last tokens whose text was returned, and the ones after them. The
        # first are decoded along, because the text of a token may depend on whether it is the first.
        self._context: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that is complete now."""
        if self._table is not None:
            return self._bytes.decode(self._table[token_id])
        self._waiting.append(token_id)
        text = self._text_of_waiting()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """Return what is left at the end; bytes that never became a character give U+FFFD."""
        if self._table is not None:
            return self._bytes.decode(b"", final=True)
        return self._text_of_waiting()

    def _text_of_waiting(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._context + self._waiting)[len(decode(self._context)) :]


def cut(text: str, size: int) -> Iterator[str]:
    """Cut a text after each `size` characters, at the next end of a word before a space or newline."""
    begin = 0
    while end := PIECE_END.search(text, begin + size):
        yield text[begin : end.start()]
        begin = end.start()
    yield text[begin:]


def _train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE (Radford et al. 2019, section 2.2): merges inside words, starting from the 256 bytes."""
    if vocab_size < SMALLEST_BPE:
        raise ConfigError(
            f"A byte-level BPE tokenizer needs at least {SMALLEST_BPE} entries (256 bytes and the end of text), but "
            f"{vocab_size} were asked for. Raise the vocabulary size, or use the tokenizer 'char'."
        )
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_special(END_OF_TEXT)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in cut(text, PIECE_CHARACTERS)), trainer)
    return backend


def _train_char(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """One entry a character, the most frequent ones where they are too many; others fall back to their bytes."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    kept = sorted(ranked[: max(0, vocab_size - 1)])
    # The bytes that a character outside the vocabulary can have: ASCII that was not kept, and all of UTF-8 beyond.
    rest = [byte for byte in range(0x80) if chr(byte) not in kept] + [*range(0x80, 0xC0), *range(0xC2, 0xF5)]
    names = [END_OF_TEXT, *kept, *map(_byte_name, rest)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([_special(END_OF_TEXT)])
    return backend


def _train_word(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """One entry a word with the space before it, the most frequent ones; others are unknown."""
    if vocab_size < 3:
        raise ConfigError(f"A word tokenizer needs at least 3 entries, but {vocab_size} were asked for.")
    splitter = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    counts: Counter[str] = Counter()
    for piece in (piece for text in texts for piece in cut(text, PIECE_CHARACTERS)):
        counts.update(word for word, _ in splitter.pre_tokenize_str(piece))
    counts.pop(END_OF_TEXT, None)
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    names = [END_OF_TEXT, UNKNOWN, *ranked[: vocab_size - 2]]
    backend = tokenizers.Tokenizer(
        models.WordLevel(vocab={name: number for number, name in enumerate(names)}, unk_token=UNKNOWN)
    )
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([_special(END_OF_TEXT), _special(UNKNOWN)])
    return backend


def _load_gpt2(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    try:
        backend = _byte_level(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{vocabulary} and {merges} are not GPT-2's tokenizer files: {error}.") from None
    backend.add_special_tokens([_special(END_OF_TEXT)])
    return backend


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def _byte_name(byte: int) -> str:
    return f"<0x{byte:02X}>"


def _token_to_bytes(decoder: dict[str, Any] | None) -> Any:
    """Return the function from a token's name to its bytes, for the decoders that treat tokens one by one."""
    if decoder is None:
        return None
    if decoder["type"] == "ByteLevel":
        table = _byte_level_table()
        # A name with other characters is an added token, written as it is.
        return lambda name: bytes(table[c] for c in name) if all(c in table for c in name) else name.encode("utf-8")
    parts = [part["type"] for part in decoder.get("decoders", [])]
    if parts == ["ByteFallback", "Fuse"]:
        names = {_byte_name(byte): bytes([byte]) for byte in range(256)}
        return lambda name: names.get(name) or name.encode("utf-8")
    if decoder["type"] == "Fuse":
        return lambda name: name.encode("utf-8")
    return None


def _byte_level_table() -> dict[str, int]:
    """Return the byte behind each character that GPT-2's vocabulary files use for bytes.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _surrogate_message(texts: Sequence[str]) -> str:
    for text in texts:
        for at, character in enumerate(text):
            if "\ud800" <= character <= "\udfff":
                return (
                    f"The text has half of a surrogate pair (U+{ord(character):04X}) at character {at}, which is no "
                    "character of Unicode. Remove it, or read the text again from its source."
                )
    return "The text cannot be encoded."
