"""Multi-head attention written out to be read: the reference that the optimized one is tested against.

Vaswani et al. 2017; grouped key/value heads: Ainslie et al. 2023; sliding window: Beltagy et al. 2020; sinks beside it:
Xiao et al. 2023.
Shape letters: B batch, T query time, S key time, H query heads, K key/value heads, C head width.
"""

import math

import torch
from torch import Tensor

from sheepop.models.dropout import drop
from sheepop.models.positions import document_starts
from sheepop.models.taps import Tap, untapped


def visible(
    query_time: int,
    key_time: int,
    *,
    window: int = 0,
    sinks: int = 0,
    document_ids: Tensor | None = None,
    device: torch.device,
) -> Tensor:
    """Say which key each query may see, (T, S), or (B, 1, T, S) with documents. True means visible.

    The queries are the last `query_time` of `key_time` positions. A query sees itself and what came before it; with
    a `window` at most that many tokens, itself included, and the first `sinks` tokens of its text; with `document_ids`
    (B, S) its own document only, which is its text then (of one that began before the row, what is in the row).
    """
    query_positions = torch.arange(key_time - query_time, key_time, device=device)[:, None]  # (T, 1)
    key_positions = torch.arange(key_time, device=device)  # (S,)
    mask = key_positions <= query_positions
    if window:
        in_sight = key_positions > query_positions - window
        if sinks:
            places = key_positions if document_ids is None else key_positions - document_starts(document_ids)[:, None]
            in_sight = in_sight | (places < sinks)  # (T, S), or (B, T, S) with documents
        mask = mask & in_sight
    if document_ids is not None:
        same_document = document_ids[:, -query_time:, None] == document_ids[:, None, :]  # (B, T, S)
        mask = (mask & same_document)[:, None]
    return mask


def visible_places(queries: Tensor, keys: Tensor, *, window: int, sinks: int) -> Tensor:
    """Say which of `keys`, places in a text, those at `queries` see; the two are broadcast together (`visible`)."""
    seen = keys <= queries
    if not window:
        return seen
    in_sight = keys > queries - window
    return seen & (in_sight | (keys < sinks) if sinks else in_sight)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int = 0,
    sinks: int = 0,
    document_ids: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    tap: Tap = untapped,
) -> Tensor:
    """Return softmax(Q Kᵀ / √C, over the visible keys) V.

    Args:
        query: (B, H, T, C), the last T of S positions.
        key, value: (B, K, S, C), with H a multiple of K; head h reads key/value head h // (H/K).
        window: a query sees this many tokens back, itself included; 0 means all.
        sinks: beside a window it sees the first so many tokens of its text.
        document_ids: (B, S); tokens of different documents do not see each other.
        mask: (B, 1, T, S), True where a query sees a key, in place of order, window, sinks and documents.
        dropout: share of attention weights dropped, the rest scaled up.
        tap: sees scores and weights, (B, H, T, S), and the mask.

    Returns:
        (B, H, T, C).
    """
    heads_per_group = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(heads_per_group, dim=1)  # (B, H, S, C)
    value = value.repeat_interleave(heads_per_group, dim=1)
    scores = tap("attention.scores", query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]))  # (B, H, T, S)
    if mask is None:
        times = query.shape[2], key.shape[2]
        mask = visible(*times, window=window, sinks=sinks, document_ids=document_ids, device=query.device)
    weights = tap("attention.weights", scores.masked_fill(~tap("attention.mask", mask), -math.inf).softmax(dim=-1))
    return drop(weights, dropout) @ value  # (B, H, T, C)
