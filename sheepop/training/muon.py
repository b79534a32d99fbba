"""Muon: momentum whose matrices are made orthogonal before they move the weights (Jordan et al. 2024).

The matrix of a gradient usually has few large singular values, so plain steps move along few directions. Newton–Schulz
iterations bring all of its singular values near one, with matrix products alone.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from sheepop.training.adamw import AdamW
from sheepop.training.shared_steps import SharedSteps

# The quintic of Jordan et al.: as steep at zero as it can be, so that five rounds bring small singular values up too.
# They end between about 0.7 and 1.2, which serves as well as exactly one.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
# Fewer rounds serve as well with a polynomial for each (Amsel et al. 2025): the one nearest to one wherever the rounds
# before it leave singular values that began between 0.01, or 0.003 for four rounds, and one. They end within 0.27 of
# one, or 0.2.
FEWER_ROUNDS = {
    3: ((8.0928, -23.618, 17.444), (3.6366, -2.7219, 0.53652), (2.6614, -1.9773, 0.45263)),
    4: (
        (8.3829, -24.763, 18.354),
        (4.0432, -3.0111, 0.56945),
        (3.5056, -2.6267, 0.52571),
        (2.4903, -1.8344, 0.43686),
    ),
}
EPSILON = 1e-7


def orthogonalize(matrices: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Bring the singular values of each matrix near one, UΣVᵀ to about UVᵀ: (N, R, C) to (N, R, C), R ≤ C.

    In 3, 4 or `ROUNDS` rounds.
    """
    # The Frobenius norm is an upper bound of the largest singular value, which must not exceed one.
    result: Tensor = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for coefficients in FEWER_ROUNDS.get(rounds, (COEFFICIENTS,) * ROUNDS):
        result = newton_schulz(result, coefficients)
    return result


def newton_schulz(matrices: Tensor, coefficients: tuple[float, float, float] = COEFFICIENTS) -> Tensor:
    """Return aX + (bXXᵀ + c(XXᵀ)²)X of each matrix (N, R, C): its singular values s become as + bs³ + cs⁵."""
    a, b, c = coefficients
    gram = matrices @ matrices.mT  # (N, R, R)
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    return torch.baddbmm(matrices, polynomial, matrices, beta=a)


@dataclass(frozen=True)
class Piece:
    """What moves a piece of a weight; both lie with no more rows than columns.

    Attributes:
        direction, weight: (R, C), or transposed.
        rate: of the step along the orthogonal direction.
        squares: the mean squares of the updates of the piece's rows, (R,); None where they do not matter.
    """

    direction: Tensor
    weight: Tensor
    rate: float
    squares: Tensor | None


def balance_rows(updates: Tensor, squares: list[Tensor], share: float | Tensor, *, dim: int) -> Tensor:
    """Divide each row of the updates (N, R, C) by the root of its usual mean square; their norms stay (Li et al. 2025).

    Orthogonal updates of equal norm still move some neurons more than others, step after step.

    Args:
        squares: of each matrix the running mean of its rows' mean squares, which goes on here.
        share: of the newest in it.
        dim: over which a row extends, -1, or -2 where the matrices are transposed.
    """
    found = updates.square().mean(dim)  # (N, R)
    for usual, square in zip(squares, found, strict=True):
        usual.lerp_(square, share)
    scales = torch.stack(squares).clamp(min=EPSILON**2).rsqrt()  # (N, R)
    shares = found.sum(-1, keepdim=True) / (found * scales.square()).sum(-1, keepdim=True).clamp(min=EPSILON**2)
    return updates * (scales * shares.sqrt()).unsqueeze(dim)


class Muon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for all else, as one optimizer with one state.

    A matrix that is several behind each other, such as the projection to queries, keys and values, is made orthogonal
    piece by piece; pieces of the same shape all at once. Updates have the size of AdamW's, 0.2 √max(R, C) times an
    orthogonal matrix (Liu et al. 2025), so that one weight decay and one schedule serve both.

    Args:
        matrices: groups with `params`, `lr` and `weight_decay`; `pieces` says how many rows each piece of its matrices
            has, None for whole ones.
        others: groups for AdamW, with all that it takes.
        shared: as of `AdamW`.
        momentum: decay of the running sum of gradients.
        dtype: of the iterations, in which rounding does not matter.
        rounds: of the iterations, 3, 4 or 5.
        beta2: decay of the mean squares that rows are divided by (`balance_rows`); 0: they are not.

    Attributes:
        found_inf: as of `AdamW`.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        matrices: list[dict[str, Any]],
        others: list[dict[str, Any]],
        shared: Mapping[Tensor, SharedSteps] | None = None,
        *,
        momentum: float,
        dtype: torch.dtype = torch.float32,
        rounds: int = ROUNDS,
        beta2: float = 0.0,
    ) -> None:
        super().__init__(matrices, {"lr": 0.0, "weight_decay": 0.0, "pieces": None})
        self.momentum, self.dtype, self.rounds, self.beta2 = momentum, dtype, rounds, beta2
        self.matrices = list(self.param_groups)
        self.adamw = AdamW(others, shared)
        self.adamw.state = self.state
        self.param_groups += self.adamw.param_groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all weights that have a gradient."""
        assert closure is None
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        momentum_kept = self._unless_refused(self.momentum, 1.0)
        share = self._unless_refused(1 - self.beta2, 0.0)
        work: dict[tuple[int, int, bool], list[Piece]] = defaultdict(list)  # by shape, and whether transposed
        for group in self.matrices:
            weight_kept = self._unless_refused(1 - group["lr"] * group["weight_decay"], 1.0)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = self._unless_refused(parameter.grad, 0.0)
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                if self.beta2 and "row_squares" not in state:  # also of a run that goes on with it
                    state["row_squares"] = parameter.new_zeros(len(parameter))
                momentum = state["momentum"].mul_(momentum_kept).add_(gradient)
                ahead = gradient.add(momentum, alpha=self.momentum)  # Nesterov
                parameter.mul_(weight_kept)
                pieces = group["pieces"] or [len(parameter)]
                squares = state["row_squares"].split(pieces) if self.beta2 else [None] * len(pieces)
                for direction, weight, usual in zip(ahead.split(pieces), parameter.split(pieces), squares, strict=True):
                    rows, columns = weight.shape
                    rate = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
                    is_tall = rows > columns
                    if is_tall:
                        direction, weight = direction.mT, weight.mT
                    work[*weight.shape, is_tall].append(Piece(direction, weight, rate, usual))
        for (_, _, is_tall), moved in work.items():
            directions = torch.stack([piece.direction for piece in moved]).to(self.dtype)
            updates = orthogonalize(directions, self.rounds).to(moved[0].weight.dtype)
            if self.beta2:
                usual_squares = [piece.squares for piece in moved if piece.squares is not None]
                updates = balance_rows(updates, usual_squares, share, dim=-2 if is_tall else -1)
            updates = self._unless_refused(updates, 0.0)
            for update, piece in zip(updates, moved, strict=True):
                piece.weight.add_(update, alpha=-piece.rate)

    @overload
    def _unless_refused(self, value: Tensor, otherwise: float) -> Tensor: ...

    @overload
    def _unless_refused(self, value: float, otherwise: float) -> float | Tensor: ...

    def _unless_refused(self, value: float | Tensor, otherwise: float) -> float | Tensor:
        """Return a number that a step is made with, or where the device refuses the step, one that changes nothing."""
        if self.found_inf is None:
            return value
        return torch.where(self.found_inf == 0, value, otherwise)
