"""What the notebooks and the guided tour share: a text that is at hand, a model trained while you wait, pictures."""

import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from sheepop.config import ModelConfig, TrainingConfig
from sheepop.data.corpora import clean_play, installed_files
from sheepop.data.dataset import num_windows, read_windows
from sheepop.data.sampler import Sampler
from sheepop.data.tokenizer import Tokenizer
from sheepop.evaluation.plots import to_png
from sheepop.models.transformer import TransformerModel, inference
from sheepop.training.loss import summed_cross_entropy
from sheepop.training.optimizer import make_optimizer
from sheepop.training.schedule import learning_rate_at
from sheepop.utils.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def some_text(characters: int = 1_000_000) -> tuple[str, str]:
    """Return what it is and a text: Shakespeare's plays, or Python's own library where they are not installed."""
    try:
        parts = [clean_play(file.read_text(encoding="utf-8")) for file in installed_files("plays")[:8]]
        name = "Shakespeare's plays"
    except DataError:
        parts = [file.read_text(encoding="utf-8", errors="replace") for file in installed_files("python")]
        name = "the source of Python's standard library"
    return name, "\n\n".join(parts)[:characters]


@dataclass(frozen=True)
class SmallModel:
    """A model of some hundred thousand weights, with what it was made from.

    Attributes:
        train_tokens, val_tokens: (num_tokens,) each; the model has never seen the second.
        losses: of each training step, in nats per token.
    """

    model: TransformerModel
    tokenizer: Tokenizer
    train_tokens: NDArray[np.uint32]
    val_tokens: NDArray[np.uint32]
    losses: list[float]


def train_small_model(
    text: str,
    *,
    steps: int = 200,
    vocab_size: int = 512,
    context: int = 64,
    batch_size: int = 16,
    learning_rate: float = 4e-3,
    seed: int = 1,
) -> SmallModel:
    """Train four small blocks on a text for some seconds; the notebook on training does the same in the open."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train("bpe", [text], vocab_size=vocab_size)
    tokens = tokenizer.encode_array(text)
    split = len(tokens) - len(tokens) // 20
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=96, num_layers=4, num_heads=4, max_seq_len=context, dropout=0.0
    )
    training = TrainingConfig(learning_rate=learning_rate, warmup_steps=20)
    model = TransformerModel(config)
    optimizer = make_optimizer(model, training)
    sampler = Sampler(num_windows(split, context, context), batch_size, gradient_accumulation_steps=1, seed=seed)
    losses = []
    for step in range(steps):
        inputs, targets = read_windows(tokens[:split], sampler.windows_of(step) * context, context)
        wanted = torch.from_numpy(targets)
        loss = model(torch.from_numpy(inputs), targets=wanted) / (wanted >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps, training)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return SmallModel(model, tokenizer, tokens[:split], tokens[split:], losses)


def held_out_loss(model: TransformerModel, tokens: NDArray[np.uint32], windows: int = 32) -> float:
    """Return the mean loss in nats per token over the first windows of a text."""
    context = model.config.max_seq_len
    starts = np.arange(min(windows, num_windows(len(tokens), context, context))) * context
    inputs, targets = read_windows(tokens, starts, context)
    with inference(model):
        loss = summed_cross_entropy(model(torch.from_numpy(inputs)), torch.from_numpy(targets))
    return float(loss) / int((targets >= 0).sum())


def show(figure: "Figure", name: str) -> None:
    """Show a picture under its cell in a notebook; a script writes it as PNG into the folder of `figure_folder`."""
    png = to_png(figure)
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if getattr(shell, "kernel", None) is not None:
        from IPython.display import Image, display

        display(Image(png, width=round(96 * figure.get_figwidth())))
        return
    path = figure_folder() / f"{name}.png"
    path.write_bytes(png)
    print(f"[picture: {path}]")


@cache
def figure_folder() -> Path:
    """Return the folder that a script's first argument names, or a new temporary one."""
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return Path(tempfile.mkdtemp(prefix="sheepop-notebook-"))
