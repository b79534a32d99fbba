"""What `sheepop plan` says of a run against the run itself: peak memory, seconds of a step, seconds altogether.

    python benchmarks/plan.py --text input.txt --text novels --repeat 2
    python benchmarks/plan.py --text novels --settings large      # one setting alone

`large` and the like take the last text, `nano` and `demo` the first. Memory is the peak of what the process of the run
held; a step is the mean over the run by its own clock, the first line of its record left out; the time altogether is
that from the run's last line before training to the end of the process. Ratios are predicted over measured. On a shared
machine, look at the last two columns: what other programs used of all cores while the plan and the run were made.
"""

import argparse
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from common import show

T = TypeVar("T")

SETTINGS = {
    "nano": "--preset nano --training.max_steps 200",
    "demo": "--preset demo --training.max_steps 150 --training.eval_interval 75",
    "large": "--preset modern --model.d_model 384 --model.num_layers 6 --model.num_heads 6 --training.batch_size 8 "
    "--training.max_steps 40 --training.eval_max_tokens 20000",
    "dropout": "--preset classic --model.d_model 512 --model.max_seq_len 512 --training.batch_size 4 "
    "--training.max_steps 30 --training.eval_max_tokens 20000",
    "accumulation": "--preset classic --model.dropout 0 --model.d_model 320 --model.num_layers 5 --model.num_heads 5 "
    "--model.max_seq_len 384 --training.batch_size 6 --training.gradient_accumulation_steps 2 "
    "--training.precision fp32 --training.max_steps 20 --training.eval_max_tokens 20000",
}
ALWAYS = "--device cpu --training.warmup_steps 5 --training.log_interval 5".split()
SMALL = ("nano", "demo")


def plan(settings: list[str]) -> dict[str, object]:
    command = [sys.executable, "-m", "sheepop", "plan", *settings, "--json"]
    began = time.perf_counter()
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result | {"plan_seconds": time.perf_counter() - began}


def train(settings: list[str], output: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "sheepop", "train", *settings, "--output", str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    began = 0.0
    for line in process.stderr:
        if line.startswith("settings: "):
            began = time.perf_counter()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    assert status == 0, line
    process.returncode = status
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    lines = [record for record in records if record["type"] == "train"]
    # Intervals have the same number of steps, so that seconds a token average over them.
    seconds_per_token = [1 / record["tokens_per_second"] for record in lines[1:]]
    tokens_per_step = lines[0]["tokens"] / lines[0]["step"]
    return {
        "step": tokens_per_step * sum(seconds_per_token) / len(seconds_per_token),
        "total": seconds,
        "peak": usage.ru_maxrss * 1024,
    }


def other_programs(measure: Callable[[], T]) -> tuple[T, float]:
    """Return what `measure` returns, and the share of all cores that programs other than its own used meanwhile."""

    def used() -> tuple[float, float, float]:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle = fields[3] + fields[4]
        ticks = os.sysconf("SC_CLK_TCK")
        ours = resource.getrusage(resource.RUSAGE_CHILDREN)
        return sum(fields) / ticks, (sum(fields) - idle) / ticks, ours.ru_utime + ours.ru_stime

    before = used()
    result = measure()
    every, busy, ours = (after - first for after, first in zip(used(), before, strict=True))
    return result, max(0.0, busy - ours) / every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, action="append", type=Path)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--data-dir", type=Path, help="where texts are prepared (default: a folder for this run alone)")
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        data_dir = options.data_dir or Path(scratch) / "data"
        for repeat in range(options.repeat):
            for name in options.settings:
                text = options.text[0 if name in SMALL else -1]
                settings = ["--data", str(text), "--data.data_dir", str(data_dir), *SETTINGS[name].split(), *ALWAYS]
                predicted, beside_plan = other_programs(functools.partial(plan, settings))
                output = Path(scratch) / f"{name}-{repeat}"
                measured, beside_run = other_programs(functools.partial(train, settings, output))
                memory, seconds = predicted["memory_bytes"], predicted["seconds"]
                rows.append(
                    {
                        "setting": name,
                        "parameters": predicted["parameters"]["total"],
                        "plan s": predicted["plan_seconds"],
                        "MiB by formula": memory["estimate"] / 2**20,
                        "MiB planned": memory["peak"] / 2**20,
                        "MiB measured": measured["peak"] / 2**20,
                        "formula ratio": memory["estimate"] / measured["peak"],
                        "memory ratio": memory["peak"] / measured["peak"],
                        "ms a step planned": seconds["step"] * 1000,
                        "ms measured": measured["step"] * 1000,
                        "step ratio": seconds["step"] / measured["step"],
                        "s planned": seconds["total"],
                        "s measured": measured["total"],
                        "time ratio": seconds["total"] / measured["total"],
                        "others' cpu, plan": beside_plan,
                        "others' cpu, run": beside_run,
                    }
                )
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show("predicted and measured", rows)


if __name__ == "__main__":
    main()
