import mmap

import pytest
import torch

from sheepop.utils import memory

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
