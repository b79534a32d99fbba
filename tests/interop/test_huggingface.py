"""Models there and back, compared by running `transformers` itself."""

import contextlib
import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sheepop.config import Config
from sheepop.data.chat_template import load_chat_template
from sheepop.data.tokenizer import Tokenizer
from sheepop.interop.convert import export_model, import_model
from sheepop.interop.huggingface import prove
from sheepop.interop.quantized import quantize_checkpoint
from sheepop.models.pretrained import load_pretrained
from sheepop.utils.errors import CheckpointError, ConfigError

transformers = pytest.importorskip("transformers")

VOCAB_SIZE = 283
TEXTS = ["The sheep sees the dog, and follows it.\n", "No dog at night: 3 sheep. Naïve!"]  # those of conftest.py


def logits_of(folder, token_ids):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(token_ids).logits


def own_logits(folder, token_ids):
    with torch.inference_mode():
        return load_pretrained(folder)(token_ids)


def ids():
    return torch.randint(0, VOCAB_SIZE, (2, 23), generator=torch.Generator().manual_seed(1))


GPT2 = {"positions": "learned", "bias": True}
TRAINED = {"rope_trained_len": 8}
EXPRESSIBLE = [
    ("GPT2LMHeadModel", "classic", GPT2),
    ("GPT2LMHeadModel", "classic", GPT2 | {"activation": "gelu_tanh", "tie_weights": False}),
    ("GPT2LMHeadModel", "classic", {"positions": "learned", "activation": "relu_squared"}),
    ("GPT2LMHeadModel", "classic", {"positions": "sinusoidal", "activation": "silu"}),
    ("GPT2LMHeadModel", "classic", {"positions": "none", "activation": "relu", "tie_weights": False}),
    ("GPTNeoXForCausalLM", "classic", {}),
    ("GPTNeoXForCausalLM", "classic", {"bias": True, "tie_weights": False, "parallel_residual": True}),
    ("GPTNeoXForCausalLM", "classic", {"rotary_dim": 4, "parallel_residual": True, "activation": "gelu_tanh"}),
    ("GPTNeoXForCausalLM", "classic", {"rope_scaling": "linear", "rope_scaling_factor": 2.0}),
    ("LlamaForCausalLM", "modern", {"qk_norm": False}),
    ("LlamaForCausalLM", "modern", {"qk_norm": False, "bias": True, "num_kv_heads": 1, "activation": "geglu"}),
    ("LlamaForCausalLM", "modern", {"qk_norm": False, "head_dim": 14, "tie_weights": False, "rope_theta": 500.0}),
    ("LlamaForCausalLM", "modern", {"qk_norm": False, "rope_scaling": "yarn", "rope_scaling_factor": 4.0}),
    ("LlamaForCausalLM", "modern", {"qk_norm": False, "rope_scaling": "yarn", "rope_scaling_factor": 2.0, **TRAINED}),
    ("LlamaForCausalLM", "modern", {"qk_norm": False, "rope_scaling": "llama3", "rope_scaling_factor": 4.0}),
    ("LlamaForCausalLM", "modern", {"qk_norm": False, "rope_scaling": "llama3", "rope_scaling_factor": 2.0, **TRAINED}),
    ("LlamaForCausalLM", "modern", {"qk_norm": False, "rope_scaling": "ntk", "rope_scaling_factor": 3.0}),
    ("Qwen3ForCausalLM", "modern", {}),
    ("Qwen3ForCausalLM", "modern", {"head_dim": 6, "num_kv_heads": 4, "tie_weights": False}),
    ("Qwen3ForCausalLM", "modern", {"sliding_window": 5}),
]


