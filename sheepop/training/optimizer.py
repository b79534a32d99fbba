"""AdamW with decay only where it belongs."""

import torch
from torch import nn

from sheepop.config import TrainingConfig


def make_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019) over the model's parameters, in one fused kernel a step.

    Matrices are decayed. Norm weights and biases are not: shrinking a scale towards zero, or an offset, does not
    limit what a layer can express, it only fights the data.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.adam_epsilon,
        fused=True,
    )
