"""What the tests of the server share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra 'serve'")
pytest.importorskip("httpx2", reason="needs the package httpx2, which comes with openai")
sys.path.insert(0, str(Path(__file__).parent))

from running_server import RunningServer, start_server, write_checkpoint

from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.batching import Engine
from sheepop.generation.runner import ModelRunner
from sheepop.generation.terminal import load_model_and_tokenizer
from sheepop.models.transformer import TransformerModel
from sheepop.serving.served_model import ServedModel


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "ewe")


@pytest.fixture(scope="session")
def pair(checkpoint: Path) -> tuple[TransformerModel, Tokenizer]:
    return load_model_and_tokenizer(checkpoint, "cpu")


@pytest.fixture
def served(pair: tuple[TransformerModel, Tokenizer]) -> ServedModel:
    model, tokenizer = pair
    return ServedModel("ewe", tokenizer, Engine(model, max_batch_size=3, runner=ModelRunner(model)), 50)


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[RunningServer]:
    """A server for all tests of a file, which must still be well after them."""
    running = start_server(checkpoint, "--max-new-tokens", "100000", "--batch-size", "5")
    yield running
    assert running.client.get("/health").status_code == 200
    running.client.close()
    assert running.end() == 143
