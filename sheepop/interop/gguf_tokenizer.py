"""Tokenizers inside of GGUF files, both ways: byte-level BPE (`gpt2`), and pieces with scores (`llama`).

A file names how text is split instead of telling the pattern; the names, and what follows where a file is silent, are
those of llama.cpp (`llama-vocab.cpp`), which splits with the patterns of the models' own tokenizers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, models

from sheepop.data.text_marks import set_text_marks, text_marks
from sheepop.data.tokenizer import Tokenizer
from sheepop.data.tokenizer_parts import (
    GPT2,
    LLAMA3,
    O200K,
    QWEN2,
    TEKKEN,
    byte_level,
    byte_name,
    bytes_beside,
    characters_and_bytes,
    special_token,
)
from sheepop.interop.scored_pieces import SPACE, merges_of, scored_pieces
from sheepop.utils.errors import CheckpointError, DataError
from sheepop.utils.logging import log

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
KEY = "tokenizer.ggml."
LONGEST_NAME = 2**10  # characters of a token; halves of each are looked up


@dataclass(frozen=True)
class Splitting:
    """A way to split text before pairs merge.

    Attributes:
        names: what files call it; the first is what we write, if `is_exact`.
        patterns: applied one after the other; none for GPT-2's way.
        whole_words: whether a word that is a token stays whole, whatever its merges.
        begins: whether a text begins with a token where a file does not say.
        is_exact: whether llama.cpp splits all text in this way too, and not an approximation of it.
    """

    names: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    whole_words: bool = False
    begins: bool = False
    is_exact: bool = True


SPLITTINGS = (
    Splitting(("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "mellum", "modern-bert", "trillion")),
    Splitting(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), (r"\p{N}", GPT2)),
    Splitting(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), (LLAMA3,), True, True),
    Splitting(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (LLAMA3,)),
    Splitting(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"), (QWEN2,)),
    Splitting(("gpt-4o", "llama4"), (O200K,), is_exact=False),
    Splitting(("tekken",), (TEKKEN,), True, True, is_exact=False),
    Splitting(("default",), (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)


def read_tokenizer(fields: Mapping[str, Any], vocab_size: int, source: str) -> Tokenizer:
    """Return the tokenizer of a GGUF file.

    Args:
        fields: of its header.
        vocab_size: entries of the model.
        source: the file, for messages.

    Raises:
        CheckpointError: it is of a kind that we do not have, damaged, or has more entries than the model.
    """
    kind, names = fields.get(f"{KEY}model"), fields.get(f"{KEY}tokens")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"The tokenizer in {source} is of the kind '{kind}'; known are gpt2 and llama. Name another with "
            "--tokenizer PATH."
        )
    try:
        vocabulary = Vocabulary(fields, names)
        backend, begins = read_byte_level(vocabulary) if kind == "gpt2" else read_pieces(vocabulary)
        set_marks(backend, vocabulary, begins=begins)
        tokenizer = Tokenizer(backend)
    except CheckpointError:
        raise
    except DataError as error:
        raise CheckpointError(f"The tokenizer in {source} cannot be used. {error}") from None
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"The tokenizer in {source} is damaged: {error}. Get the file again.") from None
    if len(vocabulary.names) > vocab_size:
        raise CheckpointError(
            f"The tokenizer in {source} has {len(vocabulary.names)} entries, but its model knows only {vocab_size}: "
            "they do not belong together."
        )
    return tokenizer


class Vocabulary:
    """The lists of a header, of one length each.

    Attributes:
        fields: of the header, without what stands before each key.
        names: of the tokens, by their numbers.
        types: as many.
        ids: the numbers of the tokens that are used.
    """

    def __init__(self, fields: Mapping[str, Any], names: object) -> None:
        """Check them.

        Raises:
            ValueError: they are missing, or do not fit together.
        """
        self.fields = {key.removeprefix(KEY): value for key, value in fields.items() if key.startswith(KEY)}
        if not isinstance(names, list) or not names:  # a list is one of strings; of numbers there are arrays
            raise ValueError("there are no tokens")
        longest = max(map(len, names))
        if longest > LONGEST_NAME:
            raise ValueError(f"a token has {longest} characters")
        self.names = names
        self.types = self.numbers("token_type", NORMAL)
        self.ids = {name: n for n, name in enumerate(names) if self.types[n] != UNUSED and name}
        used = sum(kind != UNUSED and bool(name) for kind, name in zip(self.types, names, strict=True))
        if len(self.ids) < used:
            raise ValueError("two tokens have the same name")

    def numbers(self, key: str, otherwise: float) -> list[Any]:
        """Return a list of a number for each token."""
        values = self.fields.get(key)
        if values is None:
            return [otherwise] * len(self.names)
        if not isinstance(values, np.ndarray) or len(values) != len(self.names):
            raise ValueError(f"{KEY}{key} is not a list of {len(self.names)} numbers")
        listed: list[Any] = values.tolist()
        return listed

    def of_type(self, *kinds: int) -> list[str]:
        """Return the names of the tokens of some types."""
        return [name for name, number in self.ids.items() if self.types[number] in kinds]

    def name_of(self, key: str) -> str | None:
        """Return the token whose number a key of the header has, or None."""
        number = self.fields.get(key)
        if number is None:
            return None
        if not isinstance(number, int) or not 0 <= number < len(self.names) or self.names[number] not in self.ids:
            raise ValueError(f"{KEY}{key} is {number}, but there are {len(self.names)} tokens")
        return str(self.names[number])


def read_byte_level(vocabulary: Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """Return a byte-level BPE, and whether a text begins with a token if nothing is said of it.

    Raises:
        CheckpointError: we do not know how it splits text.
        Exception: it is damaged.
    """
    name = vocabulary.fields.get("pre", "default")
    splitting = next((splitting for splitting in SPLITTINGS if name in splitting.names), None)
    if splitting is None:
        known = ", ".join(name for splitting in SPLITTINGS for name in splitting.names)
        raise CheckpointError(
            f"The tokenizer splits text in the way '{name}', which sheepop does not know; known are {known}. Name the "
            "model's tokenizer.json with --tokenizer PATH."
        )
    merges = vocabulary.fields.get("merges")
    if not isinstance(merges, list):
        raise ValueError("there are no merges")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    model = models.BPE(vocab=vocabulary.ids, merges=pairs, ignore_merges=splitting.whole_words)
    backend = byte_level(model, *splitting.patterns)
    add_tokens(backend, vocabulary)
    return backend, splitting.begins


def read_pieces(vocabulary: Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """Return a tokenizer of pieces with scores, or of characters where none merge; a text begins with a token.

    Raises:
        Exception: it is damaged.
    """
    vocabulary.fields = {"bos_token_id": 1, "eos_token_id": 2} | vocabulary.fields
    ids, prefix = vocabulary.ids, bool(vocabulary.fields.get("add_space_prefix", True))
    characters = {name.replace(SPACE, " "): number for name, number in ids.items()}
    lacking = [byte for byte in bytes_beside(characters) if byte_name(byte) not in ids]
    if lacking:
        raise ValueError(f"there is no token for the byte {lacking[0]}")
    scores = vocabulary.numbers("scores", 0.0)
    if not np.isfinite(scores).all():
        raise ValueError("a token's score is not a number")
    merges = merges_of(ids, scores, vocabulary.of_type(NORMAL))
    if merges or prefix:
        unknown = next(iter(vocabulary.of_type(UNKNOWN)), None)
        backend = scored_pieces(ids, merges, unknown=unknown, prefix=prefix)
    else:
        backend = characters_and_bytes(characters)
    add_tokens(backend, vocabulary)
    return backend, True


def add_tokens(backend: tokenizers.Tokenizer, vocabulary: Vocabulary) -> None:
    """Make the tokens that are more than pieces of text known: those that steer, and those that are never cut."""
    backend.add_special_tokens([special_token(name) for name in vocabulary.of_type(CONTROL, UNKNOWN)])
    backend.add_tokens([AddedToken(name, normalized=False) for name in vocabulary.of_type(USER_DEFINED)])


def set_marks(backend: tokenizers.Tokenizer, vocabulary: Vocabulary, *, begins: bool) -> None:
    """Let a text begin and end as the header says.

    Args:
        begins: whether it begins with a token if the header does not say so.
    """
    end, begin = vocabulary.name_of("eos_token_id"), vocabulary.name_of("bos_token_id")
    usual = text_marks(json.loads(backend.to_str()), vocabulary.ids)
    end = end or usual.end
    if end is None:
        return  # `Tokenizer` says so
    begin = begin or end
    start = [begin] if vocabulary.fields.get("add_bos_token", begins or begin == end) else []
    if start != [end] or usual.end != end:
        backend.add_special_tokens([special_token(name) for name in (*start, end)])
        set_text_marks(backend, start, end)


def tokenizer_fields(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return the values of a header that are a tokenizer.

    Args:
        tokenizer: ours.
        vocab_size: entries of the model; those without a token are marked as unused.

    Raises:
        CheckpointError: llama.cpp has no such tokenizer.
    """
    layout = json.loads(tokenizer.to_json())
    if layout["model"]["type"] != "BPE":
        raise CheckpointError(
            f"llama.cpp has no {tokenizer.kind} tokenizers. Train the model with data.tokenizer bpe or char to export "
            "it as GGUF."
        )
    if len(tokenizer.start_ids) > 1:
        raise CheckpointError("In a GGUF file a text begins with one token at the most; this model's with several.")
    added = {token["content"]: token for token in layout["added_tokens"]}
    ids: dict[str, int] = layout["model"]["vocab"] | {name: token["id"] for name, token in added.items()}
    types = dict.fromkeys(ids, NORMAL)
    types |= {name: CONTROL if token["special"] else USER_DEFINED for name, token in added.items()}
    if (layout["decoder"] or {}).get("type") == "ByteLevel":
        fields = byte_level_fields(layout)
    else:
        types |= dict.fromkeys(types.keys() & {byte_name(byte) for byte in range(256)}, BYTE)
        if layout["model"]["unk_token"]:
            types[layout["model"]["unk_token"]] = UNKNOWN
        fields = piece_fields(layout, ids, types, vocab_size)
    names = [f"[PAD{number}]" for number in range(vocab_size)]
    for name, number in ids.items():
        names[number] = name
    if len(set(names)) < len(names):
        raise CheckpointError("Two tokens would have the same name in a GGUF file; export with --format hf instead.")
    fields |= {
        "tokens": names,
        "token_type": [types.get(name, UNUSED) for name in names],
        "bos_token_id": tokenizer.begin_of_text_id,
        "eos_token_id": tokenizer.end_of_text_id,
        "add_bos_token": bool(tokenizer.start_ids),
    }
    return {KEY + key: value for key, value in fields.items()}


