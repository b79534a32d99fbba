"""The model's forward pass for the newest token of each sequence, on a CPU, by compiled kernels.

PyTorch's eager operators cost tens of microseconds each, several hundred of them a token, and have no fast product for
fp32 inputs and weights of 8 or 4 bits at one row. This is `TransformerModel.forward` again, in the same order and over
the same weights and cache, for that case alone.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sheepop.generation import batch_kernels, integer_kernels
from sheepop.generation import decode_kernels as kernels
from sheepop.generation.vector_dots import GROUP
from sheepop.generation.vector_integers import HAS_INTEGERS, MOST_INPUTS
from sheepop.generation.vector_tiles import PANEL
from sheepop.models.blocks import TransformerBlock
from sheepop.models.kv_cache import KVCache
from sheepop.models.paged_cache import PagedCache
from sheepop.models.quantized_layers import QuantizedEmbedding, QuantizedLinear
from sheepop.models.transformer import TransformerModel

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Product = Callable[[Floats, Floats, bool], None]
FEW_ROWS = 8  # up to so many a tile, which is half empty then, takes longer than one row of weights at a time
NONE: Floats = np.empty(0, dtype=np.float32)


@contextmanager
def numba_threads() -> Iterator[None]:
    """Let the kernels use as many threads as PyTorch does, and PyTorch as many as before afterwards.

    Both have them of OpenMP, whose number numba sets to that of the cores when it begins.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


