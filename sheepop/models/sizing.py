"""What a model costs before it is built: parameters, FLOPs and bytes, as pure functions of its settings."""

from dataclasses import dataclass

from sheepop.config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part. A tied head is counted once, with the embedding."""

    embedding: int
    positions: int
    attention: int
    feed_forward: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """All trainable numbers."""
        return self.embedding + self.positions + self.attention + self.feed_forward + self.norms + self.head


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count the trainable numbers of a model with these settings; equal to summing `model.parameters()`."""
    D, L, C, F = config.d_model, config.num_layers, config.head_dim, config.d_ff
    projections = (config.num_heads + 2 * config.num_kv_heads) * C  # widths of queries, keys and values together
    attention = D * projections + config.num_heads * C * D
    inner = F * (2 if config.is_gated else 1)
    feed_forward = D * inner + F * D
    if config.bias:
        attention += projections + D
        feed_forward += inner + D
    norm = D * (2 if config.norm == "layernorm" and config.bias else 1)
    return ParameterCounts(
        embedding=config.vocab_size * D,
        positions=config.max_seq_len * D if config.positions == "learned" else 0,
        attention=L * attention,
        feed_forward=L * feed_forward,
        norms=(2 * L + 1) * norm + (2 * L * C if config.qk_norm else 0),
        head=0 if config.tie_weights else config.vocab_size * D,
    )


def forward_flops_per_token(config: ModelConfig, context: int) -> float:
    """Return the floating-point operations of one token's forward pass in a sequence of `context` tokens.

    Matrix products only, a multiply and an add counted as two (Kaplan et al. 2020, table 1): twice the weights that
    multiply, plus scores and their use, over the (context + 1)/2 keys that a token sees on average under the causal
    mask, or fewer with a sliding window.
    """
    D, L, C, F, H = config.d_model, config.num_layers, config.head_dim, config.d_ff, config.num_heads
    weights = (
        L * (D * (H + 2 * config.num_kv_heads) * C + H * C * D + D * F * (3 if config.is_gated else 2))
        + D * config.vocab_size
    )
    window = min(config.sliding_window or context, context)
    # Token t sees min(t + 1, window) keys.
    keys_seen = (window * (window + 1) / 2 + (context - window) * window) / context
    return 2.0 * weights + 4.0 * L * H * C * keys_seen


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """Return the operations of one token's forward and backward pass: a backward costs two forwards."""
    return 3.0 * forward_flops_per_token(config, context)


def weight_bytes(config: ModelConfig, bytes_per_number: int = 4) -> int:
    """Return the bytes that the weights take in memory or in a file."""
    return count_parameters(config).total * bytes_per_number


def training_state_bytes(config: ModelConfig) -> int:
    """Return the bytes of weights, gradients and AdamW's two moments in fp32."""
    return 4 * weight_bytes(config)


def kv_cache_bytes(config: ModelConfig, batch_size: int, length: int, bytes_per_number: int = 4) -> int:
    """Return the bytes of keys and values: 2 x layers x B x K x length x C numbers."""
    numbers = 2 * config.num_layers * batch_size * config.num_kv_heads * length * config.head_dim
    return numbers * bytes_per_number
