"""Ideas for the recipe that are no settings: `sheepop` with one of them patched in, for `ablations.py`.

    python benchmarks/patched.py "soft cap" train --data FOLDER ...

They change single places of the model or of the loop, and say with that what it would take to have them for good.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import sheepop.models.transformer as transformer
import sheepop.training.run as run
from sheepop.cli import main
from sheepop.models.transformer import TransformerModel

CAP = 30.0  # largest logit
AVERAGED = 0.98  # decay of the average of weights


def soft_cap() -> None:
    """Let no logit grow beyond a cap, smoothly (Gemma Team 2024)."""

    def capped(logits: Tensor) -> Tensor:
        return CAP * torch.tanh(logits.float() / CAP)

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = capped(linear(hidden, weight)).flatten(0, 1)  # (N, V)
        return cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")

    plain = TransformerModel.logits
    transformer.summed_head_loss = loss
    TransformerModel.logits = lambda self, hidden: capped(plain(self, hidden))  # type: ignore[method-assign]


def in_training(change: Callable[[float, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Let something change the batch (B, T) of each step, of which it gets the share of the run that is over."""
    plain, steps, total = TransformerModel.forward, 0, steps_of_run()

    def forward(self: TransformerModel, token_ids: Tensor, *, targets: Tensor | None = None, **more: Any) -> Tensor:
        nonlocal steps
        if self.training and targets is not None:
            token_ids, targets = change(steps / total, token_ids, targets)
            steps += 1
        return plain(self, token_ids, targets=targets, **more)

    TransformerModel.forward = forward  # type: ignore[method-assign]


def context_warm_up() -> None:
    """Cut sequences into four for the first quarter of the run, and in two for the second."""

    def cut(done: float, token_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        pieces = 4 if done < 0.25 else 2 if done < 0.5 else 1
        length = token_ids.shape[1] // pieces
        return token_ids.reshape(-1, length), targets.reshape(-1, length)

    in_training(cut)


def batch_warm_up() -> None:
    """Learn from half of each batch for two fifths of the run, which is to have a quarter more steps for it.

    The loss of a step is then half as large, which neither Muon nor AdamW heeds.
    """

    def halve(done: float, token_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = len(token_ids) // 2 if done < 0.4 else len(token_ids)
        return token_ids[:rows], targets[:rows]

    in_training(halve)


def averaged_weights() -> None:
    """End with a running average of the weights instead of the last ones."""
    make, total = run.make_optimizer, steps_of_run()

    def make_averaging(model: TransformerModel, *others: Any) -> torch.optim.Optimizer:
        optimizer, steps = make(model, *others), 0
        means = [parameter.detach().clone() for parameter in model.parameters()]

        def average(*_: Any) -> None:
            nonlocal steps
            steps += 1
            with torch.no_grad():
                torch._foreach_lerp_(means, list(model.parameters()), 1 - min(AVERAGED, steps / (steps + 1)))
                if steps == total:
                    torch._foreach_copy_(list(model.parameters()), means)

        optimizer.register_step_post_hook(average)
        return optimizer

    run.make_optimizer = make_averaging


PATCHES = {
    "soft cap": soft_cap,
    "context warm-up": context_warm_up,
    "batch warm-up": batch_warm_up,
    "averaged weights": averaged_weights,
}


def steps_of_run() -> int:
    """Return the steps that the command line asks for."""
    return int(sys.argv[sys.argv.index("--training.max_steps") + 1])


if __name__ == "__main__":
    PATCHES[sys.argv.pop(1)]()
    sys.exit(main())
