"""A server in this process."""

import os
import signal
import threading

import httpx2
import pytest

from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.batching import Engine
from sheepop.models.transformer import TransformerModel
from sheepop.serving.process import run
from sheepop.serving.served_model import ServedModel
from sheepop.serving.server import bind


def test_the_thread_that_loaded_the_model_computes(
    pair: tuple[TransformerModel, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each thread that computes gets OpenMP threads of its own, and more of them than cores slow one another down."""
    model, tokenizer = pair
    engine, threads, answers = Engine(model, max_batch_size=2), set[str](), list[int]()
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: threads.add(threading.current_thread().name) or step())
    with bind("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"

        def ask() -> None:
            try:
                answers.append(httpx2.post(url, json={"prompt": "the", "max_tokens": 5}, timeout=60).status_code)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        client = threading.Thread(target=ask)
        before = signal.getsignal(signal.SIGTERM)
        number = run(
            ServedModel("here", tokenizer, engine, 100),
            listener,
            max_waiting=0,
            api_key=None,
            grace_seconds=5,
            on_ready=client.start,
        )
    client.join()
    assert (number, answers, threads) == (signal.SIGTERM, [200], {threading.main_thread().name})
    assert signal.getsignal(signal.SIGTERM) is before
