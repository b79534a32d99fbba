"""The engine: many requests at once, which join and leave between steps.

A step computes the next token of every text that is being written, and beside them a bounded chunk of the prompts
that are still being read (continuous batching: Yu et al. 2022, Orca; chunked prefill: Agrawal et al. 2023, Sarathi).
Keys and values lie in the pages of a `PagedCache`; when these run out, the youngest text gives its own back and is
computed again later. The engine knows token ids only: text, stop strings and clients are of the level above.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

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
from sheepop.generation.request import Request, TokenEvent
from sheepop.generation.runner import Chunk, ModelRunner, Runner
from sheepop.generation.speculation import Guess, Speculator, Wanted, draw_or_accept
from sheepop.generation.stream import Stream, draw, token_logprobs
from sheepop.models.int8_cache import Int8PagedCache
from sheepop.models.paged_cache import PagedCache, pages_in_memory
from sheepop.models.sizing import TOKEN_BYTES
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import ConfigError
from sheepop.utils.logging import format_bytes
from sheepop.utils.memory import check_available
from sheepop.utils.seeds import derive_seed

NO_GUESS = Guess([])
STREAM_BYTES = 8_000  # of a sample that waits: its record and the states of its random numbers, and what callers keep


@dataclass(frozen=True)
class Work:
    """What a step computes for one stream: its next tokens, and behind the last one of them guesses."""

    stream: Stream
    chunk: Chunk
    guess: Guess
    reaches_end: bool  # whether the stream's next token is known afterwards


@dataclass
class Counters:
    """What the engine has done so far.

    Attributes:
        computed: tokens that went through the model, guesses included.
        found: tokens whose keys and values an earlier text had left.
        preempted: how often a text gave its pages back.
        guessed, accepted: tokens that were guessed, and those of them that the model agreed with.
    """

    computed: int = 0
    found: int = 0
    preempted: int = 0
    guessed: int = 0
    accepted: int = 0


class Engine:
    """Continues many prompts at once; each gets the tokens that it would get alone.

    Not for use from several threads at a time.

    Args:
        model: gives the settings, the device and, without a `runner`, the computing; its weights must stay as they are.
        max_batch_size: the most samples that are written at the same time; others wait.
        num_pages: pages of keys and values; default: as many as `max_batch_size` samples of `max_seq_len` tokens fill,
            but at most half of the memory that is available.
        page_size: tokens of a page.
        chunk_size: the most tokens of prompts that a step computes.
        int8_cache: keep keys and values in 8 bits, in about a third of the memory; the logits then differ a little.
        runner: computes the chunks; default: the model, by PyTorch.
        speculator: guesses tokens ahead.

    Raises:
        ConfigError: an option is out of range, or the pages do not fit into the memory that is free.
    """

    def __init__(
        self,
        model: TransformerModel,
        *,
        max_batch_size: int = 16,
        num_pages: int | None = None,
        page_size: int = 16,
        chunk_size: int = 256,
        int8_cache: bool = False,
        runner: Runner | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("page_size", page_size), ("chunk_size", chunk_size)):
            if value < 1:
                raise ConfigError(f"The option '{name}' is {value}, but must be at least 1.")
        self.model, self.max_seq_len = model, model.config.max_seq_len
        self.max_batch_size, self.chunk_size = max_batch_size, chunk_size
        kind, dtype = Int8PagedCache if int8_cache else PagedCache, model.dtype
        if num_pages is None:
            wanted = max_batch_size * -(-self.max_seq_len // page_size)
            page_bytes = kind.page_bytes(model.config, page_size, dtype)
            num_pages = min(wanted, max(1, pages_in_memory(page_bytes, model.device)))
        self.cache = kind(model.config, num_pages, page_size, device=model.device, dtype=dtype)
        self.counters = Counters()
        self._runner = runner or ModelRunner(model)
        self._speculator = speculator
        self._waiting: deque[Stream] = deque()  # the oldest first
        self._running: list[Stream] = []  # the oldest first, and all of them older than those that wait
        self._events: list[TokenEvent] = []  # to be told with the next step
        self._next_id = 0
        self._said_context_is_full = False

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._running or self._waiting or self._events)

    @property
    def num_running(self) -> int:
        """How many samples are being written, or their prompts read."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """How many samples wait for others to end."""
        return len(self._waiting)

    def add(self, request: Request) -> int:
        """Take on a request, to join at the next step; return the number that its events carry.

        Raises:
            ConfigError, CheckpointError: as `check`.
        """
        prompt = self.check(request)
        model, end = self.model, request.end_of_text_id
        request_id, self._next_id = self._next_id, self._next_id + 1
        for sample in range(request.num_samples):
            scores_prompt = request.prompt_logprobs is not None and sample == 0
            if request.max_new_tokens == 0 and not scores_prompt:
                self._events.append(TokenEvent(request_id, sample, None, "length"))
                continue
            start = context_start(len(prompt), self.max_seq_len)
            self._waiting.append(
                Stream(
                    request_id,
                    sample,
                    request,
                    token_ids=list(prompt),
                    said_from=text_start(prompt, end),
                    start=start,
                    generator=sample_generator(model, request.seed, sample),
                    draft_generator=torch.Generator(model.device).manual_seed(
                        derive_seed(request.seed, "draft", sample)
                    ),
                    constraint=request.constrain() if request.constrain is not None else None,
                    prompt_logprobs=[None] * (start + 1) if scores_prompt else None,
                )
            )
        return request_id

    def check(self, request: Request) -> list[int]:
        """Check what was asked for, and return the tokens to start from.

        Raises:
            ConfigError: an option is out of range, or the pages could never hold the request, or the memory that is
                free all of its samples.
            CheckpointError: a token is not in the model's vocabulary.
        """
        prompt = check_request(
            self.model,
            request.prompt_ids,
            request.settings,
            request.max_new_tokens,
            request.num_samples,
            request.end_of_text_id,
        )
        request.validate(self.model.config.vocab_size)
        longest = min(len(prompt) + max(request.max_new_tokens - 1, 0), self.max_seq_len)  # the last one is not stored
        needed, cache = self.cache.pages_for(longest), self.cache
        if needed > cache.num_pages:
            page_bytes = cache.page_bytes(self.model.config, cache.page_size, cache.dtype)
            raise ConfigError(
                f"The request needs a cache of {longest} tokens ({format_bytes(needed * page_bytes)}), but there is "
                f"room for {cache.num_pages * cache.page_size} ({format_bytes(cache.num_pages * page_bytes)}). Ask for "
                "fewer tokens, or free memory, half of which is used at the most; a program can also give the engine "
                "more pages."
            )
        if request.num_samples > 1:
            check_available(
                request.num_samples * (STREAM_BYTES + TOKEN_BYTES * len(prompt)),
                torch.device("cpu"),
                f"To keep {request.num_samples} samples in mind takes",
                "Ask for fewer samples at a time.",
            )
        return prompt

    def cancel(self, request_id: int, sample: int | None = None) -> None:
        """End a request, or one of its samples, without another event; nothing happens if it has ended already."""

        def is_meant(each: Stream | TokenEvent) -> bool:
            return each.request_id == request_id and sample in (None, each.sample)

        for stream in filter(is_meant, list(self._running)):
            self._leave(stream)
        self._waiting = deque(stream for stream in self._waiting if not is_meant(stream))
        self._events = [event for event in self._events if not is_meant(event)]

    def forget(self) -> None:
        """Let no text that comes from now on use what earlier ones have left: as if the engine were new."""
        self.cache.forget()
        if self._speculator is not None:
            self._speculator.forget()

    def step(self) -> list[TokenEvent]:
        """Compute once; return what came of it, the tokens of a sample in order."""
        events, self._events = self._events, []
        self._join()
        plan = self._plan()
        if not plan:
            return events
        logits = self._runner([work.chunk for work in plan], self.cache)
        self.counters.computed += sum(len(work.chunk.token_ids) for work in plan)
        results = list(zip(plan, logits, strict=True))
        for work, rows in results:
            if work.stream.scores_prompt:
                work.stream.note_prompt_logprobs(rows)
        plain = [(work.stream, rows[-1]) for work, rows in results if work.reaches_end and not work.guess.token_ids]
        tokens = iter(draw(*zip(*plain, strict=True)) if plain else ())
        for work, rows in results:
            stream, count = work.stream, len(work.chunk.token_ids)
            told: list[TokenEvent] = []
            if work.guess.token_ids:
                told = self._check(work.guess, stream, rows)
                count = len(told)  # the newest token, and the guesses that were right
            elif work.reaches_end:
                told = [self._tell(stream, next(tokens), rows[-1])]
            self.cache.advance(stream.sequence, work.chunk.token_ids[:count])
            if told and told[-1].finish_reason is not None:
                self._leave(stream)
            events += told
        return events

    def _join(self) -> None:
        """Let streams that wait join as long as there is a row, and pages for all of what they and others have."""
        owed = sum(
            self.cache.pages_for(len(each.token_ids) - each.start) - len(each.sequence.pages) for each in self._running
        )
        while self._waiting and len(self._running) < self.max_batch_size:
            owed += self.cache.pages_for(len(self._waiting[0].token_ids) - self._waiting[0].start)
            if self._running and owed > self.cache.num_free:
                break
            self._running.append(self._waiting.popleft())

    def _plan(self) -> list[Work]:
        """Decide what is computed now, the oldest stream first, and reserve the pages for it."""
        for stream in self._running:
            self._move_window(stream)
        budget, coming, counts = self.chunk_size, set[bytes](), dict[Stream, int]()
        for stream in list(self._running):
            if stream not in self._running:  # an older one needed its pages
                continue
            if stream.pending > 1 and self._finds_prefix(stream, coming):
                continue
            count = 1
            if stream.pending > 1:
                count = self._chunk_length(stream, budget)
                budget -= count
            if count and self._make_room(stream, count + self._places_for_guesses(stream)):
                counts[stream] = count
        # Not before it is sure that they are used: then what is drawn does not depend on who else is there.
        guesses = self._guesses(counts)
        return [self._work(stream, count, guesses.get(stream, NO_GUESS)) for stream, count in counts.items()]

    def _work(self, stream: Stream, count: int, guess: Guess) -> Work:
        tokens = stream.next_tokens(count) + guess.token_ids
        all_logits = stream.scores_prompt or bool(guess.token_ids)
        return Work(stream, Chunk(stream.sequence, tokens, all_logits), guess, reaches_end=count == stream.pending)

    def _move_window(self, stream: Stream) -> None:
        """Drop the oldest half of a full context; what is left has new positions and is computed again."""
        start = context_start(len(stream.token_ids), self.max_seq_len)
        if start and not self._said_context_is_full:
            self._said_context_is_full = True
            say_context_is_full(self.max_seq_len)
        if start != stream.start:
            stream.start = start
            self.cache.release(stream.sequence)

    def _finds_prefix(self, stream: Stream, coming: set[bytes]) -> bool:
        """Take over pages that hold a prompt's next tokens; say whether to wait for one that this step computes.

        `coming` are the digests of such pages; the stream's own next one joins them.
        """
        if stream.scores_prompt or stream.sequence.length % self.cache.page_size:
            return False
        window = stream.window
        self.counters.found += self.cache.adopt(stream.sequence, window)
        digest = self.cache.next_digest(stream.sequence, window)
        if digest in coming:
            return True
        if digest is not None:
            coming.add(digest)
        return False

    def _chunk_length(self, stream: Stream, budget: int) -> int:
        """Return how many of a prompt's tokens are computed now: up to its end, or to that of a page, to be shared."""
        # Where tokens are guessed, the last one is left over, so that all are drawn in the same way: behind guesses.
        pending = stream.pending - (self._speculator is not None)
        if pending <= budget:
            return pending
        length, page_size = stream.sequence.length, self.cache.page_size
        to_page_end = (length + budget) // page_size * page_size - length
        if to_page_end > 0:
            return to_page_end
        return budget if budget == self.chunk_size else 0

    def _make_room(self, stream: Stream, count: int) -> bool:
        """Reserve pages for a stream's next tokens, if need be those of the youngest; False if that is itself."""
        while not self.cache.reserve(stream.sequence, count):
            youngest = self._running[-1]
            self._leave(youngest)
            self._waiting.appendleft(youngest)
            self.counters.preempted += 1
            if youngest is stream:
                return False
        return True

    def _leave(self, stream: Stream) -> None:
        self._running.remove(stream)
        self.cache.release(stream.sequence)
        if self._speculator is not None:
            self._speculator.forget(stream)

    def _places_for_guesses(self, stream: Stream) -> int:
        """Return how many guesses a stream can use: where it is decoding, what its length and the context leave."""
        if self._speculator is None or stream.pending > 1:
            return 0
        left = stream.request.max_new_tokens - stream.num_new_tokens - 1
        room = self.max_seq_len - (len(stream.token_ids) - stream.start)
        return max(0, min(self._speculator.num_guesses, left, room))

    def _guesses(self, streams: Iterable[Stream]) -> dict[Stream, Guess]:
        """Return guesses for those of the streams that can use some."""
        if self._speculator is None:
            return {}
        wanted = {
            stream: Wanted(stream, stream.token_ids, count, stream.request.settings, stream.draft_generator)
            for stream in streams
            if (count := self._places_for_guesses(stream))
        }
        return dict(zip(wanted, self._speculator.propose(list(wanted.values())), strict=True))

    def _check(self, guess: Guess, stream: Stream, rows: Tensor) -> list[TokenEvent]:
        """Draw a stream's tokens from the logits (k + 1, V) as long as they are the guessed ones, and one more."""
        told: list[TokenEvent] = []
        for place, row in enumerate(rows):
            adjusted, token_id = stream.adjusted(row), None
            if adjusted is not None:
                said = stream.said(row.device)
                token_id = draw_or_accept(guess, place, adjusted, stream.request.settings, stream.generator, said)
            told.append(self._tell(stream, token_id, row))
            is_right = place < len(guess.token_ids) and token_id == guess.token_ids[place]
            if told[-1].finish_reason is not None or not is_right:
                break
        self.counters.guessed += len(guess.token_ids)
        self.counters.accepted += len(told) - 1
        return told

    def _tell(self, stream: Stream, token_id: int | None, row: Tensor) -> TokenEvent:
        """Add a token that was drawn from the logits (V,) to its stream, unless it ends it, and make it known."""
        request, logprobs = stream.request, None
        reason: FinishReason | None = None
        prompt_logprobs = stream.prompt_logprobs if stream.num_new_tokens == 0 else None
        if request.max_new_tokens == 0:  # only the prompt's logprobs were asked for
            token_id, reason = None, "length"
        elif token_id is None or stream.ends_with(token_id):
            token_id, reason = None, "stop"
        else:
            if request.logprobs is not None:
                [logprobs] = token_logprobs(row[None], [token_id], request.logprobs)
            reason = stream.take(token_id)
        return TokenEvent(stream.request_id, stream.sample, token_id, reason, logprobs, prompt_logprobs)


def generate_batched(engine: Engine, request: Request, on_token: OnToken | None = None) -> list[Continuation]:
    """Return what `generate_naive` returns for one request, by an engine that has nothing else to do.

    Args:
        engine: without work.
        request: what to continue.
        on_token: as of `generate_naive`; the samples' tokens come as the engine computes them.

    Raises:
        ConfigError, CheckpointError: as `Engine.add`.
    """
    request_id = engine.add(request)
    texts: list[list[int]] = [[] for _ in range(request.num_samples)]
    finish_reasons: list[FinishReason] = ["length"] * request.num_samples
    ended = set[int]()
    while engine.has_work:
        for event in engine.step():
            if event.sample in ended:  # guesses that came with the token that ended it
                continue
            if event.token_id is not None:
                texts[event.sample].append(event.token_id)
                if on_token is not None and on_token(event.sample, event.token_id):
                    engine.cancel(request_id, event.sample)
                    ended.add(event.sample)
                    finish_reasons[event.sample] = "stop"
                    continue
            if event.finish_reason is not None:
                finish_reasons[event.sample] = event.finish_reason
    return [Continuation(token_ids, reason) for token_ids, reason in zip(texts, finish_reasons, strict=True)]
