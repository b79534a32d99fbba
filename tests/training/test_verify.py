import json
import subprocess
import sys

import pytest

from sheepop.training.verify import compare_runs, format_verdict, prove_resume
from sheepop.utils.errors import ConfigError, SheepopError

SETTINGS = {
    "model.d_model": 20,
    "model.num_layers": 2,
    "model.num_heads": 5,
    "model.max_seq_len": 14,
    "training.batch_size": 3,
    "training.precision": "fp32",
    "training.warmup_steps": 4,
    "training.sample_tokens": 3,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["classic", "modern"])
def test_the_command_proves_it(tmp_path, corpus_folder, family):
    options = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    command = ["verify-resume", "--data", str(corpus_folder), "--preset", family, "--device", "cpu", "--steps", "40"]
    done = subprocess.run(
        [sys.executable, "-m", "sheepop", *command, "--json", "--model.dropout", "0.1", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["equal"] is True
    assert [item["signal"] for item in result["interruptions"]] == ["SIGTERM", "SIGKILL"]
    assert all(item["resumed_from"] > 0 for item in result["interruptions"])
    assert [row["count"] for row in result["compared"]][:2] == [len_weights(family), 3 * len_weights(family)]
    assert "Proved: 40 steps" in format_verdict(result)


def len_weights(family):
    """Matrices and norms of two layers, embedding and final norm; `modern` has norms of queries and keys."""
    return 2 * (6 if family == "classic" else 8) + 2


def test_runs_that_differ_are_told_apart(tmp_path, train_in):
    runs = [train_in(tmp_path / str(seed), seed=seed, **{"training.max_steps": 4}) for seed in (1, 2)]
    rows = {row["what"]: row for row in compare_runs(*runs)}
    assert rows["weights"]["equal"] < rows["weights"]["count"]
    assert rows["weights"]["largest_difference"] > 0
    assert rows["lines of metrics"]["equal"] == 0
    result = {"equal": False, "steps": 4, "interruptions": [], "compared": list(rows.values())}
    assert "Not equal" in format_verdict(result)
    same = compare_runs(runs[0], runs[0])
    assert all(row["equal"] == row["count"] for row in same)
    assert sum(row["count"] for row in same) > 50


def test_what_cannot_be_proved_is_an_error(tmp_path, corpus_folder):
    with pytest.raises(ConfigError, match="--steps is 5"):
        prove_resume(None, preset=None, overrides={"data.path": str(corpus_folder)}, steps=5, output=None)
    with pytest.raises(ConfigError, match="no text"):
        prove_resume(None, preset=None, overrides={}, steps=20, output=None)
    too_long = SETTINGS | {"data.path": str(corpus_folder), "model.max_seq_len": 5000}
    with pytest.raises(SheepopError, match="shorter than the context"):
        prove_resume(None, preset=None, overrides=too_long, steps=20, output=tmp_path)
