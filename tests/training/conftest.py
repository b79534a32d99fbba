import random
from pathlib import Path

import pytest

from sheepop.config import Config, load_config
from sheepop.data.prepare import prepare_corpus
from sheepop.models.transformer import TransformerModel
from sheepop.training.checkpoint import TrainingState, save_checkpoint
from sheepop.training.optimizer import make_optimizer
from sheepop.training.run import start_run

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

    def save(run: Path, step: int, name: str | None = None) -> Path:
        config = tiny_config()
        model = TransformerModel(config.model)
        optimizer = make_optimizer(model, config.training)
        for parameter in model.parameters():
            parameter.grad = parameter.detach() + step
        optimizer.step()
        state = TrainingState(total_steps=50, data_fingerprint="f", step=step, tokens=step * 9)
        return save_checkpoint(
            run,
            name or f"checkpoint_step_{step}",
            model=model,
            optimizer=optimizer,
            config=config,
            tokenizer_json="{}",
            state=state,
        )

    return save


def tiny_config(**settings: object) -> Config:
    return load_config(overrides=TINY | {"model.vocab_size": 23} | settings)


@pytest.fixture(name="tiny_config")
def _tiny_config():
    return tiny_config
