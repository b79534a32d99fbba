"""From logits to the next token: small pure functions that compose.

Every filter maps logits (..., V) to logits (..., V) in which a token that cannot be drawn has -inf. Ties go to the
lower id, so that a filter keeps exactly the number of tokens it promises and top_k = 1 is greedy decoding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sheepop.utils.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class SamplingSettings:
    """How the next token is drawn. The defaults draw from the model's own distribution.

    Attributes:
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: only this many most likely tokens; 0 is off.
        top_p: only the smallest set of tokens that holds this much probability; 1 is off.
        min_p: only tokens at least this likely, as a share of the most likely one; 0 is off.
        repetition_penalty: above 1, tokens that occurred before become less likely; 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def validate(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: names the option, its value and what is allowed.
        """
        finite_penalty = math.isfinite(self.repetition_penalty)
        checks = (
            ("temperature", 0 <= self.temperature < math.inf, "a number from 0 (always the most likely token) up"),
            ("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "a whole number from 0 (off) up"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 (off) and below 1"),
            ("repetition_penalty", finite_penalty and self.repetition_penalty > 0, "a number above 0 (1 is off)"),
        )
        for name, is_valid, allowed in checks:
            if not is_valid:
                raise ConfigError(f"The sampling option '{name}' is {getattr(self, name)}, but must be {allowed}.")


def apply_repetition_penalty(logits: Tensor, previous_ids: Tensor, penalty: float) -> Tensor:
    """Make the tokens of `previous_ids` (..., T) less likely, each once however often it occurred.

    Positive logits are divided by the penalty and negative ones multiplied, as in CTRL (Keskar et al. 2019, section
    4.1) with the sign of the logit taken into account.
    """
    if penalty == 1.0:
        return logits
    seen = logits.gather(-1, previous_ids)
    return logits.scatter(-1, previous_ids, torch.where(seen > 0, seen / penalty, seen * penalty))


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by a temperature above 0. The largest logit becomes 0 first, so that no temperature overflows."""
    if temperature == 1.0:
        return logits
    smallest = torch.finfo(logits.dtype).tiny  # what is below would be rounded to 0
    return (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, smallest)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k most likely tokens (Fan et al. 2018); 0, or as many as there are, keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    descending = logits.topk(k, dim=-1).values
    return _keep_largest(logits, descending, torch.full_like(logits[..., :1], k, dtype=torch.int64))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the nucleus (Holtzman et al. 2020): the fewest most likely tokens whose probabilities reach p together."""
    if p >= 1.0:
        return logits
    vocab_size = logits.shape[-1]
    total = logits.logsumexp(dim=-1, keepdim=True)
    candidates = min(256, vocab_size)
    while True:  # the nucleus is nearly always small, and sorting a whole vocabulary costs more than the rest together
        descending = logits.topk(candidates, dim=-1).values
        mass = (descending - total).exp().cumsum(dim=-1)
        if candidates == vocab_size or bool((mass[..., -1] >= p).all()):
            break
        candidates = min(8 * candidates, vocab_size)
    count = (mass < p).sum(dim=-1, keepdim=True) + 1  # (..., 1): those that do not reach p, and the one that does
    return _keep_largest(logits, descending, count.clamp_max(candidates))


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Keep the tokens whose probability is at least `min_p` times that of the most likely (Nguyen et al. 2024)."""
    if min_p == 0.0:
        return logits
    threshold = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
    return logits.masked_fill(logits < threshold, -math.inf)


def filter_logits(logits: Tensor, previous_ids: Tensor, settings: SamplingSettings) -> Tensor:
    """Apply repetition penalty, temperature, top_k, top_p and min_p, in this order.

    Each filter sees the distribution that the one before left, so top_p is a share of the top_k tokens' probability.

    Args:
        logits: (..., V).
        previous_ids: (..., T), what the repetition penalty counts as said.
        settings: with a temperature above 0.
    """
    logits = apply_repetition_penalty(logits, previous_ids, settings.repetition_penalty)
    logits = apply_temperature(logits, settings.temperature)
    logits = keep_top_k(logits, settings.top_k)
    logits = keep_top_p(logits, settings.top_p)
    return keep_min_p(logits, settings.min_p)


def sample_tokens(
    logits: Tensor, settings: SamplingSettings, generators: Sequence[torch.Generator], previous_ids: Tensor
) -> Tensor:
    """Draw one token for each row of logits (B, V), row b from `generators[b]`; returns (B,).

    A row's token does not depend on the other rows. Temperature 0 takes the most likely token and draws nothing.

    Raises:
        CheckpointError: the logits are not finite numbers.
    """
    logits = logits.float()
    if settings.temperature > 0.0:
        return race(filter_logits(logits, previous_ids, settings), generators)
    best = apply_repetition_penalty(logits, previous_ids, settings.repetition_penalty).max(dim=-1)
    _check_finite(best.values)
    return best.indices


def race(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draw from the softmax of each row of scores (B, V), -inf for what cannot be drawn; returns (B,).

    An exponential race: token i arrives after Exp(1) / p_i, and the first one wins with probability p_i. It is run in
    two heats, between blocks of neighbouring tokens and then within the block that wins, so that a row takes some
    2 sqrt(V) random numbers instead of V. One number and the inverse of the cumulative distribution would take fewer
    still, but that depends on the last bits of all scores, which another batch size or number of threads changes: each
    moves the boundaries of all tokens, whereas who wins a race is seldom a matter of so little (`docs/log.md`).

    Raises:
        CheckpointError: the scores are not finite numbers.
    """
    best = scores.amax(dim=-1)
    _check_finite(best)
    rows, vocab_size = scores.shape
    width = math.isqrt(vocab_size - 1) + 1
    num_blocks = -(-vocab_size // width)
    arrivals = scores.new_empty((rows, num_blocks + width))
    for row, generator in zip(arrivals, generators, strict=True):
        row.exponential_(generator=generator)  # never 0
    log_arrivals = arrivals.log_()
    blocks = torch.nn.functional.pad(scores, (0, num_blocks * width - vocab_size), value=-math.inf)
    blocks = blocks.view(rows, num_blocks, width)
    weights = (blocks - best[:, None, None]).exp_().sum(dim=-1)  # (B, blocks)
    winner = (weights.log_() - log_arrivals[:, :num_blocks]).argmax(dim=-1)  # (B,)
    within = blocks[torch.arange(rows, device=scores.device), winner]  # (B, width)
    return winner * width + (within - log_arrivals[:, num_blocks:]).argmax(dim=-1)


def sample_token(
    logits: Tensor, settings: SamplingSettings, generator: torch.Generator, previous_ids: Sequence[int] | Tensor = ()
) -> int:
    """Draw one token from logits (V,); see `sample_tokens`."""
    previous = torch.as_tensor(previous_ids, dtype=torch.int64, device=logits.device)
    return int(sample_tokens(logits[None], settings, [generator], previous[None]))


def distribution(logits: Tensor, settings: SamplingSettings, previous_ids: Tensor) -> Tensor:
    """Return the probabilities (..., V) that `sample_tokens` draws with, for a temperature above 0.

    Raises:
        CheckpointError: the logits are not finite numbers.
    """
    _check_finite(logits.amax(dim=-1))
    return filter_logits(logits.float(), previous_ids, settings).softmax(dim=-1)


def _check_finite(best: Tensor) -> None:
    """Check the best score of each row: a row that has what is not a number has it there."""
    if not math.isfinite(best.sum()):
        raise CheckpointError(
            "The model's scores for the next token are not finite numbers: its weights are damaged, or its training "
            "went astray. Use another checkpoint."
        )


def _keep_largest(logits: Tensor, descending: Tensor, count: Tensor) -> Tensor:
    """Keep the `count` (..., 1) largest logits of each row, ties by id; `descending` holds at least those, sorted."""
    threshold = descending.gather(-1, count - 1)  # (..., 1)
    above = logits > threshold
    tied = logits == threshold
    places_left = count - above.sum(dim=-1, keepdim=True)
    return logits.masked_fill(~(above | (tied & (tied.cumsum(dim=-1) <= places_left))), -math.inf)
