"""How long until something is seen: `--help`, and the first token of `generate` over what `import torch` takes.

    python benchmarks/startup.py --checkpoint runs/demo
    python benchmarks/startup.py --checkpoint RUN --quantize int8

Whole processes are timed, so that with `--quantize` the rounding of the weights is part of it.
"""

import argparse
import subprocess
import sys
import time

from common import alternate, median, show


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    program = [sys.executable, "-m", "sheepop"]
    one_token = ["generate", "--checkpoint", options.checkpoint, "--prompt", "ROMEO:", "--max-new-tokens", "1"]
    one_token += ["--quantize", options.quantize] if options.quantize else []
    results = alternate(
        {
            "--help": lambda: seconds([*program, "--help"]),
            "import torch": lambda: seconds([sys.executable, "-c", "import torch"]),
            "generate, first token": lambda: seconds([*program, *one_token]),
        },
        options.rounds,
    )
    medians = {name: median(values) for name, values in results.items()}
    rows: list[dict[str, object]] = [
        {"what": name, "median s": value, "min s": min(results[name])} for name, value in medians.items()
    ]
    over = medians["generate, first token"] - medians["import torch"]
    rows.append({"what": "first token over import torch", "median s": over, "min s": ""})
    show(f"start-up, whole processes{f', {options.quantize}' if options.quantize else ''}", rows)


if __name__ == "__main__":
    main()
