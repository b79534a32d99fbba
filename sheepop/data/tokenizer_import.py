"""Tokenizers that others made: `tokenizer.json`, GPT-2's `encoder.json` and `vocab.bpe`, tiktoken's `.tiktoken`."""

import base64
import binascii
import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import models

from sheepop.data.text_marks import KNOWN_END_TOKENS, text_marks
from sheepop.data.tokenizer_parts import CL100K, END_OF_TEXT, O200K, byte_level, byte_level_table, special_token
from sheepop.utils.errors import ConfigError, DataError
from sheepop.utils.logging import log

TOKENIZER_FILE = "tokenizer.json"
TIKTOKEN_SUFFIX = ".tiktoken"
HUGE_NUMBER = re.compile(r'"\s*:\s*\d{8}')


@dataclass(frozen=True)
class TiktokenScheme:
    """What a `.tiktoken` file leaves out (openai/tiktoken, `openai_public.py`).

    Attributes:
        patterns: split the text; none for GPT-2's way.
        num_ranks: entries of the published vocabulary, to which alone the special tokens belong.
        special_tokens: their ids.
    """

    patterns: tuple[str, ...]
    num_ranks: int
    special_tokens: dict[str, int]


_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
TIKTOKEN_SCHEMES = {
    "r50k": TiktokenScheme((), 50256, {END_OF_TEXT: 50256}),
    "p50k": TiktokenScheme((), 50280, {END_OF_TEXT: 50256}),
    "cl100k": TiktokenScheme(
        (CL100K,),
        100256,
        {END_OF_TEXT: 100257} | {name: 100258 + n for n, name in enumerate(_FIM)} | {"<|endofprompt|>": 100276},
    ),
    "o200k": TiktokenScheme((O200K,), 199998, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}
SCHEME_ALIASES = {"gpt2": "r50k"}


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """Load a tokenizer of any known format from a file, or from a folder that holds one.

    Raises:
        DataError: there is none, or it is damaged.
    """
    if path.is_dir() and (path / "encoder.json").is_file() and (path / "vocab.bpe").is_file():
        return load_gpt2(path / "encoder.json", path / "vocab.bpe")
    file = path / TOKENIZER_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"There is no tokenizer at {path}. Name a {TOKENIZER_FILE}, a folder that holds one, a folder with "
            f"GPT-2's encoder.json and vocab.bpe, or a {TIKTOKEN_SUFFIX} file."
        )
    return load_tiktoken(file) if file.suffix == TIKTOKEN_SUFFIX else _load_json(file)


def load_gpt2(vocabulary: Path, merges: Path) -> tokenizers.Tokenizer:
    """Load GPT-2's own files.

    Raises:
        DataError: they are damaged.
    """
    try:
        backend = byte_level(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{vocabulary} and {merges} are not GPT-2's tokenizer files: {error}.") from None
    backend.add_special_tokens([special_token(END_OF_TEXT)])
    return backend


def load_tiktoken(path: Path, scheme: str | None = None) -> tokenizers.Tokenizer:
    """Load a `.tiktoken` file: a line for each token, its bytes in base64 and its rank, which is its id.

    Args:
        path: the file.
        scheme: how text is split, which the file does not say: `r50k` (also `gpt2`), `p50k`, `cl100k` or `o200k`.
            Without it, the beginning of the file's name.

    Raises:
        DataError: the file is damaged, or its name does not tell the scheme.
        ConfigError: there is no such scheme.
    """
    names = [*TIKTOKEN_SCHEMES, *SCHEME_ALIASES]
    if scheme is None:
        scheme = next((name for name in names if path.name.startswith(name)), None)
        if scheme is None:
            raise DataError(
                f"{path} does not say how its tokenizer splits text. Let its name begin with one of "
                f"{', '.join(names)}, as in cl100k_base{TIKTOKEN_SUFFIX}."
            )
    if scheme not in names:
        raise ConfigError(f"There is no tiktoken scheme '{scheme}'. Choose one of {', '.join(names)}.")
    known = TIKTOKEN_SCHEMES[SCHEME_ALIASES.get(scheme, scheme)]
    ranks = _read_ranks(path)
    splits = {token: _last_merges(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1}
    characters = {byte: character for character, byte in byte_level_table().items()}

    def name_of(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = [(name_of(left), name_of(right)) for pairs in splits.values() for left, right in pairs]
    special = known.special_tokens if len(ranks) == known.num_ranks else {END_OF_TEXT: max(ranks.values()) + 1}
    vocabulary = {name_of(token): rank for token, rank in ranks.items()} | special
    # tiktoken looks whole words up before it merges, which matters where merges alone would not make the word.
    whole_words = any(len(pairs) != 1 for pairs in splits.values())
    backend = byte_level(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words), *known.patterns)
    backend.add_special_tokens([special_token(name) for name in sorted(special, key=special.__getitem__)])
    return backend


def _load_json(file: Path) -> tokenizers.Tokenizer:
    try:
        content = file.read_text(encoding="utf-8")
        if HUGE_NUMBER.search(content):  # the library makes a table of as many entries
            raise ValueError("a token has a number of eight digits")
        backend = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{file} is not a whole {TOKENIZER_FILE}: {error}.") from None
    is_marked = any(backend.token_to_id(name) is not None for name in KNOWN_END_TOKENS)
    if not is_marked and text_marks(json.loads(backend.to_str()), backend.get_vocab()).end is None:
        backend.add_special_tokens([special_token(END_OF_TEXT)])
        log(f"{file} has no token that ends a text; {END_OF_TEXT} was added as {backend.token_to_id(END_OF_TEXT)}")
    return backend


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error, OSError) as error:
        raise DataError(f"{path} is not a whole {TIKTOKEN_SUFFIX} file: {error}, after {len(ranks)} tokens.") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        raise DataError(
            f"{path} is not a whole {TIKTOKEN_SUFFIX} file: "
            + (f"it has no token for the byte {missing[0]}." if missing else "two tokens have the same rank.")
            + " Get the file again from its source."
        )
    return ranks


def _last_merges(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return the pairs of parts from which BPE can make a token.

    That is one pair, the parts that lower ranks leave: any other pair with the same bytes would have merged otherwise
    before. Where lower ranks leave more than two parts, it is every pair of tokens.
    """
    limit = ranks[token]
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= limit:
            halves = ((token[:at], token[at:]) for at in range(1, len(token)))
            return [(left, right) for left, right in halves if left in ranks and right in ranks]
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [(parts[0], parts[1])]
