"""How much memory this process has taken and how much more it may take: measured, not estimated."""

import contextlib
import ctypes
import gc
import math
import mmap
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sheepop.utils.errors import ConfigError
from sheepop.utils.logging import format_bytes

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 2**60  # version 1 of control groups writes a number near 2**63 where there is no limit


def resident_bytes() -> int:
    """Return the memory that this process holds now, shared libraries included."""
    return _status("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """Return the most memory that this process has held, since `forget_peak` where the system can."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or (used if sys.platform == "darwin" else used * 1024)


def forget_peak() -> None:
    """Let `peak_resident_bytes` count from now on; Linux only, elsewhere nothing happens."""
    with contextlib.suppress(OSError):
        (PROC / "self" / "clear_refs").write_text("5")


def give_back_freed() -> None:
    """Give memory that was freed back to the system, so that it no longer counts as held; with glibc only."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes(device: torch.device) -> int:
    """Return how much more memory this process may take on `device` before something is ended or swapped out.

    On a GPU what its driver says, and what PyTorch has of it without using it; else the system's estimate of what can
    be had without swapping, or what a control group (of a container, say) still allows if that is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_system_bytes(), *_control_group_bytes())


def zeros_on_demand(shape: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return zeros whose memory, on a CPU, the system gives only where it is first written to or read.

    PyTorch's own zeros are written at once: of a cache for many long texts that are seldom all there, gigabytes.
    """
    if device.type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(*shape, device=device, dtype=dtype)
    # Not from malloc, which clears at once what it has had back from others.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


def check_available(needed: int, device: torch.device, what: str, advice: str) -> None:
    """See that memory is there before it is taken: a system ends a process that asks for too much without a word.

    Args:
        needed: bytes.
        device: where.
        what: what they are for, as the message begins.
        advice: what to do without them, as it ends.

    Raises:
        ConfigError: less is free; says how much.
    """
    free = available_bytes(device)
    if needed > free:
        raise ConfigError(f"{what} {format_bytes(needed)} of memory, but {format_bytes(free)} are free. {advice}")


def _system_bytes() -> int:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", (PROC / "meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found.group(1)) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _control_group_bytes() -> list[int]:
    """Return what each control group above this process still allows, in both versions of their files."""
    allowed = [NO_LIMIT]
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return allowed
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            root, limit, usage = CGROUP, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Inside a container the path is often that of the host, and the group is mounted at the root itself.
        inner = root / name.lstrip("/")
        for folder in {root, inner, *(parent for parent in inner.parents if parent.is_relative_to(root))}:
            try:
                most = int((folder / limit).read_text())
                # Files that are kept in memory count as used, but make room when it is needed.
                files = re.search(
                    r"^(?:total_)?inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE
                )
                used = int((folder / usage).read_text()) - (int(files.group(1)) if files else 0)
            except (OSError, ValueError):  # no such file, or "max"
                continue
            if most < NO_LIMIT:
                allowed.append(max(0, most - used))
    return allowed


def _status(key: str) -> int:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", (PROC / "self" / "status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0
