"""Preparation with workers, kills, filters, weights and growing sources: the same files, or a clear report."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sheepop.data.corpus import Corpus
from sheepop.data.filters import FilterSettings
from sheepop.data.gathered import gather_all
from sheepop.data.prepare import prepare_corpus
from sheepop.data.selection import Selection, parse_weights
from sheepop.data.shards import encode
from sheepop.data.tokenizer import Tokenizer
from sheepop.utils.errors import ChangedError, ConfigError, DataError, NoSpaceError

from .test_prepare import SETTINGS, documents_of, write_documents


def prepare(sources: list[Path], output: Path, selection: Selection | None = None, **changes: Any) -> Corpus:
    return prepare_corpus(sources, output, selection=selection, **SETTINGS | changes)


def report_of(corpus: Corpus) -> Any:
    return corpus.manifest["report"]


def prose(rng: random.Random, words: int) -> str:
    vocabulary = [
        "sheep",
        "grass",
        "wolf",
        "hill",
        "shepherd",
        "night",
        "moon",
        "quiet",
        "river",
        "stone",
        "dog",
        "wool",
    ]
    return " ".join(rng.choice(vocabulary) + rng.choice(["", "s", "."]) for _ in range(words))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Three hundred documents, some of which occur more than once."""
    rng = random.Random(5)
    texts = [prose(rng, rng.randrange(20, 400)) for _ in range(280)]
    return write_documents(tmp_path / "library", texts + texts[:20])


def test_two_tokenizers_in_one_process_do_not_mix(library: Path, tmp_path: Path) -> None:
    first = prepare([library], tmp_path / "a", tokenizer="bpe", vocab_size=300)
    shutil.rmtree(first.path)
    second = prepare([library], tmp_path / "a", tokenizer="bpe", vocab_size=280)
    assert int(second.split("train").tokens.max()) < 280


