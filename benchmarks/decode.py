"""How fast one model answers here and elsewhere: tokens per second of reading a prompt and of writing.

    python benchmarks/decode.py --checkpoint RUN
    python benchmarks/decode.py --checkpoint RUN --transformers HF_FOLDER --gguf F32.gguf Q8_0.gguf Q4_1.gguf
    python benchmarks/decode.py --checkpoint RUN --transformers HF_FOLDER --device cuda --compile --streams 64

The checkpoint runs in fp32 and, on a CPU, with weights of 8 and 4 bits; beside it the same model as a folder for
`transformers` (eager, fp32) and as files for llama.cpp (through `llama-cpp-python`), where these are installed.
`--compile` adds ours as `sheepop generate --compile` runs it, and `transformers` with its static cache and
`torch.compile` in the mode `reduce-overhead`. Each contestant is a process of its own; they take turns for `--rounds`
rounds, and medians are shown. Writing is measured for one stream and, except for llama.cpp, for `--streams` at once: on
a CPU by the middle of the steps' times, on a GPU by all of them in a row, between two waits for it.
"""

import argparse
import functools
import itertools
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from common import median, on_gpu, seconds_each, show

PROMPT, WRITTEN, VOCABULARY = 512, 64, 256  # tokens read, tokens written, and ids that every tokenizer has
WARM_UP = 3  # steps; the first compiles, and one of the others records a graph on a GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--transformers", type=Path)
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="also with the whole step of a token compiled")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one contestant, in its own process
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.only:
        kind, _, path = options.only.partition(":")
        print(json.dumps(CONTESTANTS[kind](path, options.streams, device)))
        return
    if options.gguf and device.type != "cpu":
        parser.error("--gguf is for the CPU")
    ways = ["", " compiled"] if options.compile else [""]
    kinds = [f"fp32{way}" for way in ways] + (["int8", "int4"] if device.type == "cpu" else [])
    contestants = [f"{kind}:{options.checkpoint}" for kind in kinds if options.checkpoint]
    contestants += [f"transformers{way}:{options.transformers}" for way in ways if options.transformers]
    contestants += [f"llama.cpp:{path}" for path in options.gguf]
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(options.rounds):
        for name in contestants:
            command = [sys.executable, __file__, "--only", name, "--streams", str(options.streams)]
            command += ["--device", options.device]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                print(f"{name} failed: {result.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
                continue
            found[name].append(json.loads(result.stdout.splitlines()[-1]))
    rows: list[dict[str, object]] = []
    for name, results in found.items():
        kind, _, path = name.partition(":")
        figures = {key: median([result[key] for result in results]) for key in results[0]}
        rows.append({"who": f"{kind} {Path(path).name}" if kind == "llama.cpp" else kind, **figures})
    show(f"tokens/s{on_gpu(device)}: {PROMPT} read, {WRITTEN} written, {options.streams} streams", rows)


def prompt_of(length: int) -> list[int]:
    return [(7919 * place) % VOCABULARY for place in range(length)]


def typical(step: Callable[[int], object], rows: int, device: torch.device) -> float:
    """Return tokens per second of steps that write one token a row: of the middle one, or on a GPU of all in a row."""
    places, in_a_row = itertools.count(), 1 if device.type == "cpu" else WRITTEN
    times = [
        seconds_each(lambda: step(next(places) % VOCABULARY), in_a_row, device) for _ in range(WRITTEN // in_a_row)
    ]
    return rows / median(times)


def figures_of(
    new_cache: Callable[[int, int], object],
    forward: Callable[[torch.Tensor, object], object],
    streams: int,
    device: torch.device,
) -> dict[str, float]:
    """Return the three figures of a model.

    Args:
        new_cache: makes an empty one for so many rows and tokens.
        forward: computes tokens (rows, T) on the device, behind those of the cache.
        streams: rows to be written at once.
        device: to compute on.
    """

    def read(rows: int, length: int) -> tuple[object, float]:
        cache = new_cache(rows, length + WARM_UP + WRITTEN)
        token_ids = torch.tensor([prompt_of(length)] * rows, device=device)
        return cache, rows * length / seconds_each(lambda: forward(token_ids, cache), 1, device)

    figures = {"read": max(read(1, PROMPT)[1] for _ in range(3))}
    for name, rows in (("written", 1), ("written by all streams", streams)):
        cache, _ = read(rows, PROMPT // 4)

        def step(token: int, rows: int = rows, cache: object = cache) -> None:
            forward(torch.full((rows, 1), token, device=device), cache)

        for token in range(WARM_UP):
            step(token)
        figures[name] = typical(step, rows, device)
    return figures


def ours(quantization: str | None, *, compiles: bool = False) -> Callable[[str, int, torch.device], dict[str, float]]:
    def measure(path: str, streams: int, device: torch.device) -> dict[str, float]:
        from sheepop.generation.engine import decode_for
        from sheepop.generation.terminal import load_model_and_tokenizer
        from sheepop.models.kv_cache import KVCache

        model, _ = load_model_and_tokenizer(Path(path), str(device), quantization)  # type: ignore[arg-type]
        decode = decode_for(model, compiles=compiles) or functools.partial(model, last_only=True)

        def new_cache(rows: int, capacity: int) -> KVCache:
            return KVCache(model.config, rows, capacity, device=device, dtype=model.dtype)

        @torch.inference_mode()
        def forward(token_ids: torch.Tensor, cache: KVCache) -> None:
            decode(token_ids, cache=cache)

        return figures_of(new_cache, forward, streams, device)

    return measure


def theirs(*, compiles: bool = False) -> Callable[[str, int, torch.device], dict[str, float]]:
    def measure(path: str, streams: int, device: torch.device) -> dict[str, float]:
        from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
        model.train(False)
        write = model
        if compiles:  # for fixed shapes, or the second number of rows would get slower code that is for any number
            write = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)

        def new_cache(_rows: int, capacity: int) -> object:  # it learns them at its first tokens
            return StaticCache(model.config, capacity) if compiles else DynamicCache(config=model.config)

        @torch.no_grad() if compiles else torch.inference_mode()  # the former as in its documentation
        def forward(token_ids: torch.Tensor, cache: object) -> None:
            compute = write if token_ids.shape[1] == 1 else model
            compute(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

        return figures_of(new_cache, forward, streams, device)

    return measure


def llama_cpp(path: str, _streams: int, device: torch.device) -> dict[str, float]:
    import llama_cpp

    # Its weights rearranged for AMX crash on virtual machines that show it and do not grant it; elsewhere rearranged
    # weights, where it has them, are its fastest.
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def plain_layout() -> object:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    if has_amx():
        llama_cpp.llama_cpp.llama_model_default_params = plain_layout
    threads = torch.get_num_threads()
    llama = llama_cpp.Llama(
        model_path=path, n_ctx=2 * PROMPT, n_threads=threads, n_threads_batch=threads, n_batch=PROMPT, verbose=False
    )

    def read(length: int) -> float:
        llama.reset()
        began = time.perf_counter()
        llama.eval(prompt_of(length))
        return length / (time.perf_counter() - began)

    figures = {"read": max(read(PROMPT) for _ in range(3))}
    read(PROMPT // 4)
    written = typical(lambda token: llama.eval([token]), 1, device)
    return {**figures, "written": written, "written by all streams": float("nan")}


def has_amx() -> bool:
    """Say whether the processor shows AMX; only Linux tells, and elsewhere there is none."""
    processor = Path("/proc/cpuinfo")
    return processor.exists() and "amx_tile" in processor.read_text()


CONTESTANTS: dict[str, Callable[[str, int, torch.device], dict[str, float]]] = {
    "fp32": ours(None),
    "fp32 compiled": ours(None, compiles=True),
    "int8": ours("int8"),
    "int4": ours("int4"),
    "transformers": theirs(),
    "transformers compiled": theirs(compiles=True),
    "llama.cpp": llama_cpp,
}

if __name__ == "__main__":
    main()
