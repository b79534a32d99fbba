import json
import os
import random
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sheepop.cli import main
from sheepop.config import load_config
from sheepop.data.corpus import open_corpus
from sheepop.data.prepare import prepare_corpus
from sheepop.interop.huggingface import export_huggingface
from sheepop.training import dial
from sheepop.training.checkpoint import find_resume, read_state
from sheepop.training.dial import choose_settings, compare_with_expectation, is_dial, look_at_text, sample_text
from sheepop.training.recipe import ENOUGH_STEPS, shape_of
from sheepop.training.rehearsal import make_plan
from sheepop.training.run import start_run
from sheepop.training.speed import MachineFacts, step_seconds
from sheepop.utils.errors import ConfigError, DataError, Interrupted

CPU = torch.device("cpu")
SLOW = MachineFacts("cpu", overhead=0.02, speeds={"fp32": 1e9, "bf16": 1e9}, bandwidth=1e8)


@pytest.fixture
def slow_machine(monkeypatch):
    """A machine on which a minute is a few steps, so that runs are short; nothing is measured by the clock."""
    monkeypatch.setattr(dial, "measure_machine", lambda *_, **__: SLOW)
    monkeypatch.setattr("sheepop.training.length.measure_step", lambda *_, **__: 3.0)
    monkeypatch.setattr("sheepop.training.length.is_review_due", lambda *_: False)
    monkeypatch.setattr("sheepop.training.trainer.is_review_due", lambda *_: False)


