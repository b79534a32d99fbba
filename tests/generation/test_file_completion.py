import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sheepop.config import Config, ModelConfig
from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.completion import complete
from sheepop.generation.file_completion import GROUP, complete_file
from sheepop.generation.grammar import Grammar
from sheepop.generation.prompt_file import Prompt, PromptOptions, read_prompts
from sheepop.generation.sampling import SamplingSettings
from sheepop.generation.speculation import LookUp
from sheepop.models.pretrained import save_weights, stored_weights
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import ConfigError
from sheepop.utils.files import write_json

PROJECT = Path(__file__).parents[2]
# Characters outside the vocabulary are written in bytes, so that a character spans up to four tokens.
TOKENIZER = Tokenizer.train("char", ["abc\n"], vocab_size=5)
DEFAULTS = PromptOptions(SamplingSettings(0.9), max_new_tokens=25, seed=3, stop=("ab",))
BATCH_SIZE = 2


@pytest.fixture(scope="module")
def model() -> TransformerModel:
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=TOKENIZER.vocab_size, d_model=24, num_layers=2, num_heads=3, d_ff=40, max_seq_len=30, init_std=0.4
    )
    return TransformerModel(config).eval()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Prompt]]:
    """More than two groups, of which some share a beginning."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    records = [
        {"prompt": "aé羊" * (number % 4) + "b" * (number % 3), "id": number}
        for number in range(2 * GROUP * BATCH_SIZE + 5)
    ]
    records[3] |= {"num_samples": 3, "temperature": 0.0, "stop": []}
    records[4] |= {"max_new_tokens": 0}
    records[9] |= {"max_new_tokens": 70, "seed": 1}
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path, read_prompts(path, DEFAULTS)


@pytest.fixture(scope="module")
def undisturbed(model: TransformerModel, prompts: tuple[Path, list[Prompt]], tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("undisturbed") / "out.jsonl"
    complete_file(model, TOKENIZER, prompts[1], path, batch_size=BATCH_SIZE)
    return path.read_bytes()


def test_each_line_is_what_its_prompt_leads_to_alone(model, prompts, undisturbed) -> None:
    lines = undisturbed.splitlines()
    assert len(lines) == len(prompts[1])
    for line, prompt in zip(lines, prompts[1], strict=True):
        record, options = json.loads(line), prompt.options
        assert record["id"] == prompt.record["id"]
        alone = complete(
            model,
            TOKENIZER,
            prompt.text,
            options.sampling,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            num_samples=options.num_samples,
            stop=options.stop,
        )
        expected = [
            {"text": each.text, "token_ids": each.token_ids, "finish_reason": each.finish_reason}
            for each in alone.completions
        ]
        assert record["completions"] == expected


def test_with_guesses_the_file_is_the_same(model, prompts, undisturbed, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    complete_file(model, TOKENIZER, prompts[1], path, batch_size=BATCH_SIZE, speculator=LookUp())
    assert path.read_bytes() == undisturbed


def test_with_an_8_bit_cache_lines_are_what_their_prompts_lead_to_alone(model, prompts, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    complete_file(model, TOKENIZER, prompts[1][5:9], path, batch_size=BATCH_SIZE, int8_cache=True)
    for line, prompt in zip(path.read_text().splitlines(), prompts[1][5:9], strict=True):
        options = prompt.options
        alone = complete(
            model,
            TOKENIZER,
            prompt.text,
            options.sampling,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
            stop=options.stop,
            int8_cache=True,
        )
        assert json.loads(line)["completions"][0]["token_ids"] == alone.completions[0].token_ids


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.77, 0.999, 1.0])
def test_a_file_that_was_cut_anywhere_is_finished_as_if_it_had_not_been(
    model, prompts, undisturbed, tmp_path: Path, share: float
) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(undisturbed[: int(share * len(undisturbed))])
    complete_file(model, TOKENIZER, prompts[1], path, batch_size=BATCH_SIZE)
    assert path.read_bytes() == undisturbed


@pytest.mark.parametrize("place", ["folder", "file/out.jsonl"])
def test_an_output_that_cannot_be_written_is_said(model, prompts, tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be written: .* Name another --output"):
        complete_file(model, TOKENIZER, prompts[1], tmp_path / place, batch_size=2)


def test_progress_is_a_bar_on_a_terminal_and_a_line_elsewhere(
    model, prompts, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete_file(model, TOKENIZER, prompts[1][:3], tmp_path / "one.jsonl", batch_size=2)
    assert capsys.readouterr().err.splitlines()[-1].startswith("3/3 prompts")
    monkeypatch.setattr("sheepop.generation.file_completion.is_terminal", lambda: True)
    complete_file(model, TOKENIZER, prompts[1][:3], tmp_path / "two.jsonl", batch_size=2)
    bar = capsys.readouterr().err
    assert bar.count("\r[") == 3
    assert bar.endswith("\n")


@pytest.fixture(scope="module")
def checkpoint(model: TransformerModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_json(folder / "config.json", Config(model=model.config).model_dump())
    save_weights(stored_weights(model), model.config, folder / "model.safetensors")
    TOKENIZER.save(folder / "tokenizer.json")
    return folder


def start(checkpoint: Path, prompts: Path, output: Path) -> subprocess.Popen[bytes]:
    options = "--max-new-tokens 25 --temperature 0.9 --top-p 1 --seed 3 --stop ab --batch-size 2 --device cpu"
    command = [sys.executable, "-m", "sheepop", "generate", "--checkpoint", checkpoint, "--prompts", prompts]
    return subprocess.Popen(
        [*map(str, command), "--output", str(output), *options.split()],
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not is_true() and process.poll() is None:
        time.sleep(0.001)


@pytest.mark.slow
def test_a_process_that_is_killed_twice_ends_with_the_same_file(
    checkpoint: Path, prompts: tuple[Path, list[Prompt]], undisturbed: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    for share in (0.2, 0.6):
        process = start(checkpoint, prompts[0], output)
        least = share * len(undisturbed)
        wait_until(lambda least=least: output.exists() and output.stat().st_size > least, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        written = output.read_bytes()
        assert undisturbed.startswith(written)
        assert len(written) < len(undisturbed)
        output.write_bytes(written[:-7])  # as if the kill had come within a line
    process = start(checkpoint, prompts[0], output)
    assert process.communicate()[0].decode() == f"{output}\n"
    assert process.returncode == 0
    assert output.read_bytes() == undisturbed


def test_a_text_begins_as_it_does_for_a_single_prompt(model: TransformerModel, tmp_path: Path) -> None:
    """Others' tokenizers have a token of their own that begins a text, or none."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "ab", "seed": 5}\n')
    for starts in ([3], []):
        tokenizer = TOKENIZER.with_marks(starts, TOKENIZER.end_of_text_id)
        assert tokenizer.start_ids == starts
        output = tmp_path / f"{len(starts)}.jsonl"
        complete_file(model, tokenizer, read_prompts(path, DEFAULTS), output, batch_size=1)
        (found,) = json.loads(output.read_text())["completions"]
        alone = complete(model, tokenizer, "ab", DEFAULTS.sampling, max_new_tokens=25, seed=5, stop=("ab",))
        assert found["token_ids"] == alone.completions[0].token_ids


def test_a_grammar_holds_for_all_lines_and_is_part_of_what_a_file_goes_on_with(
    model: TransformerModel, prompts: tuple[Path, list[Prompt]], tmp_path: Path
) -> None:
    pytest.importorskip("llguidance")
    output = tmp_path / "out.jsonl"
    followed = read_prompts(prompts[0], replace(DEFAULTS, grammar=Grammar("regex", "a(b|c){2,5}")))
    complete_file(model, TOKENIZER, followed, output, batch_size=BATCH_SIZE)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert records[0]["settings"]["grammar"] == {"kind": "regex", "text": "a(b|c){2,5}"}
    texts = {each["text"] for record in records for each in record["completions"] if each["finish_reason"] == "stop"}
    assert len(texts) > 3
    assert all(re.fullmatch("a?|a[bc]{2,5}", text) for text in texts)  # the stop string "ab" cuts some to nothing
    with pytest.raises(ConfigError, match=r"Line 1 of .* is not what these prompts and options lead to"):
        complete_file(model, TOKENIZER, prompts[1], output, batch_size=BATCH_SIZE)
