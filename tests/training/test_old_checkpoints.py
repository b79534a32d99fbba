"""Checkpoints of earlier versions go on as if nothing had changed."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from sheepop.models.pretrained import FORMAT_VERSION, load_pretrained, read_manifest
from sheepop.training.checkpoint import find_resume, read_state
from sheepop.training.loss_scale import LossScale
from sheepop.training.run import start_run
from sheepop.utils.files import sha256_of_file, write_json

FILES = Path(__file__).with_name("files")
# Written by version 1 of the format: a run of 9 steps over `corpus_of_v1`, stopped after the fifth.
VERSION_1 = FILES / "run_of_v1" / "checkpoint_step_5"


def test_version_1_goes_on(tmp_path):
    shutil.copytree(VERSION_1, tmp_path / "run" / "checkpoint_step_5")
    assert read_manifest(VERSION_1)["version"] == 1
    assert load_pretrained(VERSION_1).config.d_model == 4
    overrides = {"training.save_dir": str(tmp_path / "run"), "data.path": str(FILES / "corpus_of_v1")}
    run = start_run(VERSION_1 / "config.json", preset=None, overrides=overrides, resume="auto")
    newest = find_resume(run, "auto")
    assert read_manifest(newest)["version"] == FORMAT_VERSION
    assert read_state(newest).step == 9
    # What version 1 itself came to after nine steps, on another machine.
    expected, found = load_file(VERSION_1.parent / "after_step_9.safetensors"), load_file(newest / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_the_loss_scale_of_version_1_is_kept(tmp_path):
    checkpoint = tmp_path / "checkpoint_step_5"
    shutil.copytree(VERSION_1, checkpoint)
    state_file, manifest_file = checkpoint / "training_state/state.json", checkpoint / "manifest.json"
    state, manifest = (json.loads(path.read_text()) for path in (state_file, manifest_file))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
    scaler.scale(torch.ones(1))  # makes it know its state
    write_json(state_file, state | {"loss_scaler": scaler.state_dict() | {"_growth_tracker": 77}})
    manifest["files"]["training_state/state.json"] = {
        "bytes": state_file.stat().st_size,
        "sha256": sha256_of_file(state_file),
    }
    write_json(manifest_file, manifest)
    assert read_state(find_resume(tmp_path, "auto")).loss_scale == LossScale(512.0, 77)
