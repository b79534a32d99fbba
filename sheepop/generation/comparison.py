"""Naive generation against optimized, over prompt lengths: time to the first token, speed of the others, memory."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sheepop.generation.engine import decode_for, decoder_for, generate_cached
from sheepop.generation.generate import Continuation, generate_naive
from sheepop.generation.sampling import SamplingSettings
from sheepop.models.transformer import TransformerModel
from sheepop.utils.memory import forget_peak, give_back_freed, peak_resident_bytes, resident_bytes

SHORTEST = 16  # tokens of a prompt; the others are multiples of 4 of it
GREEDY = SamplingSettings(temperature=0.0)


@dataclass(frozen=True)
class Measurement:
    """How one way of generating did with one length of prompt.

    Attributes:
        prompt_tokens: how many.
        way: `naive`, `optimized` or `compiled`.
        time_to_first_token_seconds: from the request to the first token.
        tokens_per_second: of the tokens after the first.
        memory_bytes: the most that it took beside the model.
        same_tokens: whether the text is that of the naive way.
    """

    prompt_tokens: int
    way: str
    time_to_first_token_seconds: float
    tokens_per_second: float
    memory_bytes: int
    same_tokens: bool


def compare_ways(model: TransformerModel, *, new_tokens: int, compiles: bool = False) -> list[Measurement]:
    """Write `new_tokens` after prompts of several lengths that the context holds, by all ways, and measure each.

    With `compiles` a compiled step is one of them.

    The prompts are drawn at random, with a fixed seed; the texts are greedy.
    """
    context = model.config.max_seq_len
    new_tokens = max(2, min(new_tokens, context // 4))
    decode = decoder_for(model)
    ways: dict[str, Callable[..., list[Continuation]]] = {
        "naive": generate_naive,
        "optimized": partial(generate_cached, decode=decode),
    }
    if compiles:
        ways["compiled"] = partial(generate_cached, decode=decode_for(model, compiles=True))
    draws = torch.Generator().manual_seed(0)
    measurements: list[Measurement] = []
    for length in prompt_lengths(context - new_tokens):
        prompt = torch.randint(0, model.config.vocab_size, (length,), generator=draws).tolist()
        naive_ids: list[int] = []
        for way, generate in ways.items():
            write = partial(generate, model, prompt, GREEDY, max_new_tokens=new_tokens, seed=0)
            before = start_of_memory(model.device)
            [text] = write()
            memory = most_memory(model.device) - before
            times: list[float] = []

            def note(sample: int, token_id: int, times: list[float] = times) -> bool:  # noqa: ARG001
                times.append(time.perf_counter())
                return False

            began = time.perf_counter()  # of the second time, for which the memory is at hand
            write(on_token=note)
            rate = (len(times) - 1) / (times[-1] - times[0])
            naive_ids = naive_ids or text.token_ids
            same = text.token_ids == naive_ids
            measurements.append(Measurement(length, way, times[0] - began, rate, max(memory, 0), same))
    return measurements


def format_measurements(measurements: Sequence[Measurement]) -> str:
    """Return a table, a line for each length and way."""
    lines = [f"{'prompt':>8}  {'way':<10}  {'first token':>11}  {'tokens/s':>9}  {'memory':>9}  text"]
    for each in measurements:
        first, memory = f"{each.time_to_first_token_seconds * 1e3:.1f} ms", f"{each.memory_bytes / 1e6:.1f} MB"
        text = "the same" if each.same_tokens else "differs within rounding"
        lines.append(
            f"{each.prompt_tokens:>8}  {each.way:<10}  {first:>11}  {each.tokens_per_second:>9.1f}  {memory:>9}  {text}"
        )
    return "\n".join(lines)


def prompt_lengths(longest: int) -> list[int]:
    """Return lengths from `SHORTEST` on, each four times the one before, and the longest."""
    lengths, length = [], SHORTEST
    while length < longest:
        lengths.append(length)
        length *= 4
    return [*lengths, max(longest, 1)]


def start_of_memory(device: torch.device) -> int:
    """Return the bytes that are taken on a device, and count its peak from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    give_back_freed()
    forget_peak()
    return resident_bytes()


def most_memory(device: torch.device) -> int:
    """Return the peak of the bytes taken on a device since `start_of_memory`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
