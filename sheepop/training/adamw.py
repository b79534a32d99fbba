"""AdamW: steps of the size of each weight's own usual gradient, with decay beside it (Loshchilov and Hutter 2019)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sheepop.training.shared_steps import SharedSteps


class AdamW(torch.optim.Optimizer):
    """AdamW in one fused kernel for each group of weights; equal to `torch.optim.AdamW(groups, fused=True)`.

    PyTorch's own class imports its compiler at the first step, which takes as long as starting does otherwise.

    Args:
        groups: each with `params`, `lr`, `betas`, `eps` and `weight_decay`.
        shared: steps that rows of a weight make in common, beside those of their own.

    Attributes:
        found_inf: a scalar on the device; where it is 1, a step changes no weight and no moment. None: all are made.
            The name is that by which PyTorch's `GradScaler` tells its optimizers.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], shared: Mapping[Tensor, SharedSteps] | None = None) -> None:
        super().__init__(groups, {})
        self._shared = dict(shared or {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all weights that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            move(parameters, gradients, [self.state[parameter] for parameter in parameters], group, self.found_inf)
            for parameter in parameters:
                groups = self._shared.get(parameter)
                if groups is not None:
                    gradient = groups.gradient_of(parameter.grad)  # (G, D)
                    moves = torch.zeros_like(gradient)
                    undecayed = group | {"weight_decay": 0.0}
                    move([moves], [gradient], [self.state[parameter]], undecayed, self.found_inf, prefix="shared_")
                    parameter += groups.in_tokens(moves)


def move(
    weights: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Any]],
    group: dict[str, Any],
    found_inf: Tensor | None = None,
    *,
    prefix: str = "",
) -> None:
    """Make one step of AdamW with weights that share their settings, in one fused kernel.

    Args:
        weights: changed in place.
        gradients: of each.
        states: of each, where the moments are kept.
        group: `lr`, `betas`, `eps` and `weight_decay`.
        found_inf: as of `AdamW`.
        prefix: of the names in the states.
    """
    for weight, state in zip(weights, states, strict=True):
        if prefix + "step" not in state:
            state[prefix + "step"] = torch.zeros((), device=weight.device)
            state[prefix + "exp_avg"] = torch.zeros_like(weight)
            state[prefix + "exp_avg_sq"] = torch.zeros_like(weight)
    steps, averages, squares = (
        [state[prefix + name] for state in states] for name in ("step", "exp_avg", "exp_avg_sq")
    )
    torch._foreach_add_(steps, 1)
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        weights,
        gradients,
        averages,
        squares,
        [],
        steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))
