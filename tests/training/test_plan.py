import json
import math
import os
import re
import subprocess
import sys
import time

import pytest
import torch

from sheepop.config import PRESETS, load_config, parse_overrides
from sheepop.models.sizing import training_flops_per_token
from sheepop.models.transformer import TransformerModel
from sheepop.training import plan as planning
from sheepop.training import rehearsal
from sheepop.training.plan import (
    changed,
    count_multiples,
    plan_length,
    plan_memory,
)
from sheepop.training.plan_advice import describe_advice, settings_that_fit, smaller_models
from sheepop.training.plan_table import format_plan
from sheepop.training.rehearsal import make_plan
from sheepop.utils.errors import ConfigError, SheepopError

CPU = torch.device("cpu")
MILLION = 10**6


@pytest.fixture
def overrides(corpus_folder, tiny_config, tmp_path):
    """The tiny settings of the other tests of training, with their text."""
    values = tiny_config().model_dump()
    settings = {
        f"{section}.{key}": value for section in ("model", "training") for key, value in values[section].items()
    }
    lengths = {"training.max_epochs": None, "training.max_steps": 20, "training.save_dir": str(tmp_path / "run")}
    return settings | lengths | {"data.path": str(corpus_folder), "device": "cpu"}


@pytest.fixture
def no_measuring(monkeypatch):
    def refuse(run):
        raise AssertionError("a model was built and measured")

    monkeypatch.setattr(rehearsal, "set_up", refuse)


def with_memory(monkeypatch, number):
    monkeypatch.setattr(rehearsal, "available_bytes", lambda device: number)
    monkeypatch.setattr(planning, "available_bytes", lambda device: number)


def test_a_plan_agrees_with_the_run_that_follows(overrides, train_in, tmp_path):
    plan = make_plan(None, preset=None, overrides=overrides)
    run = train_in(tmp_path / "run", **{"training.max_steps": 20})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert plan.parameters.total == sum(p.numel() for p in TransformerModel(plan.config.model).parameters())
    # 20 steps are two epochs of 38 windows and six steps; the last window of an epoch is not full.
    assert plan.tokens == (2 * 38 + 6 * 6) * 14
    assert lines[-1]["tokens"] == pytest.approx(plan.tokens, rel=0.02)
    assert plan.length.steps_per_epoch == 7
    assert plan.length.validations == sum(line["type"] == "val" for line in lines)
    samples = (run / "samples.jsonl").read_text().splitlines()
    assert plan.length.samples == len(samples)
    assert plan.length.checkpoints >= len(list(run.glob("checkpoint_*")))
    assert plan.memory.fits
    assert plan.advice == []
    assert plan.missing == []
    checkpoint = next(run.glob("checkpoint_step_*"))
    on_disk = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    assert plan.checkpoint_bytes == pytest.approx(on_disk, rel=0.15)  # names and counters weigh in a tiny model
    assert plan.seconds.keys() == {"compiling", "steps", "validations", "samples", "checkpoints"}


def test_planning_leaves_nothing_where_the_run_will_be(overrides, tmp_path):
    make_plan(None, preset=None, overrides=overrides)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_said_without_building_it(overrides, no_measuring, monkeypatch):
    overrides |= {"training.batch_size": 4096, "model.dropout": 0.0}
    with_memory(monkeypatch, 100 * MILLION)
    plan = make_plan(None, preset=None, overrides=overrides)
    assert not plan.memory.fits
    assert plan.memory.state_fits
    assert plan.times is None
    assert plan.length.steps == 20
    assert "not measured" in plan.missing[0]
    table = format_plan(plan)
    assert "DOES NOT FIT" in table
    assert "It would fit" in table
    smaller = plan.advice[0][0]
    assert smaller["training.batch_size"] * smaller["training.gradient_accumulation_steps"] == 4096 * 2
    assert 1 < smaller["training.batch_size"] < 4096
    vocab_size = plan.config.model.vocab_size
    for settings, peak in plan.advice:
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value).lower())]
        memory = plan_memory(
            load_config(
                overrides=overrides | {"data.path": None, "model.vocab_size": vocab_size} | parse_overrides(words)
            ),
            CPU,
            process=plan.memory.process,
            available=plan.memory.available,
        )
        assert memory.fits
        assert memory.estimate == peak


