"""A paged cache in a third of the memory: keys and values in 8 bits, with a scale for each head of each token.

Rounding to 255 steps of the largest number of a head (absmax quantization: Dettmers et al. 2022, section 2.1) changes
the logits a little; how little is measured by `benchmarks/serving.py` and written in `docs/log.md`.
"""

import torch
from torch import Tensor

from sheepop.config import ModelConfig
from sheepop.models.paged_cache import PagedCache
from sheepop.models.sizing import kv_cache_bytes
from sheepop.utils.memory import zeros_on_demand

STEPS = 127  # on either side of zero


class Int8PagedCache(PagedCache):
    """`keys` and `values` are int8; `key_scales` and `value_scales`, (num_pages, K, page_size), say what a step is."""

    def allocate(self, shape: tuple[int, int, int, int]) -> None:
        """Make the tensors of all layers, (num_pages, K, page_size, C), and their scales."""
        self.keys, self.values = (
            [zeros_on_demand(shape, device=self.device, dtype=torch.int8) for _ in range(self.num_layers)]
            for _ in range(2)
        )
        self.key_scales, self.value_scales = (
            [zeros_on_demand(shape[:3], device=self.device, dtype=self.dtype) for _ in range(self.num_layers)]
            for _ in range(2)
        )

    @classmethod
    def page_bytes(cls, config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
        """Return the bytes of one page in all layers, with its scales; of keys and values alone it has 8 bits."""
        of_page, size = {"batch_size": 1, "length": page_size}, dtype.itemsize
        without = config.model_copy(update={"conv_width": 1, "copy_width": 0})
        numbers = kv_cache_bytes(without, **of_page, bytes_per_number=1)
        others = kv_cache_bytes(config, **of_page, bytes_per_number=size) - size * numbers
        return numbers + numbers // config.head_dim * size + others

    def store(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values (N, C) of single heads at `places` (N,), rounded."""
        for pages, scales, new in (
            (self.keys[layer], self.key_scales[layer], key),
            (self.values[layer], self.value_scales[layer], value),
        ):
            steps, step = rounded(new)
            pages.view(-1, pages.shape[-1]).index_copy_(0, places, steps)
            scales.view(-1).index_copy_(0, places, step)

    def load(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values (N, page_size, C) of single heads of pages, as they were rounded."""
        keys, values = (
            pages[layer].flatten(0, 1).index_select(0, blocks)
            * scales[layer].flatten(0, 1).index_select(0, blocks).unsqueeze(-1)
            for pages, scales in ((self.keys, self.key_scales), (self.values, self.value_scales))
        )
        return keys, values


def rounded(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors (N, C) as whole steps, int8, and the step of each (N,), which is above 0."""
    step = (vectors.abs().amax(dim=-1) / STEPS).clamp_min(torch.finfo(vectors.dtype).tiny)  # (N,)
    return (vectors / step.unsqueeze(-1)).round().to(torch.int8), step
