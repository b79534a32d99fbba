"""SIGINT and SIGTERM: the first asks the run to save and leave, the second ends the process at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """The signal that asked the run to stop, if one did."""

    signal_number: int | None = None

    @property
    def is_made(self) -> bool:
        """Whether a signal came."""
        return self.signal_number is not None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Let SIGINT and SIGTERM ask for an orderly stop; a second signal ends the process at once."""
    request = StopRequest()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        request.signal_number = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
