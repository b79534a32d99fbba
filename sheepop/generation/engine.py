"""Generation with a KV cache: each token costs one position, and all samples advance together as rows."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sheepop.generation.generate import (
    Continuation,
    FinishReason,
    OnToken,
    check_request,
    context_start,
    sample_generator,
    say_context_is_full,
    text_start,
)
from sheepop.generation.sampling import SamplingSettings, sample_tokens
from sheepop.models.kv_cache import KVCache
from sheepop.models.sizing import TOKEN_BYTES, count_parameters, kv_cache_bytes
from sheepop.models.transformer import TransformerModel, inference
from sheepop.utils.logging import log
from sheepop.utils.memory import check_available
from sheepop.utils.runtime import has_numba

if TYPE_CHECKING:
    from sheepop.generation.compiled_decoding import CompiledDecoder
    from sheepop.generation.fast_decoding import FastDecoder


class Decode(Protocol):
    """Maps the newest tokens of each row, (B, T), to the logits after the last, (B, 1, V), and caches the tokens."""

    def __call__(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """Return the logits."""
        ...


# Below this many parameters one token's matrix products are so short that handing them to a second core costs more
# than it saves (`docs/log.md`).
LITTLE_WORK = 4_000_000
CAPACITY_STEP = 256  # a compiled step is for one capacity, so that few of them shall serve all texts
NOTICEABLE_SECONDS = 3.0  # compiled kernels are loaded in less


def generate_cached(
    model: TransformerModel,
    prompt_ids: Sequence[int],
    settings: SamplingSettings,
    *,
    max_new_tokens: int,
    seed: int,
    num_samples: int = 1,
    end_of_text_id: int | None = None,
    on_token: OnToken | None = None,
    decode: Decode | None = None,
) -> list[Continuation]:
    """Return what `generate_naive` returns for the same arguments, many times faster.

    The prompt is computed once (prefill), then each step computes only the newest token of each sample; keys and
    values of the others come from the cache. When the oldest half of a full context is dropped, the rest is computed
    again. `on_token` gets the samples' tokens in turn: sample 0, 1, ..., then their next tokens. `decode` computes
    in the model's place (`decoder_for`).

    Raises:
        ConfigError, CheckpointError: as `generate_naive`; also if the samples do not fit into the memory that is free.
    """
    prompt = check_request(model, prompt_ids, settings, max_new_tokens, num_samples, end_of_text_id)
    said_from = text_start(prompt, end_of_text_id)
    max_seq_len, device = model.config.max_seq_len, model.device
    longest = len(prompt) + max_new_tokens
    capacity = min(-(-longest // CAPACITY_STEP) * CAPACITY_STEP, max_seq_len)
    check_available(
        kv_cache_bytes(model.config, num_samples, capacity, model.dtype.itemsize) + TOKEN_BYTES * num_samples * longest,
        device,
        f"To write {num_samples} x {max_new_tokens} tokens at the same time takes",
        "Ask for fewer samples or tokens at a time, or free memory.",
    )
    cache = KVCache(model.config, num_samples, capacity, device=device, dtype=model.dtype)
    generators = [sample_generator(model, seed, sample) for sample in range(num_samples)]
    tokens = torch.empty((num_samples, longest), dtype=torch.int64, device=device)  # (B, T)
    tokens[:, : len(prompt)] = torch.tensor(prompt, device=device)
    texts: list[list[int]] = [[] for _ in range(num_samples)]
    finish_reasons: list[FinishReason] = ["length"] * num_samples
    cached_from = -1
    with inference(model), one_core_for_little(count_parameters(model.config).total, device):
        for length in range(len(prompt), longest):
            start = context_start(length, max_seq_len)
            if start == cached_from:
                newest = tokens[:, length - 1 : length]  # (B, 1)
            else:
                if start and cached_from <= 0:
                    say_context_is_full(max_seq_len)
                cached_from = start
                cache.reset()
                newest = tokens[:, start:length]  # (B, T)
            compute = decode or partial(model, last_only=True)
            logits = compute(newest, cache=cache)[:, -1]  # (B, V)
            drawn = sample_tokens(logits, settings, generators, tokens[:, said_from:length])
            tokens[:, length] = drawn
            # A sample that has ended stays as a row whose tokens nobody reads, until the last one ends.
            for sample, token_id in enumerate(drawn.tolist()):
                if finish_reasons[sample] == "stop":
                    continue
                if token_id == end_of_text_id:
                    finish_reasons[sample] = "stop"
                    continue
                texts[sample].append(token_id)
                if on_token is not None and on_token(sample, token_id):
                    finish_reasons[sample] = "stop"
            if "length" not in finish_reasons:
                break
    return [Continuation(token_ids, reason) for token_ids, reason in zip(texts, finish_reasons, strict=True)]


@contextmanager
def one_core_for_little(work: int, device: torch.device) -> Iterator[None]:
    """Compute on one core of a CPU while there is little to do at once, and on as many as before afterwards.

    Args:
        work: tokens that are computed at once, times parameters.
        device: where.
    """
    threads = torch.get_num_threads()
    if work < LITTLE_WORK and device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def decode_for(model: TransformerModel, *, compiles: bool) -> "CompiledDecoder | FastDecoder | None":
    """Return what decodes in the model's place: with `compiles` its whole step compiled, else kernels (`decoder_for`).

    Raises:
        ConfigError: there is no compiler.
    """
    if not compiles:
        return decoder_for(model)
    from sheepop.generation.compiled_decoding import CompiledDecoder

    return CompiledDecoder(model)


def decoder_for(model: TransformerModel) -> "FastDecoder | None":
    """Return the decoder of a model by kernels, or None where the model decodes by itself.

    The kernels compute in fp32 on a CPU, and need numba, whose loading a small model does not repay; attention that was
    asked to be the reference stays that. When they are compiled for the first time on a machine, that is said.
    """
    if not uses_kernels(model):
        return None
    from sheepop.generation.fast_decoding import FastDecoder

    decoder = FastDecoder(model)
    began = time.perf_counter()
    with torch.inference_mode():
        decoder(torch.zeros((1, 1), dtype=torch.int64), KVCache(model.config, 1, capacity=1))
    if (seconds := time.perf_counter() - began) > NOTICEABLE_SECONDS:
        log(f"compiled the kernels for decoding in {seconds:.0f} s; they are kept for the next time")
    return decoder


def uses_kernels(model: TransformerModel) -> bool:
    """Say whether kernels decode in the model's place (`decoder_for`)."""
    config = model.config
    is_small = count_parameters(config).total < LITTLE_WORK and config.quantization == "none"
    if model.device.type != "cpu" or model.dtype != torch.float32 or config.attention == "reference" or is_small:
        return False
    return has_numba()
