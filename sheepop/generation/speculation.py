"""Several tokens from one forward pass: cheap guesses, checked by the model, that change nothing about what it writes.

Speculative decoding: Leviathan et al. 2023; Chen et al. 2023. Guesses by looking up what followed the same words
before: Saxena 2023 (prompt lookup decoding).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sheepop.generation.sampling import SamplingSettings, distribution, race, sample_token


@dataclass(frozen=True)
class Guess:
    """Tokens that may follow.

    Attributes:
        token_ids: k of them, perhaps none.
        probabilities: (k, V), what each was drawn from; None where nothing was drawn.
    """

    token_ids: list[int]
    probabilities: Tensor | None = None


@dataclass(frozen=True)
class Wanted:
    """A text that guesses are wanted for.

    Attributes:
        key: names the text from one time to the next, until `Speculator.forget`.
        token_ids: all of it.
        count: the most guesses that can be used.
        settings: how the model's own tokens are drawn.
        generator: to draw guesses from.
    """

    key: object
    token_ids: list[int]
    count: int
    settings: SamplingSettings
    generator: torch.Generator


class Speculator(Protocol):
    """Makes guesses. They may depend on nothing but the text: then neither do the tokens depend on the batch."""

    num_guesses: int

    def propose(self, texts: Sequence[Wanted]) -> list[Guess]:
        """Return a guess for each text."""
        ...

    def forget(self, key: object = None) -> None:
        """Drop what is kept for a text, if anything is; None: for all texts, those included that have ended."""
        ...


class LookUp:
    """Guesses that a text goes on as it did after the same tokens before: free, and good where text repeats itself."""

    def __init__(self, num_guesses: int = 5, longest: int = 3) -> None:
        self.num_guesses, self._longest = num_guesses, longest

    def propose(self, texts: Sequence[Wanted]) -> list[Guess]:
        """Return a guess for each text."""
        return [Guess(look_up(text.token_ids, text.count, self._longest)) for text in texts]

    def forget(self, key: object = None) -> None:
        """Keep nothing anyway."""


def look_up(token_ids: Sequence[int], count: int, longest: int = 3) -> list[int]:
    """Return at most `count` tokens that followed the last time that the text's last tokens occurred before.

    Of the text's last `longest`, ..., 2, 1 tokens the most that occurred before decide.
    """
    ids = torch.tensor(token_ids)
    for length in range(min(longest, len(ids) - 1), 0, -1):
        groups = ids[:-1].unfold(0, length, 1)  # (N, length), those with a token behind them
        places = (groups == ids[-length:]).all(dim=1).nonzero()[:, 0]
        if len(places):
            after = int(places[-1]) + length
            return list(token_ids[after : after + count])
    return []


def accept_or_replace(
    guess: int,
    guessed_from: Tensor,
    scores: Tensor,
    settings: SamplingSettings,
    generator: torch.Generator,
    said: Tensor,
) -> int:
    """Return the guess or another token, so that what is returned is distributed as if drawn from the model.

    With p the model's distribution and q the one that the guess was drawn from, the guess is kept with the probability
    min(1, p/q); else a token is drawn from what p has more than q, max(0, p - q), normalised (Leviathan et al. 2023,
    theorem 1 in appendix A.1).

    Args:
        guess: the guessed token.
        guessed_from: q, (V,).
        scores: the model's logits at that place, (V,).
        settings: with a temperature above 0.
        said: (T,), what the repetition penalty counts.

    Raises:
        CheckpointError: the logits are not finite numbers.
    """
    wanted = distribution(scores, settings, said)  # p, (V,)
    chance = torch.rand((), generator=generator, device=scores.device)
    if chance * guessed_from[guess] < wanted[guess]:
        return guess
    rest = (wanted - guessed_from).clamp_min(0)
    # Equal distributions reject by rounding alone, and then nothing is left over.
    return int(race((rest if bool(rest.sum() > 0) else wanted).log()[None], [generator]))


def draw_or_accept(
    guess: Guess, place: int, scores: Tensor, settings: SamplingSettings, generator: torch.Generator, said: Tensor
) -> int:
    """Return the token at one place of a guess, or behind its end, from the model's logits (V,) there.

    A guess that was not drawn is compared with what the model draws: it is kept with the probability p, as above with
    q = 1, and the tokens are even those that are drawn without guesses.
    """
    if guess.probabilities is None or place == len(guess.token_ids):
        return sample_token(scores, settings, generator, said)
    return accept_or_replace(guess.token_ids[place], guess.probabilities[place], scores, settings, generator, said)
