import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, trainers

from sheepop.data import tokenizer as tokenizer_module
from sheepop.data.fast_bpe import has_unassigned
from sheepop.data.tokenizer import Tokenizer, names_and_ids
from sheepop.data.tokenizer_import import TIKTOKEN_SCHEMES, load_tiktoken
from sheepop.data.tokenizer_parts import byte_level, byte_level_table, token_to_bytes
from sheepop.utils.errors import ConfigError, DataError

tiktoken = pytest.importorskip("tiktoken", reason="the reference is not installed")

TEXTS = [
    "The King's 1234 crowns WEREN'T hers; they're HIS'S, I'd say!\n\n  \n",
    "Déjà vu: ПРИВЕТ мир, 日本語 ١٢٣٤ e\u0301\u0300 ǅ 😀 \r\n\tthe end  ",
]
unicode_texts = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from([*TEXTS, "'ſ", "'LL", "\n ", "  ", "12345", "//"])
).map("".join)
assigned_texts = unicode_texts.filter(lambda text: not has_unassigned(text))


def reference(scheme: str, ranks: dict[bytes, int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tiktoken's own object for these ranks, with its own pattern, without the network."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    with monkeypatch.context() as patch:
        patch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})
        pattern = getattr(public, f"{scheme}_base")()["pat_str"]
    return tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def test_the_bytes_behind_a_name_are_those_of_its_characters_if_it_has_all() -> None:
    table = byte_level_table()
    to_bytes = token_to_bytes({"type": "ByteLevel"})
    assert to_bytes is not None
    for number in (*range(0x300), 0x4E2D, 0xFFFF, 0x1F411):
        for name in (chr(number), "a\u0120" + chr(number), chr(number) + "\u0142"):
            is_known = all(character in table for character in name)
            expected = bytes(table[character] for character in name) if is_known else name.encode("utf-8")
            assert to_bytes(name) == expected


@pytest.mark.parametrize(
    "model",
    [
        models.BPE({"a": 1, "b": 2, "ab": 9}, [("a", "b")]),
        models.WordLevel({"a": 0, "b": 7}, unk_token="a"),
        models.WordPiece({"a": 0, "[UNK]": 5}, unk_token="[UNK]"),
        models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0),
    ],
)
def test_a_vocabulary_with_gaps_and_additions_is_that_of_the_library(model: models.Model) -> None:
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["<|endoftext|>", "a"])
    backend.add_tokens(["zz"])
    layout = json.loads(backend.to_str())
    assert names_and_ids(layout) == backend.get_vocab(with_added_tokens=True)
    assert Tokenizer(backend).vocab_size == max(names_and_ids(layout).values()) + 1


def write_ranks(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()))
    return path


def trained_ranks(scheme: str) -> dict[bytes, int]:
    backend = byte_level(models.BPE(), *TIKTOKEN_SCHEMES[scheme].patterns)
    alphabet = sorted(byte_level_table())
    backend.train_from_iterator(
        TEXTS * 2, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    table = byte_level_table()
    return {bytes(table[c] for c in name): rank for name, rank in backend.get_vocab().items()}


@pytest.mark.parametrize("scheme", ["r50k", "cl100k", "o200k"])
@pytest.mark.parametrize("before_fast", [0, 10**9])
def test_a_tiktoken_file_encodes_as_tiktoken_does(
    scheme: str, before_fast: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_BEFORE_FAST", before_fast)
    ranks = trained_ranks(scheme)
    theirs = reference(scheme, ranks, monkeypatch)
    ours = Tokenizer.load(write_ranks(tmp_path / f"{scheme}_base.tiktoken", ranks))
    ours.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == ours.fingerprint
    assert (ours.end_of_text_id, ours.vocab_size) == (len(ranks), len(ranks) + 1)

    @settings(deadline=None)
    @given(assigned_texts)
    def check(text: str) -> None:
        assert ours.encode(text) == again.encode(text) == theirs.encode_ordinary(text)

    check()
    for text in TEXTS:
        assert max(ours.encode(text)) >= 256
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("seed", range(20))
def test_words_that_merges_do_not_make_are_found_whole(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vocabularies put together in other ways than by BPE have such words."""
    rng = random.Random(seed)
    tokens = {"".join(rng.choices("abcd", k=rng.randint(2, 5))).encode() for _ in range(30)}
    order = [bytes([byte]) for byte in range(256)] + rng.sample(sorted(tokens), len(tokens))
    ranks = {token: rank for rank, token in enumerate(order)}
    theirs = reference("r50k", ranks, monkeypatch)
    path = write_ranks(tmp_path / "r50k.tiktoken", ranks)
    for before_fast in (0, 10**9):
        monkeypatch.setattr(tokenizer_module, "CHARACTERS_BEFORE_FAST", before_fast)
        ours = Tokenizer.load(path)
        for _ in range(200):
            text = "".join(rng.choices("abcd ", k=rng.randint(0, 30)))
            assert ours.encode(text) == theirs.encode_ordinary(text)


def test_published_vocabularies_have_their_special_tokens(tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    for number in range(256, 50256):
        ranks[b"%c%c" % divmod(number - 256, 256)] = number
    tokenizer = Tokenizer.load(write_ranks(tmp_path / "gpt2.tiktoken", ranks))
    assert (tokenizer.end_of_text_id, tokenizer.vocab_size) == (50256, 50257)


def test_the_scheme_comes_from_the_name_or_is_given(tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b" 1": 256}
    path = write_ranks(tmp_path / "mine.tiktoken", ranks)
    with pytest.raises(DataError, match="cl100k"):
        Tokenizer.load(path)
    with pytest.raises(ConfigError, match="o200k"):
        load_tiktoken(path, "cl")
    assert Tokenizer(load_tiktoken(path, "gpt2")).encode(" 1") == [256]
    assert Tokenizer(load_tiktoken(path, "cl100k")).encode(" 1") == [32, 49]
    assert Tokenizer.load(write_ranks(tmp_path / "cl100k_base.tiktoken", ranks)).encode(" 1") == [32, 49]


@pytest.mark.parametrize(
    "content", [b"", b"!!! 0\n", b"YQ== 0\n", b"YQ==\n", b"YQ== x\n", b"<html>not found</html>\n", bytes(range(256))]
)
def test_a_damaged_file_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r50k.tiktoken").write_bytes(content)
    with pytest.raises(DataError, match="not a whole"):
        Tokenizer.load(tmp_path / "r50k.tiktoken")


def test_two_tokens_of_one_rank_are_an_error(tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 97}
    with pytest.raises(DataError, match="same rank"):
        Tokenizer.load(write_ranks(tmp_path / "r50k.tiktoken", ranks))
