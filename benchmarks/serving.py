"""The engine: many streams against one, a second prompt with a shared beginning, guesses, and the 8-bit cache.

    python benchmarks/serving.py --checkpoint runs/demo --text data/plays/val.txt
    python benchmarks/serving.py --checkpoint RUN --quantize int8 --transformers HF_FOLDER

With the same model as a folder for `transformers`, its `generate` answers the same prompts in fp32 as one batch, padded
on the left, where it is installed. Everything is drawn at temperature 1 from all tokens.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import alternate, median, show

from sheepop.generation.batching import Engine
from sheepop.generation.engine import decoder_for, generate_cached
from sheepop.generation.request import Request
from sheepop.generation.runner import runner_for
from sheepop.generation.sampling import SamplingSettings
from sheepop.generation.speculation import LookUp
from sheepop.generation.terminal import load_model_and_tokenizer
from sheepop.models.int8_cache import Int8PagedCache
from sheepop.models.paged_cache import PagedCache
from sheepop.models.transformer import TransformerModel

OWN_TOKENS = (1, 8, 16)  # of prompts that begin alike, behind what they share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of each prompt, and written after it")
    parser.add_argument("--shared", type=int, default=512, help="tokens that two prompts begin with")
    parser.add_argument("--text", type=Path, help="text to continue with guesses, and to score with an 8-bit cache")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--transformers", type=Path, help="the folder of the same model for this library")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, tokenizer = load_model_and_tokenizer(options.checkpoint, "cpu", options.quantize)
    context = model.config.max_seq_len
    prompts = [random_ids(model, options.tokens, seed) for seed in range(options.streams)]
    contestants: dict[str, Callable[[], float]] = {
        "one, without the engine": lambda: alone_seconds(model, prompts[0], options.tokens),
        "one": lambda: engine_seconds(model, prompts[:1], options.tokens),
        f"{options.streams}": lambda: engine_seconds(model, prompts, options.tokens),
    }
    peer = f"{options.streams}, transformers"
    if options.transformers:
        contestants[peer] = transformers_batch(options.transformers, prompts, options.tokens)
    results = alternate(contestants, options.rounds)
    rate = {name: options.tokens / median(seconds) for name, seconds in results.items()}
    for name in rate.keys() & {f"{options.streams}", peer}:
        rate[name] *= options.streams
    rows: list[dict[str, object]] = [
        {"streams": name, "tokens/s": rate[name], "ratio to one": rate[name] / rate["one"]} for name in contestants
    ]
    if options.transformers:
        rows = [{**row, "times transformers": rate[str(row["streams"])] / rate[peer]} for row in rows]
    show(f"throughput, {options.tokens} + {options.tokens} tokens each, context {context}", rows)

    shared = min(options.shared, context - max(OWN_TOKENS))  # of a shorter context as much as it holds
    rows = []
    for own in OWN_TOKENS:
        times = [first_token_seconds(model, shared, own, seed) for seed in range(options.rounds)]
        first, second = (median(each) for each in zip(*times, strict=True))
        rows.append(
            {"own tokens": own, "first (ms)": first * 1e3, "second (ms)": second * 1e3, "ratio": second / first}
        )
    show(f"time to first token after {shared} shared tokens (target: ratio < 0.1), context {context}", rows)

    if options.text is None:
        return
    token_ids = tokenizer.encode(options.text.read_text(encoding="utf-8")[:200_000])
    rows = []
    for temperature in (0.0, 0.8):
        for name, speculator in (("none", None), ("lookup", LookUp())):
            seconds, share = guessing_seconds(model, token_ids[:64], options.tokens, temperature, speculator)
            rows.append(
                {"guesses": name, "temperature": temperature, "tokens/s": options.tokens / seconds, "right": share}
            )
    show(f"guesses, {options.tokens} tokens after 64 of the text", rows)

    exact, close = (scored_nats(model, token_ids, context, int8_cache=on) for on in (False, True))
    show(
        f"8-bit cache, {len(exact)} tokens of the text",
        [
            {
                "loss, fp32": sum(exact) / len(exact),
                "loss, 8 bits": sum(close) / len(close),
                "largest change of a token": max(abs(one - other) for one, other in zip(exact, close, strict=True)),
                "memory": Int8PagedCache.page_bytes(model.config, 16, torch.float32)
                / PagedCache.page_bytes(model.config, 16, torch.float32),
            }
        ],
    )


def random_ids(model: TransformerModel, count: int, seed: int) -> list[int]:
    draws = random.Random(seed)
    return [draws.randrange(model.config.vocab_size) for _ in range(count)]


def alone_seconds(model: TransformerModel, prompt: list[int], tokens: int) -> float:
    decode = decoder_for(model)
    began = time.perf_counter()
    generate_cached(model, prompt, SamplingSettings(), max_new_tokens=tokens, seed=0, decode=decode)
    return time.perf_counter() - began


def engine_seconds(model: TransformerModel, prompts: list[list[int]], tokens: int) -> float:
    engine = Engine(model, max_batch_size=len(prompts), runner=runner_for(model))
    began = time.perf_counter()
    for seed, prompt in enumerate(prompts):
        engine.add(Request(prompt, SamplingSettings(), tokens, seed))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - began


def transformers_batch(folder: Path, prompts: list[list[int]], tokens: int) -> Callable[[], float]:
    """Return what lets `transformers` continue the prompts, all at once, and says how long that took."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # as long as ours, which do not end early
    longest = max(len(prompt) for prompt in prompts)
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # top_k is 50 unless it is said

    def measure() -> float:
        began = time.perf_counter()
        output = model.generate(padded, attention_mask=mask, max_new_tokens=tokens, pad_token_id=0, **drawn)
        assert output.shape[1] == longest + tokens
        return time.perf_counter() - began

    return measure


def first_token_seconds(model: TransformerModel, shared: int, own: int, seed: int) -> tuple[float, float]:
    """Return the times to the first token of two requests, one after the other, that begin alike."""
    engine = Engine(model, runner=runner_for(model))
    beginning, times = random_ids(model, shared, seed), []
    for place in (1, 2):
        engine.add(Request(beginning + random_ids(model, own, 100 * seed + place), SamplingSettings(), 1))
        began = time.perf_counter()
        while not engine.step():
            pass
        times.append(time.perf_counter() - began)
    return times[0], times[1]


def guessing_seconds(
    model: TransformerModel, prompt: list[int], tokens: int, temperature: float, speculator: LookUp | None
) -> tuple[float, float]:
    """Return the time for one stream, and the share of guesses that were right."""
    engine = Engine(model, runner=runner_for(model), speculator=speculator)
    engine.add(Request(prompt, SamplingSettings(temperature), tokens))
    began = time.perf_counter()
    while engine.has_work:
        engine.step()
    return time.perf_counter() - began, engine.counters.accepted / max(engine.counters.guessed, 1)


def scored_nats(model: TransformerModel, token_ids: list[int], context: int, *, int8_cache: bool) -> list[float]:
    """Return -ln p of each token but the first of windows of the text, up to some ten thousand tokens.

    They are read in chunks of 16, so that nearly all keys and values come from the cache.
    """
    engine = Engine(model, chunk_size=16, int8_cache=int8_cache)
    nats = []
    for begin in range(0, min(len(token_ids), 10_000) - context + 1, context):
        engine.add(Request(token_ids[begin : begin + context], max_new_tokens=0, prompt_logprobs=0))
        while engine.has_work:
            for event in engine.step():
                nats += [-each.logprob for each in event.prompt_logprobs or [] if each is not None]
    return nats


if __name__ == "__main__":
    main()
