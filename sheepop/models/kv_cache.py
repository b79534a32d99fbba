"""Keys and values of the tokens that were seen, so that a new token costs one position instead of all.

The model is given a cache and never owns one.
"""

from typing import Protocol

import torch
from torch import Tensor

from sheepop.config import ModelConfig


class Cache(Protocol):
    """What attention needs of a cache."""

    length: int

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, C) of new tokens; return those of all tokens, (B, K, length + T, C)."""
        ...


class KVCache:
    """One buffer a layer, allocated once for `capacity` tokens; reads are views, so nothing is copied.

    `length` counts the tokens of whole forward passes: the model advances it after its last layer.
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
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
        self.capacity = capacity
        self.length = 0

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, C) of new tokens; return those of all tokens, (B, K, length + T, C)."""
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {end} are needed")
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0
