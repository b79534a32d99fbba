"""From a text prompt to finished texts: encoding, stop strings, streaming without broken characters, timing."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

from sheepop.data.tokenizer import StreamDecoder, Tokenizer
from sheepop.generation.batching import Engine, generate_batched
from sheepop.generation.engine import Decode, generate_cached
from sheepop.generation.generate import FinishReason, generate_naive
from sheepop.generation.request import Constraint, Request
from sheepop.generation.runner import runner_for
from sheepop.generation.sampling import SamplingSettings
from sheepop.generation.speculation import Speculator
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import ConfigError


@dataclass(frozen=True)
class Completion:
    """One text that the model wrote.

    Attributes:
        text: without the prompt, cut where the first stop string begins.
        token_ids: all tokens that were drawn after the prompt, those that spell a stop string included.
        finish_reason: "stop" (end of text, or a stop string) or "length".
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Generation:
    """The completions of one prompt, and how fast they came.

    Attributes:
        tokens_per_second: decoding only, all samples together: the tokens after the first of each sample over the
            time after the first token; 0 where there is nothing to measure.
        time_to_first_token_seconds: from the request to the first token.
    """

    prompt: str
    completions: list[Completion]
    tokens_per_second: float
    time_to_first_token_seconds: float


def complete(
    model: TransformerModel,
    tokenizer: Tokenizer,
    prompt: str,
    settings: SamplingSettings,
    *,
    max_new_tokens: int,
    seed: int,
    num_samples: int = 1,
    stop: Sequence[str] = (),
    optimized: bool = True,
    decode: Decode | None = None,
    speculator: Speculator | None = None,
    constrain: Callable[[], Constraint] | None = None,
    int8_cache: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Let the model continue a text, as if the text began a document.

    Args:
        model: as in `generate_naive`.
        tokenizer: the model's own.
        prompt: the text to continue; empty begins a document.
        settings: how tokens are drawn.
        max_new_tokens: the longest that a completion gets.
        seed: the same seed draws the same texts.
        num_samples: how many completions.
        stop: strings that end a sample; the text is cut where the first of them begins.
        optimized: with a KV cache, or naively; the tokens are the same.
        decode: computes single tokens in the model's place, if optimized (`decoder_for`).
        speculator: guesses tokens ahead, for what is optimized.
        constrain: makes what each sample has to follow, for what is optimized (`grammar.py`).
        int8_cache: keep keys and values in 8 bits, for what is optimized; the logits then differ a little.
        on_text: called with the pieces of sample 0's text as they come; whole characters only, and never the
            beginning of a stop string. Together they are the sample's text.

    Raises:
        ConfigError: an option is out of range, or there is not enough memory.
        CheckpointError: model and tokenizer do not fit, or the model's scores are not finite.
    """
    if "" in stop:
        raise ConfigError("A stop string is empty; leave it out, or give at least one character.")

    @cache
    def transcript(sample: int) -> Transcript:
        return Transcript(tokenizer, stop, on_text if sample == 0 else None)

    began = time.perf_counter()
    first_token_at = began

    def on_token(sample: int, token_id: int) -> bool:
        nonlocal first_token_at
        if first_token_at == began:
            first_token_at = time.perf_counter()
        return transcript(sample).add(token_id)

    prompt_ids, end = prompt_tokens(tokenizer, prompt), tokenizer.end_of_text_id
    if optimized and (speculator is not None or constrain is not None or int8_cache):
        rows, runner = max(num_samples, 1), runner_for(model)
        engine = Engine(model, max_batch_size=rows, int8_cache=int8_cache, runner=runner, speculator=speculator)
        request = Request(prompt_ids, settings, max_new_tokens, seed, num_samples, end, constrain=constrain)
        continuations = generate_batched(engine, request, on_token)
    else:
        continuations = (partial(generate_cached, decode=decode) if optimized else generate_naive)(
            model,
            prompt_ids,
            settings,
            max_new_tokens=max_new_tokens,
            seed=seed,
            num_samples=num_samples,
            end_of_text_id=end,
            on_token=on_token,
        )
    seconds = time.perf_counter() - first_token_at
    decoded = sum(max(0, len(continuation.token_ids) - 1) for continuation in continuations)
    return Generation(
        prompt=prompt,
        completions=[
            Completion(transcript(sample).finish(), continuation.token_ids, continuation.finish_reason)
            for sample, continuation in enumerate(continuations)
        ],
        tokens_per_second=decoded / seconds if decoded else 0.0,
        time_to_first_token_seconds=first_token_at - began,
    )


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the tokens of a prompt as the beginning of a document."""
    return [*tokenizer.start_ids, *tokenizer.encode(prompt)]


class Transcript:
    """The text of one sample as it grows, watched for stop strings.

    `on_text` gets what is certain: text that may turn out to begin a stop string waits until that is known.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], on_text: Callable[[str], None] | None) -> None:
        self.text = ""
        self._decoder = StreamDecoder(tokenizer)
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._on_text = on_text
        self._emitted = 0
        self._is_stopped = False

    def add(self, token_id: int) -> bool:
        """Take the next token; return whether a stop string is complete."""
        self._append(self._decoder.push(token_id))
        self._emit(len(self.text) - self._undecided())
        return self._is_stopped

    def finish(self) -> str:
        """Release what was held back, and return the whole text."""
        if not self._is_stopped:
            self._append(self._decoder.flush())
        self._emit(len(self.text))
        return self.text

    def _append(self, piece: str) -> None:
        """Add text, and cut it where the first stop string begins."""
        search_from = max(0, len(self.text) - self._longest_stop + 1)
        self.text += piece
        found = [(at + len(string), at) for string in self._stop if (at := self.text.find(string, search_from)) >= 0]
        if found:
            self._is_stopped = True
            _, cut = min(found)  # the one that is complete first, whatever pieces the text comes in
            self.text = self.text[:cut]

    def _undecided(self) -> int:
        """Return the length of the longest end of the text that may yet become a stop string."""
        if self._is_stopped:
            return 0
        for length in range(min(self._longest_stop - 1, len(self.text)), 0, -1):
            ending = self.text[-length:]
            if any(string.startswith(ending) for string in self._stop):
                return length
        return 0

    def _emit(self, end: int) -> None:
        if self._on_text is not None and end > self._emitted:
            self._on_text(self.text[self._emitted : end])
            self._emitted = end
