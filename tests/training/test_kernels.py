import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from sheepop.config import load_config
from sheepop.models.kernel_attention import KernelAttention
from sheepop.models.kernel_head import KernelHead
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


def saved_settings(folder):
    training = json.loads((folder / "config.json").read_text())["training"]
    return training["attention_kernels"], training["head_kernels"]


def decided(config, device, *, steps, **options):
    training = use_of_kernels(config, device, steps=steps, **options).training
    return training.attention_kernels, training.head_kernels


@pytest.fixture
def taken(monkeypatch):
    """What learned by kernels, each time."""
    calls = []
    apply, score = KernelAttention.apply, KernelHead.score
    monkeypatch.setattr(KernelAttention, "apply", lambda *given: calls.append("attention") or apply(*given))
    monkeypatch.setattr(KernelHead, "score", lambda *given: calls.append("head") or score(*given))
    return calls


@pytest.fixture
def long_enough(monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_FLOPS", 0)


@pytest.mark.usefixtures("long_enough")
@pytest.mark.parametrize(("seconds", "expected"), [((1.0, 2.0), "on"), ((1.0, 1.02), "off"), ((2.0, 1.0), "off")])
def test_the_faster_way_is_measured_said_and_used(tmp_path, train_in, monkeypatch, taken, capfd, seconds, expected):
    asked = []
    monkeypatch.setattr(kernels, "measure_attention", lambda *given: asked.append(given) or seconds)
    monkeypatch.setattr(kernels, "measure_head", lambda *given: asked.append(given) or seconds[::-1])
    run = train_in(tmp_path / "run", **SETTINGS)
    other = "on" if seconds[1] < 0.95 * seconds[0] else "off"
    assert saved_settings(run) == (expected, other)
    assert ("attention" in taken, "head" in taken) == (expected == "on", other == "on")
    said = capfd.readouterr().err
    assert f"attention kernels: {expected} (64 x 64 tokens of a layer" in said
    assert f"head kernels: {other} (64 x 64 tokens" in said
    entries = json.loads((run / "config.json").read_text())["model"]["vocab_size"]
    assert asked == [((64, 64, 2, 2, 16), torch.float32, 0, 0, 0.1), ((64, 64), entries, 32, 0, torch.float32)]


def test_heads_are_timed_with_few_tokens_of_large_vocabularies_and_in_a_likely_size_for_the_dial(monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "measure_head", lambda *given: asked.append(given) or (1.0, 2.0))
    monkeypatch.setattr(kernels, "measure_attention", lambda *given: (1.0, 2.0))
    wanted = {key: value for key, value in SETTINGS.items() if key != "training.max_steps"}
    sizes = {"model.vocab_size": 50304, "model.d_model": 512, "model.copy_width": 16, "training.precision": "fp32"}
    config = load_config(preset="nano", overrides=wanted | sizes)
    assert decided(config, CPU, steps=10**9) == ("on", "on")
    assert decided(config, CPU, steps=10**9, has_size=False) == ("on", "on")
    assert asked == [((8, 64), 50304, 512, 16, torch.float32), ((64, 64), 4096, 128, 16, torch.float32)]


def test_both_ways_are_timed_in_turn(taken, monkeypatch):
    monkeypatch.setattr(kernels, "MEASURED_SECONDS", 60.0)
    state = torch.get_rng_state()
    seconds = [
        *kernels.measure_attention.__wrapped__((2, 64, 2, 1, 16), torch.float32, 9, 0, 0.1),
        *kernels.measure_head.__wrapped__((2, 64), 300, 32, 0, torch.float32),
        *kernels.measure_head.__wrapped__((2, 64), 300, 32, 16, torch.float32),
        *kernels.measure_head.__wrapped__((2, 64), 300, 32, 16, torch.bfloat16),  # its copies alone
    ]
    assert min(seconds) > 0
    assert [taken.count(what) for what in ("attention", "head")] == [1 + kernels.ROUNDS, 2 * (1 + kernels.ROUNDS)]
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
    monkeypatch.setattr(kernels, "measure_attention", None)
    monkeypatch.setattr(kernels, "measure_head", None)
    wanted = {key: value for key, value in SETTINGS.items() if key != "training.max_steps"} | changes
    config = load_config(preset="nano", overrides=wanted)
    if "model.d_model" in changes or steps != 10**9:
        assert decided(config, CPU, steps=steps) == ("off", "off")
    else:  # what keeps attention from kernels is nothing to the head
        monkeypatch.setattr(kernels, "measure_head", lambda *given: (1.0, 2.0))
        assert decided(config, CPU, steps=steps) == ("off", "on")
    assert decided(config, torch.device("cuda"), steps=10**9) == ("off", "off")


def test_long_runs_are_worth_it(monkeypatch):
    monkeypatch.setattr(kernels, "measure_attention", lambda *given: (1.0, 2.0))
    monkeypatch.setattr(kernels, "measure_head", lambda *given: (1.0, 2.0))
    config = load_config(preset="nano", overrides=SETTINGS)
    assert decided(config, CPU, steps=10**9) == ("on", "on")
    wanted = {key: value for key, value in SETTINGS.items() if key != "training.max_steps"}
    config = load_config(preset="nano", overrides=wanted | {"training.max_minutes": 10.0})
    assert decided(config, CPU, steps=None) == ("on", "on")
    config = load_config(preset="nano", overrides=wanted | {"training.max_minutes": 10.0, "training.precision": "bf16"})
    assert decided(config, CPU, steps=None) == ("on", "off")  # the head's products are for fp32
    copies = wanted | {"training.max_minutes": 10.0, "training.precision": "bf16", "model.copy_width": 16}
    assert decided(load_config(preset="nano", overrides=copies), CPU, steps=None) == ("on", "on")


@pytest.mark.parametrize("setting", kernels.SETTINGS)
def test_a_run_goes_on_as_it_began(tmp_path, train_in, taken, setting):
    on = {f"training.{setting}": "on", "training.schedule": "constant"}
    whole = train_in(tmp_path / "whole", **SETTINGS, **on)
    part = train_in(tmp_path / "part", **SETTINGS | on | {"training.max_steps": 2})
    taken.clear()
    part = train_in(part, resume="auto", **SETTINGS | {"training.schedule": "constant"}, accept_changes=True)
    assert saved_settings(part) == tuple("on" if name == setting else "off" for name in kernels.SETTINGS)
    assert taken
    one, other = (load_file(folder / "checkpoint_step_3" / "model.safetensors") for folder in (whole, part))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(ConfigError, match=rf"training\.{setting}: on -> off"):
        train_in(part, resume="auto", **SETTINGS, **{f"training.{setting}": "off", "training.schedule": "constant"})


@pytest.mark.parametrize("setting", kernels.SETTINGS)
def test_without_numba_they_are_off_and_asking_for_them_is_an_error(monkeypatch, setting):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find(name))
    config = load_config(preset="nano", overrides=SETTINGS)
    assert decided(config, CPU, steps=10**9) == ("off", "off")
    with pytest.raises(ConfigError, match=rf"training\.{setting} is on, but numba, which compiles them"):
        use_of_kernels(config.with_training(**{setting: "on"}), CPU, steps=10**9)
