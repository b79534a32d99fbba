import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from sheepop.config import load_config
from sheepop.models.kernel_attention import KernelAttention
from sheepop.training import kernels
from sheepop.training.kernels import use_of_kernels
from sheepop.utils.errors import ConfigError

CPU = torch.device("cpu")
# Contexts and heads that the kernels take.
SETTINGS = {
    "model.max_seq_len": 64,
    "data.max_length": 64,
    "data.stride": 64,
    "model.d_model": 32,
    "model.num_heads": 2,
    "training.max_steps": 3,
    "training.compile": "off",
}


def saved_setting(folder):
    return json.loads((folder / "config.json").read_text())["training"]["attention_kernels"]


@pytest.fixture
def taken(monkeypatch):
    """How often attention learned by kernels."""
    calls = []
    apply = KernelAttention.apply
    monkeypatch.setattr(KernelAttention, "apply", lambda *given: calls.append(1) or apply(*given))
    return calls


@pytest.fixture
def long_enough(monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_FLOPS", 0)


@pytest.mark.usefixtures("long_enough")
@pytest.mark.parametrize(("seconds", "expected"), [((1.0, 2.0), "on"), ((1.0, 1.02), "off"), ((2.0, 1.0), "off")])
def test_the_faster_way_is_measured_said_and_used(tmp_path, train_in, monkeypatch, taken, capfd, seconds, expected):
    asked = []
    monkeypatch.setattr(kernels, "measure", lambda *given: asked.append(given) or seconds)
    run = train_in(tmp_path / "run", **SETTINGS)
    assert saved_setting(run) == expected
    assert (len(taken) > 0) == (expected == "on")
    assert f"attention kernels: {expected} (64 x 64 tokens of a layer" in capfd.readouterr().err
    assert asked == [((64, 64, 2, 2, 16), torch.float32, 0, 0, 0.1)]


def test_both_ways_are_timed_in_turn(taken):
    state = torch.get_rng_state()
    with_kernels, without = kernels.measure.__wrapped__((2, 64, 2, 1, 16), torch.float32, 9, 0, 0.1)
    assert min(with_kernels, without) > 0
    assert len(taken) == 1 + kernels.ROUNDS
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 3),  # over soon
        ({"training.max_minutes": 1.0}, None),
        ({"model.attention": "reference"}, 10**9),
        ({"model.max_seq_len": 48, "data.max_length": 48, "data.stride": 48}, 10**9),
        ({"model.d_model": 36}, 10**9),
    ],
    ids=str,
)
def test_nothing_is_measured_where_it_does_not_matter(changes, steps, monkeypatch):
    monkeypatch.setattr(kernels, "measure", None)
    wanted = {key: value for key, value in SETTINGS.items() if key != "training.max_steps"} | changes
    config = load_config(preset="nano", overrides=wanted)
    assert use_of_kernels(config, CPU, steps=steps) == "off"
    assert use_of_kernels(config, torch.device("cuda"), steps=10**9) == "off"


def test_long_runs_are_worth_it(monkeypatch):
    monkeypatch.setattr(kernels, "measure", lambda *given: (1.0, 2.0))
    config = load_config(preset="nano", overrides=SETTINGS)
    assert use_of_kernels(config, CPU, steps=10**9) == "on"
    wanted = {key: value for key, value in SETTINGS.items() if key != "training.max_steps"}
    config = load_config(preset="nano", overrides=wanted | {"training.max_minutes": 10.0})
    assert use_of_kernels(config, CPU, steps=None) == "on"


def test_a_run_goes_on_as_it_began(tmp_path, train_in, taken):
    on = {"training.attention_kernels": "on", "training.schedule": "constant"}
    whole = train_in(tmp_path / "whole", **SETTINGS, **on)
    part = train_in(tmp_path / "part", **SETTINGS | on | {"training.max_steps": 2})
    taken.clear()
    part = train_in(part, resume="auto", **SETTINGS | {"training.schedule": "constant"}, accept_changes=True)
    assert saved_setting(part) == "on"
    assert taken
    one, other = (load_file(folder / "checkpoint_step_3" / "model.safetensors") for folder in (whole, part))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ConfigError, match=r"training\.attention_kernels: on -> off"):
        train_in(
            part, resume="auto", **SETTINGS, **{"training.attention_kernels": "off", "training.schedule": "constant"}
        )


def test_without_numba_they_are_off_and_asking_for_them_is_an_error(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find(name))
    config = load_config(preset="nano", overrides=SETTINGS)
    assert use_of_kernels(config, CPU, steps=10**9) == "off"
    with pytest.raises(ConfigError, match="numba, which compiles them, is not installed"):
        use_of_kernels(config.with_training(attention_kernels="on"), CPU, steps=10**9)