def byte_level_fields(layout: dict[str, Any]) -> dict[str, Any]:
    """Return what a header says of a byte-level BPE beside its tokens.

    Raises:
        CheckpointError: llama.cpp does not split text, or merge, in its way.
    """
    model, normalizer = layout["model"], (layout["normalizer"] or {}).get("type")
    patterns = patterns_of(layout["pre_tokenizer"])
    whole_words = bool(model.get("ignore_merges"))
    splitting = next(
        (
            splitting
            for splitting in SPLITTINGS
            if splitting.is_exact and (splitting.patterns or (GPT2,), splitting.whole_words) == (patterns, whole_words)
        ),
        None,
    )
    if splitting is None or normalizer not in (None, "NFC") or not model["merges"]:
        raise CheckpointError(
            "llama.cpp has no tokenizer that splits and merges text as this model's. Train one with data.tokenizer "
            "bpe, or export with --format hf."
        )
    if normalizer:
        log(f"the tokenizer brings text into the form {normalizer}, which llama.cpp does not: give it such text")
    return {"model": "gpt2", "pre": splitting.names[0], "merges": [" ".join(pair) for pair in model["merges"]]}


def patterns_of(splitter: dict[str, Any] | None) -> tuple[str, ...] | None:
    """Return the patterns of a pre-tokenizer of bytes, GPT-2's written out; None where it does anything else."""
    patterns = []
    for part in (splitter or {}).get("pretokenizers", [splitter]):
        match part:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": uses_pattern}:
                patterns += [GPT2] * uses_pattern
            case _:
                return None
    return tuple(patterns)


