"""Proof, on the user's own settings and text, that an interrupted run ends like an undisturbed one.

Real processes run the real command: one straight through, one that is asked to stop, resumed, killed without a warning
and resumed again. Then everything that they wrote is compared.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sheepop.config import LENGTH_KEYS, Config, load_config
from sheepop.evaluation.plots import CONFIG_FILE, METRICS_FILE
from sheepop.evaluation.report import SAMPLES_FILE
from sheepop.models.pretrained import BEST_POINTER, LATEST_POINTER, WEIGHTS_FILE, read_tensors
from sheepop.training.checkpoint import OPTIMIZER_FILE, find_resume, read_state
from sheepop.training.distributed import World
from sheepop.training.metrics import EVENTS_FILE
from sheepop.training.run import open_text, require_text
from sheepop.utils.errors import CheckpointError, ConfigError, SheepopError
from sheepop.utils.files import read_json, write_json
from sheepop.utils.logging import log

CLOCK_KEYS = ("elapsed_seconds", "tokens_per_second", "mfu")  # what two runs never have in common
LEAST_STEPS = 6
POLL_SECONDS = 0.005


def prove_resume(
    file: Path | None, *, preset: str | None, overrides: dict[str, object], steps: int, output: Path | None
) -> dict[str, Any]:
    """Train `steps` steps twice, once with interruptions, and compare every weight, moment, metric and sample.

    The length of the run is `steps`, whatever the settings say, a checkpoint is written every quarter of that, and
    every step is logged; all else is as in the settings.

    Args:
        file: settings file, see `load_config`.
        preset: see `load_config`.
        overrides: dotted settings of the command line, among them `data.path`.
        steps: of the straight run.
        output: folder for both runs, or None to remove them afterwards.

    Returns:
        `equal`, `steps`, `device`, `interruptions` (what was done after which step) and `compared`: a list of what was
        compared, how many of it, how many were equal, and the largest difference.

    Raises:
        ConfigError: settings that cannot be run, or too few steps.
        SheepopError: one of the runs failed; its message is passed on.
    """
    if steps < LEAST_STEPS:
        raise ConfigError(f"--steps is {steps}, but there is room for two interruptions only from {LEAST_STEPS} on.")
    config = load_config(file, preset=preset, overrides=overrides)
    require_text(config)
    place = nullcontext(str(output)) if output else tempfile.TemporaryDirectory(prefix="sheepop-verify-")
    with place as folder:
        settings = Path(folder) / "settings.json"
        write_json(settings, _settings_of_proof(config, steps))
        straight, interrupted = Path(folder) / "straight", Path(folder) / "interrupted"
        log(f"a straight run of {steps} steps")
        _finish(_start(settings, straight))
        # What was decided by a clock must be the same in the other run.
        decided = read_json(straight / CONFIG_FILE, CheckpointError)["training"]["compile"]
        asked = read_json(settings, ConfigError)
        write_json(settings, asked | {"training": asked["training"] | {"compile": decided}})
        interruptions = []
        resume: list[str] = []
        for number, how in ((steps // 3, signal.SIGTERM), (2 * steps // 3, signal.SIGKILL)):
            process = _start(settings, interrupted, *resume)
            _wait_for_step(interrupted, number, process)
            process.send_signal(how)
            errors = process.communicate()[1]
            if process.returncode not in (-how, 128 + how):
                raise SheepopError(
                    f"The run that was to be interrupted by {how.name} ended by itself (status {process.returncode}), "
                    f"before the signal reached it; give more --steps. It said: {_last_line(errors)}"
                )
            checkpoint = find_resume(interrupted, "auto")
            saved = read_state(checkpoint).step if checkpoint else 0
            interruptions.append({"signal": how.name, "after_step": _logged_steps(interrupted), "resumed_from": saved})
            log(f"interrupted by {how.name} after step {interruptions[-1]['after_step']}; the state is of step {saved}")
            resume = ["--resume", "auto"]
        _finish(_start(settings, interrupted, *resume))
        compared = compare_runs(straight, interrupted)
    return {
        "equal": all(row["equal"] == row["count"] for row in compared),
        "steps": steps,
        "device": config.device,
        "interruptions": interruptions,
        "compared": compared,
    }


def format_verdict(result: dict[str, Any]) -> str:
    """Say in a few lines what was proved, or what differs."""
    lines = [
        f"{item['signal']} after step {item['after_step']}, resumed from step {item['resumed_from']}"
        for item in result["interruptions"]
    ]
    for row in result["compared"]:
        difference = "" if row["equal"] == row["count"] else f"; largest difference {row['largest_difference']:.3g}"
        lines.append(f"{row['what']:>22}: {row['equal']} of {row['count']} equal bit for bit{difference}")
    if result["equal"]:
        lines.append(f"Proved: {result['steps']} steps with interruptions equal {result['steps']} steps without.")
    else:
        lines.append(
            "Not equal. On a CPU that is a defect, please report it with these settings; on a GPU some kernels add in "
            "an order that changes from run to run, and small differences come from that."
        )
    return "\n".join(lines)


def _settings_of_proof(config: Config, steps: int) -> dict[str, Any]:
    """Return the settings with a length that is known and a record of every step; text is prepared once."""
    corpus = open_text(config, World())
    settings = config.model_dump()
    settings["data"]["path"] = str(corpus.path.resolve())
    training = {key: value for key, value in settings["training"].items() if key not in LENGTH_KEYS}
    every = max(1, steps // 4)
    settings["training"] = training | {
        "max_steps": steps,
        "log_interval": 1,
        "save_interval": every,
        "eval_interval": every,
        "eval_max_tokens": min(training["eval_max_tokens"], 20 * config.data.max_length),
    }
    return settings


def _start(settings: Path, run: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "sheepop", "train", "--config", str(settings), "--output", str(run), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ)


def _finish(process: "subprocess.Popen[str]") -> None:
    errors = process.communicate()[1]
    if process.returncode:
        error = SheepopError(f"The training that was to be verified failed: {_last_line(errors)}")
        error.exit_status = process.returncode if process.returncode > 0 else 1
        raise error


def _last_line(errors: str) -> str:
    return errors.strip().rpartition("\n")[2].removeprefix("error: ")


def _wait_for_step(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    while process.poll() is None and _logged_steps(run) < step:
        time.sleep(POLL_SECONDS)


def _logged_steps(run: Path) -> int:
    """Return the last step that the run has logged, 0 if none."""
    path = run / METRICS_FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return max((int(json.loads(line)["step"]) for line in lines), default=0)


def compare_runs(straight: Path, interrupted: Path) -> list[dict[str, Any]]:
    """Compare the newest checkpoints of two runs, and what they recorded but for the clock.

    Returns:
        For each kind of thing `what`, `count`, `equal` (bit for bit) and `largest_difference`.
    """
    checkpoints = [find_resume(run, "auto") for run in (straight, interrupted)]
    if None in checkpoints:
        raise CheckpointError(f"One of the runs {straight} and {interrupted} has no checkpoint.")
    one, other = (checkpoint for checkpoint in checkpoints if checkpoint is not None)
    rows = []
    for what, file in (("weights", WEIGHTS_FILE), ("optimizer's moments", OPTIMIZER_FILE)):
        expected, found = read_tensors(one / file), read_tensors(other / file)
        names, both = expected.keys() | found.keys(), expected.keys() & found.keys()
        differences = [(expected[name].double() - found[name].double()).abs().max().item() for name in both]
        equal = sum(expected[name].equal(found[name]) for name in both)
        rows.append(_row(what, len(names), equal, max(differences, default=0.0)))
    for what, file in (
        ("lines of metrics", METRICS_FILE),
        ("samples", SAMPLES_FILE),
        ("events", EVENTS_FILE),
        ("pointer to the latest", LATEST_POINTER),
        ("pointer to the best", BEST_POINTER),
    ):
        records, others = (_records(run / file) for run in (straight, interrupted))
        pairs = list(zip(records, others, strict=False))
        losses = [abs(a["loss"] - b["loss"]) for a, b in pairs if a.get("loss") and b.get("loss")]
        count = max(len(records), len(others))
        rows.append(_row(what, count, sum(a == b for a, b in pairs), max(losses, default=0.0)))
    states = [asdict(read_state(checkpoint)) for checkpoint in (one, other)]
    for state in states:
        state["elapsed_seconds"] = 0.0
    rows.append(_row("numbers of the state", len(states[0]), sum(states[0][k] == states[1][k] for k in states[0]), 0.0))
    return rows


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    lines = [text] if path.suffix == ".json" else text.split("\n")[:-1]
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK_KEYS} for line in lines]


def _row(what: str, count: int, equal: int, difference: float) -> dict[str, Any]:
    return {"what": what, "count": count, "equal": equal, "largest_difference": difference}