def test_training_warns_before_a_run_that_is_too_large_and_refuses_one_that_cannot_be(
    train_in, tmp_path, monkeypatch, capsys
):
    with_memory(monkeypatch, 20 * MILLION)
    train_in(tmp_path / "tight", **{"training.batch_size": 4096, "training.max_steps": 1})
    said = capsys.readouterr().err
    assert re.search(r"warning: This run needs about .*It would fit .* --training.batch_size \d+ ", said)
    assert said.index("warning: This run") < said.index("model: ")

    with_memory(monkeypatch, 20_000)
    with pytest.raises(ConfigError, match=r"does not fit: its weights, gradients and optimizer moments alone"):
        train_in(tmp_path / "hopeless", **{"training.max_steps": 1})
    assert not (tmp_path / "hopeless" / "config.json").exists()


@pytest.mark.parametrize("preset", [*PRESETS])
@pytest.mark.parametrize("share", [0.7, 0.3, 0.2])
def test_all_advice_fits_by_the_same_estimate(preset, share):
    config = load_config(preset=preset)
    whole = plan_memory(config, CPU, process=0, available=0)
    available = int(share * whole.estimate)
    memory = plan_memory(config, CPU, process=0, available=available)
    assert not memory.fits
    advice = settings_that_fit(config, CPU, memory)
    assert advice
    for settings, peak in advice:
        assert peak <= available
        again = plan_memory(changed(config, settings), CPU, process=0, available=available)
        assert again.estimate == peak
        assert again.fits


def test_smaller_models_are_models():
    config = load_config(preset="modern", overrides={"model.num_heads": 6, "model.d_model": 48})
    models = [changed(config, settings).model for settings in smaller_models(config)]
    assert [(model.num_layers, model.d_model, model.num_heads, model.num_kv_heads) for model in models] == [
        (3, 48, 6, 3),
        (1, 48, 6, 3),
        (3, 24, 3, 3),
    ]
    assert all(model.head_dim == 8 for model in models)
    for model in models:
        TransformerModel(model)


def test_events_of_a_run_are_counted_once_each():
    assert count_multiples(20, 7) == 3  # 7, 14 and the last
    assert count_multiples(21, 7) == 3
    assert count_multiples(20, 6, 7) == 6  # 6, 7, 12, 14, 18, 20
    training = load_config(overrides={"training.eval_interval": 6, "training.save_interval": 4}).training
    length = plan_length(training, 7, 20)
    assert (length.validations, length.samples) == (6, 4)
    assert length.checkpoints == len({4, 6, 7, 8, 12, 14, 16, 18, 20})
    assert length.checkpoints_kept == 2 + training.keep_last + 1


def test_a_step_is_worked_out_from_fewer_sequences_where_a_whole_one_is_long(overrides, monkeypatch):
    """With clockwork steps of 2 s for each sequence and 1 s for the update, the plan says what 6 sequences take."""
    measured = []

    def measure_step(run, load, *, seconds, at_least):
        measured.append(sum(len(batch.targets) for batch in load(0)))
        return 1.0 + 2.0 * measured[-1]

    monkeypatch.setattr(rehearsal, "measure_step", measure_step)
    monkeypatch.setattr(rehearsal, "SECONDS", 36.0)
    plan = make_plan(None, preset=None, overrides=overrides)
    assert measured == [1, 2]
    assert plan.times.step == pytest.approx(1.0 + 2.0 * 6)
    assert not plan.times.is_whole_step
    assert plan.memory.measured is None
    assert "fewer sequences" in format_plan(plan)

    measured.clear()
    monkeypatch.setattr(rehearsal, "SECONDS", 360.0)
    assert make_plan(None, preset=None, overrides=overrides).times.is_whole_step
    assert measured == [1, 6]


def test_a_long_sequence_is_measured_by_its_beginning(overrides, monkeypatch):
    shapes = []

    def measure_step(run, load, *, seconds, at_least):
        shapes.append(tuple(load(0)[0].token_ids.shape))
        return 1000.0

    monkeypatch.setattr(rehearsal, "measure_step", measure_step)
    monkeypatch.setattr(rehearsal, "peak_flops", lambda device, dtype: 1.0)
    plan = make_plan(None, preset=None, overrides=overrides | {"model.max_seq_len": 64, "data.max_length": 64})
    assert shapes == [(1, 16)]
    flops = [length * training_flops_per_token(plan.config.model, length) for length in (16, 64)]
    assert plan.times.step == pytest.approx(6 * 1000 * flops[1] / flops[0])
    assert plan.times.validation == pytest.approx(plan.times.step / 6 / 3 * 61 / 64)  # worked out, not waited for