@pytest.fixture
def never_measured(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the dial looked at the machine")

    monkeypatch.setattr(dial, "measure_machine", refuse)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "hill.txt"
    path.write_text("The old sheep follows the dog over the hill, but the dog follows none.\n" * 120, encoding="utf-8")
    return path


def given(text, folder, **settings):
    named = {"data.path": str(text), "data.data_dir": str(folder / "data"), "training.save_dir": str(folder / "run")}
    named |= {"training.max_minutes": 1.0, "training.sample_tokens": 3, "device": "cpu"}
    return named | {key.replace("__", "."): value for key, value in settings.items()}


def test_the_dial_is_minutes_and_nothing_else():
    minutes = {"training.max_minutes": 3.0}
    assert is_dial(None, None, minutes)
    assert is_dial(None, None, minutes | {"model.d_model": 64})
    assert not is_dial(None, None, {})
    assert not is_dial(None, "modern", minutes)
    assert not is_dial("settings.json", None, minutes)
    assert not is_dial(None, None, minutes | {"preset": "nano"})


def test_minutes_choose_a_run_and_say_so(text, tmp_path, slow_machine, capsys):
    run = start_run(None, preset=None, overrides=given(text, tmp_path, model__num_layers=1), resume=None)
    said = capsys.readouterr().err
    for words in (
        "measured:",
        "tokens:",
        "model: 1 layers of width",
        "epochs",
        "expected:",
        "bits per byte at the end",
    ):
        assert words in said
    config = load_config(run / "config.json")
    assert config.preset == "modern"
    assert (config.training.optimizer, config.training.schedule, config.model.num_layers) == ("muon", "linear", 1)
    export_huggingface(run, tmp_path / "stock")  # refuses what no stock class has
    assert (tmp_path / "stock" / "model.safetensors").exists()
    assert config.model.vocab_size == open_corpus(Path(config.data.path)).tokenizer().vocab_size
    expected = json.loads((run / "expected.json").read_text())
    assert expected["from"] < expected["bits_per_byte"] < expected["to"]
    assert "model.num_layers" not in expected["settings"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["type"] == "val"
    assert lines[-2]["learning_rate"] == 0.0


def test_what_came_out_is_compared_with_what_was_expected(tmp_path):
    assert compare_with_expectation(tmp_path) is None
    (tmp_path / "expected.json").write_text('{"bits_per_byte": 2.0, "from": 1.9, "to": 2.1, "steps": 100}')
    for found, verdict in ((1.8, "better than expected"), (2.05, "as expected"), (2.2, "worse than expected")):
        (tmp_path / "metrics.jsonl").write_text(
            f'{{"type": "val", "bits_per_byte": 9.0}}\n{{"type": "val", "bits_per_byte": {found}, "step": 95}}\n'
        )
        assert f"{found:.3f} bits per byte at the end, {verdict}" in compare_with_expectation(tmp_path)
        assert "slower" not in compare_with_expectation(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"type": "val", "bits_per_byte": 2.5, "step": 40}\n')
    assert "the machine was slower than measured, 40 steps instead of 100" in compare_with_expectation(tmp_path)


def test_with_a_preset_or_a_file_minutes_set_the_length_alone(text, tmp_path, slow_machine, never_measured):
    sizes = {"model__d_model": 20, "model__num_heads": 5, "model__max_seq_len": 14, "training__eval_max_tokens": 50}
    overrides = given(text, tmp_path, **sizes, data__tokenizer="char", training__batch_size=2)
    run = start_run(None, preset="classic", overrides=overrides, resume=None)
    assert load_config(run / "config.json").training.optimizer == "adamw"
    assert not (run / "expected.json").exists()


def test_a_resumed_run_does_not_choose_again(text, tmp_path, slow_machine, signal_at, monkeypatch, capsys):
    overrides = given(text, tmp_path)
    signal_at(4)
    with pytest.raises(Interrupted):
        start_run(None, preset=None, overrides=overrides, resume="auto")  # nothing to resume yet: it chooses
    signal_at.undo()
    before = load_config(tmp_path / "run/config.json")
    monkeypatch.setattr(dial, "measure_machine", lambda *_, **__: 1 / 0)
    run = start_run(None, preset=None, overrides=overrides, resume="auto")
    after = load_config(run / "config.json")
    assert (after.model, after.training) == (before.model, before.training)
    assert read_state(find_resume(run, "auto")).step > 4
    assert "bits per byte at the end" in capsys.readouterr().err


def test_a_prepared_folder_keeps_its_tokenizer(corpus_folder, tmp_path, slow_machine):
    asked = load_config(preset="modern", overrides={"data.path": str(corpus_folder)})
    facts = look_at_text(asked, {}, seconds=0.0)
    corpus = open_corpus(corpus_folder)
    assert facts.is_prepared
    assert facts.train_bytes == corpus.split("train").num_bytes
    assert [entry.vocab_size for entry in facts.tokenizers] == [corpus.tokenizer().vocab_size]
    overrides = given(corpus_folder, tmp_path)
    choice = choose_settings(overrides, device=CPU, began=time.perf_counter())
    assert choice.config.model.vocab_size == corpus.tokenizer().vocab_size
    run = start_run(None, preset=None, overrides=overrides, resume=None)
    assert load_config(run / "config.json").data.path == str(corpus_folder.resolve())


def test_the_sample_of_a_prepared_folder_is_from_all_over_it(tmp_path):
    letters = random.Random(2)
    plain, hard = "the sheep " * 3000, "".join(letters.choice("abcdefghijklmnop") for _ in range(30_000))
    bits = []
    for name, text in (("plain", plain), ("hard", hard), ("both", plain + hard)):
        (tmp_path / f"{name}.txt").write_text(text)
        prepare_corpus(
            [tmp_path / f"{name}.txt"],
            tmp_path / name,
            tokenizer="char",
            vocab_size=300,
            val_fraction=0.02,
            seed=0,
            separator=None,
        )
        asked = load_config(preset="modern", overrides={"data.path": str(tmp_path / name)})
        bits.append(look_at_text(asked, {}, seconds=0.0, sample_bytes=20_000).compressed_bits)
    assert bits[2] == pytest.approx((bits[0] + bits[1]) / 2, rel=0.2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"char", "bpe"}),
        ({"data.tokenizer": "char"}, {"char"}),
        ({"data.tokenizer": "bpe", "model.vocab_size": 300}, {"bpe"}),
        ({"data.tokenizer": "word", "model.vocab_size": 9}, {"word"}),
    ],
)
def test_tokenizers_are_tried_on_the_text_unless_one_is_given(text, settings, expected):
    asked = load_config(preset="modern", overrides={"data.path": str(text)} | settings)
    facts = look_at_text(asked, settings, seconds=60.0)
    assert {entry.name for entry in facts.tokenizers} == expected
    if "model.vocab_size" in settings:
        assert [entry.entries_asked for entry in facts.tokenizers] == [settings["model.vocab_size"]]
    assert all(entry.bytes_per_token >= 1 for entry in facts.tokenizers if entry.name != "word")
    assert facts.train_bytes + facts.val_bytes == text.stat().st_size
    assert 0 < facts.compressed_bits < 3


