"""What is asked of the engine, and what it tells."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from sheepop.generation.generate import FinishReason
from sheepop.generation.sampling import SamplingSettings
from sheepop.utils.errors import ConfigError


class Constraint(Protocol):
    """What the next token of one sample may be: a grammar, say."""

    def allowed(self, token_ids: Sequence[int]) -> Tensor | None:
        """Return which tokens may follow those that the sample has, (V,) booleans; None for all.

        Where none may, the sample ends.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Take note of the sample's next token."""
        ...


@dataclass(frozen=True)
class Request:
    """A prompt to continue. The engine knows tokens only; see `generate_naive` for what is described there.

    Attributes:
        prompt_ids, settings, max_new_tokens, seed, num_samples, end_of_text_id: as of `generate_naive`.
        stop_ids: tokens that end a sample as the end of text does, and are not part of it.
        stop_sequences: sequences of tokens that end a sample, of which they are part.
        logit_bias: added to the scores of some tokens before anything else; -100 as good as forbids a token.
        logprobs: None, or of how many of the likeliest tokens the log-probabilities are told, besides the drawn one's.
        prompt_logprobs: the same for the tokens of the prompt.
        constrain: makes the constraint of each sample.
    """

    prompt_ids: Sequence[int]
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    max_new_tokens: int = 16
    seed: int = 0
    num_samples: int = 1
    end_of_text_id: int | None = None
    stop_ids: Sequence[int] = ()
    stop_sequences: Sequence[Sequence[int]] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constrain: Callable[[], Constraint] | None = None

    def validate(self, vocab_size: int) -> None:
        """Check what `check_request` does not.

        Raises:
            ConfigError: names the option, its value and what is allowed.
        """
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= vocab_size:
                raise ConfigError(f"The option '{name}' is {value}, but must be from 0 to {vocab_size}, or None.")
        if not all(self.stop_sequences):
            raise ConfigError("One of the 'stop_sequences' is empty; leave it out, or give at least one token.")
        for token_id, bias in self.logit_bias.items():
            if not 0 <= token_id < vocab_size or not math.isfinite(bias):
                raise ConfigError(
                    f"The option 'logit_bias' has {bias} for the token {token_id}, but must have finite numbers for "
                    f"tokens from 0 to {vocab_size - 1}."
                )


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely the model found a token, before temperature, filters, bias and constraint.

    Attributes:
        logprob: natural logarithm of the token's probability.
        top: ids and log-probabilities of the likeliest tokens, the likeliest first.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class TokenEvent:
    """A new token of a sample, or its end.

    Attributes:
        request_id: as `Engine.add` returned it.
        sample: from 0.
        token_id: None where the sample ended without another token: it drew the end of text or another of the
            `stop_ids`, its constraint allowed nothing more, or no tokens were asked for.
        finish_reason: "stop" or "length" with a sample's last event, else None.
        logprobs: of the token, if they were asked for.
        prompt_logprobs: of the prompt's tokens with the first event of sample 0, if they were asked for; None for the
            first token, which nothing precedes, and for those before a context that the prompt overflows.
    """

    request_id: int
    sample: int
    token_id: int | None
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
