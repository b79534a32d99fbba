"""Naive generation: the whole context is computed again for each token. The reference that fast paths must equal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sheepop.generation.sampling import SamplingSettings, sample_token
from sheepop.models.transformer import TransformerModel, inference
from sheepop.utils.errors import CheckpointError, ConfigError
from sheepop.utils.logging import log
from sheepop.utils.seeds import derive_seed

FinishReason = Literal["stop", "length"]

# Called with (sample, token_id) as soon as the token is drawn; returns True to end that sample.
OnToken = Callable[[int, int], bool]


@dataclass(frozen=True)
class Continuation:
    """The tokens that followed the prompt, without the end of text, and whether the sample ended by itself."""

    token_ids: list[int]
    finish_reason: FinishReason


def context_start(length: int, max_seq_len: int) -> int:
    """Return the first of `length` tokens that the model sees when it predicts the next one.

    When the context is full its oldest half is dropped, so the model sees more than max_seq_len // 2 tokens and at
    most max_seq_len. Half at a time, because positions count from the first visible token: each drop means to
    compute all keys and values again, and dropping one token at a time would leave a cache nothing to keep.
    """
    dropped_at_once = max_seq_len - max_seq_len // 2
    times = -(-max(0, length - max_seq_len) // dropped_at_once)
    return times * dropped_at_once


def generate_naive(
    model: TransformerModel,
    prompt_ids: Sequence[int],
    settings: SamplingSettings,
    *,
    max_new_tokens: int,
    seed: int,
    num_samples: int = 1,
    end_of_text_id: int | None = None,
    on_token: OnToken | None = None,
) -> list[Continuation]:
    """Continue a prompt `num_samples` times, one sample after the other, recomputing the context for each token.

    Args:
        model: in any mode; it is used in evaluation mode and given back as it was.
        prompt_ids: what the samples continue; empty stands for `[end_of_text_id]`, the beginning of a document.
        settings: how tokens are drawn.
        max_new_tokens: the longest that a sample gets.
        num_samples: how many continuations.
        seed: sample i draws from its own stream, derived from the seed and i, however many samples there are.
        end_of_text_id: ends a sample and is not part of it; None never ends one.
        on_token: called with (sample, token_id) for each token; returning True ends the sample.

    Raises:
        ConfigError: an option is out of range, or there is nothing to start from.
        CheckpointError: a prompt token is not in the model's vocabulary, or the model's scores are not finite.
    """
    prompt = check_request(model, prompt_ids, settings, max_new_tokens, num_samples, end_of_text_id)
    said_from = text_start(prompt, end_of_text_id)
    max_seq_len = model.config.max_seq_len
    context_was_full = False
    continuations = []
    with inference(model):
        for sample in range(num_samples):
            generator = sample_generator(model, seed, sample)
            token_ids = list(prompt)
            finish_reason: FinishReason = "length"
            for length in range(len(prompt), len(prompt) + max_new_tokens):
                start = context_start(length, max_seq_len)
                if start and not context_was_full:
                    context_was_full = True
                    say_context_is_full(max_seq_len)
                window = torch.tensor([token_ids[start:]], device=model.device)  # (1, T)
                logits = model(window)[0, -1]  # (V,)
                token_id = sample_token(logits, settings, generator, token_ids[said_from:])
                if token_id == end_of_text_id:
                    finish_reason = "stop"
                    break
                token_ids.append(token_id)
                if on_token is not None and on_token(sample, token_id):
                    finish_reason = "stop"
                    break
            continuations.append(Continuation(token_ids[len(prompt) :], finish_reason))
    return continuations


def check_request(
    model: TransformerModel,
    prompt_ids: Sequence[int],
    settings: SamplingSettings,
    max_new_tokens: int,
    num_samples: int,
    end_of_text_id: int | None,
) -> list[int]:
    """Check what was asked for, and return the tokens to start from.

    Raises:
        ConfigError: an option is out of range, or there is nothing to start from.
        CheckpointError: a token is not in the model's vocabulary.
    """
    settings.validate()
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("num_samples", num_samples, 1)):
        if value < least:
            raise ConfigError(f"The option '{name}' is {value}, but must be at least {least}.")
    prompt = list(prompt_ids)
    if not prompt:
        if end_of_text_id is None:
            raise ConfigError("The prompt is empty, and this model has no token that begins a text; give a prompt.")
        prompt = [end_of_text_id]
    vocab_size = model.config.vocab_size
    strangers = [token_id for token_id in prompt if not 0 <= token_id < vocab_size]
    if strangers:
        raise CheckpointError(
            f"The prompt has the token {strangers[0]}, but the model knows only {vocab_size} tokens: its tokenizer "
            "belongs to another model. Use the tokenizer.json that was saved with the checkpoint."
        )
    return prompt


def check_length(prompt_ids: Sequence[int], max_seq_len: int) -> None:
    """See that a model can read the whole of a prompt; generation itself would go on from the prompt's end alone.

    Raises:
        ConfigError: it is longer than the context.
    """
    if len(prompt_ids) > max_seq_len:
        raise ConfigError(
            f"The prompt has {len(prompt_ids)} tokens, but the model can read {max_seq_len} at the most "
            "(model.max_seq_len). Shorten it, for instance to its end, or use a model with a longer context."
        )


def text_start(prompt: Sequence[int], end_of_text_id: int | None) -> int:
    """Return where the prompt's text begins: the mark before a document is not a word that could repeat."""
    return int(prompt[0] == end_of_text_id)


def sample_generator(model: TransformerModel, seed: int, sample: int) -> torch.Generator:
    """Return the source of random numbers of one sample, on the model's device."""
    return torch.Generator(device=model.device).manual_seed(derive_seed(seed, "sample", sample))


def say_context_is_full(max_seq_len: int) -> None:
    """Tell the user that the model begins to forget."""
    log(f"note: the context of {max_seq_len} tokens is full; whenever it is, its oldest half is dropped")
