"""One transformer block: norm, attention, norm, feed-forward, each sub-layer added to what came in (pre-norm).

Shape letters: B batch, T time, D width, H query heads, K key/value heads, C head width, F feed-forward width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sheepop.config import ModelConfig
from sheepop.models.attention import attention
from sheepop.models.dropout import drop
from sheepop.models.kv_cache import Cache
from sheepop.models.linear import Linear
from sheepop.models.optimized_attention import optimized_attention
from sheepop.models.positions import apply_rotary
from sheepop.models.short_convolution import ShortConvolution
from sheepop.models.splitting import split
from sheepop.models.taps import Tap, untapped

ATTENTION: dict[str, Callable[..., Tensor]] = {"reference": attention, "optimized": optimized_attention}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # Hendrycks and Gimpel 2016
    "gelu_tanh": lambda hidden: F.gelu(hidden, approximate="tanh"),  # the approximation that GPT-2 was trained with
    "relu": F.relu,
    "silu": F.silu,
    "relu_squared": lambda hidden: F.relu(hidden).square(),  # So et al. 2021 (Primer)
    "swiglu": F.silu,  # the gate's activation; Shazeer 2020
    "geglu": F.gelu,
}


class Embedding(nn.Embedding):
    """PyTorch's embedding without its own initialisation."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """Return the norm that the settings ask for: LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019)."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=config.layer_norm_eps)
    return nn.LayerNorm(width, eps=config.layer_norm_eps, bias=config.bias)


@dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares.

    Attributes:
        rotary: cosines and sines of the positions at hand, (T, H+K, C/2, 2), or (B, T, H+K, C/2, 2) where they differ
            between rows; None for other positions.
        document_ids: (B, S), or None.
        cache: keys and values of earlier tokens, or None.
        mask: (B, 1, T, S), the keys that each query sees where they are not simply those before it, or None.
        tap: sees the tensors at the named points of the layer at hand (`taps.py`).
    """

    rotary: Tensor | None = None
    document_ids: Tensor | None = None
    cache: Cache | None = None
    mask: Tensor | None = None
    tap: Tap = untapped


class MultiHeadAttention(nn.Module):
    """Queries, keys and values of all heads from one projection, attention, and the projection back."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.window, self.sinks = config.head_dim, config.sliding_window, config.attention_sinks
        self.dropout = config.dropped_attention
        heads = config.num_heads + 2 * config.num_kv_heads
        self.query_key_value = Linear(config.d_model, heads * config.head_dim, bias=config.bias)
        self.output = Linear(config.num_heads * config.head_dim, config.d_model, bias=config.bias)
        # Dehghani et al. 2023: without it, attention logits grow until training at a high rate breaks.
        self.query_norm = nn.RMSNorm(config.head_dim, eps=config.layer_norm_eps) if config.qk_norm else None
        self.key_norm = nn.RMSNorm(config.head_dim, eps=config.layer_norm_eps) if config.qk_norm else None
        self.attention: Callable[..., Tensor] = ATTENTION[config.attention]

    def learn_by_kernels(self, on: bool) -> None:
        """See `TransformerModel.learn_by_kernels`; the reference stays as it is."""
        if self.attention is not attention:
            self.attention = partial(optimized_attention, by_kernels=True) if on else optimized_attention

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        batch, time, _ = hidden.shape
        H, K = self.num_heads, self.num_kv_heads
        tap = context.tap
        projected = self.query_key_value(hidden).view(batch, time, H + 2 * K, self.head_dim)  # (B, T, H+2K, C)
        query_key, value = split(tap("attention.projected", projected), (H + K, K), dim=2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = query_key.split((H, K), dim=2)  # type: ignore[no-untyped-call]
            query_key = torch.cat((self.query_norm(query), self.key_norm(key)), dim=2)
        if context.rotary is not None:
            query_key = tap("attention.before_rotary", query_key)  # (B, T, H+K, C)
            query_key = apply_rotary(query_key, context.rotary)  # queries and keys turn together: half the calls
        query, key = split(query_key.transpose(1, 2), (H, K), dim=1)  # (B, H, T, C) and (B, K, T, C)
        value = value.transpose(1, 2)  # (B, K, T, C)
        query, key, value = tap("attention.query", query), tap("attention.key", key), tap("attention.value", value)
        if context.cache is not None:
            key, value = context.cache.append(self.layer, key, value)  # (B, K, S, C)
        # Fused kernels never hold the scores and weights that are to be seen.
        attend = self.attention if tap is untapped else partial(attention, tap=tap)
        mixed = attend(
            query,
            key,
            value,
            window=self.window,
            sinks=self.sinks,
            document_ids=context.document_ids,
            mask=context.mask,
            dropout=self.dropout if self.training else 0.0,
        )  # (B, H, T, C)
        mixed = tap("attention.mixed", mixed).transpose(1, 2).reshape(batch, time, H * self.head_dim)  # (B, T, HC)
        return tap("attention.output", self.output(mixed))


class FeedForward(nn.Module):
    """Widen, bend, narrow; a gated activation multiplies the bent half by a second, linear one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_gated = config.is_gated
        self.activation = ACTIVATIONS[config.activation]
        inner = config.d_ff * (2 if config.is_gated else 1)
        self.input = Linear(config.d_model, inner, bias=config.bias)
        self.output = Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, hidden: Tensor, tap: Tap = untapped) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        hidden = self.input(hidden)  # (B, T, F), or (B, T, 2F) when gated
        if self.is_gated:
            gate, linear = hidden.chunk(2, dim=-1)
            hidden = self.activation(tap("feed_forward.gate", gate)) * tap("feed_forward.linear", linear)  # (B, T, F)
        else:
            hidden = self.activation(tap("feed_forward.input", hidden))
        return tap("feed_forward.output", self.output(tap("feed_forward.activation", hidden)))


class TransformerBlock(nn.Module):
    """Pre-norm block: the sub-layers read a normalised copy and add to the residual stream (Xiong et al. 2020).

    With `recomputes` the backward pass computes the block's inner activations again from its input, which is all that
    is kept (activation checkpointing: Chen et al. 2016); results are the same, dropout included. With `compiled` it
    computes by that function where it learns (`compile_blocks`).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config, config.d_model)
        self.attention = MultiHeadAttention(config, layer)
        self.feed_forward_norm = make_norm(config, config.d_model)
        self.feed_forward = FeedForward(config)
        convolves = config.conv_width > 1
        self.attention_convolution = ShortConvolution(config, layer, 0) if convolves else None
        self.feed_forward_convolution = ShortConvolution(config, layer, 1) if convolves else None
        self.dropout = config.dropout
        self.is_parallel = config.parallel_residual
        self.recomputes = False
        self.compiled: Callable[[TransformerBlock, Tensor, Context], Tensor] | None = None

    def forward(self, hidden: Tensor, context: Context) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        is_learning = self.training and torch.is_grad_enabled()
        compute = self.compiled if self.compiled is not None and is_learning else TransformerBlock.compute
        if self.recomputes and is_learning:
            return checkpoint(compute, self, hidden, context, use_reentrant=False)  # type: ignore[no-any-return]
        return compute(self, hidden, context)

    def compute(self, hidden: Tensor, context: Context) -> Tensor:
        """Do what `forward` does, without asking how."""
        dropout = self.dropout if self.training else 0.0
        tap = context.tap
        read = tap("attention_norm", self.attention_norm(tap("input", hidden)))
        if self.attention_convolution is not None:
            read = self.attention_convolution(read, context.cache, context.document_ids)
        attended = self.attention(tap("attention.read", read), context)
        attended = tap("after_attention", hidden + drop(attended, dropout))
        source = hidden if self.is_parallel else attended  # Wang and Komatsuzaki 2021 (GPT-J)
        read = tap("feed_forward_norm", self.feed_forward_norm(source))
        if self.feed_forward_convolution is not None:
            read = self.feed_forward_convolution(read, context.cache, context.document_ids)
        return tap("output", attended + drop(self.feed_forward(tap("feed_forward.read", read), tap), dropout))
