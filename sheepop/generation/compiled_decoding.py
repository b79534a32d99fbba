"""The whole step of one token as one compiled graph, over a cache whose shapes never change.

PyTorch's compiler fuses what stands between the products and leaves the calls out; on a GPU the graph is recorded and
played back (CUDA graphs), so that no kernel waits for Python. Which place of the cache is next is a tensor, not a
number, or each token would be another graph.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from sheepop.models.attention import visible_places
from sheepop.models.copying import following
from sheepop.models.kv_cache import KVCache
from sheepop.models.transformer import TransformerModel
from sheepop.utils.compiled_code import keep_compiled_code, missing_compiler
from sheepop.utils.errors import ConfigError
from sheepop.utils.logging import log


class CompiledDecoder:
    """A model whose steps of one token are compiled, at the first of them for each number of rows and capacity.

    Raises:
        ConfigError: there is no compiler.
    """

    def __init__(self, model: TransformerModel) -> None:
        if missing := missing_compiler(model.device):
            raise ConfigError(f"--compile was asked for, but {missing}. Install it, or leave out --compile.")
        keep_compiled_code()
        self.model = model
        self._cache: KVCache | None = None
        self._shapes: set[tuple[int, int]] = set()
        mode = "reduce-overhead" if model.device.type == "cuda" else "default"  # the former records CUDA graphs
        self._step = torch.compile(self._forward, dynamic=False, fullgraph=True, mode=mode)

    def __call__(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """Return what `model(token_ids, cache=cache, last_only=True)` returns: (B, T) to (B, 1, V)."""
        rows, num_tokens = token_ids.shape
        if num_tokens > 1:
            return self.model(token_ids, cache=cache, last_only=True)  # type: ignore[no-any-return]
        if cache is not self._cache:
            self._cache = cache
            for tensor in (*cache.keys, *cache.values, *cache.inputs, cache.copy_keys, cache.token_ids):
                torch._dynamo.mark_static_address(tensor)  # written to in place, which recorded graphs must know
        began = time.perf_counter()
        stored = (cache.keys, cache.values, cache.inputs, cache.recent_tokens, cache.copy_keys, cache.token_ids)
        logits = self._step(token_ids, torch.full((1,), cache.length, device=token_ids.device), *stored)
        shape = (rows, cache.capacity)
        if shape not in self._shapes:
            self._shapes.add(shape)
            log(f"compiled the step of a token in {time.perf_counter() - began:.0f} s; it is kept for the next time")
        cache.advance(token_ids)
        return logits.clone()  # a recorded graph writes the next ones to the same place

    def _forward(
        self,
        token_ids: Tensor,
        place: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        inputs: Sequence[Tensor],
        recent_tokens: Tensor,
        copy_keys: Tensor,
        seen_ids: Tensor,
    ) -> Tensor:
        cache = StaticRows(place, keys, values, inputs, recent_tokens, copy_keys, seen_ids)
        return self.model(token_ids, cache=cache, last_only=True)  # type: ignore[no-any-return]


class StaticRows:
    """The `Cache` of a step of one token: all of a `KVCache`'s memory, and the token's place (1,) in it."""

    def __init__(
        self,
        place: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        inputs: Sequence[Tensor],
        recent_tokens: Tensor,
        copy_keys: Tensor,
        seen_ids: Tensor,
    ) -> None:
        self._place, self._keys, self._values, self._inputs = place, keys, values, inputs
        self._copy_keys, self._seen_ids = copy_keys, seen_ids
        self.recent_tokens = recent_tokens

    def positions(self, time: int) -> Tensor:  # noqa: ARG002 - it is 1
        """Return where the token stands, (1, 1), the same for all rows."""
        return self._place[None]

    def mask(self, time: int, window: int, sinks: int) -> Tensor:  # noqa: ARG002
        """Say which places of the cache the token sees, (1, 1, 1, capacity)."""
        places = torch.arange(self._keys[0].shape[2], device=self._place.device)
        return visible_places(self._place[:, None], places, window=window, sinks=sinks)[None, None]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the token's key and value (B, K, 1, C); return all places, (B, K, capacity, C)."""
        keys, values = self._keys[layer], self._values[layer]
        keys.index_copy_(2, self._place, key)
        values.index_copy_(2, self._place, value)
        return keys, values

    def remember(self, layer: int, site: int, hidden: Tensor, back: int) -> Tensor:
        """Store what a convolution reads at the token, (B, 1, D); return it behind what it read at `back` before."""
        stored = self._inputs[layer][:, site]
        stored.index_copy_(1, self._place, hidden)
        before = self._place - torch.arange(back, 0, -1, device=hidden.device)  # (back,)
        earlier = stored.index_select(1, before.clamp(min=0)) * (before >= 0)[:, None]
        return torch.cat((earlier, hidden), dim=1)

    def advance(self, token_ids: Tensor) -> None:
        """Leave the count to the cache whose memory this is."""

    def offer(self, key: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store what the token is found by when copied, (B, 1, W); return that of the whole memory, as `Cache` says."""
        self._copy_keys.index_copy_(1, self._place, key)
        self._seen_ids.index_copy_(1, self._place, token_ids)
        return self._copy_keys, following(self._seen_ids), self._place[None]
