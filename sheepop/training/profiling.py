"""Where the time of a step goes: `sheepop train --profile`.

The loop and the step say which part begins (`begin_part`); outside a profile that costs a look at one variable. A few
steps are traced with PyTorch's profiler, which makes them slower, and a few more are timed without it.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from sheepop.utils.files import write_atomic
from sheepop.utils.logging import log, warn

Part = Literal["load", "forward", "backward", "gradient exchange", "clip", "optimizer", "other", "between steps"]
# "other" is counting targets and clearing gradients; "between steps" is logging, validating, sampling and saving.
PARTS: tuple[Part, ...] = (
    "load",
    "forward",
    "backward",
    "gradient exchange",
    "clip",
    "optimizer",
    "other",
    "between steps",
)
WARM_UP_STEPS, TRACED_STEPS, TIMED_STEPS = 3, 3, 10
TOP_OPERATORS = 15
FOLDER, TRACE_FILE, TABLE_FILE = "profile", "trace.json", "table.txt"


class StepProfile:
    """Traces and times the parts of some steps; a step begins with its loading."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.timed_steps = 0
        self.profiler: Any = None
        self._steps_begun = 0
        self._part: str | None = None
        self._part_began = 0.0
        self._label: Any = None
        self._is_tracing = False

    def begin(self, part: Part) -> None:
        """End the part that is under way and begin another."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else a part ends before its kernels do
        self._end_part()
        if part == "load":
            self._begin_step()
        self._part, self._part_began = part, time.perf_counter()
        if self._is_tracing:
            self._label = torch.profiler.record_function(f"step: {part}")
            self._label.__enter__()

    def close(self) -> None:
        """End what is under way."""
        self._end_part()
        if self._is_tracing:
            self._stop_tracing()

    def _begin_step(self) -> None:
        step = self._steps_begun
        self._steps_begun += 1
        if step == WARM_UP_STEPS:
            self._start_tracing()
        elif step == WARM_UP_STEPS + TRACED_STEPS:
            self._stop_tracing()

    def _is_timing(self) -> bool:
        timed = self._steps_begun - 1 - WARM_UP_STEPS - TRACED_STEPS
        return 0 <= timed < TIMED_STEPS

    def _end_part(self) -> None:
        if self._label is not None:
            self._label.__exit__(None, None, None)
            self._label = None
        if self._part is not None and self._is_timing():
            self.seconds[self._part] += time.perf_counter() - self._part_began
            self.timed_steps += self._part == "between steps"  # the last part of each
        self._part = None

    def _start_tracing(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=activities)
        self.profiler.start()
        self._is_tracing = True

    def _stop_tracing(self) -> None:
        self.profiler.stop()
        self._is_tracing = False


_active: StepProfile | None = None


def begin_part(part: Part) -> None:
    """Say that a part of the training step begins, if someone profiles; a call outside a profile takes some 30 ns."""
    if _active is not None:
        _active.begin(part)


def is_profiling() -> bool:
    """Say whether someone profiles, which waits for the device at each part."""
    return _active is not None


@contextmanager
def profile_steps(run: Path, device: torch.device) -> Iterator[None]:
    """Profile some of the training steps that are made inside the block, and write what was found into `run/profile`.

    The steps compute what they would compute without.
    """
    global _active
    profile = _active = StepProfile(device)
    try:
        yield
    finally:
        _active = None
        profile.close()
        write_profile(run / FOLDER, profile)


def write_profile(folder: Path, profile: StepProfile) -> None:
    """Write the trace (for chrome://tracing or ui.perfetto.dev) and the table, and show the table."""
    if profile.profiler is None:
        warn(f"nothing was profiled: that needs more than {WARM_UP_STEPS} steps, the first of which are left out")
        return
    folder.mkdir(parents=True, exist_ok=True)
    profile.profiler.export_chrome_trace(str(folder / TRACE_FILE))
    table = format_profile(profile)
    write_atomic(folder / TABLE_FILE, table + "\n")
    log(table)
    log(f"the trace: {folder / TRACE_FILE} (open it in chrome://tracing or https://ui.perfetto.dev)")


def format_profile(profile: StepProfile) -> str:
    """Return the table: the parts of the steps that were timed, and the operators that took longest in the trace."""
    lines = []
    if steps := profile.timed_steps:
        in_steps = sum(seconds for part, seconds in profile.seconds.items() if part != "between steps")
        lines.append(f"{'part of a step':<20}{'ms':>10}{'share':>9}   ({steps} steps, without the tracer)")
        for part, seconds in [*((part, profile.seconds[part]) for part in PARTS[:-1]), ("the step", in_steps)]:
            lines.append(f"{part:<20}{1000 * seconds / steps:>10.3f}{seconds / in_steps:>9.1%}")
        between = profile.seconds["between steps"]
        lines += [f"{'between steps':<20}{1000 * between / steps:>10.3f}   (logging, validating, sampling, saving)", ""]
    operators = operator_times(profile)
    all_time = sum(seconds for seconds, _ in operators.values()) or 1.0
    lines.append(f"{'operator, by its own time':<48}{'ms':>10}{'share':>9}{'calls':>8}   (all traced steps)")
    for name, (seconds, calls) in sorted(operators.items(), key=lambda item: -item[1][0])[:TOP_OPERATORS]:
        lines.append(f"{name[:47]:<48}{1000 * seconds:>10.3f}{seconds / all_time:>9.1%}{calls:>8}")
    return "\n".join(lines)


def operator_times(profile: StepProfile) -> dict[str, tuple[float, int]]:
    """Return each operator's own seconds, on the GPU where there is one, and its calls, inside the traced steps."""
    on_gpu = profile.device.type == "cuda"
    events = profile.profiler.events()
    outside = [event.time_range for event in events if event.name == "step: between steps"]
    times: dict[str, tuple[float, int]] = {}
    for event in events:
        if event.name.startswith("step: ") or any(span.start <= event.time_range.start <= span.end for span in outside):
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds, calls = times.get(event.name, (0.0, 0))
        times[event.name] = (seconds + microseconds / 1e6, calls + 1)
    return times
