"""Rules that tell prose from the rest of the web: those of Gopher and of C4.

Rae et al. 2021 ("Scaling language models", appendix A.1.1, table A1) and Raffel et al. 2020 ("Exploring the limits of
transfer learning", section 2.2). They were chosen on English web pages: code, verse, tables and lists often fail them.
Left out are Gopher's upper limit of 100,000 words, which books exceed, and C4's rules for single lines.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sheepop.data.duplicates import UNSPACED, hash_words, shingles

FEWEST_WORDS = 50
MEAN_WORD_LENGTH = (3.0, 10.0)
MOST_SYMBOLS_PER_WORD = 0.1
MOST_BULLET_LINES = 0.9
MOST_ELLIPSIS_LINES = 0.3
FEWEST_WORDS_WITH_LETTERS = 0.8
FEWEST_STOP_WORDS = 2
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
FEWEST_SENTENCES = 5
# Share of lines or paragraphs, and of their characters, that stood before.
MOST_REPEATED = 0.3
MOST_REPEATED_CHARACTERS = 0.2
# By the length of the run of words: the share of characters in the most frequent one, and in all that stood before.
MOST_IN_TOP_RUN = {2: 0.2, 3: 0.18, 4: 0.16}
MOST_IN_REPEATED_RUNS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
MOST_UNSPACED = 0.2  # of the characters; above it, the words cannot be told by the spaces between them

BULLETS = ("•", "‣", "▪", "●", "-", "*")
ELLIPSES = ("...", "…")
SENTENCE_END = re.compile(r"[.!?。！？]+[\"'”’)\]]*(?=\s|$)|[。！？]")
UNSPACED_CHARACTER = re.compile(f"[{UNSPACED}]")


def quality_problem(text: str, *, is_english: bool = False) -> str | None:
    """Return the name of the first rule that the text breaks, or None.

    The rule of the English stop words holds where `is_english`. Rules about words are left out for text in scripts
    without spaces, such as Chinese.
    """
    if not text.strip():
        return "few words"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    problem = _c4_problem(text) or _line_problem(text, lines)
    if problem or len(UNSPACED_CHARACTER.findall(text)) > MOST_UNSPACED * len(text):
        return problem
    words = text.split()
    return _word_problem(text, words, is_english=is_english) or repetition_problem(words)


def _c4_problem(text: str) -> str | None:
    if "lorem ipsum" in text.lower():
        return "lorem ipsum"
    if "{" in text:  # code and the remains of templates, where prose was wanted
        return "curly bracket"
    ends = SENTENCE_END.finditer(text)
    return (
        None
        if sum(1 for _, _ in zip(range(FEWEST_SENTENCES), ends, strict=False)) == FEWEST_SENTENCES
        else ("few sentences")
    )


def _line_problem(text: str, lines: Sequence[str]) -> str | None:
    if sum(line.startswith(BULLETS) for line in lines) > MOST_BULLET_LINES * len(lines):
        return "bullet points"
    if sum(line.endswith(ELLIPSES) for line in lines) > MOST_ELLIPSIS_LINES * len(lines):
        return "ellipsis lines"
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    for name, parts in (("repeated paragraphs", paragraphs), ("repeated lines", lines)):
        repeated = _repeated(parts)
        characters = sum(map(len, parts))
        if (
            len(repeated) > MOST_REPEATED * len(parts)
            or sum(map(len, repeated)) > MOST_REPEATED_CHARACTERS * characters
        ):
            return name
    return None


def _repeated(parts: Sequence[str]) -> list[str]:
    """Return the parts that stood before."""
    seen: set[str] = set()
    return [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]


def _word_problem(text: str, words: Sequence[str], *, is_english: bool) -> str | None:
    if len(words) < FEWEST_WORDS:
        return "few words"
    least, most = MEAN_WORD_LENGTH
    if not least <= sum(map(len, words)) / len(words) <= most:
        return "length of words"
    if max(text.count("#"), sum(map(text.count, ELLIPSES))) > MOST_SYMBOLS_PER_WORD * len(words):
        return "symbols"
    if sum(any(map(str.isalpha, word)) for word in words) < FEWEST_WORDS_WITH_LETTERS * len(words):
        return "words without letters"
    if is_english and sum(word.lower().strip(".,;:!?\"'") in STOP_WORDS for word in words) < FEWEST_STOP_WORDS:
        return "few stop words"
    return None


def repetition_problem(words: Sequence[str]) -> str | None:
    """Return "repeated phrases" where runs of words recur too often (Rae et al. 2021, table A1), else None.

    Characters of overlapping runs are counted once.
    """
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    total = int(lengths.sum())
    hashes = hash_words(words)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for length, most in MOST_IN_TOP_RUN.items():
        runs, first, counts = np.unique(shingles(hashes, length), return_index=True, return_counts=True)
        if len(runs) and counts.max() > 1:
            characters = ends[first + length] - ends[first]
            if int((counts * characters)[counts == counts.max()].max()) > most * total:
                return "repeated phrases"
    for length, most in MOST_IN_REPEATED_RUNS.items():
        runs = shingles(hashes, length)
        is_repeat = np.ones(len(runs), dtype=np.bool_)
        is_repeat[np.unique(runs, return_index=True)[1]] = False
        repeated = int(lengths[_covered(is_repeat, length, len(words))].sum())
        if repeated > most * total:
            return "repeated phrases"
        if repeated <= min(MOST_IN_REPEATED_RUNS.values()) * total:
            break  # a longer run can only recur where its parts do
    return None


def _covered(begins: NDArray[np.bool_], length: int, count: int) -> NDArray[np.bool_]:
    """Return which of `count` words lie in a run of `length` words that begins at a marked one."""
    edges = np.zeros(count + 1, dtype=np.int64)
    at = np.flatnonzero(begins)
    np.add.at(edges, at, 1)
    np.add.at(edges, at + length, -1)
    return np.cumsum(edges[:-1]) > 0