def test_the_files_do_not_depend_on_the_number_of_workers(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sheepop.data.gather.UNIT_BYTES", 20_000)
    monkeypatch.setattr("sheepop.data.gather.PART_BYTES", 5_000)
    selection = Selection("standard", "exact")
    one = prepare([library], tmp_path / "one", selection, tokenizer="bpe", vocab_size=300, num_workers=1)
    three = prepare([library], tmp_path / "three", selection, tokenizer="bpe", vocab_size=300, num_workers=3)
    assert one.manifest["files"] == three.manifest["files"]
    assert one.manifest["report"] == three.manifest["report"]


def test_neither_do_they_depend_on_the_size_of_units_and_parts(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare([library], tmp_path / "whole")
    monkeypatch.setattr("sheepop.data.gather.UNIT_BYTES", 9_000)
    monkeypatch.setattr("sheepop.data.gather.PART_BYTES", 3_000)
    assert prepare([library], tmp_path / "small").manifest["files"] == whole.manifest["files"]


def test_identical_documents_are_dropped_and_shown(library: Path, tmp_path: Path) -> None:
    corpus = prepare([library], tmp_path / "out", Selection(deduplicate="exact"))
    texts = documents_of(corpus, "train") + documents_of(corpus, "val")
    assert len(texts) == len(set(texts)) == 280
    dropped = report_of(corpus)["dropped"]["identical to an earlier document"]
    assert dropped["documents"] == 20
    assert dropped["bytes"] == sum((library / f"{n:03d}.txt").stat().st_size for n in range(20))
    assert 1 <= len(dropped["examples"]) <= 3
    assert dropped["examples"][0]["source"] == str(library / "280.txt")
    assert dropped["examples"][0]["text"] == (library / "000.txt").read_text().strip()[:120]


def test_similar_documents_are_dropped(tmp_path: Path) -> None:
    rng = random.Random(6)
    texts = [prose(rng, 300) for _ in range(30)]
    changed = [text.replace("wolf", "fox", 1) + " The end." for text in texts[:10]]
    source = write_documents(tmp_path / "text", texts + changed)
    corpus = prepare([source], tmp_path / "out", Selection(deduplicate="near"))
    assert sorted(documents_of(corpus, "train") + documents_of(corpus, "val")) == sorted(texts)
    assert report_of(corpus)["dropped"]["nearly identical to an earlier document"]["documents"] == 10


def test_filters_say_what_they_dropped(tmp_path: Path) -> None:
    texts = [
        "A letter of some length, long enough to stay in the text.",
        "short",
        "Write to ann@example.org, please do.",
    ]
    source = write_documents(tmp_path / "text", [*texts, "Another letter that is long enough to stay."])
    corpus = prepare([source], tmp_path / "out", Selection(filters=FilterSettings(min_characters=20, pii="replace")))
    dropped = report_of(corpus)["dropped"]
    assert [what["documents"] for reason, what in dropped.items() if reason.startswith("too short")] == [1]
    kept = " ".join(documents_of(corpus, "train") + documents_of(corpus, "val"))
    assert "ann@example.org" not in kept
    assert "Write to" in kept


def test_weights_repeat_and_thin_out_the_training_side(tmp_path: Path) -> None:
    rng = random.Random(7)
    often = write_documents(tmp_path / "often", [f"often {n} " + prose(rng, 20) for n in range(40)])
    seldom = write_documents(tmp_path / "seldom", [f"seldom {n} " + prose(rng, 20) for n in range(400)])
    weights = parse_weights([f"{often}=3", f"{seldom}=0.25"])
    corpus = prepare([often, seldom], tmp_path / "out", Selection(weights=weights))
    train, val = Counter(documents_of(corpus, "train")), Counter(documents_of(corpus, "val"))
    assert {count for text, count in train.items() if text.startswith("often")} == {3}
    assert set(val.values()) == {1}
    assert 60 < sum(text.startswith("seldom") for text in [*train, *val]) < 140
    assert not set(train) & set(val)


@pytest.mark.parametrize("text", ["a", "=", "a=b", "a=nan=", "x=-1"])
def test_wrong_weights_are_refused(tmp_path: Path, text: str) -> None:
    source = write_documents(tmp_path / "x", ["one text", "another text"])
    with pytest.raises(ConfigError):
        prepare([source], tmp_path / "out", Selection(weights=parse_weights([text])))


def test_leakage_between_the_sides_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(8)
    footer = "This boilerplate line stands at the end of each and every text in here."
    assert len(footer) % 8 == 3 or len(footer) >= 60
    lines = [footer + "." * extra for extra in range(8)]
    source = write_documents(tmp_path / "text", [prose(rng, 50) + "\n" + "\n".join(lines) for _ in range(30)])
    corpus = prepare([source], tmp_path / "out")
    leakage = report_of(corpus)["leakage"]
    assert leakage["also_trained_on"] == 1
    assert leakage["held_out_lines"] >= 1
    assert "also stand in the text to train on" in capsys.readouterr().err


def test_with_more_files_only_these_are_worked_on(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sheepop.data.gather.FILES_A_UNIT", 8)
    tokenizer = prepare([library], tmp_path / "first", tokenizer="bpe", vocab_size=300).path / "tokenizer.json"
    settings = {"tokenizer": str(tokenizer), "incremental": True}
    prepare([library], tmp_path / "out", **settings)
    rng = random.Random(9)
    for number in (150, 151):
        (library / f"{number:03d}b.txt").write_text(prose(rng, 100))
    texts: list[str] = []

    def counting(tokenizer: Tokenizer, text: str, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        texts.append(text)
        return encode(tokenizer, text, dtype)

    monkeypatch.setattr(Tokenizer, "encode_documents", lambda *_, **__: None)  # the way that is counted
    monkeypatch.setattr("sheepop.data.shards.encode", counting)
    grown = prepare([library], tmp_path / "out", **settings)
    assert 2 <= len(texts) < 150
    monkeypatch.undo()
    assert grown.manifest["files"] == prepare([library], tmp_path / "anew", tokenizer=str(tokenizer)).manifest["files"]


def test_work_on_files_that_are_gone_is_not_kept(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sheepop.data.gather.FILES_A_UNIT", 8)
    for number, limit in enumerate((300, 100, 20)):
        for path in sorted(library.iterdir())[limit:]:
            path.unlink()
        prepare([library], tmp_path / "out", tokenizer="bpe", vocab_size=300, incremental=True)
        prepare([library], tmp_path / f"anew{number}", tokenizer="bpe", vocab_size=300, incremental=True)
        kept, anew = (
            {path.name for path in (tmp_path / f".{name}.work").iterdir()} for name in ("out", f"anew{number}")
        )
        assert kept == anew


def test_a_file_that_cannot_be_read_is_listed_or_an_error(library: Path, tmp_path: Path) -> None:
    (library / "image.txt").write_bytes(bytes(range(256)) * 10)
    corpus = prepare([library], tmp_path / "out")
    (problem,) = report_of(corpus)["skipped"]
    assert "image.txt" in problem
    with pytest.raises(Exception, match=r"image\.txt"):
        prepare([library], tmp_path / "strict", Selection(strict=True))
    with pytest.raises(Exception, match=r"image\.txt"):
        prepare([library / "image.txt"], tmp_path / "named")
    assert not (tmp_path / "strict").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_cannot_be_opened_is_listed_or_an_error(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (library / "closed").mkdir()
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    (problem,) = report_of(prepare([library], tmp_path / "out"))["skipped"]
    assert "closed cannot be opened" in problem
    with pytest.raises(DataError, match="closed cannot be opened"):
        prepare([library], tmp_path / "strict", Selection(strict=True))


def test_a_full_disk_is_no_unreadable_file(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = np.savez, []

    def full_for_a_moment(*arguments: Any, **arrays: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, **arrays)

    monkeypatch.setattr("sheepop.data.gather.PART_BYTES", 1000)
    monkeypatch.setattr("sheepop.data.gather.np.savez", full_for_a_moment)
    with pytest.raises(NoSpaceError):
        prepare([library], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert (
        prepare([library], tmp_path / "out").manifest["files"] == prepare([library], tmp_path / "b").manifest["files"]
    )


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_files(
    library: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Kills of whole process groups, spread over the time that an undisturbed run takes."""
    big = tmp_path / "big"
    rng = random.Random(10)
    write_documents(big, [prose(rng, 4000) for _ in range(60)])

    def command(output: Path) -> list[str]:
        words = f"-m sheepop prepare {big} {library} --output {output} --tokenizer bpe --vocab-size 400 --workers 2"
        return [sys.executable, *words.split()]

    started = time.monotonic()
    subprocess.run(command(tmp_path / "straight"), check=True, capture_output=True)
    seconds = time.monotonic() - started
    expected = json.loads((tmp_path / "straight" / "manifest.json").read_text())
    output = tmp_path / "killed"
    moments = np.linspace(0.05, 0.98, pytestconfig.getoption("--kills")) * seconds
    for moment in rng.sample(list(moments), len(moments)):
        process = subprocess.Popen(
            command(output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if output.exists():  # a kill that came too late: the corpus must be whole
            assert json.loads((output / "manifest.json").read_text())["files"] == expected["files"]
            shutil.rmtree(output)
    subprocess.run(command(output), check=True, capture_output=True)
    found = json.loads((output / "manifest.json").read_text())
    assert found["files"] == expected["files"]
    assert found["splits"] == expected["splits"]
    assert found["report"] == expected["report"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big", "killed", "library", "straight"]


@pytest.fixture
def given(library: Path, tmp_path: Path) -> str:
    """The path of a tokenizer that is given, with which documents are encoded as soon as they are read."""
    tokenizer = Tokenizer.train("bpe", [path.read_text() for path in sorted(library.iterdir())], vocab_size=300)
    tokenizer.save(tmp_path / "given.json")
    return str(tmp_path / "given.json")


def test_a_given_tokenizer_gives_what_one_that_is_trained_gives(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text of documents is kept for the one and not for the other; also weights and examples are the same."""
    monkeypatch.setattr("sheepop.data.gather.UNIT_BYTES", 20_000)
    monkeypatch.setattr("sheepop.data.gather.PART_BYTES", 5_000)
    (library / "200b.txt").write_text("with \u0378, which no version of Unicode knows\n")
    selection = Selection("standard", "exact", weights=parse_weights([f"{library}=2.5"]))
    trained = prepare([library], tmp_path / "trained", selection, tokenizer="bpe", vocab_size=300)
    again = prepare([library], tmp_path / "again", selection, tokenizer=str(trained.path / "tokenizer.json"))
    assert again.manifest["files"] == trained.manifest["files"]
    assert again.manifest["splits"] == trained.manifest["splits"]
    assert again.manifest["report"] == trained.manifest["report"]
    examples = report_of(again)["dropped"]["identical to an earlier document"]["examples"]
    assert [Path(example["source"]).name for example in examples] == ["280.txt", "281.txt", "282.txt"]


def test_a_given_tokenizer_encodes_both_halves_of_a_single_text(given: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("The quiet wolf and the sheep. " * 50)
    corpus = prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=given, val_fraction=0.1)
    assert documents_of(corpus, "train") == [("The quiet wolf and the sheep. " * 50)[:1350]]
    assert documents_of(corpus, "val") == [("The quiet wolf and the sheep. " * 50)[1350:]]


def test_a_file_that_changes_before_it_is_read_again_is_told(
    library: Path, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing(*arguments: Any, **settings: Any) -> Any:
        gathered = gather_all(*arguments, **settings)
        (library / "280.txt").write_text("something else")
        return gathered

    monkeypatch.setattr("sheepop.data.prepare.gather_all", changing)
    with pytest.raises(ChangedError, match=r"280\.txt changed"):
        prepare([library], tmp_path / "out", Selection(deduplicate="exact"), tokenizer=given)
    assert not (tmp_path / "out").exists()
