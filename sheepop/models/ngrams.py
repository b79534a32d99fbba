"""Embeddings of the last few tokens together: what usually follows a group of letters, learned at the first layer.

Each length of group has a table of its own, whose rows are found by a hash (Pagnoni et al. 2024, section 3.2.1; Huang
et al. 2025). The tables hold most of a small network's parameters and cost one look-up a token each, so that the
layers need not be spent on spelling.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sheepop.config import ModelConfig
from sheepop.models.blocks import Embedding
from sheepop.models.sizing import ngram_table_sizes

MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio, as int64: spreads neighbours (Knuth, 6.4)


class NgramEmbedding(nn.Module):
    """The sum of what the tables hold for the last 2, 3, ... `ngram_order` tokens at each position."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.order, self.vocab_size = config.ngram_order, config.vocab_size
        self.sizes = ngram_table_sizes(config)
        self.tables = nn.ModuleList(Embedding(size, config.d_model) for size in self.sizes)

    def forward(self, token_ids: Tensor, before: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Map (B, T) token ids to (B, T, D).

        Args:
            before: (B, `ngram_order` - 1) ids of the tokens before these, -1 where there are none.
            document_ids: (B, T); tokens of another document count as none.
        """
        time, symbols = token_ids.shape[1], self.vocab_size + 1
        tokens = torch.cat((before, token_ids), dim=1) + 1  # (B, order - 1 + T), 0 for none
        group = tokens[:, self.order - 1 :]  # (B, T), the group as a number whose digits are its tokens
        embedded: list[Tensor] = []
        for back, (table, size) in enumerate(zip(self.tables, self.sizes, strict=True), start=1):
            earlier = tokens[:, self.order - 1 - back :][:, :time]
            if document_ids is not None:
                is_same = document_ids[:, back:] == document_ids[:, :-back]  # (B, T - back)
                earlier = torch.where(F.pad(is_same, (min(back, time), 0)), earlier, 0)
            group = group * symbols + earlier  # wraps at 64 bits
            rows = group
            if symbols ** (back + 1) > size:
                mixed = group * MULTIPLIER  # its upper bits depend on all tokens
                rows = (mixed ^ (mixed >> 32)) % size
            embedded.append(table(rows))
        return torch.stack(embedded).sum(0) if len(embedded) > 1 else embedded[0]
