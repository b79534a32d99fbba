"""How fast one model answers here and elsewhere: tokens per second of reading a prompt and of writing, on a CPU.

    python benchmarks/decode.py --checkpoint RUN
    python benchmarks/decode.py --checkpoint RUN --transformers HF_FOLDER --gguf F32.gguf Q8_0.gguf Q4_1.gguf

The checkpoint runs in fp32 and with weights of 8 and 4 bits; beside it the same model as a folder for `transformers`
(eager, fp32) and as files for llama.cpp (through `llama-cpp-python`), where these are installed. Each contestant is a
process of its own; they take turns for `--rounds` rounds, and medians are shown. Writing is measured for one stream
and, except for llama.cpp, for `--streams` at once.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from common import median, show

PROMPT, WRITTEN, VOCABULARY = 512, 64, 256  # tokens read, tokens written, and ids that every tokenizer has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--transformers", type=Path)
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one contestant, in its own process
    options = parser.parse_args()
    if options.only:
        kind, _, path = options.only.partition(":")
        print(json.dumps(CONTESTANTS[kind](path, options.streams)))
        return
    contestants = [f"{kind}:{options.checkpoint}" for kind in ("fp32", "int8", "int4") if options.checkpoint]
    contestants += [f"transformers:{options.transformers}"] if options.transformers else []
    contestants += [f"llama.cpp:{path}" for path in options.gguf]
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(options.rounds):
        for name in contestants:
            command = [sys.executable, __file__, "--only", name, "--streams", str(options.streams)]
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
    show(f"tokens/s: {PROMPT} read, {WRITTEN} written, {options.streams} streams", rows)


def prompt_of(length: int) -> list[int]:
    return [(7919 * place) % VOCABULARY for place in range(length)]


def typical(step: Callable[[int], object], rows: int) -> float:
    """Return tokens per second of a step that writes one token a row, from the middle of their times."""
    times = []
    for place in range(WRITTEN):
        began = time.perf_counter()
        step(place % VOCABULARY)
        times.append(time.perf_counter() - began)
    return rows / statistics.median(times)


def ours(quantization: str | None) -> Callable[[str, int], dict[str, float]]:
    def measure(path: str, streams: int) -> dict[str, float]:
        from sheepop.generation.engine import decoder_for
        from sheepop.generation.terminal import load_model_and_tokenizer
        from sheepop.models.kv_cache import KVCache

        model, _ = load_model_and_tokenizer(Path(path), "cpu", quantization)  # type: ignore[arg-type]
        decode = decoder_for(model) or functools.partial(model, last_only=True)

        def read(rows: int, length: int) -> tuple[KVCache, float]:
            cache = KVCache(model.config, rows, length + WRITTEN)
            token_ids = torch.tensor([prompt_of(length)] * rows)
            began = time.perf_counter()
            decode(token_ids, cache=cache)
            return cache, rows * length / (time.perf_counter() - began)

        with torch.inference_mode():
            prefill = max(read(1, PROMPT)[1] for _ in range(3))
            figures = {"read": prefill}
            for name, rows in (("written", 1), ("written by all streams", streams)):
                cache, _ = read(rows, PROMPT // 4)
                decode(torch.ones(rows, 1, dtype=torch.int64), cache=cache)  # compiles
                cache.length -= 1
                figures[name] = typical(
                    lambda token, rows=rows, cache=cache: decode(torch.full((rows, 1), token), cache=cache), rows
                )
        return figures

    return measure


def theirs(path: str, streams: int) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.train(False)

    def read(rows: int, length: int) -> tuple[object, float]:
        began = time.perf_counter()
        output = model(torch.tensor([prompt_of(length)] * rows), use_cache=True, logits_to_keep=1)
        return output.past_key_values, rows * length / (time.perf_counter() - began)

    with torch.inference_mode():
        figures = {"read": max(read(1, PROMPT)[1] for _ in range(3))}
        for name, rows in (("written", 1), ("written by all streams", streams)):
            cache, _ = read(rows, PROMPT // 4)
            figures[name] = typical(
                lambda token, rows=rows, cache=cache: model(
                    torch.full((rows, 1), token), past_key_values=cache, use_cache=True
                ),
                rows,
            )
    return figures


def llama_cpp(path: str, streams: int) -> dict[str, float]:  # noqa: ARG001
    import llama_cpp

    # Its rearranged weights for AMX crash on virtual machines that do not grant it; those of fp32 are not rearranged.
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def plain_layout() -> object:
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

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
    return {**figures, "written": typical(lambda token: llama.eval([token]), 1), "written by all streams": float("nan")}


CONTESTANTS: dict[str, Callable[[str, int], dict[str, float]]] = {
    "fp32": ours(None),
    "int8": ours("int8"),
    "int4": ours("int4"),
    "transformers": theirs,
    "llama.cpp": llama_cpp,
}

if __name__ == "__main__":
    main()