class FastDecoder:
    """A model with its weights laid out for the kernels, which read them where they are."""

    def __init__(self, model: TransformerModel) -> None:
        config = self.config = model.config
        self.model = model
        self.turns = model.rotary.numpy() if config.positions == "rotary" else np.empty((0, 1, 2), dtype=np.float32)
        self.reader = model if config.quantization == "none" else with_kernels(model)
        self.layers = [Layer(block) for block in self.reader.blocks if isinstance(block, TransformerBlock)]
        self.final_norm = norm_of(model.final_norm)
        self.head = product_of(self.reader.head)
        copy_head = self.reader.copy_head
        self.copying: tuple[Product, ...] = (
            () if copy_head is None else (product_of(copy_head.query), product_of(copy_head.key))
        )

    def __call__(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """Return what `model(token_ids, cache=cache, last_only=True)` returns: (N, T) to (N, 1, V)."""
        rows, time = token_ids.shape
        if time > 1:
            return self.reader(token_ids, cache=cache, last_only=True)  # type: ignore[no-any-return]
        hidden = self.model.embed(token_ids, cache.positions(1), before=cache.recent_tokens)[:, 0]
        positions, pages = np.full(rows, cache.length), np.arange(rows)[:, None]  # a row's buffer is its only page
        logits = self.step(hidden, token_ids[:, 0], positions, pages, cache)
        cache.advance(token_ids)
        return logits[:, None]

    @numba_threads()
    def step(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        positions: Integers,
        pages: Integers,
        cache: KVCache | PagedCache,
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the logits (N, V) after N tokens, whose keys and values are stored.

        Args:
            hidden: (N, D), their embeddings. Several tokens of one sequence are as many rows.
            token_ids: (N,).
            positions: (N,), where they stand in their sequences.
            pages: (N, M), which pages hold each one's sequence, in order; of a `KVCache` each row is a page.
            cache: where the tokens before are; it is not advanced.
            wanted: the tokens whose logits are returned; all by default.
        """
        config, rows = self.config, len(hidden)
        keys, values, inputs = cache.keys, cache.values, cache.inputs
        stream = hidden.contiguous().numpy()  # (N, D)
        normed = aligned(rows, config.d_model)
        projected = aligned(rows, config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        mixed = aligned(rows, config.num_heads, config.head_dim)
        inner = aligned(rows, config.d_ff * (2 if config.is_gated else 1))
        activated = aligned(rows, config.d_ff)
        activation = kernels.ACTIVATION[config.activation]
        for number, (layer, layer_keys, layer_values) in enumerate(zip(self.layers, keys, values, strict=True)):
            stored = (positions, layer_keys.numpy(), layer_values.numpy(), pages)
            query_norm, key_norm = layer.head_norms
            layer.attention_norm(stream, normed)
            if inputs:
                read_before = (positions, inputs[number].numpy(), pages)
                kernels.convolve(normed, layer.convolutions[0], 0, *read_before)
            layer.query_key_value(normed, projected.reshape(rows, -1), False)
            kernels.place_heads(projected, query_norm, key_norm, config.layer_norm_eps, self.turns, *stored)
            kernels.attend(projected, *stored, config.sliding_window, config.attention_sinks, mixed)
            if config.parallel_residual:  # the feed-forward reads what attention read
                layer.feed_forward_norm(stream, normed)
            layer.attention_output(mixed.reshape(rows, -1), stream, True)
            if not config.parallel_residual:
                layer.feed_forward_norm(stream, normed)
            if inputs:
                kernels.convolve(normed, layer.convolutions[1], 1, *read_before)
            layer.feed_forward_input(normed, inner, False)
            kernels.activate(inner, activation, config.is_gated, activated)
            layer.feed_forward_output(activated, stream, True)
        self.final_norm(stream, normed)
        copies = self.remember(normed, token_ids, positions, pages, cache) if self.copying else None
        if wanted is not None and len(wanted) < rows:
            normed, positions, pages = normed[wanted], positions[wanted], pages[wanted]
        logits = aligned(len(normed), config.vocab_size)
        self.head(normed, logits, False)
        if copies is not None:
            queries = aligned(len(normed), config.copy_width)
            self.copying[0](normed, queries, False)
            kernels.add_copies(queries, positions, *copies, pages, logits)
        return torch.from_numpy(logits)

    def remember(
        self, hidden: Floats, token_ids: Tensor, positions: Integers, pages: Integers, cache: KVCache | PagedCache
    ) -> tuple[Floats, Integers]:
        """Store tokens and what they are found by when copied; return where those of all texts are.

        Args:
            hidden: (N, D), what the head reads; the others are those of `step`.
        """
        keys, tokens = cache.copy_keys.numpy(), cache.token_ids.numpy()  # (all pages, S, W) and (all pages, S)
        found_by = aligned(len(hidden), keys.shape[2])
        self.copying[1](hidden, found_by, False)
        page, place = pages[np.arange(len(pages)), positions // keys.shape[1]], positions % keys.shape[1]
        keys[page, place], tokens[page, place] = found_by, token_ids.numpy()
        return keys, tokens


class Layer:
    """The weights of a block, as the functions that apply them."""

    def __init__(self, block: TransformerBlock) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.attention_norm, self.feed_forward_norm = norm_of(block.attention_norm), norm_of(block.feed_forward_norm)
        self.query_key_value, self.attention_output = (
            product_of(attention.query_key_value),
            product_of(attention.output),
        )
        self.feed_forward_input, self.feed_forward_output = (
            product_of(feed_forward.input),
            product_of(feed_forward.output),
        )
        self.convolutions = [
            numbers(convolution.weight)
            for convolution in (block.attention_convolution, block.feed_forward_convolution)
            if convolution is not None
        ]
        self.head_norms = tuple(
            NONE if norm is None else numbers(norm.weight) for norm in (attention.query_norm, attention.key_norm)
        )


def product_of(layer: nn.Module) -> Product:
    """Return the function (inputs (N, I), outputs (N, O), adds) of a linear layer, quantized or not."""
    if isinstance(layer, KernelLinear):
        return layer.multiply
    bias = NONE if layer.bias is None else numbers(layer.bias)
    if not isinstance(layer, QuantizedLinear):
        weights: list[NDArray[Any]] = [numbers(layer.weight)]
        few, many = kernels.matmul_fp32, batch_kernels.matmul_fp32
    elif not layer.is_packed:
        weights = [numbers(layer.values), numbers(layer.scale)]
        few, many = kernels.matmul_int8, batch_kernels.matmul_int8
        if HAS_INTEGERS and layer.num_inputs % GROUP == 0 and layer.num_inputs <= MOST_INPUTS:
            weights.append(weights[0].sum(1, dtype=np.int32))  # ten times as fast as PyTorch's
            few, many = integer_kernels.matmul_few, integer_kernels.matmul_many
    else:
        weights = [numbers(layer.values), numbers(layer.scale), numbers(layer.lowest)]
        few, many = kernels.matmul_int4, batch_kernels.matmul_int4

    def multiply(inputs: Floats, outputs: Floats, adds: bool) -> None:
        tiles = len(inputs) > FEW_ROWS and outputs.shape[1] >= PANEL
        (many if tiles else few)(inputs, *weights, bias, outputs, adds)

    return multiply


class KernelLinear(nn.Module):
    """A quantized layer whose product the kernels compute: PyTorch would make the whole weight fp32 each time."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.num_outputs, self.multiply = layer.values.shape[0], product_of(layer)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        inputs = hidden.flatten(0, -2).contiguous().numpy()
        outputs = aligned(len(inputs), self.num_outputs)
        with numba_threads():
            self.multiply(inputs, outputs, False)
        return torch.from_numpy(outputs).view(*hidden.shape[:-1], -1)


def with_kernels(model: TransformerModel) -> TransformerModel:
    """Return a model whose quantized layers compute by the kernels; it shares all tensors with the one given."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, shared)
    for module in list(twin.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, QuantizedLinear) and not isinstance(module, QuantizedEmbedding):
                setattr(module, name, KernelLinear(layer))
    return twin


def norm_of(norm: nn.Module) -> Callable[[Floats, Floats], None]:
    """Return the function (inputs (N, D), outputs (N, D)) of a norm."""
    assert isinstance(norm, nn.RMSNorm | nn.LayerNorm)
    weight, epsilon = numbers(norm.weight), norm.eps or 0.0
    if isinstance(norm, nn.RMSNorm):
        return lambda inputs, outputs: kernels.rms_norm(inputs, weight, epsilon, outputs)
    bias = NONE if norm.bias is None else numbers(norm.bias)
    return lambda inputs, outputs: kernels.layer_norm(inputs, weight, bias, epsilon, outputs)


def numbers(tensor: Any) -> NDArray[Any]:
    """Return a tensor's memory as an array; of bf16, which numpy does not know, the bits."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.detach().numpy()  # type: ignore[no-any-return]


def aligned(*shape: int) -> Floats:
    """Return memory that begins at a cache line, so that no vector lies in two; numpy by itself does not see to it."""
    return torch.empty(shape).numpy()
