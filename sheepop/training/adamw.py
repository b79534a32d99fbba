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
    """

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
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)

            def held(name: str, parameters: list[Tensor] = parameters) -> list[Tensor]:
                return [self.state[parameter][name] for parameter in parameters]

            steps = held("step")
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                parameters,
                [parameter.grad for parameter in parameters],
                held("exp_avg"),
                held("exp_avg_sq"),
                [],
                steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            for parameter in parameters:
                if parameter in self._shared:
                    self._shared[parameter].step(parameter, parameter.grad, self.state[parameter], group)
