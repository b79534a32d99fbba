"""The program in processes that are copies of one which has imported it, so that each begins at once.

A copy is a process like any other: it has a number, can be sent signals and killed, and shares nothing that it writes.
Several copies meet as those of `torchrun` do. What starts with the command lines themselves is tested in `test_cli.py`,
`test_docs.py` and, with `torchrun`, in `test_distributed.py`.
"""

import multiprocessing
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

from sheepop.cli import main
from sheepop.utils import devices
from sheepop.utils.logging import log

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["copies", "sheepop.training.run", "torch.distributed.fsdp"])


@dataclass(frozen=True)
class Break:
    """Something that goes wrong at a chosen moment, in the last of several processes.

    `what` happens at the `nth` call of `function`, which is named by its module: `kill-before`, `kill-after` and
    `kill-middle` (half of what it wrote stays) end the process by SIGKILL, `term` asks it to end; `nan` and `inf`
    spoil the number that it returns; `hang` lets it wait for a minute.
    """

    what: str
    function: str
    nth: int

    def install(self) -> None:
        owner_name, _, name = self.function.rpartition(".")
        owner = pkgutil.resolve_name(owner_name)
        setattr(owner, name, self.breaking(getattr(owner, name)))

    def breaking(self, original: Callable[..., object]) -> Callable[..., object]:
        calls = 0

        def function(*values: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            what = self.what if calls == self.nth else ""
            if what == "kill-before":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "term":
                os.kill(os.getpid(), signal.SIGTERM)
            if what == "hang":
                print("hanging", file=sys.stderr, flush=True)
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline:
                    time.sleep(1)
            path = next((value for value in values if isinstance(value, Path)), Path())
            size_before = path.stat().st_size if path.is_file() else 0
            result = original(*values, **options)
            if what == "kill-middle":
                os.truncate(path, (size_before + path.stat().st_size) // 2)
            if what.startswith("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            return result * float(what) if what in ("nan", "inf") else result

        return function


def always(*_: object) -> bool:
    """Stand where another answer is expected."""
    return True


def log_while_torchrun_ends_it(message: str) -> None:
    """Say something just after the signal came that ends the processes which are left."""
    os.kill(os.getpid(), signal.SIGTERM)
    log(message)


class Copies:
    """Processes that run one command together, handled as `subprocess.Popen` handles one.

    `patches` replace what is named by its module.
    """

    def __init__(self, folder: Path, arguments: tuple[object, ...], count: int, breaks: Break | None, patches: dict):
        self.files = folder / "output", folder / "errors"
        patches = {"sheepop.utils.devices.PEAK_SIZES": devices.PEAK_SIZES} | patches  # which the tests have changed
        environment = {}
        if count > 1:
            self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(self.store.port), "WORLD_SIZE": str(count)}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": str(folder)}
        self.processes = []
        for rank in range(count):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            breaking = breaks if rank == count - 1 else None
            run = (list(map(str, arguments)), environment | ranks, self.files, breaking, patches)
            self.processes.append(CONTEXT.Process(target=run_in_copy, args=run))
            self.processes[-1].start()

    @property
    def returncode(self) -> int | None:
        """How the first that failed ended, 0 when all ended well, None before all have ended."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the last one."""
        os.kill(self.processes[-1].pid, number)

    def written(self) -> tuple[str, str]:
        """Return what all wrote so far: output, errors."""
        output, errors = (file.read_text(encoding="utf-8") if file.exists() else "" for file in self.files)
        return output, errors

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for their end; return output and errors."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        assert self.returncode is not None, f"not ended after {timeout} seconds: {self.written()[1]}"
        return self.written()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def run_in_copy(
    arguments: list[str], environment: Mapping[str, str], files: tuple[Path, Path], breaks: Break | None, patches: dict
) -> None:
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    sys.argv = ["sheepop", *arguments]
    for name, value in patches.items():
        owner, _, attribute = name.rpartition(".")
        setattr(pkgutil.resolve_name(owner), attribute, value)
    if breaks:
        breaks.install()
    main(arguments)
