"""What damaged files cost to refuse: the worst time and memory over many mutations of each kind.

python benchmarks/damaged_files.py --count 300

Bounds: one kind of error, under one second of processor time, at most the file's size and 200 MB of memory.
"""

import argparse
import logging
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from common import show
from damage import KINDS, attempt, is_within_bounds, mutations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="random mutations of each kind")
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    options = parser.parse_args()
    logging.disable()
    rows: list[dict[str, object]] = []
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            source, output = KINDS[kind](Path(folder)), Path(folder) / "out"
            outcomes = []
            for content in mutations(kind, source.victim.read_bytes(), options.count, options.seed):
                outcomes.append(attempt(source, content, output))
                shutil.rmtree(output, ignore_errors=True)
        errors = Counter(outcome.error or "none" for outcome in outcomes)
        rows.append(
            {
                "file": kind,
                "tried": len(outcomes),
                "errors": ", ".join(f"{count} {name}" for name, count in errors.items()),
                "seconds": max(outcome.seconds for outcome in outcomes),
                "MB": max(outcome.grown for outcome in outcomes) / 1e6,
                "beyond bounds": sum(not is_within_bounds(source, outcome) for outcome in outcomes),
            }
        )
    show(f"damaged files, seed {options.seed}: the worst of each", rows)


if __name__ == "__main__":
    main()
