import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sheepop.training import compiling
from sheepop.training.compiling import decide_compiling
from sheepop.training.step import MicroBatch, micro_batch_loss
from sheepop.utils.errors import ConfigError


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)


@pytest.fixture
def compiled_blocks(monkeypatch):
    """What was asked of the model, which compiles nothing."""
    asked = []
    monkeypatch.setattr(
        "sheepop.models.transformer.TransformerModel.compile_blocks", lambda model, on: asked.append(on)
    )
    return asked


def saved_setting(folder):
    return json.loads((folder / "config.json").read_text())["training"]["compile"]


def test_without_a_compiler_auto_is_eager_silently_and_on_is_an_error(tmp_path, train_in, no_compiler, capfd):
    run = train_in(tmp_path / "run", **{"training.max_steps": 1})
    assert saved_setting(run) == "off"
    assert "compile:" not in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"training\.compile is on, but there is no C\+\+ compiler"):
        train_in(tmp_path / "other", **{"training.max_steps": 1, "training.compile": "on"})


@pytest.mark.usefixtures("compiler")
def test_a_short_run_is_not_compiled_and_says_so(tmp_path, train_in, capfd):
    run = train_in(tmp_path / "run", **{"training.max_steps": 2})
    assert saved_setting(run) == "off"
    assert "compile: off (2 steps of this size are over before it pays)" in capfd.readouterr().err


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("times", "asked", "reason"),
    [
        ([1.0, 0.8], [True, True], "compile: on (a step takes 800 ms compiled and 1e+03 ms not)"),
        ([1.0, 0.99], [True, False], "compile: off (a step takes 990 ms compiled"),
        ([0.01], [False], "compile: off (a run of some 1 seconds is too short to repay it)"),
        (
            [1.0, RuntimeError("no registers left")],
            [True, False],
            "compile: off (the compiler failed: no registers left)",
        ),
    ],
    ids=["pays", "no faster", "short", "broken"],
)
def test_auto_is_decided_by_measured_steps(
    tmp_path, train_in, monkeypatch, compiled_blocks, capfd, times, asked, reason
):
    def measure(run):
        time = times.pop(0)
        if isinstance(time, Exception):
            raise time
        return time

    monkeypatch.setattr(compiling, "measure", measure)
    monkeypatch.setattr(compiling, "LEAST_FLOPS", {"cpu": 0.0})
    run = train_in(tmp_path / "run", **{"training.max_steps": 100, "training.log_interval": 100})
    assert compiled_blocks == asked
    assert saved_setting(run) == ("on" if asked[-1] else "off")
    assert reason in capfd.readouterr().err


@pytest.mark.usefixtures("compiler")
def test_a_run_goes_on_as_it_began(tmp_path, train_in, compiled_blocks):
    train_in(tmp_path / "run", **{"training.max_steps": 2, "training.compile": "on"})
    more = {"training.max_steps": 4, "training.schedule": "constant"}
    run = train_in(tmp_path / "run", resume="auto", accept_changes=True, **more)
    assert saved_setting(run) == "on"
    assert compiled_blocks == [True, True]
    with pytest.raises(ConfigError, match=r"training\.compile: on -> off"):
        train_in(tmp_path / "run", resume="auto", **more, **{"training.compile": "off"})
    run = train_in(tmp_path / "run", resume="auto", accept_changes=True, **more, **{"training.compile": "off"})
    assert saved_setting(run) == "off"


@pytest.mark.usefixtures("compiler")
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("preset", "sight"),
    [("classic", {}), ("modern", {}), ("modern", {"model.sliding_window": 3, "model.attention_sinks": 2})],
    ids=["classic", "modern", "sinks"],
)
def test_compiled_equals_eager_dropout_included_and_compiles_once(
    tiny_config, bare_run, preset, sight, checkpointing, recompilations, monkeypatch
):
    monkeypatch.setattr("sheepop.models.dropout.LEAST_ENTRIES", 1 if preset == "modern" else 10**9)
    settings = {"model.dropout": 0.2, "model.num_layers": 3, "training.compile": "on"}
    config = tiny_config(preset=preset, **settings, **sight)
    run = bare_run(config)
    if checkpointing:
        run.model.recompute_activations()
    generator = torch.Generator().manual_seed(0)
    token_ids, targets = (torch.randint(0, config.model.vocab_size, (3, 11), generator=generator) for _ in range(2))
    documents = (torch.arange(11) > torch.tensor([[3], [5], [8]])).long()
    batch = MicroBatch(0, token_ids, targets, 33, document_ids=documents)
    results = []
    for way in ("eager", "compiled"):
        if way == "compiled":
            decide_compiling(run)
        torch.manual_seed(5)
        loss = micro_batch_loss(run, batch)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(run.model.parameters()))])
    assert recompilations() == 1  # for all three layers
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiler")
@pytest.mark.slow
def test_a_compiled_run_resumes_exactly_and_a_short_last_batch_is_not_compiled_anew(tmp_path, train_in, recompilations):
    settings = {"training.max_steps": 9, "training.compile": "on", "model.dropout": 0.1, "training.save_interval": 3}
    straight = train_in(tmp_path / "straight", **settings)  # the seventh step, an epoch's last, is short
    assert recompilations() == 1
    shutil.copytree(straight, tmp_path / "run")
    for step in (9, 7, 6):
        shutil.rmtree(tmp_path / f"run/checkpoint_step_{step}", ignore_errors=True)
    for folder in (tmp_path / "run").glob("checkpoint_epoch_*"):
        shutil.rmtree(folder)
    run = train_in(tmp_path / "run", resume="auto", **settings)
    name = "checkpoint_step_9/model.safetensors"
    expected, found = load_file(straight / name), load_file(run / name)
    assert all(tensor.equal(found[key]) for key, tensor in expected.items())


@pytest.fixture
def recompilations():
    """Count the graphs that were compiled since the test began."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]
