import itertools
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sheepop.utils import devices
from sheepop.utils.devices import available_devices, choose_precision, cpu_has_bf16, peak_flops, resolve_device
from sheepop.utils.errors import ConfigError, did_you_mean
from sheepop.utils.logging import format_bytes, format_count, format_duration
from sheepop.utils.runtime import perf_counter_at_start
from sheepop.utils.seeds import derive_seed

CPU = torch.device("cpu")


@given(st.lists(st.one_of(st.integers(), st.text()), min_size=1, max_size=4))
def test_seeds_are_in_range_and_depend_on_every_part(parts):
    seed = derive_seed(*parts)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(*parts)
    assert seed != derive_seed(*parts, 0)


def test_seeds_never_change_between_versions():
    assert derive_seed(42, "dropout", 7, 0) == 1241899568895607297


def test_auto_is_the_first_device():
    assert str(resolve_device("auto")) == available_devices()[0]
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize("name", ["tpu", "cuda:99", ""])
def test_a_missing_device_is_an_error_that_says_what_is_there(name):
    with pytest.raises(ConfigError, match=r"It has:.*cpu"):
        resolve_device(name)


def test_precision_on_a_cpu():
    assert choose_precision(CPU, use_amp=False, d_model=512).name == "fp32"
    assert choose_precision(CPU, use_amp=True, d_model=512).name == ("bf16" if cpu_has_bf16() else "fp32")
    assert choose_precision(CPU, use_amp=True, d_model=128).name == "fp32"
    assert choose_precision(CPU, use_amp=True, d_model=128, asked="bf16").autocast_dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="fp16"):
        choose_precision(CPU, use_amp=True, d_model=128, asked="fp16")


def test_peak_is_a_plausible_number():
    assert 1e8 < peak_flops(CPU) < 1e15


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2**20 - 1, "1.00 MiB"), (2**20 * 12.34, "12.3 MiB"), (3 * 2**30, "3.00 GiB")],
)
def test_bytes_are_written_in_three_digits(number, text):
    assert format_bytes(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (950, "950"), (999.9, "1.00K"), (12345, "12.3K"), (4.56e6, "4.56M"), (1e9, "1.00B")]
)
def test_counts(number, text):
    assert format_count(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0s"), (42.4, "42s"), (185, "3m05s"), (7620, "2h07m")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_did_you_mean():
    assert did_you_mean("hed_dim", ["head_dim", "d_ff"]) == " Did you mean 'head_dim'?"
    assert did_you_mean("zzz", ["head_dim"]) == ""


@pytest.mark.parametrize(
    ("name", "dtype", "matmul", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, "highest", 989e12),
        ("NVIDIA H100 80GB HBM3", torch.float16, "highest", 989e12),
        ("NVIDIA H100 80GB HBM3", None, "highest", 67e12),
        ("NVIDIA H100 PCIe", None, "high", 378e12),
        ("NVIDIA L40S", torch.bfloat16, "highest", 362e12),
        ("NVIDIA L4", torch.bfloat16, "highest", 121e12),
    ],
)
def test_a_known_gpu_is_compared_with_its_data_sheet_in_the_precision_used(monkeypatch, name, dtype, matmul, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    assert peak_flops(torch.device("cuda", 0), dtype) == peak


def test_the_cpus_peak_is_measured_in_the_precision_used(monkeypatch):
    products = []

    def seconds(product):
        products.append(product().dtype)
        return 1.0 if len(products) == 1 else 0.5

    monkeypatch.setattr(devices, "_best_seconds", seconds)
    fastest = 0.5 if torch.backends.mkldnn.is_available() else 1.0  # of two libraries
    assert peak_flops(CPU) == 2 * devices.PEAK_SIZES["cpu"] ** 3 / fastest
    assert set(products) == {torch.float32}
    products.clear()
    peak_flops(CPU, torch.bfloat16)
    assert products == [torch.bfloat16]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, devices.PEAK_ROUNDS), (0.06, 2), (0.2, 1)])
def test_a_peak_that_is_low_is_not_looked_for_long(monkeypatch, seconds, rounds):
    clock = itertools.chain.from_iterable((float(round_), round_ + seconds) for round_ in itertools.count())
    monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    peak_flops(CPU, torch.bfloat16)
    assert next(clock) == rounds


def test_the_start_of_the_process_is_known_and_stays():
    began = perf_counter_at_start()
    assert began < time.perf_counter()
    assert perf_counter_at_start() == pytest.approx(began, abs=0.5)


@pytest.mark.parametrize("is_loaded", [False, True])
def test_numba_begins_without_what_packages_add_that_are_not_loaded(tmp_path, is_loaded):
    pytest.importorskip("numba")
    (tmp_path / "addition").mkdir()
    (tmp_path / "addition/__init__.py").write_text("def begin():\n    print('added')\n")
    (tmp_path / "addition-1.dist-info").mkdir()
    (tmp_path / "addition-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: addition\nVersion: 1\n")
    entry_points = "[numba_extensions]\ninit = addition:begin\n"
    (tmp_path / "addition-1.dist-info/entry_points.txt").write_text(entry_points)
    script = f"""
{"import addition" if is_loaded else ""}
from sheepop.utils.runtime import load_numba_alone
load_numba_alone()
import numba, sys
print(numba.njit(lambda number: number + 1)(1), "awkward" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert ("added" in lines) == is_loaded
    assert lines[-1].startswith("2 ")
    if not is_loaded:
        assert lines == ["2 False"]
