"""Checkpoints of nanoGPT, with its model written out here as its `model.py` describes it."""

import math
import random
import zipfile

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sheepop.data.tokenizer import Tokenizer
from sheepop.interop.convert import import_model
from sheepop.models.pretrained import load_pretrained
from sheepop.utils.errors import CheckpointError

ARGUMENTS = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 13, "vocab_size": 300, "bias": True, "dropout": 0.0}


def random_weights(bias):
    generator = torch.Generator().manual_seed(0)
    width, shapes = 24, {"transformer.wte.weight": (300, 24), "transformer.wpe.weight": (13, 24)}
    for layer in range(2):
        block = f"transformer.h.{layer}"
        parts = {"attn.c_attn": (72, 24), "attn.c_proj": (24, 24), "mlp.c_fc": (96, 24), "mlp.c_proj": (24, 96)}
        for name, shape in parts.items():
            shapes |= {f"{block}.{name}.weight": shape} | ({f"{block}.{name}.bias": shape[:1]} if bias else {})
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{name}.weight": (width,)} | ({f"{block}.{name}.bias": (width,)} if bias else {})
    shapes |= {"transformer.ln_f.weight": (width,)} | ({"transformer.ln_f.bias": (width,)} if bias else {})
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}


def logits(weights, token_ids):
    def linear(hidden, name):
        return F.linear(hidden, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(hidden, name):
        return F.layer_norm(hidden, hidden.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    hidden = weights["transformer.wte.weight"][token_ids] + weights["transformer.wpe.weight"][: token_ids.shape[1]]
    for layer in range(2):
        block = f"transformer.h.{layer}"
        parts = linear(norm(hidden, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in parts)
        scores = query @ key.transpose(-1, -2) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = hidden + linear(mixed, f"{block}.attn.c_proj")
        inner = nn.functional.gelu(linear(norm(hidden, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        hidden = hidden + linear(inner, f"{block}.mlp.c_proj")
    return norm(hidden, "transformer.ln_f") @ weights["lm_head.weight"].t()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    Tokenizer.train("bpe", ["the sheep sees the dog"] * 3, vocab_size=270).save(path)
    return path


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["eager", "compiled"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_gives_the_same_logits(tmp_path, vocabulary, bias, prefix):
    weights = random_weights(bias)
    content = {"model": {prefix + name: tensor for name, tensor in weights.items()}, "iter_num": 5}
    content |= {
        "model_args": ARGUMENTS | {"bias": bias},
        "optimizer": {"state": {}},
        "best_val_loss": torch.tensor(1.5),
    }
    torch.save(content, tmp_path / "ckpt.pt")
    import_model(tmp_path / "ckpt.pt", tmp_path / "ours", tokenizer=vocabulary)
    token_ids = torch.randint(0, 300, (2, 13))
    with torch.inference_mode():
        found = load_pretrained(tmp_path / "ours")(token_ids)
    torch.testing.assert_close(found, logits(weights, token_ids), rtol=1e-5, atol=1e-5)


class Trap:
    """What a pickle of an attacker does when it is read without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_run_and_what_is_wrong_is_said(tmp_path, vocabulary):
    path = tmp_path / "ckpt.pt"
    torch.save({"model": random_weights(True), "model_args": ARGUMENTS}, path)
    with pytest.raises(CheckpointError, match=r"holds no tokenizer.*--tokenizer PATH"):
        import_model(path, tmp_path / "ours", tokenizer=None)
    for content, message in (
        ({"model": Trap(tmp_path / "sprung"), "model_args": ARGUMENTS}, "cannot be read as weights alone"),
        ({"weights": {}}, "is not a checkpoint of nanoGPT"),
        ([1], "is not a checkpoint of nanoGPT"),
        ({"model": {}, "model_args": ARGUMENTS}, "does not fit its own weights: it asks for"),
        ({"model": random_weights(True), "model_args": ARGUMENTS | {"n_embd": 36}}, "does not fit its own settings"),
        ({"model": random_weights(True), "model_args": ARGUMENTS | {"n_head": "x"}}, r"model\.num_heads"),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            import_model(path, tmp_path / "ours", tokenizer=vocabulary)
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "ours").exists()


def test_damaged_files_are_one_kind_of_error(tmp_path, vocabulary):
    path = tmp_path / "ckpt.pt"
    torch.save({"model": random_weights(True), "model_args": ARGUMENTS}, path)
    good, numbers = path.read_bytes(), random.Random(7)
    for number in range(300):
        content = bytearray(good)
        for _ in range(numbers.randint(1, 4)):
            # The index of the archive and the pickle are at its ends.
            at = numbers.randrange(4000) * numbers.choice((1, -1))
            content[at] = numbers.randrange(256)
        if number % 5 == 0:
            del content[numbers.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            import_model(path, tmp_path / f"ours{number}", tokenizer=vocabulary)
        except CheckpointError:
            assert not (tmp_path / f"ours{number}").exists()


def test_an_archive_that_is_packed_and_weights_without_memory_are_refused(tmp_path, vocabulary):
    path, packed = tmp_path / "ckpt.pt", tmp_path / "packed.pt"
    weights = random_weights(True)
    torch.save({"model": weights, "model_args": ARGUMENTS}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + bytes(10**6) * name.endswith("data/0"))
    with pytest.raises(CheckpointError, match="more than it is large"):
        import_model(packed, tmp_path / "ours", tokenizer=vocabulary)
    wide = torch.zeros(1).expand(300, 24)
    torch.save({"model": weights | {"transformer.wte.weight": wide}, "model_args": ARGUMENTS}, path)
    with pytest.raises(CheckpointError, match=r"numbers of its own for the weight transformer\.wte\.weight"):
        import_model(path, tmp_path / "ours", tokenizer=vocabulary)