@pytest.mark.parametrize(("name", "preset", "settings"), EXPRESSIBLE, ids=str)
def test_what_a_stock_class_can_express_goes_there_and_comes_back(tmp_path, checkpoint, name, preset, settings, capfd):
    folder = checkpoint(preset, **settings)
    export_model(folder, tmp_path / "hf", file_format="hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == [name]
    assert "proved with transformers" in capfd.readouterr().err
    token_ids = ids()
    expected = own_logits(folder, token_ids)
    torch.testing.assert_close(logits_of(tmp_path / "hf", token_ids), expected, rtol=1e-5, atol=1e-5)

    import_model(tmp_path / "hf", tmp_path / "back", tokenizer=None)
    torch.testing.assert_close(own_logits(tmp_path / "back", token_ids), expected, rtol=1e-5, atol=1e-5)
    assert Tokenizer.load(tmp_path / "back").fingerprint == Tokenizer.load(folder).fingerprint


@pytest.mark.parametrize("kind", ["char", "word"])
def test_other_tokenizers_go_there_too(tmp_path, checkpoint, kind, capfd):
    folder = checkpoint("modern")
    other = Tokenizer.train(kind, TEXTS * 4, vocab_size=VOCAB_SIZE)
    (folder / "manifest.json").unlink()  # its sums are those of the other tokenizer
    other.save(folder / "tokenizer.json")
    export_model(folder, tmp_path / "hf", file_format="hf")
    assert "proved with transformers" in capfd.readouterr().err


def test_the_tokenizer_is_theirs_too(tmp_path, checkpoint, tokenizer):
    export_model(checkpoint("modern"), tmp_path / "hf", file_format="hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.end_of_text_id
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text


INEXPRESSIBLE = [
    ("modern", {"ngram_order": 3}, r"model\.ngram_order is 3"),
    ("modern", {"conv_width": 4}, r"model\.conv_width is 4"),
    ("modern", {"copy_width": 8}, r"model\.copy_width is 8.*model\.copy_width 0 to export"),
    ("classic", {"qk_norm": True}, r"for GPTNeoXForCausalLM model\.qk_norm is true, not false"),
    ("modern", {"sliding_window": 5, "attention_sinks": 2}, r"for Qwen3ForCausalLM model\.attention_sinks is 2, not 0"),
    ("modern", {"positions": "none"}, r"model\.positions is none, not rotary"),
    (
        "modern",
        {"bias": True},
        r"for LlamaForCausalLM model\.qk_norm is true, not false; for Qwen3ForCausalLM model\.bias is true, not false",
    ),
    ("modern", {"rotary_dim": 4}, r"model\.rotary_dim is 4, not head_dim"),
    ("classic", {"activation": "swiglu"}, r"model\.activation is swiglu"),
    ("classic", GPT2 | {"num_kv_heads": 2}, r"for GPT2LMHeadModel model\.num_kv_heads is 2, not 4"),
    ("classic", {"head_dim": 6}, r"model\.head_dim is 6, not d_model / num_heads"),
]


@pytest.mark.parametrize(("preset", "settings", "message"), INEXPRESSIBLE, ids=str)
def test_what_none_can_express_is_refused_with_the_setting(tmp_path, checkpoint, preset, settings, message):
    with pytest.raises(CheckpointError, match=message):
        export_model(checkpoint(preset, **settings), tmp_path / "hf", file_format="hf")
    assert not (tmp_path / "hf").exists()


def test_an_export_that_is_not_the_same_is_found(tmp_path, checkpoint, tokenizer):
    folder = checkpoint("modern")
    export_model(folder, tmp_path / "hf", file_format="hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights["model.layers.1.self_attn.k_norm.weight"][2] += 0.5
    save_file(weights, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="its logits differ by up to"):
        prove(tmp_path / "hf", load_pretrained(folder), tokenizer)


def test_nothing_is_written_over(tmp_path, checkpoint):
    folder = checkpoint("modern")
    with pytest.raises(ConfigError, match="There is something at"):
        export_model(folder, folder, file_format="hf")
    with pytest.raises(ConfigError, match="There is no format 'onnx'"):
        export_model(folder, tmp_path / "x", file_format="onnx")


SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCAB_SIZE, n_embd=40, n_layer=2, n_head=4, n_positions=23),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=44, max_position_embeddings=23),
    "gpt_neox, sequential": lambda: transformers.GPTNeoXConfig(
        **SIZES, intermediate_size=44, max_position_embeddings=23, use_parallel_residual=False, attention_bias=False
    ),
    "llama": lambda: transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=44, max_position_embeddings=23
    ),
    "llama, biases": lambda: transformers.LlamaConfig(
        **SIZES, intermediate_size=44, max_position_embeddings=23, attention_bias=True, tie_word_embeddings=True
    ),
    "mistral": lambda: transformers.MistralConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=44, max_position_embeddings=23, sliding_window=5, head_dim=6
    ),
    "qwen2": lambda: transformers.Qwen2Config(
        **SIZES, num_key_value_heads=2, intermediate_size=44, max_position_embeddings=23
    ),
    "qwen3": lambda: transformers.Qwen3Config(
        **SIZES, num_key_value_heads=2, intermediate_size=44, max_position_embeddings=23, head_dim=6
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_of_theirs_gives_the_same_logits_here(tmp_path, tokenizer, kind):
    torch.manual_seed(4)
    theirs = transformers.AutoModelForCausalLM.from_config(OTHERS[kind]()).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs/tokenizer.json")
    import_model(tmp_path / "theirs", tmp_path / "ours", tokenizer=None)
    token_ids = ids()
    with torch.inference_mode():
        expected = theirs(token_ids).logits
    torch.testing.assert_close(own_logits(tmp_path / "ours", token_ids), expected, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "ours/config.json").read_text())["model"]["vocab_size"] == VOCAB_SIZE


