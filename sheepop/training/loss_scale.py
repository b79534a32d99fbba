"""Loss scaling for fp16, whose smallest gradients would vanish otherwise (Micikevicius et al. 2018)."""

from dataclasses import dataclass

GROW_AFTER = 2000  # steps without an overflow, then twice the scale
SMALLEST = 2.0**-10  # gradients that overflow even here are broken, not large


@dataclass
class LossScale:
    """What the loss is multiplied by before the backward pass, and its gradients divided by after it.

    Two numbers that are the same on every process, since all see the same gradient norm; PyTorch's own scaler asks
    each process for itself, which parts them when the gradients are sharded.
    """

    value: float = 2.0**16
    steps_without_overflow: int = 0

    def update(self, *, overflowed: bool) -> None:
        """Halve the scale after an overflow, double it after `GROW_AFTER` steps without one."""
        if overflowed:
            self.value, self.steps_without_overflow = self.value / 2, 0
            return
        self.steps_without_overflow += 1
        if self.steps_without_overflow == GROW_AFTER:
            self.value, self.steps_without_overflow = self.value * 2, 0

    @property
    def can_shrink(self) -> bool:
        """Whether an overflow may be the scale's fault."""
        return self.value > SMALLEST