def piece_fields(layout: dict[str, Any], ids: dict[str, int], types: dict[str, int], vocab_size: int) -> dict[str, Any]:
    """Return what a header says of characters, or of pieces that merge, beside its tokens.

    Raises:
        CheckpointError: llama.cpp would merge otherwise.
    """
    model, prefix = layout["model"], "Prepend" in json.dumps(layout["normalizer"])
    merges = [tuple(pair) for pair in model["merges"]]
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    scores = [-float(len(ranks))] * vocab_size
    for name, rank in ranks.items():
        scores[ids[name]] = -float(rank)
    if merges:
        same = scored_pieces(model["vocab"], merges, unknown=model["unk_token"], prefix=prefix)
    else:
        same = characters_and_bytes(model["vocab"])
        # llama.cpp looks for a space under this name, and so would find it in a text that has the character.
        if SPACE in ids:
            raise CheckpointError(
                f"The vocabulary has the character {SPACE} (U+2581), which is a space to llama.cpp. Leave it out of "
                "the text, or train the model with data.tokenizer bpe, to export it as GGUF."
            )
        ids[SPACE] = ids.pop(" " if " " in ids else byte_name(0x20))
        types[SPACE] = NORMAL
    rebuilt = json.loads(same.to_str())
    pieces = [name for name in ids if types[name] == NORMAL]
    if any(rebuilt[key] != layout[key] for key in ("normalizer", "pre_tokenizer", "model")) or (
        merges_of(ids, scores, pieces) != merges
    ):
        raise CheckpointError("llama.cpp has no tokenizer that merges pieces as this model's; export with --format hf.")
    return {"model": "llama", "scores": scores, "add_space_prefix": prefix}
