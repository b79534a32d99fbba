import json

import pytest
import torch

from sheepop.models.linear import Linear
from sheepop.training import gradient_libraries
from sheepop.training.gradient_libraries import WAYS, decide_gradient_libraries
from sheepop.utils.devices import BF16
from sheepop.utils.errors import ConfigError

SETTINGS = {"training.max_steps": 2, "training.compile": "off"}

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs PyTorch with oneDNN")
each_setting = pytest.mark.parametrize("setting", WAYS)


def saved_settings(folder):
    return json.loads((folder / "config.json").read_text())["training"]


@pytest.fixture
def large_enough(monkeypatch):
    """Let oneDNN have the products of the smallest model, on any processor, and no run be too short to be measured."""
    monkeypatch.setattr("sheepop.models.linear.IS_INTEL", False)
    monkeypatch.setattr("sheepop.models.linear.LEAST_PRODUCTS", 0)
    monkeypatch.setattr("sheepop.models.linear.LEAST_WEIGHTS", 0)
    monkeypatch.setattr(gradient_libraries, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(gradient_libraries, "is_over_soon", lambda run: False)


@pytest.fixture
def used(monkeypatch):
    """The libraries that made gradients, in order, by setting."""
    libraries = {setting: [] for setting in WAYS}

    def noted(setting, library, make):
        def make_and_note(*given):
            libraries[setting].append(library)
            return make(*given)

        return make_and_note

    for setting, ways in WAYS.items():
        for library, make in ways.items():
            name = f"sheepop.models.linear.{setting.removesuffix('s')}_by_{library}"
            monkeypatch.setattr(name, noted(setting, library, make))
    return libraries


@needs_onednn
@pytest.mark.usefixtures("large_enough")
@each_setting
@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"onednn": 1.0, "blas": 0.8}, "blas"),
        ({"onednn": 1.0, "blas": 0.97}, "onednn"),
        ({"onednn": 1.0, "blas": 2.0}, "onednn"),
    ],
)
def test_the_faster_library_is_measured_said_and_used(
    tmp_path, train_in, tiny_config, monkeypatch, used, capfd, setting, seconds, expected
):
    measured = {}

    def measure(name, *factors):
        measured[name] = [tuple(factor.shape) for factor in factors]
        return seconds if name == setting else {"onednn": 1.0, "blas": 1.0}

    monkeypatch.setattr(gradient_libraries, "measure", measure)
    run = train_in(tmp_path / "run", **SETTINGS)
    assert {name: saved_settings(run)[name] for name in WAYS} == dict.fromkeys(WAYS, "onednn") | {setting: expected}
    assert ("blas" in used[setting]) == (expected == "blas")  # the head's is always oneDNN's
    config = tiny_config(**SETTINGS)
    tokens, width = config.training.batch_size * config.data.max_length, config.model.d_model
    # Query, key and value have the largest weight.
    assert measured == {
        "weight_gradients": [(tokens, width), (tokens, 3 * width)],
        "hidden_gradients": [(3 * width, width), (tokens, 3 * width)],
    }
    said = f"{setting.replace('_', ' ')}: {expected} (of {tokens} tokens"
    assert said in capfd.readouterr().err


@needs_onednn
@pytest.mark.usefixtures("large_enough")
@each_setting
def test_a_run_goes_on_as_it_began(tmp_path, train_in, used, setting):
    train_in(tmp_path / "run", **SETTINGS, **{f"training.{setting}": "blas"})
    more = SETTINGS | {"training.max_steps": 4, "training.schedule": "constant"}
    run = train_in(tmp_path / "run", resume="auto", accept_changes=True, **more)
    assert saved_settings(run)[setting] == "blas"
    assert used[setting].count("onednn") < used[setting].count("blas")  # the head's alone
    with pytest.raises(ConfigError, match=rf"training\.{setting}: blas -> onednn"):
        train_in(tmp_path / "run", resume="auto", **more, **{f"training.{setting}": "onednn"})


@pytest.mark.parametrize("reason", ["short", "small", "Intel", "bf16"])
def test_nothing_is_measured_where_it_does_not_matter(tiny_config, bare_run, monkeypatch, request, reason):
    run = bare_run(tiny_config(**SETTINGS))
    if reason != "small":
        request.getfixturevalue("large_enough")
    if reason == "short":
        monkeypatch.setattr(gradient_libraries, "is_over_soon", lambda run: True)
    elif reason == "Intel":
        monkeypatch.setattr("sheepop.models.linear.IS_INTEL", True)
    elif reason == "bf16":
        run.precision = BF16
    monkeypatch.setattr(gradient_libraries, "measure", None)
    decide_gradient_libraries(run)
    training = run.config.training
    assert training.weight_gradients == training.hidden_gradients == "onednn"
    layers = [layer for layer in run.model.blocks.modules() if isinstance(layer, Linear)]
    assert all(layer.weight_gradient_by_onednn and layer.hidden_gradient_by_onednn for layer in layers)


@needs_onednn
@each_setting
def test_both_libraries_are_timed_in_turn(monkeypatch, setting):
    used = []

    def noted(library, make):
        return lambda *given: used.append(library) or make(*given)

    ways = {library: noted(library, make) for library, make in WAYS[setting].items()}
    monkeypatch.setattr(gradient_libraries, "WAYS", {setting: ways})
    monkeypatch.setattr(gradient_libraries, "MEASURED_SECONDS", 0.0)
    seconds = gradient_libraries.measure(setting, torch.ones(48, 32), torch.ones(48, 48))
    assert used == ["onednn", "blas"] * gradient_libraries.LEAST_ROUNDS
    assert min(seconds.values()) > 0
