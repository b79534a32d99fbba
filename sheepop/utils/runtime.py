"""How the process deals with memory, with waiting threads, and with its end; all matter more than one expects."""

import atexit
import ctypes
import gc
import importlib.util
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEEP_BELOW = 2**30  # bytes; larger single blocks still go straight back to the system
GROW_BY = 64 * 2**20  # bytes

COLLECTING_RARELY = 100_000, 50, 50  # new objects, and searches of the younger ones, before the next search
SPIN_COUNT = 30_000  # some hundred microseconds


def wait_politely() -> None:
    """Let idle compute threads spin for a part of a millisecond only before they sleep; call before torch is imported.

    GNU OpenMP's threads by default spin for milliseconds at the end of each parallel region. On a core that another
    program needs, every region then waits for that program's turn to end: one busy neighbour on two cores makes a
    training step sixteen times slower, instead of six (`docs/log.md`). The user's own setting is kept.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def hide_remark_on_norms() -> None:
    """Do not show that RMSNorm of bf16 queries with fp32 weights is not fused: a CPU has no such kernel in any case."""
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)


@contextmanager
def collecting_rarely() -> Iterator[None]:
    """Let Python search for garbage in cycles a hundred times as rarely, for what neither learns nor makes much of it.

    Importing torch and loading a tokenizer make hundreds of thousands of objects, all of which stay, and are searched
    again and again: a tenth of the time that they take.
    """
    usual = gc.get_threshold()
    gc.set_threshold(*COLLECTING_RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def end_without_a_search() -> None:
    """Let the interpreter end without a last search of all objects for garbage; the system takes their memory back.

    Of what torch alone imports that search takes a third of a second.
    """
    atexit.register(gc.freeze)


def has_numba() -> bool:
    """Say whether kernels can be compiled, without loading what compiles them, which takes half a second."""
    return importlib.util.find_spec("numba") is not None


def load_numba_alone() -> None:
    """Let numba begin without what packages that are not loaded add to it, of which our kernels use nothing.

    awkward, which the fast engine of tokenizers brings along, takes a second and 50 MiB or more to be loaded for that.
    A process that uses such a package itself keeps its additions.
    """
    if not has_numba():
        return
    from importlib import metadata  # takes half as long as the command line to start

    from numba.core import entrypoints

    additions = metadata.entry_points(group="numba_extensions")
    if not any(addition.module.partition(".")[0] in sys.modules for addition in additions):
        entrypoints._already_initialized = True


def perf_counter_at_start() -> float:
    """Return what `time.perf_counter` read when the system started this process, in seconds.

    Where the system does not say it, the time that the process has computed stands for how long it has run.
    """
    try:
        # The name, in brackets, may hold spaces; the 22nd field is the start in clock ticks since the system's own.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        age = max(0.0, uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        age = time.process_time()
    return time.perf_counter() - age


def keep_freed_memory() -> None:
    """Tell glibc not to give large freed blocks back to the system.

    A step frees and takes the same large tensors again and again; by default each of them costs fresh pages, which the
    kernel clears one page fault at a time: some 6,500 faults a step of a 2 M model, against 100 when kept
    (`docs/log.md`). On other C libraries this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, KEEP_BELOW)
    mallopt(M_TRIM_THRESHOLD, KEEP_BELOW)
    mallopt(M_TOP_PAD, GROW_BY)


def return_freed_memory() -> None:
    """Give glibc's freed blocks back to the system now, so that what is left is what is in use."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def end_at_once_among_others() -> Iterator[None]:
    """End the process with the block where it is one of several that `torchrun` started; else do nothing.

    The interpreter's usual end destroys PyTorch's process group while it holds its lock, and waits for gloo's threads;
    one of those may be waiting for that lock to let go of a tensor (seen with torch 2.13), and the process never ends.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    status: object = 0
    try:
        yield
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 0 if status is None else 1)
