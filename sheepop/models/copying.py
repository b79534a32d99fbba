"""Copying: beside writing any entry of the vocabulary, the head may repeat a token of the text so far.

A small model has no room to learn the names and words of one text, and its attention needs long to learn to repeat
what it sees. Here each earlier place offers the token that followed it, the more the likelier its context is to the one
at hand: both are projections of what the head reads, by which Grave et al. 2016 find places again. Places and entries
compete in one softmax, and an entry has what all the places that offer it have, beside its own share (CopyNet: Gu et
al. 2016, section 3.3). It takes a product of each token with those before it, as one head of attention does.
Shape letters: B batch, T time, S places of the text, D width, W width of the projections, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sheepop.config import ModelConfig
from sheepop.models.kernel_copying import KernelCopySums, learns_by_kernels
from sheepop.models.linear import Linear

QUERIES_AT_ONCE = 128  # of each text: their scores stay in a cache
# Of sums below the smallest number, which is that of e^-87 of the highest, a logarithm would be of few bits.
LOWEST, SMALLEST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).tiny
NO_TOKEN = -1  # what a place offers whose next token is not known


class Copies(NamedTuple):
    """What some tokens may copy.

    Attributes:
        queries: (B, T, W), of the tokens.
        keys: (B, S, W), of all places of their texts.
        offered: (B, S), the token that followed each place.
        positions: (B, T), where the tokens stand: each sees the places before its own.
        document_ids: (B, S), tokens with different numbers do not see each other; None: all do.
    """

    queries: Tensor
    keys: Tensor
    offered: Tensor
    positions: Tensor
    document_ids: Tensor | None = None

    def at(self, row: int, places: slice) -> "Copies":
        """Return those of some tokens of one text, as a batch of one."""
        one = slice(row, row + 1)
        documents = None if self.document_ids is None else self.document_ids[one]
        positions = self.positions[one if len(self.positions) > 1 else slice(1), places]
        return Copies(self.queries[one, places], self.keys[one], self.offered[one], positions, documents)

    def last(self) -> "Copies":
        """Return those of the last token of each text."""
        return self._replace(queries=self.queries[:, -1:], positions=self.positions[:, -1:])

    def add_to(self, logits: Tensor) -> Tensor:
        """Return logits (B, T, V) with what is copied: ln of the sum of both exponentials, in fp32 at least."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        scores = (self.queries @ self.keys.transpose(1, 2)).to(wide)  # (B, T, S)
        is_seen = visible(self.keys.shape[1], self.positions, self.document_ids)
        scores = scores.masked_fill(~is_seen, -torch.inf)
        highest = scores.amax(-1, keepdim=True).clamp(min=LOWEST)  # (B, T, 1); the first token sees no place
        offered = self.offered.clamp(min=0).unsqueeze(1).expand_as(scores)
        copied = torch.zeros_like(logits, dtype=wide).scatter_add_(2, offered, (scores - highest).exp())
        both = torch.logaddexp(logits.to(wide), copied.clamp(min=SMALLEST).log() + highest)
        return torch.where(copied < SMALLEST, logits.to(wide), both)  # what is no number stays none


def visible(num_places: int, positions: Tensor, document_ids: Tensor | None) -> Tensor:
    """Say which of S places tokens see that stand at `positions` (B, T) or (1, T): (B, T, S) or (1, T, S)."""
    is_before = torch.arange(num_places, device=positions.device) < positions.unsqueeze(-1)
    if document_ids is None:
        return is_before
    own = document_ids.gather(1, positions.expand(len(document_ids), -1))  # (B, T)
    return is_before & (document_ids.unsqueeze(1) == own.unsqueeze(2))


class CopyHead(nn.Module):
    """The projections of what the head reads into queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.query = Linear(config.d_model, config.copy_width, bias=False)
        self.key = Linear(config.d_model, config.copy_width, bias=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, T, D) to queries and keys (B, T, W)."""
        return self.query(hidden), self.key(hidden)


