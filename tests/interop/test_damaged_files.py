"""Damaged files: one kind of error, in under a second, with little memory, and no output."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks/damaged_files.py"
# What comes of most of the mutations, and for how many of them at least: others change nothing that is read.
KINDS = {
    "safetensors": ("CheckpointError", 0.5),
    "config.json": ("CheckpointError", 0.5),
    "tokenizer.json": ("CheckpointError", 0.5),
    "tokenizer_config.json": ("CheckpointError", 0.3),
    "generation_config.json": ("CheckpointError", 0.3),
    "index": ("CheckpointError", 0.5),
    "llama2.c": ("CheckpointError", 0.5),
    "llama2.c tokenizer": ("CheckpointError", 0.5),
    "nanoGPT": ("CheckpointError", 0.5),
    "GGUF": ("CheckpointError", 0.5),
    "prompts": ("DataError", 0.5),
    "JSON schema": ("ConfigError", 0.5),
    "Lark grammar": ("ConfigError", 0.5),
}
NEEDED = {"GGUF": "gguf", "JSON schema": "llguidance", "Lark grammar": "llguidance"}


@pytest.fixture(scope="module")
def rows():
    """What became of each kind, in a process of its own, since its memory is measured."""
    kinds = [kind for kind in KINDS if importlib.util.find_spec(NEEDED.get(kind, "torch"))]
    command = [sys.executable, SCRIPT, "--count", "40", "--kinds", *kinds]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {row["file"]: row for row in json.loads(done.stdout.splitlines()[-1])["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_file_costs_more_than_a_second_and_200_megabytes(rows, kind):
    if kind not in rows:
        pytest.skip(f"needs {NEEDED[kind]}")
    row = rows[kind]
    assert row["beyond bounds"] == 0, row
    error, share = KINDS[kind]
    assert int(row["errors"].split(f" {error}")[0].split()[-1]) > share * row["tried"]
