"""Guesses from a small model with the same vocabulary, which writes a few tokens ahead of the large one."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sheepop.config import ModelConfig
from sheepop.generation.generate import context_start
from sheepop.generation.runner import Chunk, ModelRunner
from sheepop.generation.sampling import distribution, race, sample_token
from sheepop.generation.speculation import Guess, Wanted
from sheepop.models.paged_cache import CachedSequence, PagedCache
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import ConfigError


@dataclass
class Draft:
    """What is kept for one text: the first token that the model sees, and those from there that are stored."""

    start: int
    sequence: CachedSequence = field(default_factory=CachedSequence)


class DraftModel:
    """A `Speculator` by a small model, with a cache of its own.

    What it has not seen of a text it reads at once, prompts included: it is small.

    Args:
        model: the small model.
        target: the settings of the model whose tokens are guessed.
        num_guesses: tokens ahead, at most.
        max_batch_size: texts at a time, as many as the engine's; beyond them there are no guesses.
        page_size: tokens of a page.

    Raises:
        ConfigError: the vocabularies differ, or the small model's context is too short.
    """

    def __init__(
        self,
        model: TransformerModel,
        target: ModelConfig,
        *,
        num_guesses: int = 4,
        max_batch_size: int = 16,
        page_size: int = 16,
    ) -> None:
        config = model.config
        if config.vocab_size != target.vocab_size:
            raise ConfigError(
                f"The draft model has {config.vocab_size} tokens, but the model whose tokens it shall guess has "
                f"{target.vocab_size}. Use a draft model that was trained with the same tokenizer."
            )
        if not 1 <= num_guesses <= config.max_seq_len // 2:
            raise ConfigError(
                f"The option 'num_guesses' is {num_guesses}, but must be from 1 to {config.max_seq_len // 2}, half of "
                "the draft model's context."
            )
        self.num_guesses = num_guesses
        self._max_seq_len, self._run = config.max_seq_len, ModelRunner(model)
        self._cache = PagedCache(
            config,
            max_batch_size * -(-config.max_seq_len // page_size),
            page_size,
            device=model.device,
            dtype=model.dtype,
        )
        self._drafts: dict[object, Draft] = {}

    def propose(self, texts: Sequence[Wanted]) -> list[Guess]:
        """Return a guess for each text: the likeliest tokens at temperature 0, else drawn as the model's own are."""
        chunks = {index: chunk for index, text in enumerate(texts) if (chunk := self._unread(text)) is not None}
        guessed: list[list[int]] = [[] for _ in texts]
        drawn_from: list[list[Tensor]] = [[] for _ in texts]
        while chunks:
            rows = self._run(list(chunks.values()), self._cache)
            for (index, chunk), [row] in zip(list(chunks.items()), rows, strict=True):
                text, sequence = texts[index], chunk.sequence
                token_id, probabilities = draw_guess(row, text)
                guessed[index].append(token_id)
                if probabilities is not None:
                    drawn_from[index].append(probabilities)
                if len(guessed[index]) == 1:
                    self._cache.advance(sequence, chunk.token_ids)
                    # Guesses may be wrong: their keys and values lie behind those of the text, and are never counted.
                    sequence = CachedSequence(sequence.pages, list(sequence.token_ids))
                else:
                    sequence.token_ids += chunk.token_ids
                chunks[index] = Chunk(sequence, [token_id])
            chunks = {index: chunk for index, chunk in chunks.items() if len(guessed[index]) < texts[index].count}
        return [
            Guess(token_ids, torch.stack(probabilities) if probabilities else None)
            for token_ids, probabilities in zip(guessed, drawn_from, strict=True)
        ]

    def forget(self, key: object = None) -> None:
        """Drop what is kept for a text, if anything is; None: for all texts, those included that have ended."""
        for each in [key] if key is not None else list(self._drafts):
            if each in self._drafts:
                self._cache.release(self._drafts.pop(each).sequence)
        if key is None:
            self._cache.forget()

    def _unread(self, text: Wanted) -> Chunk | None:
        """Return what a text has that is not stored yet, with pages for it and the guesses; None if there are none."""
        start = context_start(len(text.token_ids) + self.num_guesses - 1, self._max_seq_len)
        if text.key not in self._drafts or self._drafts[text.key].start != start:
            self.forget(text.key)
            self._drafts[text.key] = Draft(start)
        sequence = self._drafts[text.key].sequence
        if not sequence.length:
            self._cache.adopt(sequence, text.token_ids[start:])
        unread = text.token_ids[start + sequence.length :]
        return Chunk(sequence, unread) if self._cache.reserve(sequence, len(unread) + text.count - 1) else None


def draw_guess(logits: Tensor, text: Wanted) -> tuple[int, Tensor | None]:
    """Return a token that may follow, and what it was drawn from (V,): None where it is the likeliest one."""
    # What the penalty would do to the guess is done to the model's own distribution when the guess is checked.
    settings = replace(text.settings, repetition_penalty=1.0)
    nothing_said = torch.empty(0, dtype=torch.int64, device=logits.device)
    if settings.temperature == 0.0:
        return sample_token(logits, settings, text.generator), None
    probabilities = distribution(logits, settings, nothing_said)
    return int(race(probabilities.log()[None], [text.generator])), probabilities
