"""What a model costs before it is built: parameters, FLOPs and bytes, as pure functions of its settings."""

from dataclasses import asdict, dataclass
from typing import Literal

from sheepop.config import ModelConfig
from sheepop.models.block_attention import keeps, suits_blocks, weights_in_blocks
from sheepop.models.head_loss import rows_at_once
from sheepop.models.kernel_attention import suits_kernels
from sheepop.models.linear import MOST_AT_ONCE

TOKEN_BYTES = 8  # int64
CONVOLUTIONS = 2  # of a block with `conv_width` above 1: before attention and before the feed-forward


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part. A tied head is counted once, with the embedding."""

    embedding: int
    ngrams: int
    positions: int
    attention: int
    feed_forward: int
    convolutions: int
    norms: int
    head: int
    copying: int

    @property
    def total(self) -> int:
        """All trainable numbers."""
        return sum(asdict(self).values())


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
        ngrams=sum(ngram_table_sizes(config)) * D,
        positions=config.max_seq_len * D if config.positions == "learned" else 0,
        attention=L * attention,
        feed_forward=L * feed_forward,
        convolutions=CONVOLUTIONS * L * (config.conv_width - 1) * D,
        norms=(2 * L + 1) * norm + (2 * L * C if config.qk_norm else 0),
        head=0 if config.tie_weights else config.vocab_size * D,
        copying=2 * D * config.copy_width,
    )


def ngram_table_sizes(config: ModelConfig) -> list[int]:
    """Return the rows of the tables for 2, 3, ... `ngram_order` tokens: one for each group where that fits."""
    symbols = config.vocab_size + 1  # and one for "no token"
    return [min(symbols**length, config.ngram_entries) for length in range(2, config.ngram_order + 1)]


def inner_matrices(config: ModelConfig) -> int:
    """Return how many weights the matrices inside the blocks hold."""
    D, H, K, C, F = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim, config.d_ff
    return config.num_layers * D * ((H + 2 * K) * C + H * C + F * (3 if config.is_gated else 2))


def forward_flops_per_token(config: ModelConfig, context: int) -> float:
    """Return the floating-point operations of one token's forward pass in a sequence of `context` tokens.

    Matrix products only, a multiply and an add counted as two (Kaplan et al. 2020, table 1): twice the weights that
    multiply, plus scores and their use, over the (context + 1)/2 keys that a token sees on average under the causal
    mask, or fewer with a sliding window (`most_keys`). A copy head scores the (context - 1)/2 places before a token.
    """
    L, C, H = config.num_layers, config.head_dim, config.num_heads
    weights = inner_matrices(config) + config.d_model * (config.vocab_size + 2 * config.copy_width)
    most = most_keys(config, context)
    # Token t sees min(t + 1, most) keys.
    keys_seen = (most * (most + 1) / 2 + (context - most) * most) / context
    return 2.0 * weights + 4.0 * L * H * C * keys_seen + config.copy_width * (context - 1)


def most_keys(config: ModelConfig, context: int) -> int:
    """Return how many of `context` tokens one sees at the most: all, or those of its window and the sinks."""
    return min(config.sliding_window + config.attention_sinks or context, context)


def training_flops_per_token(config: ModelConfig, context: int) -> float:
    """Return the operations of one token's forward and backward pass: a backward costs two forwards."""
    return 3.0 * forward_flops_per_token(config, context)


def weight_bytes(config: ModelConfig, bytes_per_number: int = 4) -> int:
    """Return the bytes that the weights take in memory or in a file."""
    return count_parameters(config).total * bytes_per_number


def kv_cache_bytes(config: ModelConfig, batch_size: int, length: int, bytes_per_number: int = 4) -> int:
    """Return the bytes of keys and values, layers x B x length x 2 x K x C numbers, and of what else is remembered.

    That is what convolutions read, and for a copy head a key of each token and the token.
    """
    numbers = 2 * config.num_kv_heads * config.head_dim
    numbers += CONVOLUTIONS * config.d_model if config.conv_width > 1 else 0
    numbers = config.num_layers * numbers + config.copy_width
    token = TOKEN_BYTES if config.copy_width else 0
    return batch_size * length * (numbers * bytes_per_number + token)


def attention_kernel(
    config: ModelConfig, context: int, bytes_per_number: int, *, on_gpu: bool, by_kernels: bool
) -> Literal["reference", "kernels", "blocks", "fused"]:
    """Return what attention learns by: written out, compiled kernels, blocks of queries, or PyTorch's fused kernel."""
    if config.attention == "reference":
        return "reference"
    drops = config.dropped_attention > 0
    if by_kernels and not on_gpu and suits_kernels(context, config.head_dim):
        return "kernels"
    return "blocks" if not on_gpu and suits_blocks(context, bytes_per_number, drops=drops) else "fused"


