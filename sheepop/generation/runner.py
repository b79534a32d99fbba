"""Between the engine, which decides what is computed, and what computes it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from sheepop.generation.engine import one_core_for_little
from sheepop.models.paged_cache import CachedSequence, PagedCache
from sheepop.models.paged_rows import PagedRows
from sheepop.models.transformer import TransformerModel, inference


@dataclass(frozen=True)
class Chunk:
    """The next tokens of a sequence, to be computed in one go.

    Attributes:
        sequence: with the tokens before these in its pages, and pages reserved for these.
        token_ids: at least one.
        all_logits: after each of the tokens, or after the last one alone.
    """

    sequence: CachedSequence
    token_ids: list[int]
    all_logits: bool = False


class Runner(Protocol):
    """Computes chunks; the engine does not know how."""

    def __call__(self, chunks: Sequence[Chunk], cache: PagedCache) -> list[Tensor]:
        """Write the keys and values of the chunks' tokens into their sequences' pages; return the logits of each chunk.

        The sequences' own records stay as they are; the engine counts the tokens that it keeps.

        Returns:
            For each chunk fp32 logits (T, V), or (1, V) without `all_logits`.
        """
        ...


class ModelRunner:
    """Computes chunks by a model of PyTorch, those of similar lengths as rows of one forward pass."""

    def __init__(self, model: TransformerModel) -> None:
        self.model = model
        self._num_parameters = sum(parameter.numel() for parameter in model.parameters())

    def __call__(self, chunks: Sequence[Chunk], cache: PagedCache) -> list[Tensor]:
        """Do what `Runner` says."""
        logits: dict[int, Tensor] = {}
        work = self._num_parameters * sum(len(chunk.token_ids) for chunk in chunks)
        with inference(self.model), one_core_for_little(work, cache.device):
            for group in groups_of_similar_length(chunks):
                rows = self._forward([chunks[index] for index in group], cache)
                logits.update(zip(group, rows, strict=True))
        return [logits[index] for index in range(len(chunks))]

    def _forward(self, chunks: Sequence[Chunk], cache: PagedCache) -> list[Tensor]:
        """Return the logits of chunks that are computed together."""
        counts = [len(chunk.token_ids) for chunk in chunks]
        padded = [chunk.token_ids + [0] * (max(counts) - len(chunk.token_ids)) for chunk in chunks]
        rows = PagedRows(cache, [chunk.sequence for chunk in chunks], counts)
        hidden = self.model.hidden_states(torch.tensor(padded, device=cache.device), cache=rows)  # (B, T, D)
        wanted = [
            range(0 if chunk.all_logits else count - 1, count) for chunk, count in zip(chunks, counts, strict=True)
        ]
        # Only what is asked for goes through the head: with a real vocabulary it costs as much as some layers.
        row_numbers = [row for row, places in enumerate(wanted) for _ in places]
        logits = self.model.logits(hidden[row_numbers, list(chain.from_iterable(wanted))])  # (N, V)
        return list(torch.split(logits.float(), [len(places) for places in wanted]))


def groups_of_similar_length(chunks: Sequence[Chunk]) -> Iterator[list[int]]:
    """Yield the chunks' indices in groups for one forward pass each, whose padding is less than its tokens.

    So single tokens, of texts that are being written, are never padded to the length of a prompt.
    """
    longest_first = sorted(range(len(chunks)), key=lambda index: -len(chunks[index].token_ids))
    group: list[int] = []
    for index in longest_first:
        if group and 2 * len(chunks[index].token_ids) <= len(chunks[group[0]].token_ids):
            yield group
            group = []
        group.append(index)
    if group:
        yield group
