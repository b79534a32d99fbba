"""Damaged files of the formats beside GGUF: one kind of error, in under a second, with little memory, and no output."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/damaged_files.py"
KINDS = ["safetensors", "config.json", "tokenizer.json", "index", "llama2.c", "llama2.c tokenizer", "nanoGPT"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_file_costs_more_than_a_second_and_200_megabytes(kind):
    command = [sys.executable, SCRIPT, "--kinds", kind, "--count", "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    [row] = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["beyond bounds"] == 0, row
    assert int(row["errors"].split(" CheckpointError")[0].split()[-1]) > row["tried"] / 2
