import json

import pytest
import torch

from sheepop.models.linear import Linear
from sheepop.training import weight_gradients
from sheepop.training.weight_gradients import WAYS, decide_weight_gradients
from sheepop.utils.devices import BF16
from sheepop.utils.errors import ConfigError

SETTINGS = {"training.max_steps": 2, "training.compile": "off"}

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs PyTorch with oneDNN")


def saved_setting(folder):
    return json.loads((folder / "config.json").read_text())["training"]["weight_gradients"]


@pytest.fixture
def large_enough(monkeypatch):
    """Let oneDNN have the products of the smallest model, on any processor, and no run be too short to be measured."""
    monkeypatch.setattr("sheepop.models.linear.IS_INTEL", False)
    monkeypatch.setattr("sheepop.models.linear.LEAST_PRODUCTS", 0)
    monkeypatch.setattr("sheepop.models.linear.LEAST_WEIGHTS", 0)
    monkeypatch.setattr(weight_gradients, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(weight_gradients, "is_over_soon", lambda run: False)


@pytest.fixture
def used(monkeypatch):
    """The ways that weights' gradients were made, in order."""
    ways = []

    def noted(way, make):
        def make_and_note(*given):
            ways.append(way)
            return make(*given)

        return make_and_note

    for way, make in WAYS.items():
        monkeypatch.setattr(f"sheepop.models.linear.weight_gradient_by_{way}", noted(way, make))
    return ways


@needs_onednn
@pytest.mark.usefixtures("large_enough")
@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"onednn": 1.0, "blas": 0.8}, "blas"),
        ({"onednn": 1.0, "blas": 0.97}, "onednn"),
        ({"onednn": 1.0, "blas": 2.0}, "onednn"),
    ],
)
def test_the_faster_way_is_measured_said_and_used(
    tmp_path, train_in, tiny_config, monkeypatch, used, capfd, seconds, expected
):
    shapes = []
    monkeypatch.setattr(
        weight_gradients, "measure", lambda *tensors: shapes.extend(tensor.shape for tensor in tensors) or seconds
    )
    run = train_in(tmp_path / "run", **SETTINGS)
    assert saved_setting(run) == expected
    assert ("blas" in used) == (expected == "blas")  # the head's is always oneDNN's
    config = tiny_config(**SETTINGS)
    tokens = config.training.batch_size * config.data.max_length
    assert {shape[0] for shape in shapes} == {tokens}
    width = config.model.d_model
    assert [shape[1] for shape in shapes] == [width, 3 * width]  # query, key and value, the largest weight
    said = f"weight gradients: {expected} (of {tokens} tokens"
    assert said in capfd.readouterr().err


@needs_onednn
@pytest.mark.usefixtures("large_enough")
def test_a_run_goes_on_as_it_began(tmp_path, train_in, used):
    train_in(tmp_path / "run", **SETTINGS, **{"training.weight_gradients": "blas"})
    more = SETTINGS | {"training.max_steps": 4, "training.schedule": "constant"}
    run = train_in(tmp_path / "run", resume="auto", accept_changes=True, **more)
    assert saved_setting(run) == "blas"
    assert used.count("onednn") < used.count("blas")  # the head's alone
    with pytest.raises(ConfigError, match=r"training\.weight_gradients: blas -> onednn"):
        train_in(tmp_path / "run", resume="auto", **more, **{"training.weight_gradients": "onednn"})


@pytest.mark.parametrize("reason", ["short", "small", "Intel", "bf16"])
def test_nothing_is_measured_where_it_does_not_matter(tiny_config, bare_run, monkeypatch, request, reason):
    run = bare_run(tiny_config(**SETTINGS))
    if reason != "small":
        request.getfixturevalue("large_enough")
    if reason == "short":
        monkeypatch.setattr(weight_gradients, "is_over_soon", lambda run: True)
    elif reason == "Intel":
        monkeypatch.setattr("sheepop.models.linear.IS_INTEL", True)
    elif reason == "bf16":
        run.precision = BF16
    monkeypatch.setattr(weight_gradients, "measure", None)
    decide_weight_gradients(run)
    assert run.config.training.weight_gradients == "onednn"
    assert all(layer.gradient_by_onednn for layer in run.model.blocks.modules() if isinstance(layer, Linear))


@needs_onednn
def test_both_ways_are_timed_in_turn(used, monkeypatch):
    monkeypatch.setattr(
        weight_gradients,
        "WAYS",
        {way: lambda *given, way=way, make=make: used.append(way) or make(*given) for way, make in WAYS.items()},
    )
    monkeypatch.setattr(weight_gradients, "MEASURED_SECONDS", 0.0)
    seconds = weight_gradients.measure(torch.ones(64, 32), torch.ones(64, 48))
    assert used == ["onednn", "blas"] * weight_gradients.LEAST_ROUNDS
    assert min(seconds.values()) > 0
