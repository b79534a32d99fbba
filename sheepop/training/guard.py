"""What to do about numbers that are not finite, and about losses that jump.

Every process sees the same loss and the same gradient norm, summed over all of them, so all decide alike.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

from sheepop.config import TrainingConfig

Verdict = Literal["good", "bad", "spike"]

HISTORY = 128  # steps that a loss is compared with; the window and the six deviations are those of OLMo-core
LEAST_HISTORY = 32  # fewer losses do not tell how much they vary


@dataclass
class Guard:
    """What the guard remembers; saved with the run, so that a resumed run judges like an undisturbed one.

    Attributes:
        recent_losses: nats per token of the last steps that were made.
        skipped_in_a_row, skipped: steps that were left out, lately and ever.
        spikes: jumps of the loss that were seen, left out or not.
    """

    recent_losses: list[float] = field(default_factory=list)
    skipped_in_a_row: int = 0
    skipped: int = 0
    spikes: int = 0

    def judge(self, loss: float, grad_norm: float, training: TrainingConfig) -> Verdict:
        """Say what a step's loss and gradient norm are: `good`, `bad` (not finite) or a `spike` of the loss."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return "bad"
        if training.on_loss_spike != "ignore" and len(self.recent_losses) >= LEAST_HISTORY:
            mean, deviation = self.usual_loss()
            if loss > mean + training.spike_threshold * deviation:
                return "spike"
        return "good"

    def note(self, verdict: Verdict, loss: float, *, is_updated: bool) -> None:
        """Remember a step that was judged, and whether it was made."""
        self.spikes += verdict == "spike"
        if is_updated:
            self.skipped_in_a_row = 0
            self.recent_losses = [*self.recent_losses[1 - HISTORY :], loss]
        else:
            self.skipped_in_a_row += 1
            self.skipped += 1

    def usual_loss(self) -> tuple[float, float]:
        """Return mean and standard deviation of the recent losses."""
        count = len(self.recent_losses)
        mean = math.fsum(self.recent_losses) / count
        return mean, math.sqrt(math.fsum((loss - mean) ** 2 for loss in self.recent_losses) / count)


def allows_update(verdict: Verdict, training: TrainingConfig) -> bool:
    """Say whether a step with this verdict is made."""
    return verdict == "good" or (verdict == "spike" and training.on_loss_spike == "report")
