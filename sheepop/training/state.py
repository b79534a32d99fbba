"""The parts of a run that the loop works with, and the few numbers that change as it goes."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sheepop.config import Config
from sheepop.data.corpus import Corpus
from sheepop.data.packing import PackingPlan
from sheepop.data.sampler import Sampler
from sheepop.data.tokenizer import Tokenizer
from sheepop.models.transformer import TransformerModel
from sheepop.training.distributed import Parallel, World
from sheepop.training.guard import Guard
from sheepop.training.loss_scale import LossScale
from sheepop.training.schedule import Anchor
from sheepop.utils.devices import Precision


@dataclass
class TrainingState:
    """Where a run stands. Everything else about the next step follows from it and the settings.

    Random numbers need no stored generator: dropout draws from `(seed, step, micro_step)`, the sampler from
    `(seed, step)`.

    Attributes:
        total_steps: of the whole run; under a time budget it is decided again on the way.
        anchor: of the last time that it changed, or None.
        elapsed_seconds: of training, with what goes on between the steps.
        starting_seconds: under a time budget, what starting took, of all the processes that went on with this run.
        pause_seconds: under a time budget, what the last validation took, with its sample and checkpoint.
        is_unfinished: the run left before it validated and sampled at `step`, which is to be made up for.
    """

    total_steps: int
    data_fingerprint: str
    step: int = 0
    tokens: int = 0
    elapsed_seconds: float = 0.0
    starting_seconds: float = 0.0
    pause_seconds: float = 0.0
    anchor: Anchor | None = None
    best_loss: float | None = None
    best_step: int | None = None
    is_unfinished: bool = False
    loss_scale: LossScale = field(default_factory=LossScale)
    guard: Guard = field(default_factory=Guard)

    @staticmethod
    def from_json(saved: dict[str, Any]) -> "TrainingState":
        """Read what `dataclasses.asdict` wrote.

        Raises:
            TypeError: fields are missing or unknown.
        """
        anchor = saved.get("anchor")
        parts = {
            "loss_scale": LossScale(**saved["loss_scale"]),
            "guard": Guard(**saved["guard"]),
            "anchor": None if anchor is None else Anchor(**anchor),
        }
        return TrainingState(**{**saved, **parts})


@dataclass
class Learner:
    """What one step of training works with; `state` is what changes.

    Attributes:
        forward: what the step calls: the model, or the model inside PyTorch's data-parallel wrapper.
        parallel: how several processes share the model.
    """

    config: Config
    model: TransformerModel
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    world: World
    parallel: Parallel
    state: TrainingState


@dataclass
class Run(Learner):
    """A learner with its text and the folder that it writes to.

    Attributes:
        began: reading of `time.perf_counter` from which this process takes time out of a time budget.
    """

    folder: Path
    corpus: Corpus
    tokenizer: Tokenizer
    sampler: Sampler
    packing: PackingPlan | None = None
    began: float = field(default_factory=time.perf_counter)
