import mmap

import pytest
import torch

from sheepop.utils import memory
from sheepop.utils.errors import ConfigError

CPU = torch.device("cpu")
LINUX = memory.PROC / "self" / "clear_refs"


def test_what_is_held_can_be_seen_and_forgotten():
    assert 0 < memory.resident_bytes() <= memory.peak_resident_bytes()
    assert memory.available_bytes(CPU) > 0
    if not LINUX.exists():
        pytest.skip("needs Linux to forget a peak")
    size = 2**26
    with mmap.mmap(-1, size) as block:  # which goes back to the system at once, other than what an allocator frees
        block.write(bytes(size))
        held = memory.peak_resident_bytes()
    memory.forget_peak()
    assert memory.peak_resident_bytes() < held - size // 2


def control_groups(root, lines):
    """A machine with 8 GB that is free, and the control groups that `lines` name."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n")
    (root / "proc" / "self" / "cgroup").write_text(lines)


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    return tmp_path


def test_a_container_may_allow_less_than_the_machine_has(machine):
    control_groups(machine, "0::/pod/inner\n")
    assert memory.available_bytes(CPU) == 8_000_000 * 1024
    write_group(
        machine / "cgroup" / "pod",
        memory__max="3000000\n",
        memory__current="1000000\n",
        memory__stat="anon 5\ninactive_file 200000\n",
    )
    write_group(machine / "cgroup" / "pod" / "inner", memory__max="max\n", memory__current="7\n", memory__stat="")
    assert memory.available_bytes(CPU) == 2_200_000  # files that are kept make room


def test_the_first_version_of_control_groups(machine):
    control_groups(machine, "4:memory:/job\n2:cpu:/other\n")
    files = {"memory__usage_in_bytes": "600\n", "memory__stat": "total_inactive_file 100\n"}
    write_group(machine / "cgroup" / "memory", memory__limit_in_bytes="9223372036854771712\n", **files)
    write_group(machine / "cgroup" / "memory" / "job", memory__limit_in_bytes="2000\n", **files)
    assert memory.available_bytes(CPU) == 1500


def test_what_does_not_fit_is_refused_before_it_is_taken(machine):
    control_groups(machine, "")
    memory.check_available(8_000_000 * 1024, CPU, "The flock takes", "Take fewer sheep.")
    with pytest.raises(
        ConfigError, match=r"^The flock takes 7\.73 GiB of memory, but 7\.63 GiB are free\. Take fewer sheep\.$"
    ):
        memory.check_available(8_300_000_000, CPU, "The flock takes", "Take fewer sheep.")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_pytorch_keeps_of_a_gpu_without_using_it_is_free():
    device, size = torch.device("cuda"), 2**28
    torch.zeros(1, device=device)
    before = memory.available_bytes(device)
    block = torch.empty(size, dtype=torch.uint8, device=device)
    assert memory.available_bytes(device) < before - size // 2
    del block
    assert memory.available_bytes(device) > before - size // 2
