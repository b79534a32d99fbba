"""What torch.compile needs of a machine, and where it keeps what it has made."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch


def missing_compiler(device: torch.device) -> str | None:
    """Say what compiling for `device` lacks, or None."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton, which compiles for GPUs, is not installed"
    elif device.type != "cpu":
        return f"PyTorch does not compile well for {device.type}"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return "there is no C++ compiler (g++ or clang++)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's header files, which compiled code needs, are not there (package python3-dev)"
    return None


def keep_compiled_code() -> None:
    """Keep what is compiled for later runs, in the user's cache folder; `TORCHINDUCTOR_CACHE_DIR` names another."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "sheepop" / "inductor"))
