"""The optimizer of a run: AdamW, or Muon for the matrices inside the blocks; decay only where it belongs."""

import sys

import numpy as np
import torch
from numpy.typing import NDArray

from sheepop.config import TrainingConfig
from sheepop.models.transformer import TransformerModel
from sheepop.training.adamw import AdamW
from sheepop.training.muon import Muon
from sheepop.training.shared_steps import SharedSteps
from sheepop.utils.devices import cpu_has_bf16

Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


def make_optimizer(
    model: TransformerModel, training: TrainingConfig, spelling: Pairs | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer that the settings ask for, over all of the model's parameters.

    Matrices are decayed. Norm weights and biases are not: shrinking a scale towards zero, or an offset, does not
    limit what a layer can express, it only fights the data. The rate of each group is `training.learning_rate` times
    the group's `lr_ratio`.

    - `adamw` (Loshchilov and Hutter 2019), in one fused kernel a step;
    - `muon` (Jordan et al. 2024) for the matrices inside the blocks, with AdamW for embeddings, head and vectors.

    Args:
        spelling: pairs of a token and a group of tokens that move together (`shared_steps.py`); None: none do.
    """
    leave_compiler_out()
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    inner = {
        name
        for name, parameter in named.items()
        if name.startswith("blocks.") and parameter.dim() == 2 and not name.endswith("convolution.weight")
    }
    use_muon = training.optimizer == "muon"
    decayed = [p for name, p in named.items() if p.dim() >= 2 and not (use_muon and name in inner)]
    others = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = {
        "lr": training.learning_rate,
        "lr_ratio": 1.0,
        "betas": (training.beta1, training.beta2),
        "eps": training.adam_epsilon,
    }
    others = [group | adamw for group in others]
    shared = {}
    if spelling is not None and len(spelling[0]):
        steps = SharedSteps(*spelling, model.config.vocab_size, model.device)
        shared = dict.fromkeys([model.token_embedding.weight, model.head.weight], steps)
    if not use_muon:
        return AdamW(others, shared)
    C, K, H, F = model.config.head_dim, model.config.num_kv_heads, model.config.num_heads, model.config.d_ff
    pieces = {
        "query_key_value.weight": [H * C, K * C, K * C],
        "feed_forward.input.weight": [F, F] if model.config.is_gated else None,
    }
    ends = {name: next((end for end in pieces if name.endswith(end)), None) for name in inner}
    matrices = [
        {
            "params": [named[name] for name in sorted(inner) if ends[name] == end],
            "pieces": None if end is None else pieces[end],
            "lr": training.learning_rate,
            "lr_ratio": training.muon_lr_ratio,
            "weight_decay": training.weight_decay,
        }
        for end in (*pieces, None)
    ]
    has_bf16 = model.device.type == "cuda" or cpu_has_bf16()
    dtype = torch.bfloat16 if has_bf16 else torch.float32
    return Muon(
        matrices,
        others,
        shared,
        momentum=training.muon_momentum,
        dtype=dtype,
        rounds=training.muon_rounds,
        beta2=training.muon_beta2,
    )


def leave_compiler_out() -> None:
    """Let optimizers work without PyTorch's compiler, whose import takes as long as that of all the rest.

    It is imported to mark some methods of PyTorch's base class as not to be compiled, at their first call. Nothing here
    compiles an optimizer, so the methods are put as they are where the marked ones are looked for.
    """
    if "torch._dynamo" in sys.modules:
        return
    for method in vars(torch.optim.Optimizer).values():
        unmarked = getattr(method, "__wrapped__", None)
        if unmarked is not None and not hasattr(unmarked, "__dynamo_disable"):
            unmarked.__dynamo_disable = unmarked
