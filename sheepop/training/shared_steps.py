"""What one token's embedding learns, those of tokens that are spelled alike learn in part.

Most entries of a vocabulary are rare, and a small text says little of each; but `Walked` is likely to be used as
` walked`, and not unlike `walks`. So an embedding is taken to be a row of its own plus those of its groups
(`data/spelling.py`), after the sums over parts of words of Bojanowski et al. 2017, fastText. The groups' rows exist
only as the sum of their steps, which goes into the embedding at once: model and checkpoint are the same as without.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from sheepop.config import Config

ROWS_OF_A_TOKEN = 0.7  # groups over tokens, of byte-level BPE of novels with 4,096 and 8,192 entries


def shared_rows(config: Config) -> int:
    """Return about how many rows beside its own a weight of the vocabulary's size has moments of, for its groups."""
    return round(ROWS_OF_A_TOKEN * config.model.vocab_size) if config.training.shared_spelling else 0


class SharedSteps:
    """Takes rows (V, D) of a weight for sums of rows, E = U + S·W, of which W (G, D) begins at zero.

    S (V, G) is 1/√n where a token is in one of its n groups. With the gradient ∂E, that of W is Sᵀ·∂E.

    Args:
        tokens, groups: pairs of a token and a group that it is in, by token; one at least.
        vocab_size: V.
        device: where the weight is.
    """

    def __init__(
        self, tokens: NDArray[np.int64], groups: NDArray[np.int64], vocab_size: int, device: torch.device
    ) -> None:
        sizes = np.bincount(tokens, minlength=vocab_size)
        weights = (1 / np.sqrt(sizes[tokens])).astype(np.float32)
        by_group = np.argsort(groups, kind="stable")
        self._of_tokens = _Sums(groups, weights, sizes, device)
        self._of_groups = _Sums(tokens[by_group], weights[by_group], np.bincount(groups), device)

    def gradient_of(self, gradient: Tensor) -> Tensor:
        """Return the gradient (G, D) of W for that of the weight, (V, D)."""
        return self._of_groups(gradient)

    def in_tokens(self, moves: Tensor) -> Tensor:
        """Return by how much the weight (V, D) moves where W moves by `moves`, (G, D)."""
        return self._of_tokens(moves)


class _Sums:
    """Sums of rows of a table, each times a weight."""

    def __init__(
        self, rows: NDArray[np.int64], weights: NDArray[np.float32], sizes: NDArray[np.int64], device: torch.device
    ) -> None:
        self._rows, self._weights = torch.from_numpy(rows).to(device), torch.from_numpy(weights).to(device)
        self._starts = torch.from_numpy(np.cumsum(sizes) - sizes).to(device)

    def __call__(self, table: Tensor) -> Tensor:
        return embedding_bag(self._rows, table, self._starts, mode="sum", per_sample_weights=self._weights)
