"""Keep freed memory in the process, so that the next training step need not ask the system for it again."""

import ctypes
import platform

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEEP_BELOW = 2**30  # bytes; larger single blocks still go straight back to the system
GROW_BY = 64 * 2**20  # bytes


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
