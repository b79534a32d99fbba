import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.data.corpus import Corpus, is_prepared, open_corpus
from sheepop.data.documents import iter_documents
from sheepop.data.prepare import prepare_corpus, prepare_on_the_way
from sheepop.data.tokenizer import Tokenizer
from sheepop.utils.errors import ConfigError, DataError, SheepopError

SETTINGS: dict[str, Any] = {
    "tokenizer": "char",
    "vocab_size": 500,
    "val_fraction": 0.25,
    "seed": 7,
    "separator": "<|endoftext|>",
}


def prepare(source: Path | list[Path], output: Path, **changes: Any) -> Corpus:
    return prepare_corpus(source if isinstance(source, list) else [source], output, **SETTINGS | changes)


def documents_of(corpus: Corpus, split: str) -> list[str]:
    """Read a split back from its tokens alone."""
    tokenizer, ids = corpus.tokenizer(), corpus.split(split).tokens
    ends = np.flatnonzero(ids == tokenizer.end_of_text_id)
    assert ends[0] == 0
    assert ends[-1] == len(ids) - 1
    return [tokenizer.decode(ids[first + 1 : last].tolist()) for first, last in pairwise(ends)]


def write_documents(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_bytes(text.encode())
    return folder


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "stories", [f"Story {n}.\r\n" + "é, x. " * (n % 5 + 1) for n in range(20)])


def test_documents_come_back_and_none_is_lost(stories: Path, tmp_path: Path) -> None:
    corpus = prepare(stories, tmp_path / "out")
    originals = [document.text for document in iter_documents([stories], separator=None)]
    train, val = documents_of(corpus, "train"), documents_of(corpus, "val")
    assert sorted(train + val) == sorted(originals)
    assert train == [text for text in originals if text in set(train)], "the order of the sources is kept"
    sizes = {name: sum(len(text.encode()) for text in texts) for name, texts in (("train", train), ("val", val))}
    assert abs(sizes["val"] / sum(sizes.values()) - SETTINGS["val_fraction"]) < 0.05


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from(["same", "other text", "ends\n", "é😀", "long " * 9, "x"]), min_size=2, max_size=12),
    st.floats(0.05, 0.95),
    st.integers(0, 99),
)
def test_identical_documents_are_on_one_side(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], val_fraction: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    source = write_documents(folder / "text", [*texts, "one more"])
    corpus = prepare(source, folder / "out", val_fraction=val_fraction, seed=seed)
    train, val = documents_of(corpus, "train"), documents_of(corpus, "val")
    assert train
    assert val
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted([*texts, "one more"])


def test_the_split_follows_content_and_seed_and_not_file_names(stories: Path, tmp_path: Path) -> None:
    renamed = write_documents(
        tmp_path / "renamed", [path.read_bytes().decode() for path in sorted(stories.iterdir())][::-1]
    )
    held_out = set(documents_of(prepare(stories, tmp_path / "a"), "val"))
    assert set(documents_of(prepare(renamed, tmp_path / "b"), "val")) == held_out
    assert set(documents_of(prepare(stories, tmp_path / "c", seed=8), "val")) != held_out


def test_a_single_text_is_cut_by_position(tmp_path: Path) -> None:
    text = "".join(chr(0x4E00 + n) for n in range(103))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    corpus = prepare(tmp_path / "a.txt", tmp_path / "out", val_fraction=0.1)
    assert documents_of(corpus, "train") == [text[:92]]
    assert documents_of(corpus, "val") == [text[92:]]


def test_copies_of_one_text_are_cut_at_one_place(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "text", ["abcdefghij"] * 3)
    corpus = prepare(source, tmp_path / "out", val_fraction=0.2)
    assert set(documents_of(corpus, "train")) == {"abcdefgh"}
    assert set(documents_of(corpus, "val")) == {"ij"}


def test_the_tokenizer_sees_the_training_side_alone(stories: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(stories.iterdir())):
        path.write_text(path.read_text() + chr(0x4E00 + number))
    corpus = prepare(stories, tmp_path / "out")
    entries = {corpus.tokenizer().token_text(token_id) for token_id in range(corpus.tokenizer().vocab_size)}
    assert all(text[-1] in entries for text in documents_of(corpus, "train"))
    assert not any(text[-1] in entries for text in documents_of(corpus, "val"))


def test_the_manifest_tells_the_truth(stories: Path, tmp_path: Path) -> None:
    corpus = prepare(stories, tmp_path / "out", tokenizer="bpe", vocab_size=270)
    manifest = json.loads((corpus.path / "manifest.json").read_text())
    assert manifest["dtype"] == "uint16"
    assert manifest["vocab_size"] == corpus.tokenizer().vocab_size == 270
    for name in ("train.bin", "val.bin", "tokenizer.json"):
        assert manifest["files"][name] == hashlib.sha256((corpus.path / name).read_bytes()).hexdigest()
    for name in ("train", "val"):
        split, texts = corpus.split(name), documents_of(corpus, name)
        assert split.path.stat().st_size == 2 * split.num_tokens == 2 * len(split.tokens)
        assert split.num_documents == len(texts)
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
        assert split.num_characters == sum(map(len, texts))
        assert split.num_words == sum(len(text.split()) for text in texts)
    assert [source["bytes"] for source in manifest["sources"]] == [
        path.stat().st_size for path in sorted(stories.iterdir())
    ]
    assert manifest["settings"]["val_fraction"] == SETTINGS["val_fraction"]
    assert (corpus.path / "train.bin").read_bytes()[:2] == b"\0\0", "nanoGPT's layout: raw ids without a header"


