"""A few sequences of a `PagedCache` as the rows of one forward pass, each with its own length."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sheepop.models.attention import visible_places
from sheepop.models.copying import following
from sheepop.models.paged_cache import CachedSequence, PagedCache
from sheepop.models.sizing import CONVOLUTIONS


class PagedRows:
    """The `Cache` of a forward pass over the next `counts[b]` tokens of each sequence b, padded to the most.

    The padding stands behind a row's tokens: nothing of it is stored, and no token of the row sees it. The pages have
    to be reserved before. The sequences stay as they are: who asked for the pass knows which of the tokens to keep.
    """

    def __init__(self, cache: PagedCache, sequences: Sequence[CachedSequence], counts: Sequence[int]) -> None:
        self._cache = cache
        B, T, K, device = len(sequences), max(counts), cache.num_heads, cache.device
        starts = [sequence.length for sequence in sequences]
        # Rows that begin and end at the same places need neither a mask nor positions of their own.
        self._is_even = len(set(zip(starts, counts, strict=True))) == 1
        self._end = max(start + count for start, count in zip(starts, counts, strict=True))
        self._first = starts[0]
        self.recent_tokens = _last_tokens(cache, sequences)

        begins, lengths = torch.tensor([starts, counts], device=device)[..., None]  # (B, 1) each
        steps = torch.arange(T, device=device)  # (T,)
        self._positions = begins + steps.minimum(lengths - 1)  # (B, T); the padding repeats a row's last place
        # Of all pages those from the first in any row's window to the last that any row fills, behind those of sinks.
        first, last = min(map(cache.first_in_window, starts)) // cache.page_size, cache.pages_for(self._end)
        sunk = min(cache.sink_pages, first)
        self._begin, self._sunk = first * cache.page_size, sunk * cache.page_size
        table = [
            [*sequence.pages[:sunk], *sequence.pages[first:last], *[0] * (last - len(sequence.pages))]
            for sequence in sequences
        ]
        pages = self._pages = torch.tensor(table, device=device)  # (B, P)
        self._pages_ahead = sunk - first  # where a page stands in the table, less its number, but for the sinks'
        heads = torch.arange(K, device=device)[:, None]  # (K, 1)
        self._blocks = (pages[:, None] * K + heads).flatten()  # (B·K·P,)
        own = pages.gather(1, self._positions // cache.page_size + self._pages_ahead)[:, None] * K + heads  # (B, K, T)
        places = (own * cache.page_size + (self._positions % cache.page_size)[:, None]).flatten()  # (B·K·T,)
        self._is_real = steps < lengths  # (B, T), not padding
        self._real: Tensor | None = None  # which of (B·K·T,) are not padding; None for all
        if len(set(counts)) > 1:
            self._real = self._is_real[:, None].expand(B, K, T).flatten().nonzero()[:, 0]
            places = places[self._real]
        self._places = places

    def positions(self, time: int) -> slice | Tensor:
        """Return where the tokens stand in their texts: one slice for all rows, or (B, T)."""
        return slice(self._first, self._first + time) if self._is_even else self._positions

    def mask(self, time: int, window: int, sinks: int) -> Tensor | None:
        """Say which keys the tokens see, (B, 1, T, S); None for even rows of one token or of whole texts.

        For those attention has faster ways; for others the mask is made here, once for all layers.
        """
        if self._is_even and (time == 1 or self._first == 0):
            return None
        queries = self._positions[:, None, :, None]  # (B, 1, T, 1)
        keys = torch.arange(self._begin - self._sunk, self._end, device=self._cache.device)  # (S,)
        if sinks:
            keys[: self._sunk] -= self._begin - self._sunk  # where the sinks' pages stand
        return visible_places(queries, keys, window=window, sinks=sinks)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, C) of the tokens; return those of all tokens in sight, (B, K, S, C)."""
        B, K, _, C = key.shape
        new = [part.reshape(-1, C) for part in (key, value)]  # (B·K·T, C)
        if self._real is not None:
            new = [part[self._real] for part in new]
        self._cache.store(layer, self._places, *new)
        keys, values = self._cache.load(layer, self._blocks)  # (B·K·P, page_size, C)
        S = self._sunk + self._end - self._begin
        return keys.view(B, K, -1, C)[:, :, :S], values.view(B, K, -1, C)[:, :, :S]

    def remember(self, layer: int, site: int, hidden: Tensor, back: int) -> Tensor:
        """Store what a convolution reads at new tokens, (B, T, D); return it behind what it read at `back` before."""
        stored = self._cache.inputs[layer].view(-1, hidden.shape[-1])  # (pages·sites·page_size, D)
        places = self._input_places(self._positions, site)  # (B, T)
        if self._real is None:
            stored[places] = hidden
        else:
            stored[places[self._is_real]] = hidden[self._is_real]
        earlier = self._positions[:, :1] - torch.arange(back, 0, -1, device=hidden.device)  # (B, back)
        before = stored[self._input_places(earlier.clamp(min=0), site)] * (earlier >= 0).unsqueeze(-1)  # (B, back, D)
        return torch.cat((before, hidden), dim=1)

    def _input_places(self, positions: Tensor, site: int) -> Tensor:
        """Return where in a layer's `inputs`, flattened to rows, a site's of these positions (B, N) lie."""
        size = self._cache.page_size
        pages = self._pages.gather(1, positions // size + self._pages_ahead)  # (B, N)
        return (pages * CONVOLUTIONS + site) * size + positions % size

    def advance(self, token_ids: Tensor) -> None:
        """Leave the count to who asked for the forward pass."""

    def offer(self, key: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store what the tokens (B, T) of the forward pass are found by when copied, (B, T, W); see `Cache`."""
        cache, size = self._cache, self._cache.page_size
        places = self._pages.gather(1, self._positions // size) * size + self._positions % size  # (B, T)
        cache.copy_keys.view(-1, key.shape[-1])[places[self._is_real]] = key[self._is_real]
        cache.token_ids.view(-1)[places[self._is_real]] = token_ids[self._is_real]
        keys, tokens = cache.copy_keys[self._pages].flatten(1, 2), cache.token_ids[self._pages].flatten(1, 2)
        return keys[:, : self._end], following(tokens[:, : self._end]), self._positions


def _last_tokens(cache: PagedCache, sequences: Sequence[CachedSequence]) -> Tensor:
    """Return the last (B, `ngram_order` - 1) tokens of each sequence, -1 where there are not as many."""
    count = cache.num_recent
    known = [sequence.token_ids[max(0, sequence.length - count) :] for sequence in sequences]
    rows = [[-1] * (count - len(token_ids)) + token_ids for token_ids in known]
    return torch.tensor(rows, dtype=torch.int64, device=cache.device).view(len(sequences), count)
