"""The long versions of the tests that nothing is lost, and what checkpoints cost.

    python benchmarks/reliability.py --text FOLDER --kills 200 --corruptions 480
    python benchmarks/reliability.py --text FOLDER --only overhead

`FOLDER` is a text for the demo's model, whose training with a checkpoint every 100 steps is timed against the steps
alone. The rest are tests, most of `tests/training`, run with larger numbers; each row is one of them.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from common import median, show

from sheepop.config import load_config
from sheepop.training.batches import batch_loader
from sheepop.training.distributed import World
from sheepop.training.run import open_text, set_up
from sheepop.training.saver import Saver
from sheepop.training.step import train_step

STEPS_BETWEEN = 100
TESTS = {
    "2N steps = N + stop + N, everything equal": ["test_trainer.py", "test_verify.py"],
    "killed at any moment": ["test_kills.py"],
    "a text's preparation, killed at any moment": ["../data/test_prepare_at_scale.py", "-k", "killed"],
    "no space left at any write": ["test_checkpoint.py", "test_saver.py", "test_stopping.py", "-k", "disk or fit"],
    "damaged checkpoints": ["test_checkpoint.py", "-k", "damage"],
    "bad numbers, on one of two processes too": ["test_bad_numbers.py", "test_guard.py"],
    "1, 2 and 4 processes; a lost one; another number": ["test_distributed.py", "test_batch_loader.py"],
    "signals at any moment": ["test_trainer.py", "test_stopping.py", "-k", "signal"],
}


def run_tests(what: list[str], options: list[str]) -> dict[str, object]:
    folder = Path(__file__).parents[1] / "tests" / "training"
    words = [str(folder / word) if word.endswith(".py") else word for word in what]
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        began = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-q", *words, *options, f"--junitxml={report.name}"]
        subprocess.run(command, cwd=folder.parents[1], capture_output=True, check=False)
        suite = ElementTree.parse(report.name).getroot()[0]
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        "tests": counts["tests"],
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": time.perf_counter() - began,
        "verdict": "MISSED" if failed or counts["tests"] == counts["skipped"] else "reached",
    }


def overhead(text: Path, *, async_save: bool, rounds: int) -> dict[str, object]:
    """Time the demo's steps and its checkpoints in one process, where both are seen by the same clock.

    A save beside the training costs what it holds up the loop, and what it slows the steps down that run meanwhile:
    the steps after a save are compared with those long after it.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides: dict[str, object] = {
            "data.path": str(text),
            "data.data_dir": folder,
            "training.save_dir": folder,
            "training.async_save": async_save,
            "device": "cpu",
        }
        config = load_config(preset="demo", overrides=overrides)
        run = set_up(config, open_text(config, World()), device=torch.device("cpu"), world=World())
        load = batch_loader(run)
        steps: list[float] = []
        saves: list[float] = []
        slowed: list[float] = []
        with Saver(run) as saver:
            for step in range(rounds * STEPS_BETWEEN):
                batches = load(step)
                began = time.perf_counter()
                train_step(run, batches, step=step, learning_rate=1e-3)
                steps.append(time.perf_counter() - began)
                run.state.step = step + 1
                if (step + 1) % STEPS_BETWEEN == 0:
                    began = time.perf_counter()
                    saver.save()
                    saves.append(time.perf_counter() - began)
        usual = median(steps)
        for index in range(STEPS_BETWEEN, len(steps), STEPS_BETWEEN):
            slowed.append(sum(steps[index : index + 10]) - 10 * usual if async_save else 0.0)
        cost = median(saves) + max(0.0, median(slowed)) if slowed else median(saves)
        return {
            "saves": "beside the training" if async_save else "at once",
            "ms a step": 1000 * usual,
            "ms held up by a save": 1000 * median(saves),
            "ms of later steps": 1000 * median(slowed) if slowed else 0.0,
            "share of training time": cost / (STEPS_BETWEEN * usual),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--corruptions", type=int, default=480)
    parser.add_argument("--rounds", type=int, default=4, help="checkpoints that are timed")
    parser.add_argument("--only", choices=["tests", "overhead"])
    options = parser.parse_args()
    if options.only != "overhead":
        more = [f"--kills={options.kills}", f"--corruptions={options.corruptions}"]
        show("nothing is lost", [{"what": name, **run_tests(words, more)} for name, words in TESTS.items()])
    if options.only != "tests":
        rows = [overhead(options.text, async_save=beside, rounds=options.rounds) for beside in (False, True)]
        show(f"one checkpoint every {STEPS_BETWEEN} steps of the demo", rows)


if __name__ == "__main__":
    main()
