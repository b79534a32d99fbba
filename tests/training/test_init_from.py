"""Runs that begin with the weights of another."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sheepop.models.pretrained import resolve_checkpoint
from sheepop.training.run import start_run
from sheepop.utils.errors import CheckpointError, SheepopError


def weights(run, step):
    return load_file(run / f"checkpoint_step_{step}" / "model.safetensors")


@pytest.fixture
def begin(tmp_path, corpus_folder):
    """Begin a run with nothing said of the model: `begin("new", origin)`."""

    def start(name, origin, *, data=corpus_folder, resume=None, **settings):
        overrides = {
            "data.path": str(data),
            "data.data_dir": str(tmp_path / "data"),
            "training.save_dir": str(tmp_path / name),
            "training.init_from": str(origin),
            "training.max_steps": 1,
            "training.warmup_steps": 0,
            "training.batch_size": 3,
            "training.sample_tokens": 0,
            "device": "cpu",
        }
        return start_run(None, preset=None, overrides=overrides | settings, resume=resume)

    return start


def test_it_begins_with_the_weights_and_settings_of_the_other(tmp_path, train_in, begin):
    first = train_in(tmp_path / "first", **{"training.max_steps": 5})
    second = begin("second", first, **{"training.learning_rate": 1e-12, "training.weight_decay": 0.0})
    expected, found = load_file(resolve_checkpoint(first) / "model.safetensors"), weights(second, 1)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensor, found[name])
    models = [json.loads((run / "config.json").read_text())["model"] for run in (first, second)]
    assert models[0] == models[1]
    state = json.loads((second / "checkpoint_step_1/training_state/state.json").read_text())
    assert state["step"] == 1

    third = begin("third", first, **{"training.learning_rate": 1e-2})
    assert any(not tensor.equal(expected[name]) for name, tensor in weights(third, 1).items())


def test_a_resumed_run_goes_on_and_does_not_begin_again(tmp_path, train_in, begin):
    first = train_in(tmp_path / "first", **{"training.max_steps": 3})
    straight = begin("straight", first, **{"training.max_steps": 4, "training.schedule": "constant"})
    begin("halted", first, **{"training.max_steps": 2, "training.schedule": "constant"})
    resumed = begin("halted", first, resume="auto", **{"training.max_steps": 4, "training.schedule": "constant"})
    expected, found = weights(straight, 4), weights(resumed, 4)
    assert all(tensor.equal(found[name]) for name, tensor in expected.items())


def test_plain_text_is_read_with_the_vocabulary_of_the_other(tmp_path, train_in, begin):
    first = train_in(tmp_path / "first", **{"training.max_steps": 1})
    text = tmp_path / "other.txt"
    text.write_text("the old dog follows the young sheep " * 20)
    run = begin("second", first, data=text)
    assert (run / "checkpoint_step_1/tokenizer.json").read_text() == (
        resolve_checkpoint(first) / "tokenizer.json"
    ).read_text()


def test_another_vocabulary_or_model_is_refused(tmp_path, train_in, begin, many_documents):
    first = train_in(tmp_path / "first", **{"training.max_steps": 1})
    with pytest.raises(CheckpointError, match=r"prepared with another vocabulary .*--tokenizer "):
        begin("second", first, data=many_documents)
    with pytest.raises(SheepopError, match="does not fit the model"):
        begin("third", first, **{"model.d_ff": 31})
    with pytest.raises(CheckpointError, match="does not exist"):
        begin("fourth", tmp_path / "nothing")