def test_large_vocabularies_take_32_bits(tmp_path: Path) -> None:
    """The width follows the tokenizer, which is larger here than 16 bits can count."""
    source = write_documents(tmp_path / "text", ["w0 w1", "w2 w3"])
    large = Tokenizer.train("word", [" ".join(f"w{n}" for n in range(66_000))], vocab_size=70_000)
    large.save(tmp_path / "tokenizer.json")
    corpus = prepare(source, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer.json"))
    assert corpus.manifest["dtype"] == "uint32"
    assert corpus.split("train").path.stat().st_size == 4 * corpus.split("train").num_tokens
    assert corpus.tokenizer().fingerprint == large.fingerprint


def test_the_same_text_and_settings_give_the_same_files(stories: Path, tmp_path: Path) -> None:
    first, second = prepare(stories, tmp_path / "a"), prepare(stories, tmp_path / "b")
    assert first.fingerprint == second.fingerprint
    assert (first.path / "train.bin").read_bytes() == (second.path / "train.bin").read_bytes()
    assert prepare(stories, tmp_path / "c", seed=8).fingerprint != first.fingerprint


def test_what_exists_is_replaced_only_if_asked_and_only_if_it_is_a_corpus(stories: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    before = prepare(stories, output).fingerprint
    with pytest.raises(ConfigError, match="--overwrite"):
        prepare(stories, output, seed=8)
    assert open_corpus(output).fingerprint == before
    assert prepare(stories, output, seed=8, overwrite=True).fingerprint != before

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError):
            prepare(stories, mine, overwrite=overwrite)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError):
        prepare(stories, mine / "thesis.txt")
    with pytest.raises(ConfigError):
        prepare(stories, mine / "thesis.txt" / "out")
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_misspelt_tokenizer_is_told_the_nearest(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'char'"):
        prepare(stories, tmp_path / "out", tokenizer="chars")


@pytest.mark.parametrize("texts", [["x"], ["  \n"], [""], []])
def test_too_little_text_is_an_error_and_leaves_nothing(tmp_path: Path, texts: list[str]) -> None:
    source = write_documents(tmp_path / "text", texts)
    with pytest.raises(DataError):
        prepare(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize(
    "changes",
    [{"val_fraction": 0.0}, {"val_fraction": 1.0}, {"vocab_size": 100, "tokenizer": "bpe"}, {"tokenizer": "nothing"}],
)
def test_settings_that_cannot_be_leave_nothing(stories: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(SheepopError):
        prepare(stories, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["stories"]


def test_a_prepared_folder_is_no_text_to_prepare(stories: Path, tmp_path: Path) -> None:
    corpus = prepare(stories, tmp_path / "out")
    with pytest.raises(ConfigError, match="is prepared already"):
        prepare(corpus.path, tmp_path / "again")


def test_damage_is_found(stories: Path, tmp_path: Path) -> None:
    corpus = prepare(stories, tmp_path / "out")
    corpus.verify()
    train = corpus.path / "train.bin"
    content = train.read_bytes()
    train.write_bytes(content[:-3] + b"\1" + content[-2:])
    with pytest.raises(DataError, match=r"train\.bin"):
        open_corpus(corpus.path).verify()
    train.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"train\.bin"):
        open_corpus(corpus.path)
    train.write_bytes(content)
    manifest = corpus.path / "manifest.json"
    for broken in ("{", "[]", "{}", '{"format": "other", "version": 1}', '{"format": "sheepop-corpus", "version": 1}'):
        manifest.write_text(broken)
        with pytest.raises(DataError):
            open_corpus(corpus.path)


def test_on_the_way_the_same_text_is_prepared_once(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_dir = tmp_path / "data"
    first = prepare_on_the_way([stories], data_dir, **SETTINGS)
    assert first.path.parent == data_dir / "prepared"
    assert first.path.name.startswith("stories-")
    stamp = (first.path / "manifest.json").stat().st_mtime_ns
    assert prepare_on_the_way([stories], data_dir, **SETTINGS).path == first.path
    assert (first.path / "manifest.json").stat().st_mtime_ns == stamp
    assert prepare_on_the_way([first.path], data_dir, **SETTINGS).path == first.path
    assert prepare_on_the_way([stories], data_dir, **SETTINGS | {"seed": 8}).path != first.path
    (stories / "000.txt").write_text("changed")
    assert prepare_on_the_way([stories], data_dir, **SETTINGS).path != first.path
    assert is_prepared(first.path)


def test_the_data_folder_itself_can_be_trained_on_again_and_again(tmp_path: Path) -> None:
    """What was prepared there must not become part of the text."""
    data_dir = write_documents(tmp_path / "data", ["one text", "another text"])
    first = prepare_on_the_way([data_dir], data_dir, **SETTINGS)
    assert prepare_on_the_way([data_dir], data_dir, **SETTINGS).path == first.path


def test_tinyshakespeare_is_split_as_its_benchmark_does(real_data: Path, tmp_path: Path) -> None:
    file = real_data / "tinyshakespeare" / "input.txt"
    text = file.read_text()
    corpus = prepare(file, tmp_path / "out", val_fraction=0.1)
    assert documents_of(corpus, "train") == [text[: int(len(text) * 0.9)]]
    assert documents_of(corpus, "val") == [text[int(len(text) * 0.9) :]]
