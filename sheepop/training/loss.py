"""The training loss written out to be read: the reference that `models/head_loss.py` is tested against."""

from torch import Tensor
from torch.nn import functional as F

from sheepop.data.dataset import IGNORE_INDEX


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of -ln p(target) in nats over the targets that are not `IGNORE_INDEX`, as an fp32 scalar.

    A sum, not a mean: micro-batches and processes hold different numbers of real targets, and only the division
    by the total of the step makes the update independent of how the step was cut.

    Args:
        logits: (B, T, V), any floating type; summed in fp32.
        targets: (B, T) integers.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
