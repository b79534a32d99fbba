"""Steps whose numbers are read when the next one is under way, so that a GPU never waits for Python.

To read a loss is to wait until the device has found it; then nothing is queued, and the device waits in turn while
Python prepares the next step. So whether a step is made is decided where its numbers are, by kernels, and what was
decided is read a step later.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sheepop.config import TrainingConfig
from sheepop.training.guard import Guard


class Refusals:
    """Leaves out steps whose loss or gradient is not finite, as `Guard` does, without asking the device for either.

    After a step that ends the run none is made any more, since Python learns of it too late for the next one.

    Args:
        guard: of the steps before.
        training: says how many steps may be left out in a row.
        device: where all is decided.
    """

    def __init__(self, guard: Guard, training: TrainingConfig, device: torch.device) -> None:
        self._allowed = 0 if training.on_bad_numbers == "stop" else training.max_skipped_steps
        self._in_a_row = torch.tensor(float(guard.skipped_in_a_row)).to(device)

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Return 1 if the step with these numbers is not to be made, else 0, as an fp32 scalar on the device."""
        is_finite = loss.isfinite() & grad_norm.isfinite()
        is_refused = (~is_finite) | (self._in_a_row > self._allowed)
        self._in_a_row = torch.where(is_refused, self._in_a_row + 1, 0.0)
        return is_refused.float()


@dataclass(frozen=True)
class StepNumbers:
    """What a step says about itself, where its device has it.

    Attributes:
        values: (3,): loss in nats per token, before the update; how many processes were asked to stop; norm of the
            gradient before clipping.
        num_targets: tokens looked at, over all processes; a scalar on the device where there are several.
    """

    values: Tensor
    num_targets: int | Tensor

    def read(self) -> tuple[float, float, float, int]:
        """Wait for the device and return the three values and the number of targets."""
        loss, stops, grad_norm = self.values.tolist()
        return loss, stops, grad_norm, int(self.num_targets)


class QueuedNumbers:
    """Numbers on their way to Python, which goes on meanwhile."""

    def __init__(self, numbers: StepNumbers) -> None:
        on_cpu = torch.device("cpu")
        self._values = numbers.values.to(on_cpu, non_blocking=True)  # into pinned memory
        count = numbers.num_targets
        self._num_targets = count.to(on_cpu, non_blocking=True) if isinstance(count, Tensor) else count
        self._arrival = None
        if numbers.values.is_cuda:
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()

    def read(self) -> tuple[float, float, float, int]:
        """As `StepNumbers.read`, for which it waits until these are there, but not for what was queued since."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return StepNumbers(self._values, self._num_targets).read()
