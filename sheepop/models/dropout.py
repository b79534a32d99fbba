"""Dropout, for which a CPU draws the random bits of four entries at once (Srivastava et al. 2014).

PyTorch draws a number for each entry, which takes 9 ns of one thread (`docs/log.md`, 2026-11-30). Small tensors are
left to it: there the calls cost more than the numbers.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_ENTRIES = 2**14
BITS = 16  # an entry, so that a share is met within 1/2^17
BIAS = 2 ** (BITS - 1)  # PyTorch compares signed numbers of 16 bits alone


def drop(hidden: Tensor, share: float) -> Tensor:
    """Set a share of the entries to zero and scale up the rest; a share of 0 costs nothing."""
    if not share:
        return hidden
    if hidden.device.type != "cpu":
        return F.dropout(hidden, share)
    return (hidden * kept_entries(hidden, share)).mul_(1 / (1 - share))


def kept_entries(hidden: Tensor, share: float) -> Tensor:
    """Return True for each entry with probability 1 - `share`, from the CPU's generator, in the shape of `hidden`."""
    return (opaque_draw if torch.compiler.is_compiling() else draw)(hidden, share)


def draw(hidden: Tensor, share: float) -> Tensor:
    """Do what `kept_entries` does where nothing is compiled."""
    if hidden.numel() < LEAST_ENTRIES:
        return torch.empty(hidden.shape, dtype=torch.bool).bernoulli_(1 - share)
    words = torch.empty(-(-hidden.numel() * BITS // 64), dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: hidden.numel()].view(hidden.shape)
    return numbers.ge(min(round(share * 2**BITS) - BIAS, BIAS - 1))


opaque_draw = torch.library.custom_op(
    "sheepop::draw_kept_entries", draw, mutates_args=(), tags=torch.Tag.nondeterministic_seeded
)


@opaque_draw.register_fake
def shape_of_draw(hidden: Tensor, _share: float) -> Tensor:
    """Return what has the shape and type of what is drawn, for the compiler."""
    return torch.empty(hidden.shape, dtype=torch.bool, device=hidden.device)
