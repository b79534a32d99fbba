"""Run the program and let something go wrong in it at a chosen moment.

    python break_at.py WHAT FUNCTION NTH ARGUMENTS…

FUNCTION is named by its module; WHAT happens at its NTH call: `kill-before`, `kill-after` and `kill-middle` (half of
what it wrote stays) end the process by SIGKILL, `term` asks it to end; `nan` and `inf` spoil the number that it
returns, `hang` lets it wait for a minute. Of several processes, it happens in the last one. With READS_LATE=1 in the
environment the loop is a step behind, as on a GPU.
"""

import os
import pkgutil
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    what, function, nth, *arguments = sys.argv[1:]
    import sheepop.training.run
    import sheepop.training.trainer  # whose functions are patched, too
    from sheepop.cli import main as program

    if os.environ.get("READS_LATE"):
        sheepop.training.trainer.reads_late = lambda run: True
    owner_name, _, name = function.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    original = getattr(owner, name)
    calls = 0

    def breaking(*values: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        is_moment = calls == int(nth)
        if is_moment and what == "kill-before":
            os.kill(os.getpid(), signal.SIGKILL)
        if is_moment and what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if is_moment and what == "hang":
            print("hanging", file=sys.stderr, flush=True)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                time.sleep(1)
        path = next((value for value in values if isinstance(value, Path)), Path())
        size_before = path.stat().st_size if path.is_file() else 0
        result = original(*values, **options)
        if is_moment and what == "kill-middle":
            os.truncate(path, (size_before + path.stat().st_size) // 2)
        if is_moment and what.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        return result * float(what) if is_moment and what in ("nan", "inf") else result

    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        setattr(owner, name, breaking)
    program(arguments)


if __name__ == "__main__":
    main()
