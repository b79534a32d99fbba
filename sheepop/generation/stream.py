"""One sample of a request on its way through the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sheepop.generation.generate import FinishReason
from sheepop.generation.request import Constraint, Request, TokenLogprobs
from sheepop.generation.sampling import sample_tokens
from sheepop.models.paged_cache import CachedSequence


@dataclass(eq=False)
class Stream:
    """One sample: its tokens so far, and where it stands.

    Attributes:
        token_ids: the prompt's, then those that were drawn.
        prompt_length: how many are the prompt's.
        said_from: where the text begins that the repetition penalty counts as said.
        start: the first token that the model sees (`context_start`).
        sequence: the tokens from there whose keys and values are stored.
        generator: what it draws its tokens from.
        draft_generator: what a draft model's guesses are drawn from.
        prompt_logprobs: of the prompt's first tokens, as far as they are known; None if nobody asked.
    """

    request_id: int
    sample: int
    request: Request
    token_ids: list[int]
    said_from: int
    start: int
    generator: torch.Generator
    draft_generator: torch.Generator
    constraint: Constraint | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    sequence: CachedSequence = field(default_factory=CachedSequence)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.token_ids)

    @property
    def pending(self) -> int:
        """How many tokens have to be computed before the next one can be drawn: one for a stream that is decoding."""
        return len(self.token_ids) - self.start - self.sequence.length

    @property
    def num_new_tokens(self) -> int:
        """How many tokens were drawn."""
        return len(self.token_ids) - self.prompt_length

    @property
    def window(self) -> list[int]:
        """The tokens that the model sees."""
        return self.token_ids[self.start :]

    @property
    def scores_prompt(self) -> bool:
        """Whether logits after the prompt's tokens are still wanted."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length

    def next_tokens(self, count: int) -> list[int]:
        """Return the next tokens to be computed, at most `count`."""
        begin = self.start + self.sequence.length
        return self.token_ids[begin : begin + count]

    def note_prompt_logprobs(self, logits: Tensor) -> None:
        """Take from the logits (T, V) after the next tokens what they say about the prompt's."""
        assert self.prompt_logprobs is not None
        assert self.request.prompt_logprobs is not None
        first = self.start + self.sequence.length + 1  # the token that the first logits foretell
        known, end = len(self.prompt_logprobs), min(first + len(logits), self.prompt_length)
        if known < end:  # else they were computed before, and again after the stream had given its pages back
            rows = logits[known - first : end - first]
            self.prompt_logprobs += token_logprobs(rows, self.token_ids[known:end], self.request.prompt_logprobs)

    def adjusted(self, logits: Tensor) -> Tensor | None:
        """Return logits (V,) with bias and constraint applied, or None where no token may follow."""
        bias = self.request.logit_bias
        if bias:
            ids = torch.tensor(list(bias), device=logits.device)
            added = torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
            logits = logits.index_add(0, ids, added)
        if self.constraint is None:
            return logits
        allowed = self.constraint.allowed(self.token_ids[self.prompt_length :])
        if allowed is None:
            return logits
        if not bool(allowed.any()):
            return None
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def said(self, device: torch.device) -> Tensor:
        """Return the tokens (T,) that the repetition penalty counts as said; none where there is no penalty."""
        has_penalty = self.request.settings.repetition_penalty != 1.0
        return torch.tensor(self.token_ids[self.said_from :] if has_penalty else [], dtype=torch.int64, device=device)

    def take(self, token_id: int) -> FinishReason | None:
        """Add a token that was drawn; return why the sample ends with it, or None."""
        self.token_ids.append(token_id)
        if self.constraint is not None:
            self.constraint.accept(token_id)
        said = self.token_ids[self.prompt_length :] if self.request.stop_sequences else []
        if any(said[-len(sequence) :] == list(sequence) for sequence in self.request.stop_sequences):
            return "stop"
        return "length" if self.num_new_tokens == self.request.max_new_tokens else None

    def ends_with(self, token_id: int) -> bool:
        """Say whether a token ends the sample without being part of it."""
        return token_id == self.request.end_of_text_id or token_id in self.request.stop_ids


def draw(streams: Sequence[Stream], logits: Sequence[Tensor]) -> list[int | None]:
    """Draw the next token of each stream from its logits (V,); None where its constraint allows none.

    Streams that draw in the same way do so together, which changes nothing for any of them.
    """
    drawn: list[int | None] = [None] * len(streams)
    together: dict[object, list[tuple[int, Tensor]]] = {}
    for index, (stream, row) in enumerate(zip(streams, logits, strict=True)):
        adjusted = stream.adjusted(row)
        if adjusted is not None:
            settings = stream.request.settings
            key = settings if settings.repetition_penalty == 1.0 else index  # what was said differs in length
            together.setdefault(key, []).append((index, adjusted))
    for group in together.values():
        members = [streams[index] for index, _ in group]
        rows = torch.stack([row for _, row in group])  # (B, V)
        said = torch.stack([member.said(rows.device) for member in members])  # (B, T)
        generators = [member.generator for member in members]
        tokens = sample_tokens(rows, members[0].request.settings, generators, said)
        for (index, _), token_id in zip(group, tokens.tolist(), strict=True):
            drawn[index] = token_id
    return drawn


def token_logprobs(logits: Tensor, token_ids: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Return the log-probability of one token for each row of logits (T, V), and those of the `count` likeliest."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, dtype=torch.int64, device=logits.device)[:, None])[:, 0]
    top = logprobs.topk(count, dim=-1)
    return [
        TokenLogprobs(logprob, list(zip(ids, values, strict=True)))
        for logprob, ids, values in zip(chosen.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    ]
