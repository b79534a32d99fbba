"""The decoder transformer: embed tokens, pass the blocks, normalise, score every entry of the vocabulary."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from sheepop.config import ModelConfig
from sheepop.models.blocks import Context, Embedding, TransformerBlock, make_norm
from sheepop.models.compiler import compile_graph
from sheepop.models.copying import Copies, CopyHead, copy_sums, following
from sheepop.models.dropout import drop
from sheepop.models.fp8 import suits_fp8
from sheepop.models.head_loss import summed_head_loss
from sheepop.models.kv_cache import Cache
from sheepop.models.linear import Linear
from sheepop.models.ngrams import NgramEmbedding
from sheepop.models.positions import document_starts, rotary_table, sinusoidal_table
from sheepop.models.quantized_layers import use_quantized_layers
from sheepop.models.taps import Record, Tap, tap_into, untapped


class TransformerModel(nn.Module):
    """A language model: token ids in, logits of the next token out. The settings say which family.

    With `initialize=False`, and where they are quantized, the weights are whatever the memory held, to be loaded.
    """

    rotary: Tensor
    sinusoidal: Tensor

    def __init__(self, config: ModelConfig, *, initialize: bool = True) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.d_model)
        self.ngram_embedding = NgramEmbedding(config) if config.ngram_order > 1 else None
        if config.positions == "learned":
            self.position_embedding = Embedding(config.max_seq_len, config.d_model)
        elif config.positions == "sinusoidal":
            table = sinusoidal_table(config.max_seq_len, config.d_model)
            self.register_buffer("sinusoidal", table, persistent=False)
        elif config.positions == "rotary":
            self.register_buffer("rotary", rotary_table(config, config.max_seq_len), persistent=False)
        self.blocks = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.num_layers))
        self.final_norm = make_norm(config, config.d_model)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        self.copy_head = CopyHead(config) if config.copy_width else None
        self.head_by_kernels = False
        if config.tie_weights:
            self.head.weight = self.token_embedding.weight  # Press and Wolf 2017
        if config.quantization != "none":
            use_quantized_layers(self, config)
        elif initialize:
            self.initialize()

    def initialize(self) -> None:
        """Draw the weights: normal with `init_std`, the projections into the residual stream narrower.

        Each of the 2L sub-layers adds to the stream, so their output projections are scaled by 1/√(2L) to keep its
        variance from growing with depth (Radford et al. 2019, section 2.3), or zero with `zero_init_outputs`. Biases
        are zero, norms one.
        """
        output_scale = 0.0 if self.config.zero_init_outputs else 1 / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            else:
                scale = output_scale if name.endswith("output.weight") else 1.0
                nn.init.normal_(parameter, mean=0.0, std=self.config.init_std * scale)

    def forward(
        self,
        token_ids: Tensor,
        *,
        targets: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
        record: Record | None = None,
    ) -> Tensor:
        """Return the logits (B, T, V) of the token after each position; with `last_only` (B, 1, V).

        With `targets` return their loss instead, summed in nats, an fp32 scalar (`head_loss.py`): it is made here
        and not by who calls, so that wrappers for several processes see the whole of it.

        Args:
            token_ids: (B, T) integers below `vocab_size`.
            targets: (B, T), the token after each position, negative where there is none.
            document_ids: (B, T), tokens with different numbers do not see each other; positions that are added to
                embeddings restart with each document. Not together with a cache.
            cache: keys and values of the tokens before these; it grows by T.
            record: is told the tensors at the model's named points (`learn/trace.py`).

        Raises:
            ValueError: more tokens than `max_seq_len`.
        """
        hidden = self.hidden_states(token_ids, document_ids=document_ids, cache=cache, record=record)
        if targets is not None:
            copied = None
            if self.copy_head is not None:
                query, key = self.copy_head(hidden)  # (B, T, W)
                copied = copy_sums(query, key, token_ids, targets, document_ids, by_kernels=self.head_by_kernels)
            return summed_head_loss(hidden, self.head.weight, targets, copied, by_kernels=self.head_by_kernels)
        copies = self.copies(hidden, token_ids, document_ids=document_ids, cache=cache)
        if last_only:
            hidden = hidden[:, -1:]
            copies = copies and copies.last()
        tap = tap_into(record, "")
        if copies is None:
            return tap("logits", self.logits(hidden))  # (B, T, V)
        scores = tap("entry_scores", self.logits(hidden))
        copies = copies._replace(queries=tap("copying.query", copies.queries), keys=tap("copying.key", copies.keys))
        return tap("logits", copies.add_to(scores))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., V) of what `hidden_states` returned, or of some of it, (..., D).

        Of a model with a copy head they are what its `copies` are added to.
        """
        return self.head(hidden)  # type: ignore[no-any-return]

    def copies(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        *,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Copies | None:
        """Return what the tokens of a forward pass may copy, and let the cache keep it; None without a copy head.

        Args:
            hidden: (B, T, D), what `hidden_states` returned.
            token_ids, document_ids, cache: what it was given.
        """
        if self.copy_head is None:
            return None
        query, key = self.copy_head(hidden)  # (B, T, W)
        if cache is not None:
            return Copies(query, *cache.offer(key, token_ids))
        positions = torch.arange(token_ids.shape[1], device=token_ids.device).unsqueeze(0)
        return Copies(query, key, following(token_ids), positions, document_ids)

    def hidden_states(
        self,
        token_ids: Tensor,
        *,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        record: Record | None = None,
    ) -> Tensor:
        """Return what the head reads: the residual stream after the final norm, (B, T, D)."""
        time = token_ids.shape[1]
        positions = cache.positions(time) if cache is not None else slice(0, time)
        if isinstance(positions, slice) and positions.stop > self.config.max_seq_len:
            raise ValueError(f"the model sees at most {self.config.max_seq_len} tokens, not {positions.stop}")
        if document_ids is not None and cache is not None:
            raise ValueError("document_ids and a cache do not go together: a cache holds one document a row")
        dropout = self.config.dropout if self.training else 0.0
        before = None if cache is None else cache.recent_tokens
        tap = tap_into(record, "")
        hidden = self.embed(token_ids, positions, document_ids, before, tap)  # (B, T, D)
        hidden = drop(tap("embedding", hidden), dropout)
        rotary = None
        if self.config.positions == "rotary":
            # Repeated for each head, once for all layers: products with rows that lie in one piece are faster.
            heads = self.config.num_heads + self.config.num_kv_heads
            table = self.rotary[positions].unsqueeze(-3)  # (T, 1, C/2, 2), or (B, T, 1, C/2, 2)
            rotary = table.expand(*table.shape[:-3], heads, -1, -1).contiguous()  # (T, H+K, C/2, 2), or (B, T, ...)
        mask = None
        if cache is not None:
            mask = cache.mask(time, self.config.sliding_window, self.config.attention_sinks)
        context = Context(rotary=rotary, document_ids=document_ids, cache=cache, mask=mask)
        for layer, block in enumerate(self.blocks):
            if record is not None:
                context = replace(context, tap=tap_into(record, f"blocks.{layer}."))
            hidden = block(hidden, context)
        if cache is not None:
            cache.advance(token_ids)
        return tap("final_norm", self.final_norm(hidden))

    def embed(
        self,
        token_ids: Tensor,
        positions: slice | Tensor,
        document_ids: Tensor | None = None,
        before: Tensor | None = None,
        tap: Tap = untapped,
    ) -> Tensor:
        """Return token embeddings plus those of the last few together and, for absolute positions, of the place.

        Args:
            token_ids: (B, T).
            positions: where they stand in their texts, one slice for all rows, or (B, T).
            document_ids: as in `forward`.
            before: the (B, `ngram_order` - 1) tokens before these, -1 for none; None: none at all.
            tap: sees the parts of the sum.
        """
        embedded = tap("token_embedding", self.token_embedding(token_ids))  # (B, T, D)
        if self.ngram_embedding is not None:
            if before is None:
                before = token_ids.new_full((token_ids.shape[0], self.config.ngram_order - 1), -1)
            embedded = embedded + tap("ngram_embedding", self.ngram_embedding(token_ids, before, document_ids))
        if self.config.positions not in ("learned", "sinusoidal"):
            return embedded
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop, device=token_ids.device)  # (T,)
        if document_ids is not None:
            positions = positions - document_starts(document_ids)  # (B, T)
        if self.config.positions == "learned":
            return embedded + tap("position_embedding", self.position_embedding(positions))
        # Vaswani et al. 2017, section 3.4: scaled up so that the unit waves do not drown the tokens.
        return embedded * math.sqrt(self.config.d_model) + tap("position_embedding", self.sinusoidal[positions])

    def recompute_activations(self) -> None:
        """Let the backward pass compute each block's inner activations again instead of keeping them."""
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            block.recomputes = True

    def learn_in_fp8(self) -> tuple[int, int]:
        """Let the large linear layers of the blocks learn in 8 bits (`fp8.py`).

        Returns:
            How many of them do, of how many.
        """
        layers = [module for module in self.blocks.modules() if isinstance(module, Linear)]
        for layer in layers:
            layer.learns_in_fp8 = suits_fp8(layer.weight)
        return sum(layer.learns_in_fp8 for layer in layers), len(layers)

    def compile_blocks(self, on: bool) -> None:
        """Let the blocks compute by compiled code where they learn, or no longer; evaluation and generation never do.

        One block is compiled, once, and serves all layers, so that compiling takes as long for a deep model as for a
        flat one. Dropout draws the same numbers as without. Shapes are fixed: another one is compiled anew.
        """
        compiled = None
        if on:  # else the compiler is not even imported, which takes as long as the rest of starting
            compiled = torch.compile(TransformerBlock.compute, dynamic=False, backend=compile_graph)
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            block.compiled = compiled

    def learn_by_kernels(self, *, attention: bool, head: bool) -> None:
        """Let attention, or the head and what it copies, learn on a CPU by kernels that numba compiles, or no longer.

        Args:
            head: this concerns products in fp32 alone.
        """
        self.head_by_kernels = head
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            block.attention.learn_by_kernels(attention)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.final_norm.weight.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        """What the hidden states are numbers of."""
        return self.final_norm.weight.dtype  # type: ignore[return-value]


@contextmanager
def inference(model: TransformerModel) -> Iterator[None]:
    """Switch dropout and gradients off, and give the model back in the mode that it was in."""
    was_training = model.training
    if was_training:  # going through all modules takes a good part of a small model's time for one token
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if was_training:
            model.train()
