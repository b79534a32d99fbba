"""What a run writes down while it trains: `metrics.jsonl` always, TensorBoard on request, a line at the terminal."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from sheepop.evaluation.plots import METRICS_FILE
from sheepop.evaluation.report import SAMPLES_FILE
from sheepop.utils.errors import ConfigError
from sheepop.utils.files import write_atomic
from sheepop.utils.logging import format_count, format_duration, is_terminal, log

EVENTS_FILE = "events.jsonl"  # steps that were left out, and jumps of the loss


class RunLog:
    """Appends lines to the run's JSONL files and tells the person at the terminal; other processes stay silent.

    Lines after `step` are dropped on opening, so that a resumed run continues its own record without doubles; with
    `is_unfinished` also what was validated and sampled at it, which is done again.
    """

    def __init__(
        self,
        run: Path,
        *,
        step: int,
        is_unfinished: bool = False,
        tensorboard: bool = False,
        is_silent: bool = False,
    ) -> None:
        self.run, self.is_silent = run, is_silent
        self._line_is_open = False
        self._tensorboard = None
        if is_silent:
            return
        for name in (METRICS_FILE, SAMPLES_FILE, EVENTS_FILE):
            keep_lines_until(run / name, step, is_unfinished=is_unfinished)
        if tensorboard:
            self._tensorboard = _open_tensorboard(run / "tensorboard", step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def metrics(self, **values: Any) -> None:
        """Append a line to `metrics.jsonl`; numbers that JSON cannot hold become null."""
        if self.is_silent:
            return
        _append(self.run / METRICS_FILE, {key: _json_number(value) for key, value in values.items()})
        if self._tensorboard is not None:
            for key, value in values.items():
                if isinstance(value, float) and key != "elapsed_seconds":
                    self._tensorboard.add_scalar(f"{values['type']}/{key}", value, values["step"])

    def event(self, **values: Any) -> None:
        """Append to `events.jsonl` that a step was bad or its loss jumped."""
        if not self.is_silent:
            _append(self.run / EVENTS_FILE, {key: _json_number(value) for key, value in values.items()})

    def sample(self, *, step: int, prompt: str, text: str) -> None:
        """Append to `samples.jsonl` what the model writes at this step, and show it."""
        if self.is_silent:
            return
        _append(self.run / SAMPLES_FILE, {"step": step, "prompt": prompt, "text": text})
        self.say(f"  a sample at step {step}:")
        for line in (prompt + text).splitlines():
            self.say(f"    | {line}")

    def progress(
        self, *, step: int, total_steps: int, loss: float, learning_rate: float, tokens_per_second: float, left: float
    ) -> None:
        """Show how far the run is: a bar that is rewritten on a terminal, a line elsewhere."""
        if self.is_silent:
            return
        text = (
            f"step {step}/{total_steps}  loss {loss:.4f}  lr {learning_rate:.2e}  "
            f"{format_count(tokens_per_second)} tokens/s  {format_duration(left)} left"
        )
        if not is_terminal():
            log(text)
            return
        done = round(20 * step / total_steps)
        print(f"\r[{'#' * done}{'.' * (20 - done)}] {text}\x1b[K", end="", file=sys.stderr, flush=True)
        self._line_is_open = True

    def say(self, message: str) -> None:
        """Print a line without breaking the progress bar."""
        if self.is_silent:
            return
        if self._line_is_open:
            log()
            self._line_is_open = False
        log(message)

    def close(self) -> None:
        """End the progress bar and the TensorBoard file."""
        if self._line_is_open:
            log()
            self._line_is_open = False
        if self._tensorboard is not None:
            self._tensorboard.close()


def keep_lines_until(path: Path, step: int, *, is_unfinished: bool = False) -> None:
    """Drop the lines of a JSONL file that belong to later steps, and a last line that was cut by a kill.

    Of an unfinished step itself the line of its training stays, and what happened in it; its validation and sample go.
    """

    def is_kept(record: dict[str, Any]) -> bool:
        of_training = record.get("type") == "train" or "kind" in record
        return bool(record["step"] < step + (not is_unfinished or of_training))

    if not path.exists():
        return
    kept = []
    # As bytes: a kill may have cut a character in two, and str.splitlines also splits at line ends that samples hold.
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if line.endswith(b"\n") and is_kept(json.loads(line)):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    write_atomic(path, b"".join(kept))


def _append(path: Path, value: dict[str, object]) -> None:
    # One write call of a whole line: a reader never sees a line cut by our buffering.
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def _json_number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "training.tensorboard needs the package tensorboard: pip install 'sheepop[tensorboard]', "
            "or leave it off; metrics.jsonl and the plots are written either way."
        ) from None
    return SummaryWriter(str(folder), purge_step=step + 1)
