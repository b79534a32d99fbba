"""Between the engine, which decides what is computed, and what computes it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from sheepop.generation.engine import decoder_for, one_core_for_little
from sheepop.models.paged_cache import CachedSequence, PagedCache
from sheepop.models.paged_rows import PagedRows
from sheepop.models.sizing import count_parameters
from sheepop.models.transformer import TransformerModel, inference

if TYPE_CHECKING:
    from sheepop.generation.fast_decoding import FastDecoder


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
        self._num_parameters = count_parameters(model.config).total  # of quantized layers, too

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
        token_ids = torch.tensor(padded, device=cache.device)
        hidden = self.model.hidden_states(token_ids, cache=rows)  # (B, T, D)
        copies = self.model.copies(hidden, token_ids, cache=rows)
        wanted = [
            range(0 if chunk.all_logits else count - 1, count) for chunk, count in zip(chunks, counts, strict=True)
        ]
        # Only what is asked for goes through the head: with a real vocabulary it costs as much as some layers.
        row_numbers = [row for row, places in enumerate(wanted) for _ in places]
        logits = self.model.logits(hidden[row_numbers, list(chain.from_iterable(wanted))])  # (N, V)
        parts = list(torch.split(logits.float(), [len(places) for places in wanted]))
        if copies is None:
            return parts
        own = [copies.at(row, slice(places.start, places.stop)) for row, places in enumerate(wanted)]
        return [of_chunk.add_to(part.unsqueeze(0))[0] for of_chunk, part in zip(own, parts, strict=True)]


class NaiveRunner:
    """Computes the whole text of each chunk again, without stored keys and values: the reference of the others."""

    def __init__(self, model: TransformerModel) -> None:
        self.model = model

    def __call__(self, chunks: Sequence[Chunk], cache: PagedCache) -> list[Tensor]:
        """Do what `Runner` says, but for the pages, which stay as they are."""
        logits = []
        with inference(self.model):
            for chunk in chunks:
                text = torch.tensor([chunk.sequence.token_ids + chunk.token_ids], device=cache.device)  # (1, T)
                wanted = len(chunk.token_ids) if chunk.all_logits else 1
                logits.append(self.model(text)[0, -wanted:].float())
        return logits


# Up to about so many tokens of a step the kernels are faster than PyTorch's operators. Beyond that the weights are used
# so often that these no longer matter, and PyTorch's attention is the better one (`docs/log.md`).
FEW_TOKENS = 32
# The weights of quantized layers are multiplied by the kernels in any case; up to a text of about this length the
# kernels' attention takes no more than PyTorch's, and the rest of a layer less (`docs/log.md`).
SHORT_TEXT = 512


class KernelRunner:
    """Computes few tokens, and short texts of quantized models, by the kernels for decoding, and others by the model.

    To the kernels each token is a row.
    """

    def __init__(self, model: TransformerModel, decoder: "FastDecoder") -> None:
        self.model, self._decoder, self._others = model, decoder, ModelRunner(decoder.reader)

    def __call__(self, chunks: Sequence[Chunk], cache: PagedCache) -> list[Tensor]:
        """Do what `Runner` says."""
        few = [index for index, chunk in enumerate(chunks) if len(chunk.token_ids) <= FEW_TOKENS]
        while sum(len(chunks[index].token_ids) for index in few) > max(FEW_TOKENS, len(few)):
            few.remove(max(few, key=lambda index: len(chunks[index].token_ids)))
        if self.model.config.quantization != "none":
            ends = [chunk.sequence.length + len(chunk.token_ids) for chunk in chunks]
            few = [index for index, end in enumerate(ends) if index in few or end <= SHORT_TEXT]
        if type(cache) is not PagedCache:  # the kernels know no keys of 8 bits
            few = []
        others = [index for index in range(len(chunks)) if index not in few]
        logits = dict(zip(few, self._decode([chunks[index] for index in few], cache), strict=True)) if few else {}
        if others:
            logits.update(zip(others, self._others([chunks[index] for index in others], cache), strict=True))
        return [logits[index] for index in range(len(chunks))]

    def _decode(self, chunks: Sequence[Chunk], cache: PagedCache) -> list[Tensor]:
        """Return the logits of chunks whose tokens are few."""
        most = max(len(chunk.sequence.pages) for chunk in chunks)
        token_ids, positions, pages, before, wanted = [], [], [], [], list[int]()
        for chunk in chunks:
            start = chunk.sequence.length
            text = [-1] * cache.num_recent + chunk.sequence.token_ids[max(0, start - cache.num_recent) :]
            text += chunk.token_ids
            for place, token_id in enumerate(chunk.token_ids):
                end = len(text) - len(chunk.token_ids) + place
                before.append(text[end - cache.num_recent : end])
                token_ids.append([token_id])
                positions.append(start + place)
                pages.append(chunk.sequence.pages + [0] * (most - len(chunk.sequence.pages)))
            wanted += range(len(positions) - (len(chunk.token_ids) if chunk.all_logits else 1), len(positions))
        with inference(self.model):
            places = torch.tensor(positions)[:, None]
            tokens = torch.tensor(token_ids)
            hidden = self.model.embed(tokens, places, before=torch.tensor(before, dtype=torch.int64))
            rows = self._decoder.step(hidden[:, 0], tokens[:, 0], np.array(positions), np.array(pages), cache, wanted)
        return list(torch.split(rows, [len(chunk.token_ids) if chunk.all_logits else 1 for chunk in chunks]))


def runner_for(model: TransformerModel) -> Runner:
    """Return what computes a model's chunks the fastest (`decoder_for`)."""
    decoder = decoder_for(model)
    return ModelRunner(model) if decoder is None else KernelRunner(model, decoder)


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
