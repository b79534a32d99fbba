"""The measured step of training: one way for both devices."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks/throughput.py"
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize(("device", "precision"), [("cpu", "fp32"), pytest.param("cuda", "bf16", marks=GPU)])
def test_a_step_has_a_time_a_share_of_the_peak_and_a_peak_of_memory(device, precision):
    command = [sys.executable, SCRIPT, "--here", "--sizes", "0.8M", "--ways", "eager", "--batch", "2"]
    command += ["--device", device, "--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"seconds", "first", "share", "peak"}
    assert min(found.values()) > 0
