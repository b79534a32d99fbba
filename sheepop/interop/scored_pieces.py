"""Tokenizers whose pieces have scores, as SentencePiece makes them: of neighbours, those with the best score merge."""

from collections.abc import Iterable, Mapping, Sequence

import tokenizers
from tokenizers import decoders, models, normalizers

MOST_SPLITTING = 2**26  # characters of all halves of all pieces; 262,144 pieces of 16 characters have as many
SPACE = "▁"  # what stands for a space


def merges_of(ids: Mapping[str, int], scores: Sequence[float], pieces: Iterable[str]) -> list[tuple[str, str]]:
    """Return the pairs that merge, the first first: all halves of each piece that are in the vocabulary.

    Args:
        ids: the vocabulary.
        scores: of each id.
        pieces: the names that may come out of a merge.

    Raises:
        ValueError: the pieces are longer than those of any vocabulary.
    """
    pieces = list(pieces)
    if sum(len(name) ** 2 for name in pieces) > MOST_SPLITTING:
        raise ValueError("its pieces are far longer than words")
    merges = []
    for name in pieces:
        halves = ((name[:cut], name[cut:]) for cut in range(1, len(name)))
        merges += [(-scores[ids[name]], ids[name], pair) for pair in halves if pair[0] in ids and pair[1] in ids]
    merges.sort(key=lambda merge: merge[:2])
    return [pair for *_, pair in merges]


def scored_pieces(
    ids: dict[str, int], merges: list[tuple[str, str]], *, unknown: str | None, prefix: bool
) -> tokenizers.Tokenizer:
    """Return a tokenizer over pieces that merge; what is no piece is bytes.

    Args:
        ids: the vocabulary, with the bytes as `byte_name` has them.
        merges: as by `merges_of`.
        unknown: the piece for what is not even bytes.
        prefix: whether a text is read as if a space stood before it.
    """
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
    )
    before = [normalizers.Prepend(SPACE)] if prefix else []
    behind = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *behind]
    )
    return backend
