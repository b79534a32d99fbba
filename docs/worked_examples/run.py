"""The run whose numbers the examples show: a small model, trained by the same code as any other."""

import contextlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sheepop.config import Config, load_config
from sheepop.data.corpora import installed_files, write_corpus
from sheepop.data.corpus import open_corpus
from sheepop.data.tokenizer import Tokenizer
from sheepop.evaluation.plots import RunRecord, read_run
from sheepop.generation.terminal import load_model_and_tokenizer
from sheepop.learn.trace import Trace, trace_text
from sheepop.models.pretrained import resolve_checkpoint
from sheepop.models.transformer import TransformerModel
from sheepop.training.run import start_run
from sheepop.utils.errors import DataError

TEXT = "The old sheep"
NUM_FILES = 8
TINY_CHARACTERS = 8000
SETTINGS: dict[str, object] = {
    "seed": 7,
    "device": "cpu",
    "model.vocab_size": 1024,
    "model.d_model": 48,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.max_seq_len": 64,
    "model.dropout": 0.0,
    "training.batch_size": 12,
    "training.max_steps": 300,
    "training.optimizer": "muon",
    "training.learning_rate": 0.02,
    "training.warmup_steps": 30,
    "training.compile": "off",
    "training.eval_interval": 50,
    "training.eval_max_tokens": 6000,
    "training.sample_tokens": 0,
}


@dataclass(frozen=True)
class ExampleRun:
    """A finished run, and what its model does with `TEXT`.

    Attributes:
        learned_from: what it was trained on, in words.
        record: its losses.
        held_out: (N,) token ids of text that the model never learned from.
        trace: of `TEXT`, behind what begins a text.
    """

    learned_from: str
    config: Config
    record: RunRecord
    held_out: Tensor
    model: TransformerModel
    tokenizer: Tokenizer
    trace: Trace

    @property
    def pieces(self) -> list[str]:
        """The tokens of the traced text, as they stand in a table."""
        return [self.piece(int(token_id)) for token_id in self.trace.token_ids]

    def piece(self, token_id: int) -> str:
        """Return a token as it stands in a table: spaces can be seen, and ∎ is the token between texts."""
        if token_id == self.tokenizer.end_of_text_id:
            return "∎"
        text = self.tokenizer.token_text(token_id).replace("\n", "⏎").replace(" ", "␣")
        return f"`{text}`" if "`" not in text else text


@lru_cache(maxsize=1)
def example_run() -> ExampleRun:
    """Train the model of the examples, once in a process."""
    with tempfile.TemporaryDirectory() as name:
        learned_from = write_text(Path(name) / "text")
        run, config = train(Path(name), {})
        model, tokenizer = load_model_and_tokenizer(resolve_checkpoint(run), "cpu")
        held_out = open_corpus(Path(str(config.data.path))).split("val").tokens
        return ExampleRun(
            learned_from,
            config,
            read_run(run),
            torch.from_numpy(held_out[:4000].astype("int64")),
            model,
            tokenizer,
            trace_text(model, tokenizer, TEXT),
        )


def record_by_heart() -> RunRecord:
    """Return the record of a run that reads a tiny text so often that it learns it by heart."""
    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / "text"
        write_text(text)
        first, *others = sorted(text.iterdir())
        first.write_text(first.read_text(encoding="utf-8")[:TINY_CHARACTERS], encoding="utf-8")
        for path in others:
            path.unlink()
        run, _ = train(Path(name), {"data.tokenizer": "char", "training.eval_interval": 25})
        return read_run(run)


def train(folder: Path, changed: dict[str, object]) -> tuple[Path, Config]:
    """Train on `folder`/text with the examples' settings, some of them changed; return the run and its settings."""
    places: dict[str, object] = {
        "data.path": str(folder / "text"),
        "data.data_dir": str(folder / "data"),
        "training.save_dir": str(folder / "run"),
    }
    with one_thread(), contextlib.redirect_stderr(io.StringIO()):
        run = start_run(None, preset="classic", overrides=SETTINGS | changed | places, resume=None)
    return run, load_config(run / "config.json")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, which is as fast for so small a model, whoever else works on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_text(folder: Path) -> str:
    """Write the text to train on into a folder, and return what it is."""
    try:
        installed_files("plays")
    except DataError:
        corpus, words = "python", "files of Python's own source"
    else:
        corpus, words = "plays", "of Shakespeare's plays"
    for path in write_corpus(corpus, folder)[NUM_FILES:]:
        path.unlink()
    return f"{NUM_FILES} {words}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table; numbers are rounded to three places."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return "−∞" if value == float("-inf") else f"{value:.3f}".replace("-", "−")
        return str(value).replace("|", "\\|")

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)
