"""Which tokens are spelled alike: words in other cases, other forms of a word, words with the same ending."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

BEGINNINGS, ENDINGS = range(3, 7), range(1, 4)  # characters


def spelling_groups(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return groups of at least two tokens each that have something of their spelling in common.

    Args:
        texts: what each token stands for; empty for one that is no text.

    Returns:
        Pairs of a token and a group that it is in, both counted from 0 and by token in rising order.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for token_id, text in enumerate(texts):
        for name in sorted(set(marks_of(text))):
            members[name].append(token_id)
    groups = [tokens for _, tokens in sorted(members.items()) if len(tokens) > 1]
    pairs = sorted((token_id, group) for group, tokens in enumerate(groups) for token_id in tokens)
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def marks_of(text: str) -> Iterator[str]:
    """Yield names of what a token may share with others: its word, how that begins and ends, its case, its place."""
    word = text.strip()
    if not text:
        return
    yield "after a space" if text[0].isspace() else "not after a space"
    if word[:1].isupper():
        yield "all capitals" if len(word) > 1 and word.isupper() else "capital"
    word = word.lower()
    if word:
        yield f"word {word}"
    for length in BEGINNINGS:
        if word:
            yield f"begins {word[:length]}"
    for length in ENDINGS:
        if len(word) > length:
            yield f"ends {word[-length:]}"
