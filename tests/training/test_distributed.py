import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from sheepop.training.distributed import World, agree_on_any, join_world, sum_gradients, sum_over_processes


def read_metrics(run, kind):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == kind]


def test_alone_nothing_is_exchanged(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cpu = torch.device("cpu")
    with join_world(cpu) as world:
        assert (world, world.is_main) == (World(rank=0, size=1), True)
        assert float(sum_over_processes(torch.tensor(3.0), world)) == 3.0
        assert [agree_on_any(flag, world, cpu) for flag in (True, False)] == [True, False]
        layer = torch.nn.Linear(2, 3)
        sum_gradients(layer, world)
        assert layer.weight.grad is None
    assert not torch.distributed.is_initialized()


def test_two_processes_train_as_one_does(tmp_path, train_in):
    # Three micro-batches a step for two processes, and the seventh step has a single one: the second process has none.
    settings = {
        "training.batch_size": 2,
        "training.gradient_accumulation_steps": 3,
        "training.max_steps": 10,
        "model.dropout": 0.1,
    }
    alone = train_in(tmp_path / "alone", **settings)
    together = tmp_path / "together"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sheepop"]
    command = ["train", "--config", str(alone / "config.json"), "--output", str(together)]
    finished = subprocess.run(
        [sys.executable, *launcher, *command], capture_output=True, text=True, timeout=240, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == [str(together)]  # the main process alone speaks
    assert "2 processes share 3 micro-batch(es)" in finished.stderr

    for kind, steps in (("train", 10), ("val", 2)):
        expected, found = read_metrics(alone, kind), read_metrics(together, kind)
        assert len(expected) == len(found) >= steps
        for one, other in zip(expected, found, strict=True):
            assert (one["step"], one["tokens"]) == (other["step"], other["tokens"])
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    weights, same = (load_file(run / "checkpoint_step_10/model.safetensors") for run in (alone, together))
    for name, tensor in weights.items():
        torch.testing.assert_close(same[name], tensor, rtol=0, atol=1e-5, msg=name)
    # What several processes began, one goes on with.
    train_in(together, resume="auto", **settings | {"training.max_steps": 12})
    assert (together / "checkpoint_step_12").is_dir()