def layer_activation_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    context: int,
    bytes_per_number: int = 4,
    document_mask: bool = False,
    on_gpu: bool = False,
    by_kernels: bool = False,
) -> int:
    """Return the bytes that one block keeps from its forward pass for its backward pass.

    What each operation saves, in the manner of Korthikanti et al. 2022, section 4.1, for this model's own operations:
    the residual stream and the norms are in fp32, products and the feed-forward in the computing type.

    Args:
        bytes_per_number: of the computing type: 4 for fp32, 2 for bf16 and fp16.
        document_mask: each layer keeps a mask of its own.
        on_gpu: fused norms, and dropout inside the fused attention.
        by_kernels: attention learns by compiled kernels where it can.
    """
    B, T, D, H, K, C, F = (
        batch_size,
        context,
        config.d_model,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.d_ff,
    )
    N, e = B * T, bytes_per_number
    is_mixed = e < 4

    norms = 2 * (norm_activation_bytes(config, N, on_gpu=on_gpu) + e * N * D)  # and what the products read of them
    projected = e * N * (H + 2 * K) * C
    attention = e * N * H * C  # what the output projection reads
    if config.qk_norm:
        attention += 4 * N * (H + K) * (1 + (0 if on_gpu else C))  # scales, and normalised queries and keys
        attention += 4 * N * (H + K) * C if is_mixed else 0  # their fp32 copies
    kernel = attention_kernel(config, T, e, on_gpu=on_gpu, by_kernels=by_kernels)
    if kernel == "kernels":
        attention += projected + 4 * N * H  # and the logarithms of the softmax's sums
        attention += projected if config.qk_norm and not is_mixed else 0
    elif kernel == "blocks":
        attention += projected  # queries and keys, and values: together as projected, or a copy where those were turned
        sight = config.sliding_window, config.attention_sinks
        per_weight = (e if keeps(T, *sight) else 0) + (1 if config.dropped_attention else 0)
        attention += per_weight * B * H * weights_in_blocks(T, *sight)
        attention += projected if config.qk_norm and not is_mixed else 0
    elif kernel == "reference":
        weights = e + (e + 1 if config.dropped_attention else 0) + (4 if is_mixed and on_gpu else 0)
        attention += 3 * e * N * H * C + weights * N * T * H
        attention += projected if config.qk_norm and not is_mixed else 0
    else:
        attention += projected + 4 * N * H  # values are a view of it; and the logarithms of the softmax's sums
        if config.positions == "rotary" or config.qk_norm:
            attention += e * N * (H + K) * C
        if document_mask or most_keys(config, T) < T:
            attention += e * T * T * (B if document_mask else 1)

    # Gated: both halves, the bent one, and the product. Else what goes into the activation and what comes out of it,
    # but ReLU's gradient is known from the latter.
    convolutions = 0
    if config.conv_width > 1:  # what their weights multiply, in the norms' fp32 and with the padding in front
        convolutions = CONVOLUTIONS * 4 * B * (T + config.conv_width - 1) * D
    inner = 4 if config.is_gated else 1 if config.activation == "relu" else 2
    kept_entries = 2 * N * D if config.dropout else 0
    return norms + convolutions + attention + inner * e * N * F + kept_entries


def norm_activation_bytes(config: ModelConfig, num_tokens: int, *, on_gpu: bool) -> int:
    """Return the bytes that one norm of the residual stream keeps: its fp32 input and its statistics."""
    if config.norm == "layernorm":
        return 4 * num_tokens * (config.d_model + 2)
    # Outside a GPU, PyTorch's RMSNorm is composed of simpler operations and keeps the normalised input as well.
    return 4 * num_tokens * (config.d_model * (1 if on_gpu else 2) + 1)


