import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from sheepop.data.corpus import open_corpus
from sheepop.models.transformer import TransformerModel
from sheepop.training import saver as saver_module
from sheepop.training.checkpoint import read_state, save_checkpoint
from sheepop.training.distributed import World
from sheepop.training.run import set_up
from sheepop.utils.errors import ConfigError, NoSpaceError

SETTINGS = {"training.max_steps": 8, "training.save_interval": 1, "training.keep_last": 20, "model.dropout": 0.1}


def test_a_checkpoint_beside_the_training_is_of_the_step_that_it_claims(tmp_path, train_in, monkeypatch):
    straight = train_in(tmp_path / "straight", **SETTINGS)
    in_flight, most = 0, 0

    def slow(*arguments):
        nonlocal in_flight, most
        assert threading.current_thread() is not threading.main_thread()
        in_flight += 1
        most = max(most, in_flight)
        time.sleep(0.05)  # the training goes on meanwhile
        result = save_checkpoint(*arguments)
        in_flight -= 1
        return result

    monkeypatch.setattr(saver_module, "save_checkpoint", slow)
    beside = train_in(tmp_path / "beside", **SETTINGS, **{"training.async_save": True})
    assert most == 1
    for step in (1, 2, 3, 4, 5, 6, 8):
        for name in ("model.safetensors", "training_state/optimizer.safetensors"):
            expected, found = (load_file(run / f"checkpoint_step_{step}" / name) for run in (straight, beside))
            assert all(tensor.equal(found[key]) for key, tensor in expected.items()), (step, name)
        assert read_state(beside / f"checkpoint_step_{step}").step == step
    assert (straight / "latest.json").read_bytes() == (beside / "latest.json").read_bytes()
    assert (straight / "best.json").read_bytes() == (beside / "best.json").read_bytes()


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("nth", [1, 2, 8])
def test_a_full_disk_ends_the_run_and_keeps_what_was_saved(tmp_path, train_in, monkeypatch, async_save, nth):
    settings = SETTINGS | {"training.async_save": async_save}
    straight = train_in(tmp_path / "straight", **settings)
    saves = 0
    real = shutil.disk_usage

    def full_at_last(path):
        nonlocal saves
        saves += 1
        return real(path) if saves < nth else real(path)._replace(free=1000)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", full_at_last)
        with pytest.raises(NoSpaceError) as caught:
            train_in(tmp_path / "run", **settings)
    assert caught.value.exit_status == 6
    assert not list((tmp_path / "run").glob(".checkpoint_*"))
    train_in(tmp_path / "run", resume="auto", **settings)
    expected, found = (load_file(run / "checkpoint_step_8/model.safetensors") for run in (straight, tmp_path / "run"))
    assert all(tensor.equal(found[key]) for key, tensor in expected.items())


def test_milestones_are_kept(tmp_path, train_in):
    settings = SETTINGS | {"training.keep_last": 1, "training.keep_every": 3, "training.eval_interval": 50}
    run = train_in(tmp_path / "run", **settings)
    steps = {path.name for path in run.glob("checkpoint_*")}
    # The epoch ends after step 7; the last step is the best.
    assert steps == {"checkpoint_step_3", "checkpoint_step_6", "checkpoint_epoch_1", "checkpoint_step_8"}


def test_recomputed_activations_change_nothing_but_memory(tmp_path, train_in):
    kept = train_in(tmp_path / "kept", **SETTINGS)
    again = train_in(tmp_path / "again", **SETTINGS, **{"training.activation_checkpointing": True})
    expected, found = (load_file(run / "checkpoint_step_8/model.safetensors") for run in (kept, again))
    assert all(tensor.equal(found[key]) for key, tensor in expected.items())


def test_recomputing_keeps_less_for_the_backward_pass(tiny_config):
    model = TransformerModel(tiny_config(**{"model.num_layers": 6}).model).train()

    def bytes_kept():
        kept = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.nbytes) and tensor, lambda x: x
        )
        with hooks:
            model(torch.zeros(3, 14, dtype=torch.long))
        return sum(kept.values())

    before = bytes_kept()
    model.recompute_activations()
    assert bytes_kept() < before / 2


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("training.async_save", True, r"training\.async_save \(true\)"),
        ("training.optimizer", "muon", r"training\.optimizer \(muon\)"),
    ],
)
def test_what_sharding_cannot_do_is_said(tiny_config, corpus_folder, setting, value, named):
    config = tiny_config(**{setting: value, "training.parallel": "fsdp"})
    with pytest.raises(ConfigError, match=named + r" .* training\.parallel \(fsdp\)"):
        set_up(config, open_corpus(corpus_folder), device=torch.device("cpu"), world=World(0, 2))