def test_a_sample_is_taken_from_all_over_the_files(tmp_path):
    for number in range(7):
        (tmp_path / f"{number}.txt").write_text(f"{number}" * 5000, encoding="utf-8")
    pieces, total = sample_text(tmp_path, None, 700)
    assert total == 35_000
    assert {piece[0] for piece in pieces} == set("0123456")
    assert sum(map(len, pieces)) < 1000
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("long.txt", "sheep " * 10_000)
    _, total = sample_text(tmp_path / "a.zip", None, 100_000)
    assert total == pytest.approx(60_000, rel=0.01)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/empty.txt").touch()
    with pytest.raises(DataError, match="no text"):
        sample_text(tmp_path / "empty", None, 100)


@pytest.mark.parametrize("size", [1000, 300_000])
def test_tiny_texts_and_long_ones_train(tmp_path, slow_machine, size):
    path = tmp_path / "text.txt"
    path.write_text(("The hill is green. A sheep sleeps on it; the dog does not.\n" * 6000)[:size], encoding="utf-8")
    run = start_run(None, preset=None, overrides=given(path, tmp_path), resume=None)
    assert len(list(run.glob("checkpoint_*"))) <= 3
    assert (run / "best.json").exists()


def test_planning_shows_the_same_choice(text, tmp_path, slow_machine, capsys):
    overrides = given(text, tmp_path)
    plan = make_plan(None, preset=None, overrides=overrides)
    assert "expected:" in capsys.readouterr().err
    choice = choose_settings(overrides, device=CPU, began=time.perf_counter())
    assert plan.config.model.d_model == choice.config.model.d_model
    assert plan.config.training.optimizer == "muon"
    assert not (tmp_path / "run").exists()


def test_too_short_a_time_is_a_clear_error(text, tmp_path, slow_machine):
    with pytest.raises(ConfigError, match="minutes are too short"):
        start_run(None, preset=None, overrides=given(text, tmp_path, training__max_minutes=0.001), resume=None)


def test_the_machine_is_measured_by_real_steps():
    facts = dial.measure_machine(CPU, seconds=0.0, fixed={})
    assert facts.overhead >= 0
    assert all(1e8 < speed < 1e15 for speed in facts.speeds.values())
    assert facts.bandwidth > 1e7


def test_the_machine_is_measured_in_the_precision_that_was_asked_for():
    assert set(dial.measure_machine(CPU, seconds=0.0, fixed={"training.use_amp": False}).speeds) == {"fp32"}
    assert set(dial.measure_machine(CPU, seconds=0.0, fixed={"training.precision": "bf16"}).speeds) == {"bf16"}


def test_minutes_alone_do_not_train_in_eight_bits(text, tmp_path, never_measured):
    with pytest.raises(ConfigError, match="fp8"):
        start_run(None, preset=None, overrides=given(text, tmp_path, training__precision="fp8"), resume=None)


LAPTOP = MachineFacts("cpu", overhead=1e-3, speeds={"fp32": 1e11, "bf16": 3e11}, bandwidth=1e10)


@pytest.fixture
def timed(monkeypatch):
    """Steps that take what the cost model of `LAPTOP` says, times a factor by shape; returns which were timed."""
    shapes = []

    def time_steps(config, device, *, seconds, num_processes=1):
        shapes.append((config.model.d_model, config.model.num_layers))
        timed.seconds += seconds
        return step_seconds(config, LAPTOP) * timed.factors.get(shapes[-1], 1.0)

    def timed():
        return set(shapes)

    timed.factors, timed.seconds = {}, 0.0
    monkeypatch.setattr(dial, "measure_machine", lambda *_, **__: LAPTOP)
    monkeypatch.setattr(dial, "time_steps", time_steps)
    return timed


