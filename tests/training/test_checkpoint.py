import errno
import json
import os
import pickletools
import shutil
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from sheepop.models import pretrained
from sheepop.models.pretrained import FORMAT_VERSION, read_tensors, verify_manifest
from sheepop.models.transformer import TransformerModel
from sheepop.training.checkpoint import (
    checkpoint_name,
    find_resume,
    read_state,
    restore,
    sweep_leftovers,
)
from sheepop.training.optimizer import make_optimizer
from sheepop.training.saver import mark_best, prune_step_checkpoints
from sheepop.utils.errors import CheckpointError, NoSpaceError
from sheepop.utils.files import sha256_of_file

FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "training_state/optimizer.safetensors",
    "training_state/state.json",
)
MANIFEST = "manifest.json"


def damage(file: Path, how: str, place: float = 0.5, bit: int = 4) -> None:
    """Damage a file at a place from 0 to 1."""
    content = bytearray(file.read_bytes())
    at = min(int(place * len(content)), len(content) - 1)
    match how:
        case "flip":
            content[at] ^= 1 << bit
        case "truncate":
            del content[at:]
        case "zero":
            at = max(0, min(at, len(content) - 16))
            content[at : at + 16] = bytes(len(content[at : at + 16]))
            if content == file.read_bytes():  # zeros stood there
                content[at] = 1
        case "delete":
            file.unlink()
            return
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("step", "name"),
    [(0, "checkpoint_step_0"), (4, "checkpoint_step_4"), (7, "checkpoint_epoch_1"), (14, "checkpoint_epoch_2")],
)
def test_a_checkpoint_is_named_by_its_epoch_where_one_ends(step, name):
    assert checkpoint_name(step, steps_per_epoch=7) == name


def test_it_gives_back_weights_moments_and_state(tmp_path, save_step, tiny_config):
    checkpoint = save_step(tmp_path, 5)
    config = tiny_config()
    model = TransformerModel(config.model)
    optimizer = make_optimizer(model, config.training)
    restore(checkpoint, model, optimizer)
    weights = read_tensors(checkpoint / "model.safetensors")
    moments = read_tensors(checkpoint / "training_state/optimizer.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter.equal(weights[name])
        assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}
        for key, tensor in optimizer.state[parameter].items():
            assert tensor.equal(moments[f"{name}/{key}"])
        assert torch.count_nonzero(optimizer.state[parameter]["exp_avg"])
    state = read_state(checkpoint)
    assert (state.step, state.tokens, state.total_steps, state.data_fingerprint) == (5, 45, 50, "f")


def test_every_file_is_in_the_manifest_and_nothing_is_pickled(tmp_path, save_step):
    checkpoint = save_step(tmp_path, 5)
    listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
    present = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert present == {*listed, MANIFEST} == {*FILES, MANIFEST}
    for name, entry in listed.items():
        assert entry == {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256_of_file(checkpoint / name)}
        content = (checkpoint / name).read_bytes()
        assert not content.startswith(b"PK")  # PyTorch's own files are zip archives of pickles
        with pytest.raises(ValueError):  # noqa: PT011 - pickletools has no error of its own
            list(pickletools.genops(content))


def test_damage_of_any_kind_to_any_file_is_found_named_and_passed_over(tmp_path, save_step, pytestconfig, capsys):
    good, checkpoint = save_step(tmp_path / "run", 4), save_step(tmp_path / "run", 5)
    shutil.copytree(checkpoint, tmp_path / "untouched")
    random = Random(7)
    kinds = [(name, how) for name in (*FILES, MANIFEST) for how in ("flip", "truncate", "delete", "zero")]
    for number in range(pytestconfig.getoption("--corruptions")):
        name, how = kinds[number % len(kinds)]
        damage(checkpoint / name, how, random.random(), random.randrange(8))
        with pytest.raises(CheckpointError) as caught:
            find_resume(tmp_path / "run", str(checkpoint))
        assert str(checkpoint) in str(caught.value)
        assert Path(name).name in str(caught.value)
        assert find_resume(tmp_path / "run", "auto") == good
        assert Path(name).name in capsys.readouterr().err
        shutil.copytree(tmp_path / "untouched", checkpoint, dirs_exist_ok=True)
    assert find_resume(tmp_path / "run", "auto") == checkpoint


