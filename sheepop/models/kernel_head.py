"""The output head and its gradients in fp32 by compiled kernels (`head_kernels.py`), for some tokens at a time.

Shape letters: n tokens, N of them with those that fill the last block, V entries, D width, P width of a panel.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sheepop.utils.threads import on_all_threads

WIDTHS = 32  # the width is a multiple of it


def suits_kernels(width: int, dtype: torch.dtype) -> bool:
    """Say whether there are kernels for products in a type of what has such a width."""
    return dtype == torch.float32 and width % WIDTHS == 0


def learns_by_kernels(weight: Tensor, dtype: torch.dtype) -> bool:
    """Say whether a head of this weight (V, D) can learn by kernels."""
    return weight.device.type == "cpu" and weight.dtype == dtype and suits_kernels(weight.shape[1], dtype)


class KernelHead:
    """What `OperatorHead` of `head_loss.py` does, with the powers of e of all scores kept instead of errors.

    They become errors with the factors of their tokens, once these are known.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        """Get ready for at most so many rows at a time."""
        from sheepop.models.head_kernels import ENTRIES, TOKENS, new_powers  # numba, which takes half a second to load
        from sheepop.models.squares import LOW, PANEL

        self.sides, self.panel = (TOKENS, ENTRIES), PANEL
        self.weight, self.gradient = weight.detach().contiguous(), torch.empty(weight.shape)
        self.left_over = len(weight) % ENTRIES
        rest = self.weight[len(weight) - self.left_over :]
        self.last = F.pad(rest, (0, 0, 0, -len(rest) % LOW))
        self.last_gradient = torch.empty_like(self.last)
        self.memory = new_powers(rows, len(weight))

    @property
    def weight_gradient(self) -> Tensor:
        """The gradient (V, D) of the weight, once all tokens are in it."""
        self.gradient[len(self.gradient) - self.left_over :] = self.last_gradient[: self.left_over]
        return self.gradient

    def score(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return -ln p(target) in nats and the logit of the target, (n,) each, for inputs (n, D) and targets (n,)."""
        from sheepop.models.head_kernels import find_powers

        tokens = self.sides[0]
        missing = -len(inputs) % tokens
        self.inputs, self.targets = F.pad(inputs, (0, 0, 0, missing)), F.pad(targets, (0, missing))
        self.powers = self.memory[: len(self.inputs) // tokens]
        in_blocks = self.inputs.view(len(self.powers), tokens // self.panel, self.panel, -1)
        turned = in_blocks.transpose(2, 3).contiguous()  # (N / 128, 128 / P, D, P)
        scores, bases, self.totals = torch.empty(3, len(self.inputs))
        tensors = turned, self.weight, self.last, self.targets, self.powers, scores, bases, self.totals
        arrays = [tensor.numpy() for tensor in tensors]
        on_all_threads(lambda part: find_powers(*arrays, part.start, part.stop), rows=len(self.powers))
        losses = (self.totals.log() + bases - scores)[: len(inputs)]
        self.set_right(torch.exp(-losses) - 1)
        return losses, scores[: len(inputs)]

    def set_right(self, errors: Tensor) -> None:
        """Set the errors (n,) of the targets themselves."""
        targets = self.targets[: len(errors)]
        (block, row), (other, column) = (
            (torch.div(of, side, rounding_mode="floor"), of % side)
            for of, side in zip((torch.arange(len(errors)), targets), self.sides, strict=True)
        )
        self.powers[block, other, column, row] = errors * self.totals[: len(errors)]

    def weigh(self, weights: Tensor) -> None:
        """Let the errors of each token count so much, (n,)."""
        self.factors = torch.zeros_like(self.totals)
        self.factors[: len(weights)] = weights / self.totals[: len(weights)]

    def find_hidden_gradient(self, gradient: Tensor) -> None:
        """Set the gradient (n, D) of the inputs."""
        from sheepop.models.head_kernels import find_hidden_gradient

        whole = gradient if len(gradient) == len(self.inputs) else torch.empty_like(self.inputs)
        arrays = [tensor.numpy() for tensor in (self.powers, self.weight, self.last, self.factors, whole)]
        on_all_threads(lambda part: find_hidden_gradient(*arrays, part.start, part.stop), rows=len(self.powers))
        if whole is not gradient:
            gradient.copy_(whole[: len(gradient)])

    def add_weight_gradient(self, *, is_first: bool) -> None:
        """Add to the gradient (V, D) of the weight; the first replaces what was there."""
        from sheepop.models.head_kernels import add_to_weight_gradient

        weighed = self.inputs * self.factors[:, None]
        panels = weighed.view(len(weighed), -1, self.panel).transpose(0, 1).contiguous()  # (D / P, N, P)
        arrays = [tensor.numpy() for tensor in (self.powers, panels, self.gradient, self.last_gradient)]
        on_all_threads(
            lambda part: add_to_weight_gradient(*arrays, is_first, part.start, part.stop), rows=self.powers.shape[1]
        )
