"""How many tokens a text has under different tokenizers, estimated on a sample of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sheepop.data.tokenizer import SMALLEST_BPE, Tokenizer, bytes_per_token

SAMPLE_CHARACTERS = 3_000_000
PIECE_CHARACTERS = 20_000
MEASURE_EVERY = 5  # every fifth piece is measured and not trained on
TRAINED_SIZES = (1_024, 4_096, 16_384)


class TokenSample:
    """Pieces from the whole text: of long documents a part, of short ones some whole."""

    def __init__(self, about_bytes: int, tokenizers: Sequence[Path]) -> None:
        self._tokenizers = [(str(path), Tokenizer.load(path)) for path in tokenizers]
        self._share = min(1.0, SAMPLE_CHARACTERS / max(1, about_bytes))
        self._pieces: list[str] = []
        self._characters = 0

    def add(self, text: str, digest: int) -> None:
        """Take a share of a document; `digest` decides which, so that the same text gives the same sample."""
        # Compressed files hold more text than their size says.
        if self._characters >= 2 * SAMPLE_CHARACTERS:
            return
        size = int(len(text) * self._share)
        if size >= PIECE_CHARACTERS:
            start = digest % (len(text) - size + 1)
            text = text[start : start + size]
        elif digest % 2**32 >= self._share * 2**32 and self._pieces:
            return
        for start in range(0, len(text), PIECE_CHARACTERS):
            self._pieces.append(text[start : start + PIECE_CHARACTERS])
        self._characters += size

    def measure(self, num_bytes: int) -> list[dict[str, Any]]:
        """Return for each tokenizer its entries, its bytes a token, and the tokens of `num_bytes` of such text.

        A character tokenizer and BPE tokenizers of some sizes are trained on four fifths of the sample; all are
        measured on the last fifth, where there is one.
        """
        pieces = [piece.encode("utf-8", errors="replace").decode("utf-8") for piece in self._pieces]
        measured = pieces[MEASURE_EVERY - 1 :: MEASURE_EVERY] or pieces
        trained_on = [piece for number, piece in enumerate(pieces) if number % MEASURE_EVERY != MEASURE_EVERY - 1]
        named = [("char", Tokenizer.train("char", trained_on, vocab_size=SMALLEST_BPE))]
        for size in TRAINED_SIZES:
            bpe = Tokenizer.train("bpe", trained_on, vocab_size=size)
            named.append((f"bpe {bpe.vocab_size}", bpe))
            if bpe.vocab_size < size:  # the sample fills no larger one
                break
        rows = []
        for name, tokenizer in [*named, *self._tokenizers]:
            density = bytes_per_token(tokenizer, measured)
            rows.append(
                {
                    "name": name,
                    "vocab_size": tokenizer.vocab_size,
                    "bytes_per_token": density,
                    "tokens": round(num_bytes / density) if density else 0,
                    "trained_here": (name, tokenizer) in named,
                }
            )
        return rows
