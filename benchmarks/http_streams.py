"""The HTTP server: many streams at once, against the engine alone on the same prompts.

    python benchmarks/http_streams.py --checkpoint runs/demo --streams 1 8 16

The clients run in this process, so that on few cores they take time from the server, as clients on the same machine do.
"""

import argparse
import http.client
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import alternate, median, show

from sheepop.generation.batching import Engine
from sheepop.generation.request import Request
from sheepop.generation.runner import runner_for
from sheepop.generation.sampling import SamplingSettings
from sheepop.generation.terminal import load_model_and_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=128, help="written after each prompt")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    most = max(options.streams)
    model, _ = load_model_and_tokenizer(options.checkpoint, "cpu")
    runner, vocab_size = runner_for(model), model.config.vocab_size
    command = [sys.executable, *"-m sheepop serve --port 0 --json --device cpu".split()]
    command += ["--checkpoint", str(options.checkpoint), "--batch-size", str(most)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    address = json.loads(server.stdout.readline())["url"].removeprefix("http://")
    rows: list[dict[str, object]] = []
    beginning = 0  # so that no two prompts begin alike, and none is found in a cache
    try:
        for streams in options.streams:
            first_tokens: list[float] = []

            def over_http(count: int = streams, into: list[float] = first_tokens) -> float:
                nonlocal beginning
                beginning += count
                prompts = [prompt_of(beginning + i, options.prompt, vocab_size) for i in range(count)]
                began = time.perf_counter()
                with ThreadPoolExecutor(count) as pool:
                    into += pool.map(lambda prompt: first_token_seconds(address, prompt, options.tokens), prompts)
                return time.perf_counter() - began

            def alone(count: int = streams) -> float:
                engine = Engine(model, max_batch_size=most, runner=runner)
                began = time.perf_counter()
                for i in range(count):
                    prompt = prompt_of(i, options.prompt, vocab_size)
                    engine.add(Request(prompt, SamplingSettings(), options.tokens, seed=i))
                while engine.has_work:
                    engine.step()
                return time.perf_counter() - began

            over_http(), alone()  # not counted
            first_tokens.clear()
            times = alternate({"http": over_http, "engine": alone}, options.rounds)
            seconds = {name: median(each) for name, each in times.items()}
            rows.append(
                {
                    "streams": streams,
                    "engine (tokens/s)": streams * options.tokens / seconds["engine"],
                    "http (tokens/s)": streams * options.tokens / seconds["http"],
                    "overhead a step (ms)": 1e3 * (seconds["http"] - seconds["engine"]) / options.tokens,
                    "first token (ms)": 1e3 * median(first_tokens),
                    "slowest first token (ms)": 1e3 * max(first_tokens),
                }
            )
    finally:
        server.terminate()
        server.wait()
    show(f"streams of {options.prompt} + {options.tokens} tokens over HTTP", rows)


def prompt_of(number: int, tokens: int, vocab_size: int) -> list[int]:
    """Return a prompt of its own for each number below the square of the vocabulary's size."""
    own = [number % vocab_size, number // vocab_size % vocab_size]
    return [*own, *((number * i) % vocab_size for i in range(2, tokens))]


def first_token_seconds(address: str, prompt: list[int], tokens: int) -> float:
    """Read a stream to its end; return the time to its first text."""
    body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, "seed": 0}
    began, first = time.perf_counter(), 0.0
    connection = http.client.HTTPConnection(address)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    with connection.getresponse() as answer:
        for line in answer:
            if line.startswith(b"data: "):
                first = first or time.perf_counter() - began
                last = line
    assert last.strip() == b"data: [DONE]", last
    return first


if __name__ == "__main__":
    main()
