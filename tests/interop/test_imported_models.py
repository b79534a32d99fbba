"""Every command works on models of every format that was imported: tiny ones of random weights."""

import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from sheepop.cli import main
from sheepop.config import ModelConfig, load_config
from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.terminal import load_model_and_tokenizer
from sheepop.interop.convert import export_model
from sheepop.interop.imported import write_imported
from sheepop.learn.trace import trace_text
from sheepop.models.pretrained import stored_weights
from sheepop.models.transformer import TransformerModel

sys.path.insert(0, str(Path(__file__).parent))
from test_llama2c import write_model, write_tokenizer
from test_nanogpt import ARGUMENTS, random_weights

TEXT = "The sheep sees the dog, and follows it.\nNo dog at night: 3 sheep. Naïve!\n" * 6
SIZES = {"vocab_size": 283, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
REST = {"intermediate_size": 44, "max_position_embeddings": 23}


def a_tokenizer(vocab_size=283):
    return Tokenizer.train("bpe", [TEXT], vocab_size=vocab_size)


def moved(model):
    """Move all weights of a model from where it begins, norms and biases included."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def huggingface(folder, kind):
    transformers = pytest.importorskip("transformers")
    config = {
        "gpt2": lambda: transformers.GPT2Config(vocab_size=283, n_embd=40, n_layer=2, n_head=4, n_positions=23),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, **REST),
        "llama": lambda: transformers.LlamaConfig(**SIZES, **REST, num_key_value_heads=2),
        "qwen3": lambda: transformers.Qwen3Config(**SIZES, **REST, num_key_value_heads=2, head_dim=6),
    }[kind]()
    moved(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(folder / "theirs")
    a_tokenizer().save(folder / "theirs/tokenizer.json")
    return [folder / "theirs"]


def gguf(folder):
    pytest.importorskip("gguf")
    sizes = {"d_model": 40, "num_layers": 2, "num_heads": 4, "d_ff": 44, "max_seq_len": 23, "dropout": 0.0}
    overrides = {f"model.{key}": value for key, value in (sizes | {"vocab_size": 283, "qk_norm": False}).items()}
    config = load_config(preset="modern", overrides=overrides).model
    write_imported(folder / "theirs", config, stored_weights(moved(TransformerModel(config))), a_tokenizer())
    export_model(folder / "theirs", folder / "theirs.gguf", file_format="gguf", encoding="f16")
    return [folder / "theirs.gguf"]


def llama2c(folder):
    sizes = {"d_model": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "d_ff": 20, "max_seq_len": 13}
    family = {"norm": "rmsnorm", "activation": "swiglu", "dropout": 0.0}
    vocab_size = write_tokenizer(folder / "tokenizer.bin")
    write_model(folder / "model.bin", moved(TransformerModel(ModelConfig(vocab_size=vocab_size, **sizes | family))))
    return [folder / "model.bin"]


def nanogpt(folder):
    """A checkpoint whose table has more rows than its tokenizer has tokens, as that of nanoGPT by default."""
    torch.save({"model": random_weights(True), "model_args": ARGUMENTS}, folder / "ckpt.pt")
    a_tokenizer(270).save(folder / "tokenizer.json")
    return [folder / "ckpt.pt", "--tokenizer", folder / "tokenizer.json"]


FORMATS = {
    "Hugging Face, GPT-2": lambda folder: huggingface(folder, "gpt2"),
    "Hugging Face, GPT-NeoX": lambda folder: huggingface(folder, "gpt_neox"),
    "Hugging Face, Llama": lambda folder: huggingface(folder, "llama"),
    "Hugging Face, Qwen3": lambda folder: huggingface(folder, "qwen3"),
    "GGUF": gguf,
    "llama2.c": llama2c,
    "nanoGPT": nanogpt,
}


def status_of(*words):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, words)))
    return ended.value.code


@pytest.fixture(scope="module", params=FORMATS)
def imported(request, tmp_path_factory):
    """The checkpoint that `sheepop import` makes of a model, with a text beside it."""
    folder = tmp_path_factory.mktemp("imported")
    assert status_of("import", *FORMATS[request.param](folder), "--output", folder / "model") == 0
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder / "model"


@pytest.fixture
def sheepop(capsys):
    """Run a command that has to succeed: `sheepop("evaluate", ...)` gives what it prints."""

    def run(*words):
        capsys.readouterr()
        status = status_of(*words)
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return captured.out

    return run


def scores(sheepop, checkpoint, text):
    return json.loads(sheepop("evaluate", "--checkpoint", checkpoint, "--data", text, "--json"))


def completions(sheepop, checkpoint, *ways):
    arguments = ["--prompt", "The sheep", "--max-new-tokens", "30", "--seed", "5", "--json"]
    return json.loads(sheepop("generate", "--checkpoint", checkpoint, *arguments, *ways))["completions"]


def test_it_is_scored(imported, sheepop):
    text = imported.parent / "text.txt"
    found = scores(sheepop, imported, text)
    assert found["bytes"] == text.stat().st_size
    assert math.isfinite(found["loss"])


def test_it_writes(imported, sheepop, tmp_path, monkeypatch):
    samples = ["--num-samples", "2"]
    written = completions(sheepop, imported, *samples)
    assert all(each["token_ids"] for each in written)
    for ways in (["--no-optimized"], ["--speculate", "lookup"]):
        assert completions(sheepop, imported, *samples, *ways) == written
    for ways in (["--quantize", "int8"], ["--quantize", "int4"], ["--cache", "int8"]):
        assert len(completions(sheepop, imported, *samples, *ways)) == 2
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "The sheep", "seed": 5, "max_new_tokens": 30}\n')
    output = tmp_path / "out.jsonl"
    sheepop("generate", "--checkpoint", imported, "--prompts", tmp_path / "prompts.jsonl", "--output", output)
    assert json.loads(output.read_text())["completions"] == completions(sheepop, imported)
    monkeypatch.setattr(sys, "stdin", io.StringIO("The sheep\n\n"))
    assert sheepop("chat", "--checkpoint", imported, "--max-new-tokens", "4").endswith("\n")


def test_its_inside_is_seen(imported):
    model, tokenizer = load_model_and_tokenizer(imported, "cpu")
    seen = trace_text(model, tokenizer, "The sheep")
    with torch.inference_mode():
        expected = model(torch.as_tensor(seen.token_ids)[None])[0]
    torch.testing.assert_close(seen["logits"], expected, rtol=1e-4, atol=1e-4)


def test_it_is_trained_further(imported, sheepop, tmp_path):
    text = imported.parent / "text.txt"
    where = ["--data", text, "--output", tmp_path / "run", "--data.data_dir", tmp_path / "data", "--device", "cpu"]
    settings = {"max_steps": 2, "warmup_steps": 0, "batch_size": 2, "sample_tokens": 4, "learning_rate": 1e-12}
    options = [word for name, value in settings.items() for word in (f"--training.{name}", value)]
    sheepop("train", "--init-from", imported, *where, *options, "--training.weight_decay", 0)
    before, after = (scores(sheepop, checkpoint, text) for checkpoint in (imported, tmp_path / "run"))
    assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)  # it began with the model
    assert completions(sheepop, tmp_path / "run")
    options += ["--training.learning_rate", 1e-2, "--training.max_steps", 8]
    where[where.index(tmp_path / "run")] = tmp_path / "learned"
    sheepop("train", "--init-from", imported, *where, *options)
    assert scores(sheepop, tmp_path / "learned", text)["loss"] < before["loss"]


def test_it_is_rounded_and_exported(imported, sheepop, tmp_path):
    sheepop("quantize", "--checkpoint", imported, "--output", tmp_path / "int8", "--to", "int8")
    text = imported.parent / "text.txt"
    exact, rounded = (scores(sheepop, checkpoint, text)["loss"] for checkpoint in (imported, tmp_path / "int8"))
    assert rounded == pytest.approx(exact, rel=0.02)
    sheepop("export", "--checkpoint", imported, "--format", "hf", "--output", tmp_path / "hf")
    sheepop("import", tmp_path / "hf", "--output", tmp_path / "again")
    assert scores(sheepop, tmp_path / "again", text)["loss"] == pytest.approx(exact, rel=1e-5)
