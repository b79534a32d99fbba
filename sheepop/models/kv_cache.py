"""Keys and values of the tokens that were seen, so that a new token costs one position instead of all.

The model is given a cache and never owns one. `KVCache` holds texts that grow together; `paged_cache.py` holds texts
that come and go, of any lengths.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sheepop.config import ModelConfig
from sheepop.models.copying import following
from sheepop.models.sizing import CONVOLUTIONS


class Cache(Protocol):
    """What a forward pass needs of a cache. `recent_tokens` are the last (B, `ngram_order` - 1) tokens, -1 for none."""

    recent_tokens: Tensor

    def positions(self, time: int) -> slice | Tensor:
        """Return where the next `time` tokens stand in their texts: one slice for all rows, or (B, T)."""
        ...

    def mask(self, time: int, window: int, sinks: int) -> Tensor | None:
        """Say which keys the next `time` tokens see, (B, 1, T, S), window and sinks as in `attention.py`.

        None where the tokens are the last of all S, in order, but for keys between the sinks and the windows, which may
        be missing where there is one token.
        """
        ...

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, C) of new tokens; return those of all tokens, (B, K, S, C)."""
        ...

    def remember(self, layer: int, site: int, hidden: Tensor, back: int) -> Tensor:
        """Store what a convolution reads at new tokens, (B, T, D); return it behind what it read at `back` before.

        The result is (B, back + T, D), zero where there are not as many tokens.
        """
        ...

    def advance(self, token_ids: Tensor) -> None:
        """Count the tokens (B, T) of a forward pass, whose keys and values every layer has stored."""
        ...

    def offer(self, key: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store what the tokens (B, T) of the last forward pass, which is counted, are found by when copied (B, T, W).

        Returns:
            As in `Copies`: keys (B, S, W) and what is offered (B, S) at all places from the text's first on, and the
            positions of the tokens, (B, T) or (1, T).
        """
        ...


class KVCache:
    """Buffers for each layer, allocated once for `capacity` tokens; reads are views, so nothing is copied.

    `length` counts the tokens of whole forward passes: the model advances it after its last layer. `recent_tokens` are
    the last (B, `ngram_order` - 1) of them, -1 where there are not as many.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (batch_size, config.num_kv_heads, capacity, config.head_dim)  # (B, K, T, C)
        # Zeros, because a compiled step multiplies also what its mask hides, by 0, and memory may hold no number.
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.inputs = [  # of short convolutions
            torch.zeros((batch_size, CONVOLUTIONS, capacity, config.d_model), device=device, dtype=dtype)
            for _ in range(config.num_layers if config.conv_width > 1 else 0)
        ]
        width = config.copy_width  # of what the copy head finds tokens by
        self.copy_keys = torch.zeros((batch_size, capacity if width else 0, width), device=device, dtype=dtype)
        self.token_ids = torch.zeros((batch_size, capacity if width else 0), device=device, dtype=torch.int64)
        self.recent_tokens = torch.full((batch_size, config.ngram_order - 1), -1, device=device)
        self.capacity = capacity
        self.length = 0

    def positions(self, time: int) -> slice:
        """Return where the next `time` tokens stand, the same for all rows."""
        return slice(self.length, self.length + time)

    def mask(self, time: int, window: int, sinks: int) -> None:
        """Leave it to attention: the new tokens are the last ones, in order."""

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, C) of new tokens; return those of all tokens, (B, K, length + T, C)."""
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} are needed")
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def remember(self, layer: int, site: int, hidden: Tensor, back: int) -> Tensor:
        """Store what a convolution reads at new tokens, (B, T, D); return it behind what it read at `back` before."""
        stored, end = self.inputs[layer][:, site], self.length + hidden.shape[1]
        stored[:, self.length : end] = hidden
        return F.pad(stored[:, max(0, self.length - back) : end], (0, 0, max(0, back - self.length), 0))

    def advance(self, token_ids: Tensor) -> None:
        """Count the tokens (B, T) of a forward pass, whose keys and values every layer has stored."""
        self.length += token_ids.shape[1]
        kept = self.recent_tokens.shape[1]
        if kept:
            self.recent_tokens = torch.cat((self.recent_tokens, token_ids), dim=1)[:, -kept:]

    def offer(self, key: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store what the tokens (B, T) of the last forward pass are found by when copied, (B, T, W); see `Cache`."""
        begin, end = self.length - token_ids.shape[1], self.length
        self.copy_keys[:, begin:end] = key
        self.token_ids[:, begin:end] = token_ids
        positions = torch.arange(begin, end, device=key.device).unsqueeze(0)
        return self.copy_keys[:, :end], following(self.token_ids[:, :end]), positions

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0
        self.recent_tokens = torch.full_like(self.recent_tokens, -1)
