"""One thread that runs the engine; requests join and leave between its steps.

The event loop of the server submits jobs and reads their parts; the engine's thread, the one that calls
`Scheduler.run`, alone touches the engine. It never waits for a client: what a slow one has not read yet lies in the
queue of its job, which its own tokens bound.
"""

import asyncio
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.batching import Engine
from sheepop.generation.request import Request, TokenEvent
from sheepop.serving.choice import Choice, Piece
from sheepop.serving.errors import BAD_REQUEST, CLIENT_GONE, INTERNAL, TOO_MANY, UNAVAILABLE, ApiError
from sheepop.serving.metrics import Metrics
from sheepop.utils.errors import CheckpointError
from sheepop.utils.logging import log

CLOSING = "The server is shutting down and takes on nothing new. Send the request again in a moment, or to another one."
GONE = "The client went away."
BROKE_OFF = "The server was shut down before this text was finished. Send the request again in a moment."


class Job:
    """What one client waits for: requests that are computed side by side, each of `num_samples` texts."""

    def __init__(self, requests: Sequence[Request], tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.requests = requests
        self.num_samples = sum(request.num_samples for request in requests)
        self.choices = [Choice(index, tokenizer, stop) for index in range(self.num_samples)]
        self.began = time.perf_counter()
        self.last_token: dict[int, float] = {}  # of each choice, when it came
        self.loop = asyncio.get_running_loop()
        self.queue = asyncio.Queue[list[Piece] | ApiError]()
        self.request_ids: list[int] = []  # the engine's
        self.is_over = False  # finished, broken off or given up

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Yield the parts of all texts as they come, those of one step together, to the last.

        Raises:
            ApiError: the job was broken off.
        """
        left = self.num_samples
        while left:
            item = await self.queue.get()
            if isinstance(item, ApiError):
                raise item
            left -= sum(piece.finish_reason is not None for piece in item)
            yield item


class Scheduler:
    """Runs an engine for many clients at once.

    All but `run` and what it calls is for the event loop, which is another thread's.

    Args:
        engine: without work; nobody else may use it from now on.
        tokenizer: the model's.
        max_waiting: samples that may wait for a place at most.
        metrics: gets counts and times.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, max_waiting: int, metrics: Metrics) -> None:
        self._engine, self._tokenizer, self._metrics = engine, tokenizer, metrics
        self._capacity = engine.max_batch_size + max_waiting
        self._changed = threading.Condition()
        self._inbox = deque[Callable[[], None]]()  # what the thread is to do before its next step
        self._num_samples = 0  # of all jobs that are not finished
        self._is_draining = self._is_closed = False
        self._jobs: dict[int, tuple[Job, int]] = {}  # by the engine's number, with the index of the first choice
        self._ended = threading.Event()

    def submit(self, requests: Sequence[Request], stop: Sequence[str]) -> Job:
        """Take on requests of one client.

        Args:
            requests: what `Engine.check` accepts.
            stop: strings that end each of their texts.

        Raises:
            ApiError: 429, too many wait already; 503, the server is shutting down; 400, it could never hold so many.
        """
        job = Job(requests, self._tokenizer, stop)
        if job.num_samples > self._capacity:
            raise ApiError(
                f"The request asks for {job.num_samples} texts, but this server holds {self._capacity} at the most. "
                "Send fewer prompts, or a smaller 'n', at a time.",
                status=BAD_REQUEST,
            )
        with self._changed:
            if self._is_draining:
                raise ApiError(CLOSING, status=UNAVAILABLE, code="shutting_down")
            if self._num_samples + job.num_samples > self._capacity:
                raise ApiError(
                    f"The server is busy: {self._num_samples} texts are being written or wait, of {self._capacity} at "
                    "the most. Send the request again in a moment.",
                    status=TOO_MANY,
                    code="queue_full",
                )
            self._num_samples += job.num_samples
        self._metrics.tokens_in.inc(sum(len(request.prompt_ids) for request in requests))
        self._post(lambda: self._add(job))
        return job

    def cancel(self, job: Job) -> None:
        """Stop writing what a client no longer waits for; nothing happens if it is finished."""
        self._post(lambda: self._drop(job))

    def drain(self) -> None:
        """Refuse what is new from now on; what was taken on is finished."""
        with self._changed:
            self._is_draining = True

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused."""
        return self._is_draining

    @property
    def is_idle(self) -> bool:
        """Whether all jobs are finished."""
        return self._num_samples == 0

    def close(self) -> None:
        """Break off what is not finished, let `run` return, and wait for that."""
        self.drain()
        self._post(self._break_off)
        self._ended.wait()

    # From here on the engine's thread.

    def run(self) -> None:
        """Compute what is submitted, until `close` is called."""
        try:
            while not self._is_closed:
                self._do_next()
        finally:
            self._ended.set()

    def _do_next(self) -> None:
        """Wait for something to do; take on and drop what clients ask for, and make one step."""
        with self._changed:
            while not self._inbox and not self._engine.has_work:
                self._changed.wait()
            orders = [self._inbox.popleft() for _ in range(len(self._inbox))]
        for order in orders:
            order()
        try:
            self._tell(self._engine.step())
        except Exception as error:  # a defect: those who wait are told, and the next ones are served
            if not isinstance(error, CheckpointError):
                log(traceback.format_exc())
            self._fail_all(ApiError(f"The text could not be computed. {error}", status=INTERNAL))

    def _post(self, order: Callable[[], None]) -> None:
        with self._changed:
            self._inbox.append(order)
            self._changed.notify()

    def _add(self, job: Job) -> None:
        first = 0
        for request in job.requests:
            try:
                request_id = self._engine.add(request)
            except ValueError as error:  # memory that was free when the request was checked, say
                self._fail(job, ApiError(str(error), status=UNAVAILABLE))
                return
            job.request_ids.append(request_id)
            self._jobs[request_id] = job, first
            first += request.num_samples

    def _drop(self, job: Job) -> None:
        if not job.is_over:
            self._metrics.cancelled.inc()
            self._fail(job, ApiError(GONE, status=CLIENT_GONE))

    def _forget(self, job: Job) -> None:
        """Give back what a job has of the engine and of the queue."""
        job.is_over = True
        for request_id in job.request_ids:
            self._engine.cancel(request_id)
            self._jobs.pop(request_id, None)
        self._release(sum(not choice.is_finished for choice in job.choices))

    def _release(self, num_samples: int) -> None:
        with self._changed:
            self._num_samples -= num_samples

    def _fail(self, job: Job, error: ApiError) -> None:
        self._forget(job)
        _deliver([(job, error)])

    def _fail_all(self, error: ApiError) -> None:
        for job in dict.fromkeys(job for job, _ in self._jobs.values()):
            self._fail(job, error)
        self._engine.forget()

    def _break_off(self) -> None:
        self._is_closed = True
        self._fail_all(ApiError(BROKE_OFF, status=UNAVAILABLE, code="shutting_down"))

    def _tell(self, events: Sequence[TokenEvent]) -> None:
        """Pass on what a step brought, one message for each job."""
        told: dict[Job, list[Piece]] = {}
        now, ended = time.perf_counter(), 0
        for event in events:
            job, first = self._jobs.get(event.request_id, (None, 0))
            if job is None:
                continue
            choice = job.choices[first + event.sample]
            if choice.is_finished:  # guesses that came with the end of a stop string
                continue
            if event.token_id is not None:
                self._count_token(job, choice.index, now)
            piece = choice.take(event)
            if piece is not None:
                told.setdefault(job, []).append(piece)
            if choice.is_finished:
                ended += 1
                if event.finish_reason is None:
                    self._engine.cancel(event.request_id, event.sample)
        for job in told:
            if all(choice.is_finished for choice in job.choices):
                job.is_over = True
                for request_id in job.request_ids:
                    self._jobs.pop(request_id)
        if ended:
            self._release(ended)
        _deliver(list(told.items()))

    def _count_token(self, job: Job, index: int, now: float) -> None:
        metrics = self._metrics
        metrics.tokens_out.inc()
        if index in job.last_token:
            metrics.token_seconds.observe(now - job.last_token[index])
        elif not job.last_token:
            metrics.first_token_seconds.observe(now - job.began)
        job.last_token[index] = now


def _deliver(told: Sequence[tuple[Job, list[Piece] | ApiError]]) -> None:
    """Hand the news of jobs to the event loop, in one go: each way there wakes it up."""

    def put() -> None:
        for job, news in told:
            job.queue.put_nowait(news)

    if told and not told[0][0].loop.is_closed():
        told[0][0].loop.call_soon_threadsafe(put)
