import os
import pkgutil
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sheepop.config import Config, load_config
from sheepop.data.prepare import prepare_corpus
from sheepop.models.transformer import TransformerModel
from sheepop.training.checkpoint import save_checkpoint, take_snapshot
from sheepop.training.distributed import World
from sheepop.training.optimizer import make_optimizer
from sheepop.training.run import start_run
from sheepop.training.state import Run, TrainingState
from sheepop.training.step import micro_batch_loss
from sheepop.utils.devices import FP32

sys.path.insert(0, str(Path(__file__).parent))

from copies import Break, Copies

WORDS = [
    "a",
    "the",
    "old",
    "young",
    "sheep",
    "dog",
    "hill",
    "sees",
    "hears",
    "follows",
    "leaves",
    "and",
    "but",
    "no",
    "one",
    "at",
    "night",
    "by",
    "day",
]

# 7 steps an epoch: 38 windows in steps of 6, the last one short; all sizes differ.
TINY: dict[str, object] = {
    "model.d_model": 20,
    "model.num_layers": 2,
    "model.num_heads": 5,
    "model.d_ff": 27,
    "model.max_seq_len": 14,
    "training.batch_size": 3,
    "training.gradient_accumulation_steps": 2,
    "training.warmup_steps": 4,
    "training.learning_rate": 3e-3,
    "training.precision": "fp32",
    "training.log_interval": 1,
    "training.sample_tokens": 3,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory) -> Path:
    """A prepared folder of characters whose training side has 38 windows of 14 tokens."""
    folder = tmp_path_factory.mktemp("text")
    source = folder / "hill.txt"
    words = random.Random(5)
    source.write_text(" ".join(words.choice(WORDS) for _ in range(400))[:584], encoding="utf-8")
    corpus = prepare_corpus(
        [source], folder / "hill", tokenizer="char", vocab_size=300, val_fraction=0.1, seed=3, separator=None
    )
    assert corpus.split("train").num_windows(14, 14) == 38
    return corpus.path


@pytest.fixture(scope="session")
def many_documents(tmp_path_factory):
    """A prepared folder of documents from 1 to 40 characters."""
    folder = tmp_path_factory.mktemp("documents")
    letters = random.Random(5)
    texts = ["".join(letters.choice("sheep ") for _ in range(letters.randint(1, 40))).strip() or "e" for _ in range(60)]
    source = folder / "documents.txt"
    source.write_text("<|endoftext|>".join(texts), encoding="utf-8")
    return prepare_corpus(
        [source],
        folder / "prepared",
        tokenizer="char",
        vocab_size=300,
        val_fraction=0.1,
        seed=3,
        separator="<|endoftext|>",
    ).path


@pytest.fixture(scope="session")
def train_config():
    """Train a tiny model: `train_config(folder, corpus, **{"training.max_steps": 5})`."""

    def train(folder: Path, corpus: Path, **settings: object) -> Path:
        overrides = TINY | {"data.path": str(corpus), "training.save_dir": str(folder)} | settings
        return start_run(None, preset="modern", overrides=overrides, resume=None)

    return train


@pytest.fixture
def train_in(corpus_folder):
    """Train in a folder: `train_in(folder, resume="auto", **{"training.max_steps": 5})`."""

    def train(
        folder: Path,
        *,
        resume: str | None = None,
        accept_changes: bool = False,
        profile: bool = False,
        **settings: object,
    ) -> Path:
        overrides = TINY | {"data.path": str(corpus_folder), "training.save_dir": str(folder)} | settings
        preset = overrides.pop("preset", None)
        return start_run(
            None, preset=preset, overrides=overrides, resume=resume, accept_changes=accept_changes, profile=profile
        )

    return train


@pytest.fixture
def save_step():
    """Save a checkpoint of a tiny model whose weights and moments tell its step: `save_step(run, 3)`."""

    def save(folder: Path, step: int, name: str | None = None) -> Path:
        run = bare_run(tiny_config(), state=TrainingState(total_steps=50, data_fingerprint="f"))
        run.state.step, run.state.tokens = step, step * 9
        for parameter in run.model.parameters():
            parameter.grad = parameter.detach() + step
        run.optimizer.step()
        return save_checkpoint(folder, name or f"checkpoint_step_{step}", take_snapshot(run))

    return save


class NoTokenizer:
    """Stands where a tokenizer is only written down."""

    def to_json(self) -> str:
        return "{}"


def bare_run(config: Config, **parts: object) -> Run:
    """Return a run of a model and its optimizer without text; `parts` take the place of others."""
    torch.manual_seed(0)
    model = TransformerModel(config.model).train()
    usual = {
        "folder": Path("unused"),
        "config": config,
        "corpus": None,
        "tokenizer": NoTokenizer(),
        "model": model,
        "forward": model,
        "optimizer": make_optimizer(model, config.training),
        "sampler": None,
        "precision": FP32,
        "world": World(),
        "parallel": "none",
        "state": TrainingState(total_steps=50, data_fingerprint="f"),
    }
    return Run(**(usual | parts))  # type: ignore[arg-type]


@pytest.fixture(name="bare_run")
def _bare_run():
    return bare_run


@pytest.fixture
def spoil(monkeypatch):
    """Change the losses of some micro-batches, counted from 1 over the run: `spoil({9: math.nan})`."""

    def install(factors):
        calls = 0

        def spoiled(learner, batch):
            nonlocal calls
            calls += 1
            return micro_batch_loss(learner, batch) * factors.get(calls, 1.0)

        monkeypatch.setattr("sheepop.training.step.micro_batch_loss", spoiled)

    return install


def _wait_for_step(run: Path, step: int, process: subprocess.Popen[str] | Copies) -> None:
    """Wait until a run in another process has logged a step."""
    metrics = run / "metrics.jsonl"
    for _ in range(6000):
        if metrics.exists() and metrics.read_bytes().count(b'"train"') >= step:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture
def wait_for_step():
    return _wait_for_step


@pytest.fixture
def start(tmp_path):
    """Start the program in copies of a process: `start("train", "--output", run, count=2, breaks=Break(…))`."""
    started: list[Copies] = []

    def start(
        *arguments: object, count: int = 1, breaks: Break | None = None, patches: dict[str, object] | None = None
    ) -> Copies:
        folder = tmp_path / f"copies-{len(started)}"
        folder.mkdir()
        started.append(Copies(folder, arguments, count, breaks, patches or {}))
        return started[-1]

    yield start
    for copies in started:
        copies.kill()


@pytest.fixture
def run_program(start):
    """The same, to its end."""

    def run_program(*arguments: object, **options: object) -> Copies:
        copies = start(*arguments, **options)
        copies.communicate()
        return copies

    return run_program


def tiny_config(**settings: object) -> Config:
    return load_config(overrides=TINY | {"model.vocab_size": 23} | settings)


@pytest.fixture(name="tiny_config")
def _tiny_config():
    return tiny_config


@pytest.fixture
def signal_at():
    """Send this process a signal at the `nth` call, from 1, of a function that is named by its module."""
    patch = pytest.MonkeyPatch()

    def at(nth, function="sheepop.training.trainer.train_step", number=signal.SIGTERM):
        patch.undo()
        original = pkgutil.resolve_name(function)
        calls = 0

        def signalling(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == nth:
                os.kill(os.getpid(), number)
            return original(*arguments, **options)

        patch.setattr(function, signalling)

    at.undo = patch.undo
    yield at
    patch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
