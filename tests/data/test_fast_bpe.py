import json
import pickle
import random
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, trainers

from sheepop.data import fast_bpe as engine_module
from sheepop.data import tokenizer as tokenizer_module
from sheepop.data.fast_bpe import FastBpe, fast_bpe, has_unassigned
from sheepop.data.tokenizer import Tokenizer, bytes_per_token
from sheepop.data.tokenizer_parts import CL100K, O200K, WORDS, byte_level, byte_level_table, special_token
from sheepop.utils.errors import DataError

pytest.importorskip("gigatoken", reason="the extra `fast` is not installed")

SHARED = Path(__file__).parents[3] / "shared" / "data"
TEXTS = [
    "The King's 1234 crowns WEREN'T hers; they're HIS'S, I'd say!\n\n  \n",
    "Déjà vu: ПРИВЕТ мир, 日本語 ١٢٣٤ e\u0301\u0300 ǅ 😀 \r\n\tthe end  ",
]
HARD = [*TEXTS, "<|endoftext|>", "'ſ", "'LL", "\n ", "\u00a0 ", "\u2028", "\x1c", "12345", "//", "\u088f", "\u0378"]
unicode_texts = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(HARD)).map("".join)


def train(pattern: str | None) -> Tokenizer:
    backend = byte_level(models.BPE(), *filter(None, [pattern]))
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[special_token("<|endoftext|>")],
        initial_alphabet=sorted(byte_level_table()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 2, trainer)
    return Tokenizer(backend)


