"""The `.bin` files of llama2.c: written by hand here, and the real stories260K where it is at hand."""

import json
import random
import struct
import subprocess
import sys

import pytest
import torch

from sheepop.config import ModelConfig
from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.completion import complete
from sheepop.generation.sampling import SamplingSettings
from sheepop.generation.terminal import load_model_and_tokenizer
from sheepop.interop.convert import import_model
from sheepop.models.pretrained import load_pretrained
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import CheckpointError

PIECES = [" ", "e", "t", "h", "s", "he", " t", " the", "ep", "hee"]  # behind the marks and the bytes


def write_tokenizer(path):
    marks = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    scores = [0.0] * len(marks) + [-float(number) for number in range(len(PIECES))]
    parts = [struct.pack("<i", 7)]
    for piece, score in zip(marks + PIECES, scores, strict=True):
        encoded = piece.encode()
        parts.append(struct.pack("<fi", score, len(encoded)) + encoded)
    path.write_bytes(b"".join(parts))
    return len(marks) + len(PIECES)


def write_model(path, model):
    """Write a model as llama2.c's `export.py` describes the file."""
    config = model.config
    weights = model.state_dict()
    H, K, C = config.num_heads, config.num_kv_heads, config.head_dim
    vocab_size = config.vocab_size if config.tie_weights else -config.vocab_size
    header = (config.d_model, config.d_ff, config.num_layers, H, K, vocab_size, config.max_seq_len)
    layers = [f"blocks.{layer}" for layer in range(config.num_layers)]
    projections = [
        weights[f"{block}.attention.query_key_value.weight"].split((H * C, K * C, K * C)) for block in layers
    ]
    halves = [weights[f"{block}.feed_forward.input.weight"].chunk(2) for block in layers]

    def all_layers(name):
        return [weights[f"{block}.{name}.weight"] for block in layers]

    tensors = [
        weights["token_embedding.weight"],
        *all_layers("attention_norm"),
        *(part[0] for part in projections),
        *(part[1] for part in projections),
        *(part[2] for part in projections),
        *all_layers("attention.output"),
        *all_layers("feed_forward_norm"),
        *(half[0] for half in halves),
        *all_layers("feed_forward.output"),
        *(half[1] for half in halves),
        weights["final_norm.weight"],
        torch.zeros(config.max_seq_len * C),
        *([] if config.tie_weights else [weights["head.weight"]]),
    ]
    path.write_bytes(struct.pack("<7i", *header) + b"".join(tensor.numpy().tobytes() for tensor in tensors))


@pytest.fixture
def files(tmp_path):
    """A model and its tokenizer beside it: `files(tie_weights=False)` gives the model and its path."""

    def make(**settings):
        sizes = {"d_model": 24, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "d_ff": 20, "max_seq_len": 13}
        family = {"norm": "rmsnorm", "activation": "swiglu", "dropout": 0.0}
        vocab_size = write_tokenizer(tmp_path / "tokenizer.bin")
        torch.manual_seed(2)
        model = TransformerModel(ModelConfig(vocab_size=vocab_size, **sizes | family | settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        write_model(tmp_path / "model.bin", model)
        return model, tmp_path / "model.bin"

    return make


@pytest.mark.parametrize("tie_weights", [True, False])
def test_a_model_gives_the_same_logits(tmp_path, files, tie_weights):
    model, path = files(tie_weights=tie_weights)
    import_model(path, tmp_path / "ours", tokenizer=None)
    imported = load_pretrained(tmp_path / "ours")
    token_ids = torch.randint(0, model.config.vocab_size, (2, 13))
    with torch.inference_mode():
        assert imported(token_ids).equal(model(token_ids))
    assert imported.config.tie_weights == tie_weights


def test_pieces_merge_by_score_and_the_rest_are_bytes(tmp_path, files):
    _, path = files()
    import_model(path, tmp_path / "ours", tokenizer=None)
    tokenizer = Tokenizer.load(tmp_path / "ours")
    assert tokenizer.end_of_text_id == 1
    piece = {name: 259 + number for number, name in enumerate(PIECES)}
    # " t" + "he" by the scores of "he" and " t"; " the" is made of them.
    assert tokenizer.encode("the sheep") == [piece[" the"], piece[" "], piece["s"], piece["hee"], 3 + ord("p")]
    for text in ("the sheep", "é → 3\n", "  two spaces"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_real_model_writes_what_llama2c_writes(tmp_path, real_data):
    folder = real_data / "stories260K"
    import_model(folder / "stories260K.bin", tmp_path / "ours", tokenizer=None)
    model, tokenizer = load_model_and_tokenizer(tmp_path / "ours", "cpu")
    expected = (folder / "expected_greedy_200.txt").read_text().strip()
    for optimized in (True, False):
        settings = SamplingSettings(temperature=0.0)
        written = complete(model, tokenizer, "", settings, max_new_tokens=200, seed=0, optimized=optimized)
        assert written.completions[0].text.strip() == expected


def test_what_is_no_model_is_said(tmp_path, files):
    _, path = files()
    good = path.read_bytes()
    for content, message in (
        (b"", "0 bytes, fewer than the header"),
        (good[:-4], "bytes, but a model with its header has"),
        (b"PK\x03\x04" + good[4:], "is not a llama2.c model: its header says"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            import_model(path, tmp_path / "ours", tokenizer=None)
    path.write_bytes(good)
    (tmp_path / "tokenizer.bin").rename(tmp_path / "elsewhere.bin")
    with pytest.raises(CheckpointError, match=r"no tokenizer beside .* \(tokenizer\.bin or tok269\.bin\)"):
        import_model(path, tmp_path / "ours", tokenizer=None)
    import_model(path, tmp_path / "ours", tokenizer=tmp_path / "elsewhere.bin")


def test_damaged_files_are_one_kind_of_error(tmp_path, files):
    """300 mutations each of the model's header and of the tokenizer."""
    _, path = files()
    random_numbers = random.Random(6)
    for victim, reach in ((path, 28), (tmp_path / "tokenizer.bin", None)):
        good = victim.read_bytes()
        for number in range(300):
            content = bytearray(good)
            for _ in range(random_numbers.randint(1, 4)):
                content[random_numbers.randrange(reach or len(good))] = random_numbers.randrange(256)
            if number % 5 == 0:
                del content[random_numbers.randrange(len(content)) :]
            victim.write_bytes(content)
            try:
                import_model(path, tmp_path / f"ours{number}", tokenizer=None)
            except CheckpointError:
                assert not (tmp_path / f"ours{number}").exists()
            else:
                Tokenizer.load(tmp_path / f"ours{number}").encode("the sheep")
        victim.write_bytes(good)


def test_the_command(tmp_path, files):
    _, path = files()

    def run(*words):
        return subprocess.run([sys.executable, "-m", "sheepop", *map(str, words)], capture_output=True, text=True)

    assert run("import", path, "--output", tmp_path / "ours").returncode == 0
    done = run("generate", "--checkpoint", tmp_path / "ours", "--prompt", "the", "--max-new-tokens", 4, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt"] == "the"
    path.write_bytes(b"nothing")
    done = run("import", path, "--output", tmp_path / "other")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
