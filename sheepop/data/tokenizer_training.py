"""Making tokenizers from texts: byte-level BPE, characters, words."""

from collections import Counter
from collections.abc import Iterable

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from sheepop.data.tokenizer_parts import (
    END_OF_TEXT,
    PIECE_CHARACTERS,
    UNKNOWN,
    WORDS,
    byte_level,
    byte_name,
    bytes_beside,
    characters_and_bytes,
    cut,
    special_token,
)
from sheepop.utils.errors import ConfigError

SMALLEST_BPE = 257  # every byte, and the end of text


def train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE (Radford et al. 2019, section 2.2): merges inside words, starting from the 256 bytes."""
    if vocab_size < SMALLEST_BPE:
        raise ConfigError(
            f"A byte-level BPE tokenizer needs at least {SMALLEST_BPE} entries (256 bytes and the end of text), but "
            f"{vocab_size} were asked for. Raise the vocabulary size, or use the tokenizer 'char'."
        )
    backend = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[special_token(END_OF_TEXT)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in texts for piece in cut(text, PIECE_CHARACTERS)), trainer)
    return backend


def train_char(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """One entry a character, the most frequent ones where they are too many; others fall back to their bytes."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    kept = sorted(ranked[: max(0, vocab_size - 1)])
    names = [END_OF_TEXT, *kept, *map(byte_name, bytes_beside(kept))]
    backend = characters_and_bytes({name: number for number, name in enumerate(names)})
    backend.add_special_tokens([special_token(END_OF_TEXT)])
    return backend


def train_word(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
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
    backend.add_special_tokens([special_token(END_OF_TEXT), special_token(UNKNOWN)])
    return backend