def test_parts_that_an_index_names_are_one_model(tmp_path, checkpoint):
    folder = checkpoint("modern")
    export_model(folder, tmp_path / "hf", file_format="hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/model.safetensors").unlink()
    names, index = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in part}, tmp_path / "hf" / file)
        index |= dict.fromkeys(part, file)
    path = tmp_path / "hf/model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    import_model(tmp_path / "hf", tmp_path / "back", tokenizer=None)
    torch.testing.assert_close(own_logits(tmp_path / "back", ids()), own_logits(folder, ids()))

    path.write_text(json.dumps({"weight_map": {"x": "../checkpoint/model.safetensors"}}))
    with pytest.raises(CheckpointError, match="does not name the files of a model"):
        import_model(tmp_path / "hf", tmp_path / "other", tokenizer=None)


def change_settings(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, r"a 'gemma', which sheepop cannot import; known are gpt2, gpt_neox, llama"),
        ({"hidden_size": None}, "lack hidden_size"),
        ({"hidden_size": "wide"}, r"config\.json"),
        ({"hidden_size": 48}, "does not fit its own settings"),
        ({"num_hidden_layers": 3}, r"lacks the weight model\.layers\.2\."),
        ({"hidden_act": "mish"}, "activation function mish"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "scaled by 'longrope'"),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "several kinds"),
    ],
    ids=str,
)
def test_what_cannot_be_imported_is_named_and_leaves_nothing(tmp_path, checkpoint, changes, message):
    export_model(checkpoint("modern"), tmp_path / "hf", file_format="hf")
    change_settings(tmp_path / "hf", **changes)
    with pytest.raises(CheckpointError, match=message):
        import_model(tmp_path / "hf", tmp_path / "back", tokenizer=None)
    assert not (tmp_path / "back").exists()


STRANGE = [None, True, "x", "", -1, 0, 1, 3, 2**40, 10**30, 0.5, -1e300, [], [1], {}, {"rope_type": "yarn"}]


def test_damaged_files_are_one_kind_of_error(tmp_path, checkpoint):
    """300 mutations each of the settings and of the bytes of the weights."""
    export_model(checkpoint("modern"), tmp_path / "hf", file_format="hf")
    numbers = random.Random(8)
    path = tmp_path / "hf/config.json"
    good = json.loads(path.read_text())
    spoiled = []
    for _ in range(300):
        changed = dict(good)
        for key in numbers.sample(sorted(good), numbers.randint(1, 3)):
            if numbers.random() < 0.2:
                del changed[key]
            else:
                changed[key] = numbers.choice(STRANGE)
        spoiled.append((path, json.dumps(changed).encode()))
    weights = tmp_path / "hf/model.safetensors"
    whole = weights.read_bytes()
    for number in range(300):
        content = bytearray(whole)
        for _ in range(numbers.randint(1, 4)):
            content[numbers.randrange(1200)] = numbers.randrange(256)
        if number % 5 == 0:
            del content[numbers.randrange(len(content)) :]
        spoiled.append((weights, bytes(content)))
    for number, (file, content) in enumerate(spoiled):
        before = file.read_bytes()
        file.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            import_model(tmp_path / "hf", tmp_path / f"back{number}", tokenizer=None)
        file.write_bytes(before)


MARKS = {"end": "<|endoftext|>", "begin": "<|im_start|>", "stop": "<|im_end|>"}