def test_a_time_budget_is_planned_as_steps_and_with_the_copy_to_measure_on(overrides):
    overrides |= {"training.max_steps": None, "training.max_minutes": 3.0, "training.compile": "off"}
    plan = make_plan(None, preset=None, overrides=overrides)
    assert plan.length.steps >= 1
    assert plan.memory.copy == plan.memory.tensors.weights


def test_compiling_is_decided_as_the_run_will_and_its_time_counts(overrides, monkeypatch):
    decided = []

    def decide(run):
        decided.append(run)
        time.sleep(0.05)
        run.config = run.config.with_training(compile="on")

    overrides |= {"training.max_steps": None, "training.max_minutes": 0.5}
    eager = make_plan(None, preset=None, overrides=overrides | {"training.compile": "off"})
    assert eager.seconds["compiling"] == 0
    assert "compil" not in format_plan(eager)
    monkeypatch.setattr(rehearsal, "decide_compiling", decide)
    plan = make_plan(None, preset=None, overrides=overrides)
    assert len(decided) == 1
    assert 0.05 <= plan.seconds["compiling"] < 1
    assert plan.to_json()["seconds"]["compiling"] == plan.seconds["compiling"]
    assert "measured, compiled" in format_plan(plan)


def test_without_a_text_memory_is_planned_and_the_rest_is_said_to_be_missing(no_measuring):
    plan = make_plan(None, preset="nano", overrides={"device": "cpu", "training.max_epochs": 3})
    assert plan.length is None
    assert plan.times is None
    assert "--data" in plan.missing[0]
    assert json.loads(json.dumps(plan.to_json()))["seconds"]["total"] is None
    assert make_plan(None, preset="nano", overrides={"device": "cpu"}).length.steps == 2000
    assert "steps" in format_plan(plan)


def test_what_training_would_refuse_planning_refuses(overrides):
    with pytest.raises(SheepopError, match="shorter than the context"):
        make_plan(None, preset=None, overrides=overrides | {"model.max_seq_len": 5000, "data.max_length": 5000})


def run_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "sheepop", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_a_table_or_one_json_value(corpus_folder, tmp_path):
    sizes = "--model.d_model 20 --model.num_heads 5 --model.num_layers 2 --model.max_seq_len 14 --device cpu".split()
    given = ["plan", "--data", corpus_folder, "--output", tmp_path / "run", *sizes, "--training.batch_size", 3]
    done = run_command(*given, "--training.max_steps", 9, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "measuring" in done.stderr
    assert result["run"]["steps"] == 9
    memory, parts = result["memory_bytes"], ("weights", "optimizer", "activations", "logits", "process", "allocator")
    assert memory["estimate"] == sum(memory[part] for part in parts)
    assert memory["fits"] is True
    assert memory["peak"] == memory["measured"] > memory["process"] > 0
    seconds = result["seconds"]
    assert math.isclose(seconds["total"], sum(seconds["by_part"].values()))
    assert result["disk_bytes"]["fits"] is True
    assert result["flops"]["per_step"] == result["flops"]["per_token"] * 3 * 14
    assert 0 < result["mfu"] < 1

    table = run_command(*given, "--training.max_steps", 9)
    assert table.returncode == 0, table.stderr
    for word in ("parameters", "activations", "a step", "checkpoints", "available"):
        assert word in table.stdout
    assert not (tmp_path / "run").exists()

    wrong = run_command(*given, "--training.max_step", 9)
    assert wrong.returncode == 2
    assert "max_steps" in wrong.stderr


def test_where_nothing_fits_that_is_said():
    config = load_config(preset="demo")
    memory = plan_memory(config, CPU, process=100 * MILLION, available=101 * MILLION)
    assert settings_that_fit(config, CPU, memory) == []
    assert "free some memory" in next(describe_advice([]))
