"""The server's process: it says when it is ready, and on a signal finishes what it can before it ends."""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import uvicorn
from fastapi import FastAPI

from sheepop.serving.app import create_app
from sheepop.serving.metrics import Metrics
from sheepop.serving.scheduler import Scheduler
from sheepop.serving.served_model import ServedModel
from sheepop.utils.logging import log

SECONDS_BETWEEN_LOOKS = 0.02
SECONDS_TO_SEND = 2  # what is finished, to a client that reads slowly


class Server(uvicorn.Server):
    """uvicorn, with an end of our own.

    Attributes:
        signal_number: the signal that ended it.
    """

    def __init__(
        self, app: FastAPI, scheduler: Scheduler, *, grace_seconds: float, on_ready: Callable[[], None]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=int(grace_seconds) + SECONDS_TO_SEND,
            )
        )
        self.signal_number: int | None = None
        self._scheduler, self._grace_seconds, self._on_ready = scheduler, grace_seconds, on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `run`: the system's come to the main thread alone, which is not this one."""
        yield

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Let the first signal ask for an orderly end, and the second break off what is being written."""
        self.force_exit = self.should_exit
        self.should_exit, self.signal_number = True, number

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take on nothing new, and let what is being written come to its end for a while."""
        self._scheduler.drain()
        if not self._scheduler.is_idle:
            log(f"finishing what is being written, in {self._grace_seconds:g} s at the most; a second signal ends that")
        finishing = asyncio.create_task(self._finish())
        await super().shutdown(sockets)
        await finishing

    async def _finish(self) -> None:
        deadline = time.monotonic() + self._grace_seconds
        while not self._scheduler.is_idle and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        await asyncio.to_thread(self._scheduler.close)


def run(
    served: ServedModel,
    listener: socket.socket,
    *,
    max_waiting: int,
    api_key: str | None,
    grace_seconds: float,
    on_ready: Callable[[], None],
) -> int:
    """Serve until a signal comes; return its number.

    The engine computes on this thread, the main one, which loaded the model; a thread of its own speaks with clients.
    Each thread that computes has OpenMP threads of its own, and where they are more than cores, OpenMP lets all of them
    sleep between its pieces of work: the steps of a model of 135 M parameters then took 1.4 times as long.

    Args:
        served: the model.
        listener: bound to an address.
        max_waiting: as of `Scheduler`.
        api_key: as of `create_app`.
        grace_seconds: how long what is being written may take to end after the signal.
        on_ready: called when requests are taken on.
    """
    metrics = Metrics()
    metrics.watch(served.engine)
    scheduler = Scheduler(served.engine, served.tokenizer, max_waiting=max_waiting, metrics=metrics)
    server = Server(
        create_app(served, scheduler, metrics, api_key=api_key),
        scheduler,
        grace_seconds=grace_seconds,
        on_ready=on_ready,
    )

    def speak() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            scheduler.close()

    previous = {number: signal.signal(number, server.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="http") as pool:
            speaking = pool.submit(speak)
            try:
                scheduler.run()
            finally:
                server.should_exit = True
            speaking.result()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert server.signal_number is not None
    return server.signal_number
