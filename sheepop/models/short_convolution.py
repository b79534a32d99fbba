"""A short causal convolution: what a layer reads at a token is mixed with the same of the few tokens before.

Each channel has weights of its own (depthwise), and the token itself stays as it is (Allen-Zhu 2025, Canon layers; So
et al. 2021, Primer). Small models learn from it what follows what without spending attention on neighbours.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sheepop.config import ModelConfig
from sheepop.models.kv_cache import Cache


class ShortConvolution(nn.Module):
    """y_t = x_t + Σ_j w_j ⊙ x_{t-j} over the `conv_width` - 1 tokens before.

    Args:
        config: the model's settings.
        layer: of the block.
        site: 0 before attention, 1 before the feed-forward.
    """

    def __init__(self, config: ModelConfig, layer: int, site: int) -> None:
        super().__init__()
        self.layer, self.site = layer, site
        self.weight = nn.Parameter(torch.empty(config.conv_width - 1, config.d_model))

    def forward(self, hidden: Tensor, cache: Cache | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D).

        Args:
            cache: has what this convolution read at the tokens before these, and is given what it reads now.
            document_ids: (B, T); tokens of another document count as none.
        """
        back, time = len(self.weight), hidden.shape[1]
        if cache is None:
            stream = F.pad(hidden, (0, 0, back, 0))  # (B, back + T, D)
        else:
            stream = cache.remember(self.layer, self.site, hidden, back)
        mixed = hidden
        for distance in range(1, back + 1):
            earlier = stream[:, back - distance :][:, :time]
            if document_ids is not None:
                is_same = document_ids[:, distance:] == document_ids[:, :-distance]  # (B, T - distance)
                earlier = earlier * F.pad(is_same, (min(distance, time), 0)).unsqueeze(-1)
            mixed = mixed + self.weight[distance - 1] * earlier
        return mixed