def general(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """The general library alone, with the same vocabulary."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    backend.encode_special_tokens = True
    return lambda text: backend.encode(text, add_special_tokens=False).ids


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the fast engine from the first character on."""
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_BEFORE_FAST", 0)


@pytest.fixture(scope="module", params=[None, CL100K, O200K], ids=["gpt2", "cl100k", "o200k"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train(request.param)


@settings(deadline=None, max_examples=300)
@given(unicode_texts)
def test_the_fast_engine_gives_the_tokens_of_the_general_library(tokenizer: Tokenizer, text: str) -> None:
    expected = general(tokenizer)(text)
    assert tokenizer.encode(text) == expected
    array = tokenizer.encode_array(text)
    assert array.dtype == np.uint32
    assert array.tolist() == expected


@settings(deadline=None)
@given(unicode_texts, st.integers(1, 9))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(tokenizer: Tokenizer, text: str, size: int) -> None:
    pieces = list(tokenizer.cut(text, size))
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_every_character_of_unicode_is_split_alike(tokenizer: Tokenizer) -> None:
    """Of the large blocks of ideographs and syllables, which are all letters, a part."""
    code_points = [*range(0x4E10), *range(0x9F00, 0xAC10), *range(0xD700, 0xD800), *range(0xF800, 0x17010)]
    code_points += [*range(0x18700, 0x20010), *range(0x2A6D0, 0x2A6F0), *range(0xE0000, 0xE0200), 0x10FFFF]
    characters = [chr(code_point) for code_point in code_points if unicodedata.category(chr(code_point)) != "Cn"]
    lines = [f"a{c} 1{c}'s {c}x {c}'S'{c}.{c}{c} {c}\n" for c in characters]
    encode = general(tokenizer)
    assert tokenizer_module.fast_bpe(tokenizer._layout) is not None
    for begin in range(0, len(lines), 500):
        text = "".join(lines[begin : begin + 500])
        assert not has_unassigned(text)
        assert tokenizer.encode(text) == encode(text)


def test_code_points_without_a_character_are_known() -> None:
    assert has_unassigned("a\u0378b")
    assert has_unassigned("\U0010ffff")
    assert not has_unassigned("".join(TEXTS))


def test_unassigned_code_points_go_to_the_general_library(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train(None)
    asked: list[str] = []
    encode = FastBpe.encode
    monkeypatch.setattr(FastBpe, "encode", lambda self, text: asked.append(text) or encode(self, text))
    text = "a good king " * 500 + "\u0378 " + "is dead now " * 500
    assert tokenizer.encode(text) == general(tokenizer)(text)
    assert "\u0378" not in "".join(asked)
    assert sum(map(len, asked)) > 0.7 * len(text)


def layout_of(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    layout: dict[str, Any] = json.loads(backend.to_str())
    return layout


def test_only_what_is_known_to_be_equal_is_encoded_fast() -> None:
    trained = tokenizers.Tokenizer.from_str(train(None).to_json())
    assert fast_bpe(layout_of(trained)) is not None
    for kind in ("char", "word"):
        assert fast_bpe(layout_of(Tokenizer.train(kind, TEXTS, vocab_size=300)._backend)) is None
    assert fast_bpe(train(WORDS)._layout) is None
    trained.model.dropout = 0.5
    assert fast_bpe(layout_of(trained)) is None
    trained.model.dropout = None
    trained.normalizer = normalizers.NFKC()
    assert fast_bpe(layout_of(trained)) is None
    trained.normalizer = None
    trained.add_tokens([AddedToken("King", special=False)])
    assert fast_bpe(layout_of(trained)) is None
    text = "King of Kings"
    assert Tokenizer(trained).encode(text) == general(Tokenizer(trained))(text)


def test_an_engine_that_errs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = FastBpe.encode
    monkeypatch.setattr(FastBpe, "encode", lambda self, text: encode(self, text)[:-1])
    tokenizer = train(None)
    assert tokenizer.encode(TEXTS[0]) == general(tokenizer)(TEXTS[0])


def test_without_the_extra_the_tokens_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [train(None).encode(text) for text in HARD]
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert fast_bpe(train(None)._layout) is None
    assert [train(None).encode(text) for text in HARD] == expected


def test_short_texts_do_not_wait_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_BEFORE_FAST", 100)
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(tokenizer_module, "fast_bpe", lambda layout: made.append(layout) or fast_bpe(layout))
    tokenizer = train(None)
    tokenizer.encode("a short prompt")
    assert not made
    for _ in range(9):
        tokenizer.encode_batch(["a short prompt", "another"])
    assert len(made) == 1


def test_an_engine_made_anew_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train(None)
    expected = [tokenizer.encode(text) for text in HARD]
    monkeypatch.setattr(engine_module, "CHARACTERS_KEPT", 10)
    monkeypatch.setattr(engine_module, "LOOK_EVERY", 10)
    memory = iter(range(10**12, 10**15, engine_module.GROWTH_KEPT + 1))
    monkeypatch.setattr(engine_module, "memory_in_use", lambda: next(memory))
    renewed: list[FastBpe] = []
    renew = FastBpe._renew
    monkeypatch.setattr(FastBpe, "_renew", lambda self: renewed.append(self) or renew(self))
    assert [tokenizer.encode(text) for text in HARD] == expected
    assert renewed


def test_an_engine_is_made_anew_only_where_memory_grew_or_cannot_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "CHARACTERS_KEPT", 10)
    monkeypatch.setattr(engine_module, "LOOK_EVERY", 10)
    made: list[FastBpe] = []
    renew = FastBpe._renew
    monkeypatch.setattr(FastBpe, "_renew", lambda self: made.append(self) or renew(self))
    for memory in (10**9, None):
        monkeypatch.setattr(engine_module, "memory_in_use", lambda memory=memory: memory)
        engine = fast_bpe(train(None)._layout)
        assert engine is not None
        made.clear()
        for _ in range(3):
            engine.encode("a good king is dead")
        assert bool(made) == (memory is None)


GROWTH_OF_DIFFERENT_WORDS = """
import json
import sys
from pathlib import Path

import numpy as np

from sheepop.data.fast_bpe import fast_bpe, memory_in_use

engine = fast_bpe(json.loads(Path(sys.argv[1]).read_text()))
random = np.random.default_rng(5)
before, most = memory_in_use(), 0
for _ in range(40):
    letters = random.integers(ord("a"), ord("z") + 1, 1_000_000, dtype=np.uint8)
    letters[random.random(len(letters)) < 0.15] = ord(" ")
    engine.encode(letters.tobytes())
    most = max(most, memory_in_use() or 0)
print(-1 if before is None else most - before)
"""


def test_memory_is_bounded_whatever_the_number_of_different_words(tmp_path: Path) -> None:
    """Of words that are all different the engine would keep 7 MB for each megabyte, some 300 MB here.

    A process of its own: in one that has run other tests, holes in its memory count as if they were the engine's.
    """
    train(None).save(tmp_path / "tokenizer.json")
    command = [sys.executable, "-c", GROWTH_OF_DIFFERENT_WORDS, str(tmp_path / "tokenizer.json")]
    growth = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if growth < 0:
        pytest.skip("the system does not say how much memory there is")
    assert growth < 200_000_000


def test_documents_in_one_call_are_encoded_as_each_by_itself() -> None:
    tokenizer = train(None)
    texts = [text for text in HARD if text and not has_unassigned(text)]
    texts += [f"{end}{begin}" for begin in ("a", " ", "\n", "'s", "é") for end in ("", "x", "\n ", " '")]
    found = tokenizer.encode_documents([text.encode() for text in texts], out_of=10**6)
    assert found is not None
    assert found.tolist() == [
        token for text in texts for token in (tokenizer.end_of_text_id, *general(tokenizer)(text))
    ]
    assert train(WORDS).encode_documents([b"a"], out_of=10**6) is None


def test_a_tokenizer_goes_to_another_process() -> None:
    tokenizer = train(None)
    expected = tokenizer.encode(TEXTS[0])
    assert pickle.loads(pickle.dumps(tokenizer)).encode(TEXTS[0]) == expected


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\u0378\ud800"])
@pytest.mark.parametrize("kind", ["bpe", "char", "word"])
def test_half_of_a_surrogate_pair_is_an_error(kind: str, text: str) -> None:
    tokenizer = Tokenizer.train(kind, TEXTS, vocab_size=300)
    for encode in (tokenizer.encode, tokenizer.encode_array):
        with pytest.raises(DataError, match="surrogate"):
            encode(text)


@pytest.mark.parametrize("kind", ["char", "word"])
def test_the_other_kinds_have_arrays_too(kind: str) -> None:
    tokenizer = Tokenizer.train(kind, TEXTS[:1], vocab_size=300)
    for text in ["", *TEXTS]:
        array = tokenizer.encode_array(text)
        assert array.dtype == np.uint32
        assert array.tolist() == tokenizer.encode(text) == general(tokenizer)(text)


def test_bytes_per_token() -> None:
    assert bytes_per_token(Tokenizer.train("char", ["abcé"], vocab_size=300), ["abc", "é"]) == 5 / 4
    assert bytes_per_token(Tokenizer.train("bpe", ["ab ab ab"], vocab_size=258), ["abab", ""]) == 2
    assert bytes_per_token(train(None), []) == 0


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    if not (SHARED / "gpt2_tokenizer" / "vocab.bpe").is_file():
        pytest.skip("GPT-2's vocabulary is not here (shared/data/gpt2_tokenizer)")
    return Tokenizer.load(SHARED / "gpt2_tokenizer")


def tiktoken_gpt2(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    tiktoken = pytest.importorskip("tiktoken", reason="the reference is not installed")
    public = pytest.importorskip("tiktoken_ext.openai_public")
    assert tokenizer.token_bytes is not None
    ranks = {token: rank for rank, token in enumerate(tokenizer.token_bytes) if token}
    encoding = tiktoken.Encoding("gpt2", pat_str=public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    encode: Callable[[str], list[int]] = encoding.encode_ordinary
    return encode


def test_gpt2_on_generated_strings(gpt2: Tokenizer) -> None:
    """10,000 strings of all of Unicode, half of them of characters that are hard to split."""
    rng = random.Random(0)
    hard = "".join(HARD) + "'sdmtlvre \n\t\r\u00a0\u2003\u3000\x85\u2028\x1c\u200b\ufeff²½Ⅷ👩‍👧🏽한국어"
    assigned = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
    pools = [assigned, [c for c in hard if unicodedata.category(c) != "Cn"]]
    texts = ["".join(rng.choices(rng.choice(pools), k=rng.randint(0, 50))) for _ in range(10_000)]
    theirs, backend = tiktoken_gpt2(gpt2), general(gpt2)
    for text in texts:
        assert gpt2.encode(text) == theirs(text) == backend(text)


def real_texts() -> Iterator[tuple[str, str]]:
    """Names and texts of all text files of the shared data, those in archives too."""
    for path in sorted(SHARED.rglob("*")):
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".jsonl") and "__MACOSX" not in name:
                        yield name, archive.read(name).decode("utf-8")
        elif path.is_file() and path.suffix != ".bin":
            yield str(path), path.read_bytes().decode("utf-8")


@pytest.mark.slow
def test_gpt2_on_all_real_data(gpt2: Tokenizer) -> None:
    theirs, backend = tiktoken_gpt2(gpt2), general(gpt2)
    num_bytes = 0
    for name, text in real_texts():
        num_bytes += len(text.encode())
        assert gpt2.encode(text) == theirs(text), name
        beginning = text[:200_000]
        assert gpt2.encode(beginning) == [token for piece in gpt2.cut(beginning) for token in backend(piece)], name
    assert num_bytes > 30_000_000