def choose_for(minutes, text, tmp_path):
    overrides = given(text, tmp_path, training__max_minutes=minutes)
    return choose_settings(overrides, device=CPU, began=time.perf_counter())


@pytest.fixture
def long_text(tmp_path):
    letters = random.Random(3)
    words = ["".join(letters.choices("abcdefghijklmnop", k=letters.randint(2, 9))) for _ in range(3000)]
    path = tmp_path / "long.txt"
    path.write_text(" ".join(letters.choices(words, k=120_000)), encoding="utf-8")
    return path


def test_the_steps_of_the_finalists_are_measured_before_the_choice(long_text, tmp_path, timed, capsys):
    believed = choose_for(20.0, long_text, tmp_path)
    first = timed()
    assert shape_of(believed) in first
    assert capsys.readouterr().err.count("timed:") == len(first) >= 2
    assert 0 < timed.seconds <= 0.05 * 20 * 60
    timed.factors = {shape_of(believed): 8.0}  # the cost model holds it for much too quick
    assert shape_of(choose_for(20.0, long_text, tmp_path)) in first - {shape_of(believed)}
    timed.factors = dict.fromkeys(first, 2.0)
    slow = choose_for(20.0, long_text, tmp_path)
    assert slow.seconds_per_step == pytest.approx(2 * step_seconds(slow.config, LAPTOP))


def test_where_all_finalists_are_too_slow_a_smaller_model_is_chosen(long_text, tmp_path, timed):
    believed = choose_for(20.0, long_text, tmp_path)
    finalists = timed()
    timed.factors = dict.fromkeys(finalists, believed.steps / 20)
    chosen = choose_for(20.0, long_text, tmp_path)
    assert shape_of(chosen) not in finalists
    assert chosen.steps >= ENOUGH_STEPS
    assert chosen.seconds_per_step > step_seconds(chosen.config, LAPTOP)


def test_one_busy_moment_does_not_decide(long_text, tmp_path, timed, monkeypatch):
    quiet = choose_for(20.0, long_text, tmp_path)
    calls, measure = [], dial.time_steps

    def with_busy_start(config, device, **how):
        calls.append(config)
        return measure(config, device, **how) * (10.0 if len(calls) == 1 else 1.0)

    monkeypatch.setattr(dial, "time_steps", with_busy_start)
    assert choose_for(20.0, long_text, tmp_path).config.model == quiet.config.model


def test_a_short_budget_measures_no_finalists(text, tmp_path, timed):
    choose_for(1.0, text, tmp_path)
    assert not timed()


def test_finalists_are_timed_only_where_there_is_time(text, tmp_path, timed):
    choices = [choose_for(1.0, text, tmp_path)] * 3
    slow = [replace(choice, seconds_per_step=5.0) for choice in choices]
    assert dial.time_finalists(slow, CPU, seconds=1.0) == []
    assert dial.time_finalists(choices, CPU, seconds=-1.0) == []
    assert len(dial.time_finalists(slow, CPU, seconds=31.0)) == 1
    assert len(dial.time_finalists(slow, CPU, seconds=100.0)) == 3
    assert len(dial.time_finalists([choices[0], slow[0]], CPU, seconds=20.0)) == 1


def test_steps_of_any_settings_can_be_timed(text, tmp_path, timed, monkeypatch):
    monkeypatch.undo()
    settings = {"model.d_model": 20, "model.num_heads": 5, "model.vocab_size": 33, "model.max_seq_len": 14}
    settings |= {"model.dropout": 0.1, "training.gradient_accumulation_steps": 2, "data.document_mask": True}
    config = load_config(preset="modern", overrides=settings | {"training.activation_checkpointing": True})
    assert dial.time_steps(config, CPU, seconds=0.0, num_processes=2) > 0


def test_the_command(text, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--data", str(text), "--minutes", "-1", "--output", str(tmp_path / "run")])
    assert caught.value.code == 2
    assert "max_minutes" in capsys.readouterr().err
    command = ["train", "--data", text, "--minutes", "0.25", "--output", "run", "--device", "cpu"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "sheepop", *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "run"
    assert "bits per byte at the end" in done.stderr
    assert time.perf_counter() - began < 60  # 15 s, on a machine that nobody else uses
