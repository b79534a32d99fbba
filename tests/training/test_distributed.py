import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from copies import Break, log_while_torchrun_ends_it
from safetensors.torch import load_file

from sheepop.training.distributed import World, agree_on_any, join_world, on_main, sum_over_processes
from sheepop.utils.errors import CheckpointError

# Documents that are packed leave ends of sequences unused, so that micro-batches have different numbers of targets.
# Three micro-batches a step for two or four processes: some get an empty one.
UNEVEN = {
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 3,
    "training.max_steps": 50,
    "training.save_interval": 25,
    "training.eval_interval": 20,
    "model.dropout": 0.1,
    "model.d_model": 24,
    "model.num_heads": 4,
    "data.packing": "best_fit",
}


def read_metrics(run, kind):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["type"] == kind]


def torchrun(*command):
    """Start `sheepop` in two processes by the program that users start it by, which restarts it once."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "sheepop", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )


def finish(process):
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return output, errors


@pytest.fixture(scope="module")
def alone(tmp_path_factory, many_documents, train_config):
    """The run of one process that those of several are compared with."""
    return train_config(tmp_path_factory.mktemp("alone") / "run", many_documents, **UNEVEN)


def assert_same_within_rounding(alone, together, last):
    for kind in ("train", "val"):
        expected, found = ({line["step"]: line for line in read_metrics(run, kind)} for run in (alone, together))
        assert expected.keys() <= found.keys()
        assert len(expected) > 2
        for step, line in expected.items():
            assert found[step]["tokens"] == line["tokens"]
            assert found[step]["loss"] == pytest.approx(line["loss"], rel=1e-5)
            assert found[step].get("grad_norm", 0) == pytest.approx(line.get("grad_norm", 0), rel=1e-3)
    weights, same = (load_file(run / last / "model.safetensors") for run in (alone, together))
    for name, tensor in weights.items():
        torch.testing.assert_close(same[name], tensor, rtol=0, atol=2e-5, msg=name)


def test_alone_nothing_is_exchanged(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cpu = torch.device("cpu")
    with join_world(cpu) as world:
        assert (world, world.is_main) == (World(rank=0, size=1), True)
        assert float(sum_over_processes(torch.tensor(3.0), world)) == 3.0
        assert [agree_on_any(flag, world, cpu) for flag in (True, False)] == [True, False]
        assert on_main(world, lambda: 7) == 7
        with pytest.raises(CheckpointError, match="gone"):
            on_main(world, lambda: (_ for _ in ()).throw(CheckpointError("gone")))
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "parallel"), [(2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp")])
def test_several_processes_train_as_one_does(tmp_path, alone, run_program, num_processes, parallel):
    together = tmp_path / "together"
    command = ["train", "--config", alone / "config.json", "--training.parallel", parallel, "--output", together]
    output, errors = finish(run_program(*command, count=num_processes))
    assert output.split() == [str(together)]  # the main process alone speaks
    assert f"{num_processes} processes share 3 micro-batch(es)" in errors
    assert_same_within_rounding(alone, together, "checkpoint_step_50")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [(("ddp", 2), ("fsdp", 2)), (("fsdp", 2), ("alone", 1)), (("fsdp", 2), ("fsdp", 3))]
)
def test_another_number_of_processes_goes_on(tmp_path, alone, run_program, first, then):
    run = tmp_path / "run"
    for (parallel, num_processes), length, resume in ((first, 25, []), (then, 50, ["--resume", "auto"])):
        command = ["train", "--config", alone / "config.json", "--output", run, *resume, "--accept-changes"]
        settings = ["--training.max_steps", length, "--training.schedule", "constant"]
        sharing = ["--training.parallel", parallel] if num_processes > 1 else []
        finish(run_program(*command, *settings, *sharing, count=num_processes))
        if parallel == "fsdp":
            assert (run / f"checkpoint_step_{length}/training_state/sharded/.metadata").is_file()
            # The model is in one piece all the same.
            weights = load_file(run / f"checkpoint_step_{length}/model.safetensors")
            assert all(tensor.shape for tensor in weights.values())
    straight = tmp_path / "straight"
    config = ["--config", alone / "config.json", "--training.schedule", "constant"]
    finish(run_program("train", *config, "--output", straight))
    assert_same_within_rounding(straight, run, "checkpoint_step_50")


def children_of(process):
    text = (f"/proc/{process.pid}/task/{process.pid}/children",)
    with open(text[0]) as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_lost_process_is_replaced_by_a_restart_that_finishes_the_run(tmp_path, alone, wait_for_step):
    run = tmp_path / "run"
    command = ["train", "--config", alone / "config.json", "--training.save_interval", "2", "--output", run]
    process = torchrun(*command)
    wait_for_step(run, 7, process)
    os.kill(children_of(process)[-1], signal.SIGKILL)
    finish(process)
    assert_same_within_rounding(alone, run, "checkpoint_step_50")


def test_a_lost_process_ends_the_run_and_the_others_say_so_before_they_are_ended(tmp_path, alone, run_program):
    run = tmp_path / "run"
    command = ["train", "--config", alone / "config.json", "--training.save_interval", "2", "--output", run]
    lost = Break("kill-before", "sheepop.training.step.micro_batch_loss", 8)
    done = run_program(*command, count=2, breaks=lost, patches={"sheepop.cli.log": log_while_torchrun_ends_it})
    assert "lost the connection to another one" in done.written()[1]
    assert done.returncode > 0
    assert sorted(run.glob("checkpoint_*"))
    assert not list(run.glob(".checkpoint_*"))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_all_and_resume_is_exact(
    tmp_path, alone, start, run_program, wait_for_step, parallel
):
    run, straight = tmp_path / "run", tmp_path / "straight"
    command = ["train", "--config", alone / "config.json", "--training.parallel", parallel, "--output"]
    finish(run_program(*command, straight, count=2))
    process = start(*command, run, count=2)
    wait_for_step(run, 5, process)
    process.send_signal(signal.SIGTERM)  # to one of them
    _, errors = process.communicate()
    assert errors.count("Stopped by a signal after step") == 2
    finish(run_program(*command, run, "--resume", "auto", count=2))
    weights, same = (load_file(path / "checkpoint_step_50/model.safetensors") for path in (straight, run))
    assert all(tensor.equal(same[name]) for name, tensor in weights.items())


@pytest.mark.slow
def test_a_restart_does_not_go_on_with_a_run_that_is_not_its_own(tmp_path, alone):
    run = tmp_path / "run"
    shutil.copytree(alone, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    process = torchrun("train", "--config", alone / "config.json", "--output", run)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "already holds a run" in errors
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_sharded_run_that_never_made_a_step_goes_on(tmp_path, alone, run_program):
    run = tmp_path / "run"
    command = ["train", "--config", alone / "config.json", "--training.parallel", "fsdp", "--output", run]
    first_loss = Break("nan", "sheepop.training.step.micro_batch_loss", 1)
    _, errors = run_program(*command, count=2, breaks=first_loss).written()
    assert "At step 1 the loss was nan" in errors
    assert (run / "checkpoint_step_0/training_state/sharded").is_dir()
    finish(run_program(*command, "--resume", "auto", count=2))
    assert_same_within_rounding(alone, run, "checkpoint_step_50")


@pytest.mark.slow
def test_processes_share_a_run_that_was_chosen_for_a_time(tmp_path, many_documents, run_program):
    command = ["train", "--data", many_documents, "--minutes", 0.3, "--device", "cpu", "--training.log_interval", 1]
    _, errors = finish(run_program(*command, "--output", tmp_path / "run", count=2))
    assert errors.count("measured:") == errors.count("bits per byte at the end") == 1
    steps = [line["step"] for line in read_metrics(tmp_path / "run", "train")]
    assert steps == list(range(1, len(steps) + 1))
    assert read_metrics(tmp_path / "run", "val")[-1]["step"] == steps[-1]
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["training"]["gradient_accumulation_steps"] % 2 == 0