@pytest.mark.parametrize(
    ("files", "start", "end"),
    [
        ({}, ["end"], "end"),  # as we export it
        ({"tokenizer_config": {}}, ["end"], "end"),  # GPT-2's: one token in config.json
        ({"tokenizer_config": {}, "config": {"bos_token_id": 1, "eos_token_id": 2}}, ["end"], "end"),  # no marks at all
        ({"tokenizer_config": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}}, [], "stop"),
        ({"tokenizer_config": {"add_bos_token": False, "bos_token": None, "eos_token": "<|endoftext|>"}}, [], "end"),
        (
            {"tokenizer_config": {"add_bos_token": True, "bos_token": {"content": "<|im_start|>"}, "eos_token": None}},
            ["begin"],
            "end",
        ),
        ({"tokenizer_config": {}, "generation_config": {"eos_token_id": [284, 0]}}, [], "stop"),
        ({"tokenizer": ["begin"], "tokenizer_config": {"eos_token": "<|im_end|>"}}, ["begin"], "stop"),
        ({"tokenizer": ["begin"], "tokenizer_config": {"add_bos_token": False, "eos_token": "<|im_end|>"}}, [], "stop"),
    ],
    ids=str,
)
def test_texts_begin_and_end_as_the_files_say(tmp_path, checkpoint, files, start, end):
    export_model(checkpoint("modern", vocab_size=VOCAB_SIZE + 4), tmp_path / "hf", file_format="hf")
    layout = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    for number, name in ((283, "<|im_start|>"), (284, "<|im_end|>")):
        layout["added_tokens"].append(layout["added_tokens"][0] | {"id": number, "content": name})
    if "tokenizer" in files:
        sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
        begin = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
        template = {"single": [begin, sequences[0]], "pair": [begin, sequences[0], begin, sequences[1]]}
        special = {"<|im_start|>": {"id": "<|im_start|>", "ids": [283], "tokens": ["<|im_start|>"]}}
        layout["post_processor"] = {"type": "TemplateProcessing", **template, "special_tokens": special}
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(layout))
    for name in ("tokenizer_config", "generation_config"):
        if name in files:
            (tmp_path / f"hf/{name}.json").write_text(json.dumps(files[name]))
    change_settings(tmp_path / "hf", **files.get("config", {}))
    import_model(tmp_path / "hf", tmp_path / "back", tokenizer=None)
    found = Tokenizer.load(tmp_path / "back")
    assert found.end_of_text == MARKS[end]
    assert found.start_ids == [found.special_ids[MARKS[name]] for name in start]

    export_model(tmp_path / "back", tmp_path / "again", file_format="hf")  # what was found is written
    import_model(tmp_path / "again", tmp_path / "twice", tokenizer=None)
    assert Tokenizer.load(tmp_path / "twice").fingerprint == found.fingerprint


TEMPLATE = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"


def test_the_template_of_conversations_stays_with_the_model(tmp_path, checkpoint, capfd):
    def template_of(folder):
        template = load_chat_template(folder)
        return template and template.source

    export_model(checkpoint("modern"), tmp_path / "hf", file_format="hf")
    settings = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    several = [{"name": "tools", "template": "other"}, {"name": "default", "template": TEMPLATE}]
    for said, expected in (
        (TEMPLATE, TEMPLATE),
        (several, TEMPLATE),
        (several[:1], None),
        ("{% for %}", None),
        (5, None),
    ):
        (tmp_path / "hf/tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": said}))
        shutil.rmtree(tmp_path / "back", ignore_errors=True)
        import_model(tmp_path / "hf", tmp_path / "back", tokenizer=None)
        assert template_of(tmp_path / "back") == expected
    assert "cannot be read" in capfd.readouterr().err
    (tmp_path / "hf/chat_template.jinja").write_text(TEMPLATE + "!")
    import_model(tmp_path / "hf", tmp_path / "own", tokenizer=None)
    assert template_of(tmp_path / "own") == TEMPLATE + "!"
    quantize_checkpoint(tmp_path / "own", tmp_path / "rounded", "int8")
    export_model(tmp_path / "own", tmp_path / "again", file_format="hf")
    assert template_of(tmp_path / "rounded") == template_of(tmp_path / "again") == TEMPLATE + "!"
    import_model(tmp_path / "hf", tmp_path / "plain", tokenizer=tmp_path / "own")
    assert template_of(tmp_path / "plain") is None


def test_pickles_are_not_read(tmp_path, checkpoint):
    export_model(checkpoint("modern"), tmp_path / "hf", file_format="hf")
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "hf/pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle, which may run code"):
        import_model(tmp_path / "hf", tmp_path / "back", tokenizer=None)
    with pytest.raises(CheckpointError, match="does not exist"):
        import_model(tmp_path / "nothing", tmp_path / "back", tokenizer=None)


def test_the_commands(tmp_path, checkpoint):
    folder = checkpoint("modern")

    def run(*words):
        return subprocess.run([sys.executable, "-m", "sheepop", *map(str, words)], capture_output=True, text=True)

    done = run("export", "--checkpoint", folder, "--format", "hf", "--output", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    done = run("import", tmp_path / "hf", "--output", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    done = run("generate", "--checkpoint", tmp_path / "back", "--prompt", "The sheep", "--max-new-tokens", 3, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["completions"][0]["token_ids"]) == 3
    assert Config.model_validate(json.loads((tmp_path / "back/config.json").read_text())).model.qk_norm
    done = run("export", "--checkpoint", folder, "--format", "hf", "--output", tmp_path / "hf")
    assert done.returncode == 2
    assert "There is something at" in done.stderr
