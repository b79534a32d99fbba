"""What tokenizers are made of: names of bytes and special tokens, patterns that split text, pieces of long texts."""

import re
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unk|>"
REPLACEMENT = "\ufffd"
# A word takes the space before it along; punctuation and white space stand for themselves.
WORDS = r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s"
# The patterns of tiktoken's `cl100k_base` and `o200k_base`, written for the regular expressions of `tokenizers`, where
# `{1,3}+` is not possessive and `$` is the end of a line.
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+\z|\s*[\r\n]|\s+(?!\S)|\s"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The patterns of Llama 3, Qwen2 and Mistral's Tekken, which descend from these, and GPT-2's own written out.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Encoding takes hundreds of bytes of memory a token and one core a text, so long texts are encoded in pieces. White
# space after a letter or digit begins a new token in GPT-2's splitting and in the patterns above, whatever stands
# around it.
PIECE_CHARACTERS = 100_000
PIECE_END = re.compile(r"(?<=[^\W_])(?=[ \n])")
CUT_AT_WHITE_SPACE = ("gpt2", WORDS, CL100K, O200K, LLAMA3, QWEN2, TEKKEN)


def special_token(name: str) -> AddedToken:
    """Return a token that never comes out of plain text."""
    return AddedToken(name, special=True, normalized=False)


def byte_name(byte: int) -> str:
    """Return the name of a byte in vocabularies of characters: `<0x0A>`."""
    return f"<0x{byte:02X}>"


def byte_level_table() -> dict[str, int]:
    """Return the byte behind each character that GPT-2's vocabulary files use for bytes.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def byte_level(model: models.BPE, *patterns: str) -> tokenizers.Tokenizer:
    """Return a tokenizer of bytes that splits text with each pattern in turn, or with none as GPT-2 does."""
    backend = tokenizers.Tokenizer(model)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not patterns)
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes]) if patterns else as_bytes
    backend.decoder = decoders.ByteLevel()
    return backend


def bytes_beside(characters: Container[str]) -> list[int]:
    """Return the bytes that a character outside of a vocabulary can have: ASCII that it lacks, all of UTF-8 beyond."""
    return [byte for byte in range(0x80) if chr(byte) not in characters] + [*range(0x80, 0xC0), *range(0xC2, 0xF5)]


def characters_and_bytes(ids: dict[str, int]) -> tokenizers.Tokenizer:
    """Return a tokenizer of characters over a vocabulary that has the bytes of all others, as `byte_name` has them."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


def splitting_pattern(layout: dict[str, Any]) -> str | None:
    """Return what splits text in a `tokenizer.json`: a pattern, `gpt2`, or None where it is neither."""
    splitter = layout["pre_tokenizer"]
    if splitter is None or layout["normalizer"] is not None:
        return None
    if splitter["type"] == "Sequence" and len(splitter["pretokenizers"]) == 2:
        splitter, as_bytes = splitter["pretokenizers"]
        if as_bytes["type"] != "ByteLevel" or as_bytes["use_regex"] or as_bytes["add_prefix_space"]:
            return None
    if splitter["type"] == "ByteLevel":
        return "gpt2" if splitter["use_regex"] and not splitter["add_prefix_space"] else None
    if splitter["type"] == "Split" and splitter["behavior"] == "Isolated" and not splitter["invert"]:
        pattern = splitter["pattern"].get("Regex")
        return None if pattern is None else str(pattern)
    return None


def byte_level_bytes(name: str) -> bytes:
    """Return the bytes that a name in GPT-2's characters stands for; one with others is an added token, as it is."""
    try:
        return name.translate(CHARACTER_OF_BYTE).encode("latin-1")
    except UnicodeEncodeError:
        return name.encode("utf-8")


# What GPT-2's characters stand for as characters of Latin-1, and for those of Latin-1 that are none one beyond it.
CHARACTER_OF_BYTE = dict.fromkeys(range(0x100), 0xFFFF) | {ord(c): byte for c, byte in byte_level_table().items()}


def token_to_bytes(decoder: dict[str, Any] | None) -> Callable[[str], bytes] | None:
    """Return the function from a token's name to its bytes, for the decoders that treat tokens one by one."""
    if decoder is None:
        return None
    if decoder["type"] == "ByteLevel":
        return byte_level_bytes
    parts = [part["type"] for part in decoder.get("decoders", [])]
    if parts == ["ByteFallback", "Fuse"]:
        names = {byte_name(byte): bytes([byte]) for byte in range(256)}
        return lambda name: names.get(name) or name.encode("utf-8")
    if decoder["type"] == "Fuse":
        return lambda name: name.encode("utf-8")
    return None


def cut(text: str, size: int) -> Iterator[str]:
    """Cut a text after each `size` characters, at the next end of a word before a space or newline."""
    begin = 0
    while end := PIECE_END.search(text, begin + size):
        yield text[begin : end.start()]
        begin = end.start()
    yield text[begin:]


def surrogate_message(texts: Sequence[str]) -> str:
    """Return what to tell the user of texts that cannot be encoded: where half of a surrogate pair is."""
    for text in texts:
        for at, character in enumerate(text):
            if "\ud800" <= character <= "\udfff":
                return (
                    f"The text has half of a surrogate pair (U+{ord(character):04X}) at character {at}, which is no "
                    "character of Unicode. Remove it, or read the text again from its source."
                )
    return "The text cannot be encoded."