def test_a_checkpoint_of_a_newer_version_is_left_alone(tmp_path, save_step):
    manifest = save_step(tmp_path, 5) / MANIFEST
    manifest.write_text(manifest.read_text().replace(f'"version": {FORMAT_VERSION}', '"version": 99'))
    with pytest.raises(CheckpointError, match="version 99"):
        find_resume(tmp_path, "auto")


def test_auto_takes_the_newest_whole_one_and_says_what_it_skipped(tmp_path, save_step, capsys):
    for step in (9, 10, 11, 100):  # in order of number, not of spelling
        save_step(tmp_path, step)
    damage(tmp_path / "checkpoint_step_100/model.safetensors", "truncate")
    damage(tmp_path / "checkpoint_step_11/manifest.json", "delete")
    assert find_resume(tmp_path, "auto") == tmp_path / "checkpoint_step_10"
    said = capsys.readouterr().err
    assert "checkpoint_step_100 is damaged: model.safetensors has" in said
    assert "checkpoint_step_11 has no manifest.json" in said


def test_auto_compares_steps_and_not_names(tmp_path, save_step):
    save_step(tmp_path, 21, "checkpoint_epoch_3")
    save_step(tmp_path, 20)
    assert find_resume(tmp_path, "auto") == tmp_path / "checkpoint_epoch_3"


def test_auto_with_nothing_to_resume_and_with_damaged_ones_only(tmp_path, save_step):
    assert find_resume(tmp_path, "auto") is None
    assert find_resume(tmp_path / "missing", "auto") is None
    damage(save_step(tmp_path, 3) / "config.json", "flip")
    with pytest.raises(CheckpointError, match=r"config\.json was changed"):
        find_resume(tmp_path, "auto")


def test_a_run_folder_means_its_latest_checkpoint(tmp_path, save_step):
    for step in (3, 8):
        save_step(tmp_path, step)
    mark_best(tmp_path, "checkpoint_step_3", read_state(tmp_path / "checkpoint_step_3"))
    assert find_resume(Path("elsewhere"), str(tmp_path)) == tmp_path / "checkpoint_step_8"


def test_pruning_keeps_the_last_ones_the_epochs_the_best_and_the_latest(tmp_path, save_step):
    save_step(tmp_path, 7, "checkpoint_epoch_1")
    for step in (2, 4, 9, 10, 12):
        save_step(tmp_path, step)
    save_step(tmp_path, 1)  # the latest to be written
    mark_best(tmp_path, "checkpoint_step_4", read_state(tmp_path / "checkpoint_step_4"))
    prune_step_checkpoints(tmp_path, keep_last=2)
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {
        "checkpoint_epoch_1",
        "checkpoint_step_1",
        "checkpoint_step_4",
        "checkpoint_step_10",
        "checkpoint_step_12",
    }


def test_pruning_keeps_milestones(tmp_path, save_step):
    for step in range(1, 11):
        save_step(tmp_path, step)
    prune_step_checkpoints(tmp_path, keep_last=1, keep_every=4)
    assert {int(path.name.rpartition("_")[2]) for path in tmp_path.glob("checkpoint_*")} == {4, 8, 10}


def test_a_run_without_pointers_still_has_its_newest_checkpoint(tmp_path, save_step):
    for step in (9, 10):
        save_step(tmp_path, step)
    (tmp_path / "latest.json").unlink()
    assert pretrained.resolve_checkpoint(tmp_path) == tmp_path / "checkpoint_step_10"
    (tmp_path / "latest.json").write_text("{")
    assert pretrained.resolve_checkpoint(tmp_path) == tmp_path / "checkpoint_step_10"


