"""SIGINT and SIGTERM: the first asks the run to save and leave, the second ends the process at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


@dataclass
class StopRequest:
    """The signal that asked the run to stop, if one did."""

    signal_number: int | None = None

    @property
    def is_made(self) -> bool:
        """Whether a signal came."""
        return self.signal_number is not None


@contextmanager
def stop_signals(*, is_alone: bool = True) -> Iterator[StopRequest]:
    """Let SIGINT and SIGTERM ask for an orderly stop; a second signal ends the process at once.

    Of several processes, one that an error ends is not to be ended by SIGTERM as well: `torchrun` sends it to all as
    soon as one of them is gone, and they would not come to say what they met.
    """
    request = StopRequest()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        request.signal_number = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    previous: dict[signal.Signals, Any] = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield request
    except BaseException:
        if not is_alone:
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
