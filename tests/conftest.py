import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sheepop.utils import devices
from sheepop.utils.compiled_code import missing_compiler

PROJECT = Path(__file__).parents[1]
MEMORY = Path("/dev/shm")


def pytest_addoption(parser: pytest.Parser) -> None:
    # `benchmarks/reliability.py` asks for more.
    parser.addoption("--kills", type=int, default=26, help="how often a run is killed")
    parser.addoption("--corruptions", type=int, default=120, help="how often a file of a checkpoint is damaged")


def pytest_configure() -> None:
    # The tests flush thousands of small files to the disk, each of which may wait for seconds on a disk that
    # others use too. A file system in memory keeps a kill's promises as well as a disk does. Another TMPDIR wins.
    if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 6 << 30:
        os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tiny matrices are faster on one thread, and exact equality needs the same thread count everywhere.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _small_peak() -> None:
    # Each run measures the processor's peak, to compare itself with; that of larger products costs more than a test.
    devices.PEAK_SIZES["cpu"] = 64


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    # Kernels of other libraries share OpenMP's threads with PyTorch, and may leave another number of them behind.
    if nextitem is None or nextitem.path != item.path:
        assert torch.get_num_threads() == 1, f"{item.path.name} left PyTorch another number of threads"


@pytest.fixture
def inductor_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep compiled code out of the user's own folder; what all of it includes is compiled once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))


@pytest.fixture
def compiler(inductor_folder: None) -> None:
    """A compiler; tests that need it are skipped where there is none."""
    missing = missing_compiler(torch.device("cpu"))
    if missing:
        pytest.skip(f"needs a compiler: {missing}")


@pytest.fixture
def replaces_functions_of_pytorch() -> None:
    """PyTorch's compiler notes, when it is imported, which functions it knows: for good, so that it comes first."""
    importlib.import_module("torch._dynamo")


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium, the system's or the one that Playwright installed."""
    api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    with api.sync_playwright() as playwright:
        installed = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, names)), installed if Path(installed).exists() else None)
        if path is None:
            pytest.skip("needs Chromium, from the system's packages or by `playwright install chromium`")
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real texts beside the checkout; tests that need it are skipped where it is absent."""
    folder = PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real texts in {folder}")
    return folder
