import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.data.tokenizer import StreamDecoder, Tokenizer
from sheepop.utils.errors import ConfigError, DataError

PROJECT = Path(__file__).parents[2]
TEXTS = ["The king is dead, long live the king!\n\n", "Déjà vu: the queen is 27.\n", "  the\tking's crown\r\n"]
NAMES = ["<|endoftext|>", "<|unk|>", "<0x41>", "<0xC3>"]

# Any Unicode text without lone surrogates, and often with what spells a special token.
unicode_texts = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from([*NAMES, *TEXTS])).map(
    "".join
)


@pytest.fixture(scope="module", params=["bpe", "char", "word"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train(request.param, TEXTS, vocab_size=300)


@pytest.fixture(scope="module", params=["bpe", "char"])
def lossless(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer.train(request.param, TEXTS, vocab_size=300)


@settings(deadline=None)
@given(unicode_texts)
def test_any_text_round_trips(lossless: Tokenizer, text: str) -> None:
    assert lossless.decode(lossless.encode(text)) == text


@settings(deadline=None)
@given(unicode_texts)
def test_special_tokens_never_come_out_of_plain_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text_id not in ids
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)


@settings(deadline=None)
@given(unicode_texts)
def test_a_character_tokenizer_equals_the_general_path(text: str) -> None:
    tokenizer = Tokenizer.train("char", TEXTS, vocab_size=300)
    general = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    general.encode_special_tokens = True
    assert tokenizer.encode(text) == general.encode(text, add_special_tokens=False).ids


@settings(deadline=None)
@given(unicode_texts, st.integers(1, 9))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(tokenizer: Tokenizer, text: str, size: int) -> None:
    pieces = list(tokenizer.cut(text, size))
    assert "".join(pieces) == text
    assert [token_id for piece in pieces for token_id in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_each_token_has_a_text_unless_it_is_special_or_a_part_of_a_character(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.token_texts) == tokenizer.vocab_size
    for token_id, text in enumerate(tokenizer.token_texts):
        decoded = tokenizer.decode([token_id])
        assert text == ("" if "\ufffd" in decoded else decoded)


def test_texts_of_tokens_whose_decoding_depends_on_neighbours() -> None:
    vocab = {"<|endoftext|>": 0, "▁walk": 1, "s": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(["<|endoftext|>"])
    tokenizer = Tokenizer(backend)
    assert tokenizer.token_bytes is None
    assert tokenizer.token_texts == ["", " walk", "s"]


def test_long_texts_are_cut() -> None:
    tokenizer = Tokenizer.train("bpe", TEXTS, vocab_size=300)
    assert max(map(len, tokenizer.cut(TEXTS[0] * 100, 50))) < 60


@settings(deadline=None)
@given(st.data())
def test_a_stream_gives_what_decoding_at_once_gives(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Also for tokens in an order that no text has, with halves of characters among them."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids] + [stream.flush()]
    assert "".join(pieces) == tokenizer.decode(ids)


def test_an_entry_that_only_the_model_has_has_no_text_in_a_stream(lossless: Tokenizer) -> None:
    first, second = lossless.encode("ab")[:1], lossless.encode("ba")[:1]
    stream = StreamDecoder(lossless)
    pieces = [stream.push(token_id) for token_id in (*first, lossless.vocab_size, lossless.vocab_size + 5, *second)]
    assert "".join([*pieces, stream.flush()]) == lossless.decode([*first, *second])


@settings(deadline=None)
@given(unicode_texts)
def test_a_stream_never_shows_half_a_character(lossless: Tokenizer, text: str) -> None:
    stream, shown = StreamDecoder(lossless), ""
    for token_id in lossless.encode(text):
        shown += stream.push(token_id)
        assert text.startswith(shown)


def test_words_take_their_space_along_and_others_are_unknown() -> None:
    tokenizer = Tokenizer.train("word", ["to be, or not to be"], vocab_size=100)
    assert [tokenizer.token_text(token_id) for token_id in tokenizer.encode("to be, not")] == ["to", " be", ",", " not"]
    assert tokenizer.decode(tokenizer.encode("to be, or not")) == "to be, or not"
    known = tokenizer.encode("to be")
    with_unknown = tokenizer.encode("to dream")
    assert len(with_unknown) == 2
    assert with_unknown[0] == known[0]


def test_the_end_of_text_is_the_first_entry_and_has_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_of_text_id == 0
    assert tokenizer.decode([0, *tokenizer.encode(" the king"), 0]) == " the king"


def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(["", *TEXTS]) == [tokenizer.encode(text) for text in ["", *TEXTS]]


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_of_a_surrogate_pair_is_an_error(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(DataError):
        tokenizer.encode(text)


def test_a_token_outside_the_vocabulary_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError):
        tokenizer.decode([tokenizer.vocab_size])


def test_the_vocabulary_is_lowered_where_the_text_cannot_fill_it() -> None:
    assert Tokenizer.train("bpe", ["ab"], vocab_size=5000).vocab_size < 300
    assert Tokenizer.train("word", ["a b"], vocab_size=5000).vocab_size == 4
    assert Tokenizer.train("bpe", TEXTS, vocab_size=280).vocab_size == 280
    assert Tokenizer.train("word", TEXTS, vocab_size=7).vocab_size == 7


def test_sizes_and_kinds_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="257"):
        Tokenizer.train("bpe", TEXTS, vocab_size=256)
    with pytest.raises(ConfigError, match="sentence"):
        Tokenizer.train("sentence", TEXTS, vocab_size=300)


def test_what_is_saved_loads_as_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    tokenizer.save(file)
    for loaded in (Tokenizer.load(file), Tokenizer.load(tmp_path)):
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.kind, loaded.vocab_size, loaded.end_of_text_id) == (
            tokenizer.kind,
            tokenizer.vocab_size,
            tokenizer.end_of_text_id,
        )
        assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


@pytest.mark.parametrize("kind", ["bpe", "char", "word"])
def test_training_is_the_same_in_every_process(kind: str) -> None:
    code = (
        "import sys; from sheepop.data.tokenizer import Tokenizer; import json\n"
        f"print(Tokenizer.train({kind!r}, json.loads(sys.argv[1]), vocab_size=290).fingerprint)"
    )
    command = [sys.executable, "-c", code, json.dumps(TEXTS * 3)]
    fingerprints = {
        subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout for _ in range(2)
    }
    assert fingerprints == {Tokenizer.train(kind, TEXTS * 3, vocab_size=290).fingerprint + "\n"}


def test_damaged_and_missing_files_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    broken = tmp_path / "tokenizer.json"
    for content in (b"", b"{", b'{"model": 1}', b"\xff\xfe\0"):
        broken.write_bytes(content)
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            Tokenizer.load(broken)
    (tmp_path / "encoder.json").write_text("{}")
    (tmp_path / "vocab.bpe").write_text("no merges here, at all\n")
    with pytest.raises(DataError):
        Tokenizer.load(tmp_path)


def foreign_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer in the manner of SentencePiece: `▁` for a space, added before the first word."""
    pieces = [("<unk>", 0.0), ("▁", -3.0), ("▁the", -2.0), ("▁king", -2.5), ("s", -3.0), ("é", -4.0)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    return backend


def test_a_foreign_tokenizer_gets_an_end_of_text_and_streams(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tokenizer.json"
    foreign_tokenizer().save(str(file))
    tokenizer = Tokenizer.load(file)
    assert "<|endoftext|>" in capsys.readouterr().err
    assert (tokenizer.end_of_text_id, tokenizer.vocab_size) == (6, 7)
    assert tokenizer.end_of_text_id not in tokenizer.encode("the <|endoftext|> kings")
    assert list(tokenizer.cut("the king the king", 2)) == ["the king the king"], "a piece would begin with a space more"
    ids = tokenizer.encode("the kings the king") * 3
    stream = StreamDecoder(tokenizer)
    assert "".join([stream.push(token_id) for token_id in ids] + [stream.flush()]) == tokenizer.decode(ids)


def test_padding_and_truncation_of_a_foreign_file_are_ignored(tmp_path: Path) -> None:
    backend = foreign_tokenizer()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("the kings the king")) == 5


@pytest.fixture(scope="module")
def gpt2(real_data: Path) -> Tokenizer:
    return Tokenizer.load(real_data / "gpt2_tokenizer")


def test_gpt2_has_the_published_numbers(gpt2: Tokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.end_of_text_id, gpt2.kind) == (50257, 50256, "bpe")
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert 50256 not in gpt2.encode("<|endoftext|>")


def test_gpt2_merging_equals_the_algorithm_written_out(gpt2: Tokenizer, real_data: Path) -> None:
    """Of all neighbours that can be merged, the pair learnt first is merged everywhere, until none is left."""
    folder = real_data / "gpt2_tokenizer"
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines) if line}
    text = (real_data / "tinyshakespeare" / "input.txt").read_text()[:20_000]
    for word in sorted({word for word in text.split() if word.isalpha()}):
        parts = list(word)
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            merged, position = [], 0
            while position < len(parts):
                width = 2 if tuple(parts[position : position + 2]) == best else 1
                merged.append("".join(parts[position : position + width]))
                position += width
            parts = merged
        assert gpt2.encode(word) == [vocabulary[part] for part in parts]


def test_gpt2_on_real_text_round_trips(gpt2: Tokenizer, real_data: Path) -> None:
    text = (real_data / "wikitext-2" / "wiki.valid.tokens").read_text(encoding="utf-8")
    assert gpt2.decode(gpt2.encode(text)) == text
    assert list(itertools.chain.from_iterable(gpt2.encode_batch(list(gpt2.cut(text, 1000))))) == gpt2.encode(text)