def before_each(monkeypatch, name, action):
    """Call `action()` before each call of `os.<name>`."""
    real = getattr(os, name)

    def wrapper(*arguments, **named):
        action()
        return real(*arguments, **named)

    monkeypatch.setattr(os, name, wrapper)


def test_a_full_disk_at_any_moment_leaves_the_old_checkpoint(tmp_path, save_step, monkeypatch):
    old = save_step(tmp_path, 3)
    pointer = (tmp_path / "latest.json").read_bytes()
    for moment in range(100):
        calls_left = moment

        def fill_up():
            nonlocal calls_left
            calls_left -= 1
            if calls_left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            before_each(patch, "fsync", fill_up)
            try:
                save_step(tmp_path, 4)
                break
            except NoSpaceError:
                pass
        found = find_resume(tmp_path, "auto")
        assert found is not None
        assert read_state(found).step == (4 if (tmp_path / "checkpoint_step_4").exists() else 3)
        assert (tmp_path / "latest.json").read_bytes() == pointer or found != old
        assert not list(tmp_path.glob(".*"))
    assert moment > 10
    assert read_state(tmp_path / "checkpoint_step_4").step == 4


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_disk_that_fills_up_among_the_tensors_is_a_clear_error(tmp_path, save_step, monkeypatch, file):
    old = save_step(tmp_path, 3)
    real = pretrained.save_file

    def fill_up(tensors, path, **options):
        if path.name == file:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path, **options)

    monkeypatch.setattr(pretrained, "save_file", fill_up)
    with pytest.raises(NoSpaceError, match="No space is left"):
        save_step(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [old.name]
    assert find_resume(tmp_path, "auto") == old


def test_what_will_not_fit_is_not_begun(tmp_path, save_step, monkeypatch):
    save_step(tmp_path, 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_050_000))
    with pytest.raises(NoSpaceError, match=r"needs 1\.1 MB, but only 1\.1 MB are left|needs .* MB") as caught:
        save_step(tmp_path, 4)
    assert caught.value.exit_status == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_step_3", "latest.json"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_checkpoint_that_is_replaced_is_never_lost(tmp_path, save_step, monkeypatch, can_exchange):
    run, photograph = tmp_path / "run", tmp_path / "photograph"
    save_step(run, 4)
    missing = 0
    real_replace = os.replace

    def replace(*names):
        nonlocal missing
        missing += not (run / "checkpoint_step_4" / MANIFEST).is_file()
        shutil.copytree(run, photograph)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", real_replace)
            sweep_leftovers(photograph)
        assert find_resume(photograph, "auto") == photograph / "checkpoint_step_4"
        shutil.rmtree(photograph)
        real_replace(*names)

    if not can_exchange:
        monkeypatch.setattr("sheepop.utils.files._exchange", lambda *_: False)
    monkeypatch.setattr(os, "replace", replace)
    save_step(run, 4)
    assert missing == (0 if can_exchange and sys.platform == "linux" else 1)
    assert not list(run.glob(".checkpoint_*"))


@pytest.mark.parametrize("existing", ["another step", "the same step"])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, save_step, monkeypatch, existing):
    run = tmp_path / "run"
    save_step(run, 3)
    if existing == "the same step":
        save_step(run, 4)
    moments = []

    def photograph():
        moments.append(tmp_path / f"moment_{len(moments)}")
        shutil.copytree(run, moments[-1])

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            before_each(patch, name, photograph)
        save_step(run, 4)
    assert len(moments) > 10
    for moment in moments:
        found = find_resume(moment, "auto")
        assert found is not None
        verify_manifest(found)
        assert read_state(found).step in (3, 4)
        # What is a checkpoint by name is one in full.
        for folder in moment.glob("checkpoint_*"):
            assert (folder / MANIFEST).is_file()
        sweep_leftovers(moment)
        assert not list(moment.glob(".checkpoint_*"))
        assert find_resume(moment, "auto") == found