def activation_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    context: int,
    bytes_per_number: int = 4,
    document_mask: bool = False,
    on_gpu: bool = False,
    by_kernels: bool = False,
    activation_checkpointing: bool = False,
) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, but for the head's gradients.

    With `activation_checkpointing` each block keeps its input alone and is run again in the backward pass (Chen et
    al. 2016), so that the whole of one block exists at a time.
    """
    N, D, e = batch_size * context, config.d_model, bytes_per_number
    layer = layer_activation_bytes(
        config,
        batch_size=batch_size,
        context=context,
        bytes_per_number=e,
        document_mask=document_mask,
        on_gpu=on_gpu,
        by_kernels=by_kernels,
    )
    layers = config.num_layers * 4 * N * D + layer if activation_checkpointing else config.num_layers * layer
    outside = 8 * N * config.ngram_order + norm_activation_bytes(config, N, on_gpu=on_gpu)  # ids, rows; final norm
    if config.positions == "rotary":
        outside += 4 * context * (config.num_heads + config.num_kv_heads) * config.head_dim
    outside += N * D if config.dropout else 0
    if e < 4:  # autocast keeps a copy of each matrix that multiplies
        counts = count_parameters(config)
        outside += e * (counts.attention + counts.feed_forward + counts.copying)
    outside += copying_bytes(config, batch_size=batch_size, context=context, bytes_per_number=e)
    return layers + outside


def copying_bytes(config: ModelConfig, *, batch_size: int, context: int, bytes_per_number: int) -> int:
    """Return the bytes that a copy head keeps for its backward pass.

    That is queries, keys and both sums of each token, and with mixed precision a copy of what they are made from.
    """
    N, W, e = batch_size * context, config.copy_width, bytes_per_number
    return N * (2 * e * W + 8 + (e * config.d_model if e < 4 else 0)) if W else 0


def logits_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    context: int,
    bytes_per_number: int = 4,
    on_gpu: bool = False,
    by_kernels: bool = False,
) -> int:
    """Return the bytes of the logits that exist at one time and of what the head makes of them (`head_loss.py`).

    In fp32 on a CPU log-softmax and gradient take the logits' place. On a GPU there are two fp32 ones at a time, and
    with mixed precision on a CPU one and the gradient in the computing type. At the end there are the gradients of what
    the head reads and of its weight; with mixed precision a part of the latter stands beside it.
    """
    is_mixed = bytes_per_number < 4
    at_once = rows_at_once(config.vocab_size, "cuda" if on_gpu else "cpu", by_kernels=by_kernels and not is_mixed)
    rows = min(batch_size * context, at_once)
    beside = 4 if on_gpu else bytes_per_number if is_mixed else 0
    part = bytes_per_number * min(MOST_AT_ONCE, config.d_model * config.vocab_size) if is_mixed else 0
    gradients = 4 * config.d_model * (config.vocab_size + batch_size * context)
    return rows * config.vocab_size * (4 + beside) + gradients + part


@dataclass(frozen=True)
class TrainingBytes:
    """The bytes of a training step by part, on one device.

    Attributes:
        activations: what the forward pass keeps for the backward pass of one micro-batch.
        logits: see `logits_bytes`.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    gradients_at_start: int

    @property
    def state(self) -> int:
        """What is there whatever the batch: weights, gradients and the optimizer's moments."""
        return self.weights + self.gradients + self.optimizer

    @property
    def transient(self) -> int:
        """What comes and goes within a step, at its largest.

        At the start of the backward pass all activations are there and, in the first micro-batch, no gradient is but
        the head's; at its end it is the other way round.
        """
        return max(self.activations + self.logits + self.gradients_at_start, self.gradients)

    @property
    def peak(self) -> int:
        """The most bytes that tensors hold at one time."""
        return self.weights + self.optimizer + self.transient


def training_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    context: int,
    gradient_accumulation_steps: int = 1,
    bytes_per_number: int = 4,
    document_mask: bool = False,
    on_gpu: bool = False,
    by_kernels: bool = False,
    head_by_kernels: bool = False,
    activation_checkpointing: bool = False,
    optimizer: Literal["adamw", "muon"] = "adamw",
    shared_rows: int = 0,
) -> TrainingBytes:
    """Return the bytes of a training step by part; see `activation_bytes` for the arguments.

    AdamW keeps two moments of each weight, Muon one of each matrix inside the blocks, and each weight of the
    vocabulary's size has two of each of its `shared_rows`.
    """
    weights = weight_bytes(config)
    shared = 4 * shared_rows * config.d_model * (1 if config.tie_weights else 2)
    single_moments = inner_matrices(config) if optimizer == "muon" else 0
    return TrainingBytes(
        weights=weights,
        gradients=weights,
        optimizer=2 * weights - 4 * single_moments + 2 * shared,
        activations=activation_bytes(
            config,
            batch_size=batch_size,
            context=context,
            bytes_per_number=bytes_per_number,
            document_mask=document_mask,
            on_gpu=on_gpu,
            by_kernels=by_kernels,
            activation_checkpointing=activation_checkpointing,
        ),
        logits=logits_bytes(
            config,
            batch_size=batch_size,
            context=context,
            bytes_per_number=bytes_per_number,
            on_gpu=on_gpu,
            by_kernels=head_by_kernels,
        ),
        gradients_at_start=weights if gradient_accumulation_steps > 1 else 0,
    )
