"""A checkpoint of random weights, and servers that are processes of their own."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch

from sheepop.config import load_config
from sheepop.data.tokenizer import Tokenizer
from sheepop.interop.imported import write_imported
from sheepop.models.pretrained import stored_weights
from sheepop.models.transformer import TransformerModel

PROJECT = Path(__file__).parents[2]
CONTEXT = 47
# Other characters are written in bytes, so that the model writes whole ones, parts of them, and what is none.
TOKENIZER = Tokenizer.train("char", ["the sheep sees a dog.\n"], vocab_size=16)


def write_checkpoint(folder: Path, tokenizer: Tokenizer = TOKENIZER, **settings: object) -> Path:
    """Write a model of random weights, wide enough that what it writes has structure."""
    sizes = {"d_model": 24, "num_layers": 2, "num_heads": 4, "d_ff": 40, "max_seq_len": CONTEXT, "dropout": 0.0}
    values = sizes | {"init_std": 0.4, "vocab_size": tokenizer.vocab_size} | settings
    config = load_config(overrides={f"model.{key}": value for key, value in values.items()})
    torch.manual_seed(5)
    write_imported(folder, config.model, stored_weights(TransformerModel(config.model)), tokenizer)
    return folder


@dataclass
class RunningServer:
    """A server and how to talk to it."""

    process: subprocess.Popen[str]
    url: str
    client: httpx2.Client

    def post(self, path: str, body: Any, status: int = 200) -> Any:
        """Send a body and return the answer, which must have a status."""
        answer = self.client.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def stream(self, path: str, body: Any) -> list[Any]:
        """Send a body and return the events of the stream, which must end as one."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert answer.headers["content-type"].startswith("text/event-stream"), lines
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def metric(self, name: str) -> float:
        """Return what a line of the metrics says."""
        lines = self.client.get("/metrics").text.splitlines()
        (value,) = (line.rpartition(" ")[2] for line in lines if line.rpartition(" ")[0] == name)
        return float(value)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


def start_server(checkpoint: Path, *options: str, key: str | None = None) -> RunningServer:
    """Start a server at a free port and wait until it is ready."""
    command = [sys.executable, "-m", "sheepop", "serve", "--checkpoint", str(checkpoint), "--port", "0", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "SHEEPOP_API_KEY"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen(
        [*command, "--device", "cpu", *options], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"the server ended with status {process.wait()}"
    ready = json.loads(line)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return RunningServer(process, ready["url"], httpx2.Client(base_url=ready["url"], headers=headers, timeout=120))