def copy_sums(
    query: Tensor,
    key: Tensor,
    token_ids: Tensor,
    targets: Tensor,
    document_ids: Tensor | None = None,
    *,
    by_kernels: bool = False,
) -> Tensor:
    """Return ln of the summed exponentials of each token's scores, of all places and of those that offer its target.

    Args:
        query, key: (B, T, W).
        token_ids: (B, T).
        targets: (B, T), what is to be copied.
        document_ids: (B, T), or None.
        by_kernels: learn by compiled kernels where there are such (`kernel_copying.py`).

    Returns:
        (2, B, T) fp32, minus infinity where there is no place.
    """
    with torch.autocast(query.device.type, enabled=False):
        if by_kernels and learns_by_kernels(query) and torch.is_grad_enabled():
            offered = following(token_ids)
            return KernelCopySums.apply(query, key, offered, targets, document_ids)  # type: ignore[no-untyped-call, no-any-return]
        return CopySums.apply(query, key, token_ids, targets, document_ids)  # type: ignore[no-untyped-call, no-any-return]


class CopySums(torch.autograd.Function):
    """`copy_sums`; scores of a block of queries are made twice and never kept."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, token_ids: Tensor, targets: Tensor, document_ids: Tensor | None
    ) -> Tensor:
        """Map (B, T, W) twice and (B, T) ids to (2, B, T)."""
        ctx.save_for_backward(query, key, token_ids, targets, document_ids)
        sums = [
            torch.where(block.totals < SMALLEST, -torch.inf, block.totals.log() + block.highest)
            for block in blocks(query, key, token_ids, targets, document_ids)
        ]
        return torch.cat(sums, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query and key for that of the sums, (2, B, T)."""
        query, key, *rest = ctx.saved_tensors
        query_gradient, key_gradient = torch.empty_like(query), torch.zeros_like(key, dtype=torch.float32)
        for block in blocks(query, key, *rest):
            here = block.here
            shares = torch.where(block.totals < SMALLEST, 0.0, gradient[:, :, here] / block.totals).unsqueeze(-1)
            factors = torch.where(block.is_right, shares[0] + shares[1], shares[0])  # (B, n, S)
            errors = block.powers.mul_(factors).to(query.dtype)  # of the scores
            seen = slice(0, errors.shape[2])
            query_gradient[:, here] = errors @ key[:, seen]
            key_gradient[:, seen] += errors.transpose(1, 2) @ query[:, here]
        return query_gradient, key_gradient.to(key.dtype), None, None, None


def following(token_ids: Tensor) -> Tensor:
    """Return the token after each of (B, T)."""
    return torch.cat((token_ids[:, 1:], torch.full_like(token_ids[:, :1], NO_TOKEN)), 1)


class Block(NamedTuple):
    """The scores of n queries of each text for the S places before the last of them.

    Attributes:
        here: which queries.
        powers: (B, n, S) fp32, exponentials of the scores, each row's over that of its highest; zero where not seen.
        is_right: (B, n, S), whether what a place offers is the target.
        totals: (2, B, n), the sums of all powers and of those that are right.
        highest: (B, n), the highest scores.
    """

    here: slice
    powers: Tensor
    is_right: Tensor
    totals: Tensor
    highest: Tensor


def blocks(
    query: Tensor, key: Tensor, token_ids: Tensor, targets: Tensor, document_ids: Tensor | None
) -> Iterator[Block]:
    """Yield the blocks of queries, in order; the arguments are those of `copy_sums`."""
    offered, targets = following(token_ids).int(), targets.int()  # comparing them takes half the time
    positions = torch.arange(query.shape[1], device=query.device).unsqueeze(0)  # (1, T)
    for start in range(0, query.shape[1], QUERIES_AT_ONCE):
        here = slice(start, start + QUERIES_AT_ONCE)
        seen = slice(0, min(here.stop, query.shape[1]))
        scores = (query[:, here] @ key[:, seen].transpose(1, 2)).float()  # (B, n, S)
        if document_ids is None:  # all places before the block are seen
            itself_on = torch.ones(scores.shape[1], scores.shape[1], dtype=torch.bool, device=scores.device).triu()
            scores[..., start:].masked_fill_(itself_on, -torch.inf)
        else:
            scores.masked_fill_(~visible(seen.stop, positions[:, here], document_ids[:, seen]), -torch.inf)
        highest = scores.amax(-1, keepdim=True).clamp_(min=LOWEST)
        powers = scores.sub_(highest).exp_()
        is_right = offered[:, None, seen] == targets[:, here, None]
        totals = torch.stack((powers.sum(-1), (powers * is_right).sum(-1)))
        yield Block(here, powers, is_right, totals, highest.squeeze(-1))
