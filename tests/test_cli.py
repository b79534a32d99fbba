import errno
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sheepop.cli import main
from sheepop.training.step import micro_batch_loss

PROJECT = Path(__file__).parents[1]
WORDS = ["sheep", "dog", "hill", "sees", "the", "a", "old", "and"]
SETTINGS = {
    "model": {"d_model": 20, "num_heads": 2, "num_layers": 1, "d_ff": 27, "max_seq_len": 14},
    "training": {"batch_size": 3, "max_epochs": 10, "warmup_steps": 4, "eval_interval": 50, "sample_tokens": 3},
    "data": {"tokenizer": "char"},
    "device": "cpu",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a text, settings and a run of three steps; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    words = random.Random(2)
    (folder / "hill.txt").write_text(" ".join(words.choice(WORDS) for _ in range(60)), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    arguments = ["--data", str(folder / "hill.txt"), "--config", str(folder / "config.json")]
    where = ["--output", str(folder / "run"), "--data.data_dir", str(folder / "data")]
    with pytest.raises(SystemExit) as ended:
        main(["train", *arguments, *where, "--training.max_steps", "3"])
    assert ended.value.code == 0
    return folder


@pytest.fixture
def place(finished, tmp_path, monkeypatch) -> Path:
    """A copy of the finished folder, to be in and to be changed."""
    folder = tmp_path / "place"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def sheepop(capsys):
    """Run the program: `status, out, err = sheepop("train", "--data", "hill.txt")`."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


@pytest.fixture
def refused(sheepop, place):
    """Check that a command ends with a status and one clear paragraph, and that no file changed."""

    def check(status, *arguments, says):
        before = contents(place)
        code, out, err = sheepop(*arguments)
        assert code == status, err
        assert out == ""
        assert "Traceback" not in err
        *_, paragraph = err.rstrip("\n").split("\n")
        assert paragraph.startswith("error: ")
        assert paragraph.endswith(".")
        for words in says:
            assert words in paragraph
        after = contents(place)
        assert {name: after.get(name) for name in before} == before
        assert not any("checkpoint" in name for name in after.keys() - before.keys())

    return check


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def train(*arguments, data="hill.txt", output="new"):
    return ["train", "--config", "config.json", "--data", data, "--output", output, *arguments]


def test_training_without_text(refused):
    refused(2, "train", "--output", "new", says=["no text to train on", "--data PATH"])


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, ["no file or folder missing.txt", "Check the path"]),
        ("empty.txt", b"", ["no text in empty.txt", "Name files with text"]),
        ("blank.txt", b" \n\n\t", ["no text in blank.txt"]),
        ("binary.txt", bytes(range(256)), ["binary.txt is not text", "offset 0", "Leave it out"]),
        ("photo.jpg", bytes(range(256)), ["photo.jpg is an image that cannot be read"]),
        ("latin.txt", "Mäh".encode("latin-1"), ["latin.txt is not UTF-8", "0xe4 at offset 1"]),
        ("one.txt", b"x", ["too short", "Add more text"]),
        ("short.txt", b"the sheep see ", ["only 14 tokens", "context of 14", "data.max_length", "add text"]),
    ],
)
def test_text_that_cannot_be_trained_on(place, refused, name, content, says):
    if content is not None:
        (place / name).write_bytes(content)
    refused(3, *train(data=name), says=says)


def test_text_that_fills_the_context_is_enough(place, sheepop):
    (place / "short.txt").write_text("the sheep see a", encoding="utf-8")  # 13 characters and two ends to train on
    assert sheepop(*train("--training.max_epochs", "1", data="short.txt"))[0] == 0


def test_text_of_another_vocabulary(place, refused, sheepop):
    (place / "other.txt").write_text("zebra quagga " * 20, encoding="utf-8")
    says = ["vocabulary", "checkpoint_step_3", "--tokenizer"]
    refused(4, *train("--resume", "auto", data="other.txt", output="run"), says=says)
    assert sheepop("prepare", "other.txt", "--output", "other", "--tokenizer", "word")[0] == 0
    refused(4, "evaluate", "--checkpoint", "run", "--data", "other", says=["another tokenizer", "other"])


def test_another_text_of_the_same_vocabulary(place, refused, sheepop):
    tokenizer = place / "run/checkpoint_step_3/tokenizer.json"
    (place / "other.txt").write_text("the old dog sees the hill and " * 9, encoding="utf-8")
    assert sheepop("prepare", "other.txt", "--output", "other", "--tokenizer", tokenizer)[0] == 0
    arguments = train("--resume", "auto", "--training.max_steps", "3", data="other", output="run")
    refused(3, *arguments, says=["not the text", "--accept-changes"])


def test_resuming_with_other_settings(refused):
    resume = ["--resume", "auto", "--training.max_steps", "3"]
    says = ["training.beta2: 0.95 -> 0.9", "--accept-changes"]
    refused(2, *train(*resume, "--training.beta2", "0.9", output="run"), says=says)
    says = ["another model", "model.d_ff: 27 -> 29"]
    refused(4, *train(*resume, "--model.d_ff", "29", output="run"), says=says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--training.learning_rat", "1"], ["--training.learning_rat", "Did you mean 'training.learning_rate'"]),
        (["--learning_rate", "1"], ["--learning_rate", "Did you mean 'training.learning_rate'"]),
        (["--training.learning_rate", "fast"], ["'training.learning_rate' is 'fast'", "number"]),
        (["--training.learning_rate", "-1"], ["training.learning_rate", "-1", "greater than 0"]),
        (["--training.batch_size", "0"], ["training.batch_size", "greater than 0"]),
        (["--model.d_model", "21"], ["d_model (21)", "num_heads (2)", "nearest: d_model 20"]),
        (["--data.max_length", "15"], ["data.max_length (15)", "model.max_seq_len (14)"]),
        (["--training.max_steps", "3", "--minutes", "1"], ["max_steps and max_minutes", "keep one"]),
        (["--preset", "moden"], ["no preset 'moden'", "Did you mean 'modern'"]),
        (["--device", "cuda:99"], ["device 'cuda:99'", "cpu", "--device auto"]),
        (["--device", "abacus"], ["device 'abacus'", "cpu"]),
        (["--training.precision", "fp16"], ["training.precision 'fp16'", "fp32"]),
        (["--config", "missing.json"], ["no file missing.json"]),
        (["stray"], ["'stray'"]),
    ],
)
def test_settings_that_cannot_be_run(refused, arguments, says):
    refused(2, *train(*arguments), says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"model": {"d_model": 20,}}', ["not valid JSON", "line 1"]),
        ("[1, 2]", ["must hold a JSON object"]),
        ('{"model": {"d_modle": 20}}', ["model.d_modle", "Did you mean 'model.d_model'"]),
        ('{"modell": {}}', ["modell", "Did you mean 'model'"]),
        ('{"d_model": 20}', ["d_model", "Did you mean 'model.d_model'"]),
        ('{"model": {"learning_rate": 1}}', ["model.learning_rate", "Did you mean 'training.learning_rate'"]),
        ('{"training": {"learning_rate": NaN}}', ["training.learning_rate"]),
    ],
)
def test_a_broken_settings_file(place, refused, content, says):
    (place / "broken.json").write_text(content)
    refused(2, *train("--config", "broken.json"), says=["broken.json", *says])


def test_an_output_that_cannot_be_written_to(refused):
    refused(2, *train(output="hill.txt"), says=["hill.txt", "is a file", "--output"])
    refused(2, *train(output="hill.txt/run"), says=["hill.txt/run", "cannot be written to", "--output"])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_an_output_on_a_read_only_place(refused):
    refused(2, *train(output="/proc/run"), says=["/proc/run", "cannot be written to", "--output"])


def test_an_output_that_holds_another_run(place, refused):
    refused(2, *train(output="run"), says=["run already holds a run", "--resume auto", "--output"])
    shutil.rmtree(place / "run/checkpoint_step_3")
    refused(2, *train(output="run"), says=["run already holds a run"])


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_checkpoint_that_cannot_be_used(place, refused, command):
    def use(checkpoint, says):
        refused(4, command, "--checkpoint", checkpoint, says=says)

    use("missing", ["missing does not exist", "sheepop train"])
    use("data", ["data holds no checkpoint"])
    use("run/checkpoint_epoch_9.pt", ["checkpoint_epoch_9", "There is: checkpoint_step_3"])
    (place / "foreign.pt").write_bytes(b"junk" * 50)
    use("foreign.pt", ["foreign.pt", "folder"])
    weights = place / "run/checkpoint_step_3/model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-7])
    use("run", ["checkpoint_step_3 is damaged", "model.safetensors", "truncated", "another checkpoint"])
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    use("run/checkpoint_step_3", ["model.safetensors was changed"])
    weights.write_bytes(content)
    (place / "run/checkpoint_step_3/manifest.json").unlink()
    use("run", ["checkpoint_step_3 has no manifest.json"])


def test_a_checkpoint_that_cannot_be_resumed(place, refused):
    refused(4, *train("--resume", "missing"), says=["missing does not exist"])
    state = place / "run/checkpoint_step_3/training_state/optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:99])
    resume = train("--training.max_steps", "3", "--resume", "auto", output="run")
    refused(4, *resume, says=["No checkpoint in run is whole", "optimizer.safetensors has 99 bytes"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--top-p", "1.5"], ["top_p", "1.5", "at most 1"]),
        (["--top-p", "0"], ["top_p", "above 0"]),
        (["--top-k", "-2"], ["top_k", "-2"]),
        (["--max-new-tokens", "-1"], ["max_new_tokens", "-1"]),
        (["--num-samples", "0"], ["num_samples", "at least 1"]),
        (["--device", "cuda:99"], ["cuda:99", "cpu"]),
        (["--prompts", "hill.txt"], ["--output"]),
        (["--output", "out.jsonl"], ["--prompts"]),
        (["--prompts", "hill.txt", "--output", "hill.txt"], ["same file", "hill.txt"]),
        (["--prompts", "hill.txt", "--output", "out.jsonl", "--prompt", "the"], ["--prompt", "leave out"]),
        (["--prompts", "hill.txt", "--output", "out.jsonl", "--no-optimized"], ["--no-optimized", "leave out"]),
        (["--speculate", "lookup", "--no-optimized"], ["--speculate", "--no-optimized"]),
        (["--regex", "a", "--no-optimized"], ["grammar", "--no-optimized"]),
        (["--compile", "--no-optimized"], ["--compile", "--no-optimized"]),
        (["--compile", "--regex", "a"], ["--compile", "grammar"]),
        (["--compile", "--speculate", "lookup"], ["--compile", "--speculate"]),
        (["--compile", "--cache", "int8"], ["--compile", "--cache"]),
        (["--cache", "int8", "--no-optimized"], ["--cache", "--no-optimized"]),
        (["--prompt", "the sheep sees"], ["15 tokens", "14 at the most", "Shorten"]),
        (["--prompt", "the sheep sees", "--no-optimized", "--num-samples", "2"], ["15 tokens", "14 at the most"]),
        (["--regex", "a", "--json-schema", "hill.txt"], ["--json-schema", "--regex", "give one"]),
        (["--grammar", "nowhere.lark"], ["lark nowhere.lark", "No such file"]),
        (["--json-schema", "hill.txt"], ["json schema cannot be used"]),
        (["--regex", "a("], ["regex cannot be used"]),
    ],
)
def test_options_of_generate_that_make_no_sense(refused, arguments, says):
    refused(2, "generate", "--checkpoint", "run", *arguments, says=says)


@pytest.mark.parametrize(
    "arguments",
    [["generate"], ["generate", "--checkpoint", "run", "--seed", "x"], ["evaluate", "--nonsense"], ["tain"]],
)
def test_a_command_that_is_misspelled(place, sheepop, arguments):
    code, out, err = sheepop(*arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err
    assert "Traceback" not in err


def test_debug_shows_the_trace(place, sheepop):
    code, _, err = sheepop("--debug", *train(data="missing.txt"))
    assert code == 3
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: There is no file or folder missing.txt")


def test_a_full_disk(place, sheepop, monkeypatch):
    before = contents(place / "run")
    real = os.fsync

    def full(descriptor):
        # Only the run's own folder is on the full disk.
        if "run/.checkpoint" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs the names of open files")
    monkeypatch.setattr(os, "fsync", full)
    code, _, err = sheepop(*train("--resume", "auto", "--training.max_steps", "5", output="run"))
    monkeypatch.undo()
    assert code == 6
    assert "No space is left" in err.splitlines()[-1]
    assert "Traceback" not in err
    after = contents(place / "run")
    checkpoint = {name for name in before if name.startswith("checkpoint") or name in ("latest.json", "best.json")}
    assert all(after[name] == before[name] for name in checkpoint)
    assert sheepop("generate", "--checkpoint", place / "run", "--max-new-tokens", "2")[0] == 0


def test_numbers_that_are_not_finite(place, sheepop, monkeypatch):
    monkeypatch.setattr(
        "sheepop.training.step.micro_batch_loss", lambda learner, batch: micro_batch_loss(learner, batch) * math.nan
    )
    code, _, err = sheepop(*train("--resume", "auto", "--training.max_steps", "5", output="run"))
    assert code == 5
    assert "At step 4 the loss was nan" in err.splitlines()[-1]


def test_generate_json(place, sheepop):
    arguments = ["--prompt", "the sheep", "--max-new-tokens", "5", "--num-samples", "2", "--seed", "7"]
    code, out, _ = sheepop("generate", "--checkpoint", "run", *arguments, "--json")
    assert code == 0
    value = json.loads(out)
    assert value.keys() >= {"prompt", "completions", "tokens_per_second", "time_to_first_token_seconds"}
    assert value["prompt"] == "the sheep"
    assert len(value["completions"]) == 2
    for completion in value["completions"]:
        assert completion.keys() >= {"text", "token_ids", "finish_reason"}
        assert len(completion["token_ids"]) <= 5
        assert completion["finish_reason"] in ("stop", "length")
    again = json.loads(sheepop("generate", "--checkpoint", "run", *arguments, "--no-optimized", "--json")[1])
    assert again["completions"] == value["completions"]


def test_generate_prints_the_text_alone_to_standard_output(place, sheepop):
    arguments = ["--prompt", "the sheep", "--max-length", "5", "--top-k", "1"]
    expected = json.loads(sheepop("generate", "--checkpoint", "run", *arguments, "--json")[1])
    code, out, _ = sheepop("generate", "--checkpoint", "run/checkpoint_step_3.pt", *arguments)
    assert (code, out) == (0, "the sheep" + expected["completions"][0]["text"] + "\n")


def test_what_is_written_follows_an_expression_or_a_schema(place, sheepop):
    pytest.importorskip("llguidance")
    arguments = ["generate", "--checkpoint", "run", "--prompt", "the sheep", "--num-samples", "3", "--json"]
    code, out, _ = sheepop(*arguments, "--regex", "[a-d]{2,4}")
    assert code == 0
    texts = [completion["text"] for completion in json.loads(out)["completions"]]
    assert all(re.fullmatch("[a-d]{2,4}", text) for text in texts)
    (place / "schema.json").write_text('{"enum": ["wool", "hay"]}', encoding="utf-8")
    code, out, _ = sheepop(*arguments, "--json-schema", "schema.json")
    assert {completion["text"] for completion in json.loads(out)["completions"]} <= {'"wool"', '"hay"'}


@pytest.mark.parametrize("speculate", ["lookup", "run"])
def test_guesses_do_not_change_the_likeliest_text(place, sheepop, speculate):
    arguments = ["generate", "--checkpoint", "run", "--prompt", "the sheep", "--temperature", "0", "--json"]
    plain = json.loads(sheepop(*arguments)[1])
    code, out, _ = sheepop(*arguments, "--speculate", speculate)
    assert code == 0
    assert json.loads(out)["completions"] == plain["completions"]


def test_a_draft_model_that_cannot_be_used(place, refused, sheepop):
    refused(4, "generate", "--checkpoint", "run", "--speculate", "nowhere", says=["nowhere", "does not exist"])
    (place / "other.txt").write_text("wool " * 60, encoding="utf-8")
    other = ["--data", "other.txt", "--config", "config.json", "--output", "other", "--data.data_dir", "other_data"]
    assert sheepop("train", *other, "--training.max_steps", "3")[0] == 0
    refused(2, "generate", "--checkpoint", "run", "--speculate", "other", says=["other", "another tokenizer"])


def test_generate_from_a_file(place, sheepop, refused):
    lines = ['{"prompt": "the", "id": 1}', '{"prompt": "a", "max_new_tokens": 2, "temperature": 0}']
    (place / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["generate", "--checkpoint", "run", "--prompts", "prompts.jsonl", "--output", "out.jsonl"]
    assert sheepop(*arguments, "--max-new-tokens", "3")[:2] == (0, "out.jsonl\n")
    content = (place / "out.jsonl").read_text(encoding="utf-8")
    first, second = map(json.loads, content.splitlines())
    assert (first["id"], first["prompt"], second["prompt"]) == (1, "the", "a")
    assert [len(record["completions"][0]["token_ids"]) for record in (first, second)] == [3, 2]
    code, out, err = sheepop(*arguments, "--max-new-tokens", "3", "--json")
    assert (code, json.loads(out)["tokens"]) == (0, 0)
    assert "has 2 of 2" in err
    refused(2, *arguments, "--max-new-tokens", "4", says=["Line 1 of out.jsonl"])
    (place / "prompts.jsonl").write_text("\n".join([*lines, "wool"]), encoding="utf-8")
    refused(3, *arguments, says=["prompts.jsonl", "line 3"])
    assert (place / "out.jsonl").read_text(encoding="utf-8") == content


def test_a_schema_of_megabytes(place, refused):
    (place / "schema.json").write_text("[" + "[]," * 400_000 + "1]")
    arguments = ["--json-schema", "schema.json"]
    refused(2, "generate", "--checkpoint", "run", *arguments, says=["schema.json has 1200003 bytes", "1048576"])


def test_a_prompt_that_fills_the_context_is_continued_beyond_it(place, sheepop, monkeypatch):
    arguments = ["--checkpoint", "run", "--max-new-tokens", "30"]
    code, _, err = sheepop("generate", *arguments, "--prompt", "the sheep see")
    assert code == 0
    assert "the context of 14 tokens is full" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("the old dog sees the sheep\nand\n\n"))
    assert sheepop("chat", *arguments)[0] == 0  # a talk goes on


def test_a_file_with_a_prompt_longer_than_the_context(place, sheepop, refused):
    lines = [
        '{"prompt": "the"}',
        "",
        '{"prompt": "the sheep sees"}',
        '{"prompt": "a"}',
        '{"prompt": "the hill sees the"}',
    ]
    (place / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["generate", "--checkpoint", "run", "--prompts", "prompts.jsonl", "--output", "out.jsonl"]
    refused(
        3, *arguments, says=["nothing was run", "line 3: The prompt has 15 tokens", "line 5: The prompt has 18", "Mend"]
    )
    assert not (place / "out.jsonl").exists()


@pytest.fixture
def leave_free(monkeypatch):
    """Let the machine have so many bytes of memory left."""

    def leave(number):
        for module in ("utils.memory", "models.paged_cache"):
            monkeypatch.setattr(f"sheepop.{module}.available_bytes", lambda device: number)

    return leave


@pytest.mark.parametrize(
    ("free", "arguments", "says"),
    [
        (
            100_000,
            ["--num-samples", "1000"],
            ["1000 x 200 tokens", "MiB of memory, but 97.7 KiB are free", "fewer samples"],
        ),
        (100_000, ["--max-new-tokens", str(10**12)], ["TiB of memory", "fewer samples or tokens"]),
        (100_000, ["--num-samples", "1000", "--speculate", "lookup"], ["1000 samples", " 7.7", "fewer samples"]),
        (100_000, ["--num-samples", "1000", "--speculate", "run"], ["16000 tokens take", "2.44 MiB", "less at a time"]),
        (1000, ["--speculate", "lookup"], ["16 tokens take 2.50 KiB of memory, but 1000 B are free"]),
    ],
)
def test_samples_that_do_not_fit_into_memory(refused, leave_free, free, arguments, says):
    leave_free(free)
    refused(2, "generate", "--checkpoint", "run", "--prompt", "the sheep", "--json", *arguments, says=says)


def test_a_line_of_a_file_that_does_not_fit_into_memory(place, sheepop, refused, leave_free):
    lines = ['{"prompt": "the"}', '{"prompt": "a", "num_samples": 100000}']
    (place / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["generate", "--checkpoint", "run", "--prompts", "prompts.jsonl", "--output", "out.jsonl"]
    leave_free(10**8)
    refused(
        3, *arguments, says=["nothing was run", "line 2: To keep 100000 samples in mind takes 764 MiB", "95.4 MiB are"]
    )
    leave_free(5200)
    refused(
        2, *arguments, "--batch-size", "4", "--speculate", "run", says=["64 tokens take 10.0 KiB", "5.08 KiB are free"]
    )
    assert not (place / "out.jsonl").exists()


def test_keys_and_values_in_8_bits(place, sheepop):
    arguments = ["generate", "--checkpoint", "run", "--cache", "int8", "--max-new-tokens", "30"]
    code, out, _ = sheepop(*arguments, "--prompt", "the", "--num-samples", "2", "--json")
    assert (code, len(json.loads(out)["completions"])) == (0, 2)
    (place / "prompts.jsonl").write_text('{"prompt": "the"}', encoding="utf-8")
    code, out, _ = sheepop(*arguments, "--prompts", "prompts.jsonl", "--output", "out.jsonl")
    assert (code, out) == (0, "out.jsonl\n")


def test_evaluate_json(place, sheepop):
    code, out, _ = sheepop("evaluate", "--checkpoint", "run", "--json")
    assert code == 0
    value = json.loads(out)
    figures = {"loss", "perplexity", "word_perplexity", "bits_per_byte", "accuracy", "top5_accuracy"}
    assert value.keys() >= figures | {"tokens", "bytes"}
    assert all(math.isfinite(value[name]) for name in figures)
    manifest = json.loads((Path(value["data"]) / "manifest.json").read_text())
    split = manifest["splits"]["val"]
    assert (value["tokens"], value["bytes"]) == (split["tokens"] - 1, split["bytes"])
    elsewhere = json.loads(sheepop("evaluate", "--checkpoint", "run", "--data", "hill.txt", "--json")[1])
    assert elsewhere["bytes"] == (place / "hill.txt").stat().st_size


@pytest.mark.parametrize("start", [[], ["--init-from", "run"]], ids=["new", "from a model without"])
def test_a_model_with_a_window_and_sinks_trains_writes_and_is_scored(place, sheepop, start):
    settings = ["--model.sliding_window", "4", "--model.attention_sinks", "2", "--data.packing", "best_fit"]
    arguments = ["--data", "hill.txt", "--config", "config.json", "--training.max_steps", "3", "--output", "sunk"]
    assert sheepop("train", *arguments, *start, *settings)[0] == 0
    arguments = ["--checkpoint", "sunk", "--prompt", "the sheep", "--max-new-tokens", "30", "--json"]
    texts = [
        json.loads(sheepop("generate", *arguments, *ways)[1])["completions"]
        for ways in (["--optimized"], ["--no-optimized"])
    ]
    assert texts[0] == texts[1]
    for ways in ([], ["--stride", "1"]):
        code, out, _ = sheepop("evaluate", "--checkpoint", "sunk", "--json", *ways)
        assert code == 0
        assert math.isfinite(json.loads(out)["loss"])
    for file_format in ("hf", "gguf"):
        code, _, err = sheepop("export", "--checkpoint", "sunk", "--format", file_format, "--output", "exported")
        assert code == 4
        assert "model.attention_sinks is 2, not 0" in err


def test_help_waits_for_nothing_heavy():
    script = """
import sys
from sheepop.cli import main
for words in (["--help"], ["train", "--help"], ["generate", "--help"]):
    try:
        main(words)
    except SystemExit as ended:
        assert ended.code == 0
print("heavy:", sorted({"torch", "numpy", "tokenizers", "matplotlib"} & set(sys.modules)))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=True
    )
    assert finished.stdout.endswith("heavy: []\n")
    assert "--training.learning_rate" in finished.stdout
    for command in ("demo", "download", "prepare", "train", "evaluate", "generate", "chat", "report"):
        assert f"\n  {command} " in finished.stdout


def test_generate_neither_loads_nor_searches_what_it_does_not_use(place):
    script = """
import atexit, gc, sys
atexit.register(lambda: print("frozen:", gc.get_freeze_count() > 10_000))
from sheepop.cli import main
usual = gc.get_threshold()
try:
    main(["generate", "--checkpoint", "run", "--prompt", "the ", "--quantize", "int8", "--max-new-tokens", "2"])
except SystemExit as ended:
    assert ended.code == 0
loaded = {"awkward", "gigatoken"} & set(sys.modules)
print("searched as before:", gc.get_threshold() == usual, "loaded:", sorted(loaded))
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=place, capture_output=True, text=True, timeout=200, check=True
    )
    assert finished.stdout.endswith("searched as before: True loaded: []\nfrozen: True\n")


def test_the_scripts_at_the_root_work_as_their_first_users_know_them(place):
    (place / "data/wikitext_103.txt").write_bytes((place / "hill.txt").read_bytes())

    def script(name, *arguments):
        command = [sys.executable, PROJECT / name, *arguments]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    text = ["--data", "data/wikitext_103.txt", "--config", "config.json", "--device", "cpu"]
    assert script("train.py", *text) == "checkpoints\n"
    checkpoint = ["--checkpoint", "checkpoints/checkpoint_epoch_10.pt"]
    how = ["--prompt", "the sheep …", "--max-length", "4", "--optimized", "--device", "cpu"]
    assert script("inference.py", *checkpoint, *how).startswith("the sheep …")
