import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.data.documents import Document, documents_of_file, iter_documents, list_files
from sheepop.data.download import download
from sheepop.utils.errors import DataError

SEPARATOR = "<|endoftext|>"


def texts(*sources: Path, separator: str | None = SEPARATOR) -> list[str]:
    return [document.text for document in iter_documents(sources, separator=separator)]


def test_a_file_is_one_document_kept_to_the_last_byte(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\r\nfirst\r\nsecond \xc3\xa9\r\n\r\n")
    assert list(iter_documents([file], separator=SEPARATOR)) == [
        Document("\r\nfirst\r\nsecond é\r\n\r\n", str(file)),
    ]


def test_a_separator_splits_a_file_and_takes_its_newlines_along(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n<|endoftext|>\n\n<|endoftext|>\n  two\n\n<|endoftext|>\nthree")
    assert texts(file) == ["one", "  two", "three"]
    assert texts(file, separator=None) == [file.read_text()]


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab \n|é😀", min_size=1).filter(lambda text: text.strip()), min_size=2, max_size=5))
def test_documents_joined_by_the_separator_come_back(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    file = tmp_path_factory.mktemp("documents") / "a.txt"
    file.write_bytes(f"\n{SEPARATOR}\n".join(parts).encode())
    assert texts(file) == [part.strip("\r\n") for part in parts]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_understood_and_removed(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("déjà 😀".encode(encoding))
    assert texts(file) == ["déjà 😀"]


@pytest.mark.parametrize(
    ("content", "offset"), [(b"good \xff bad", 5), (b"good\0bad", 4), ("é".encode() * 3 + b"\xc3", 6), (b"caf\xe9 ", 3)]
)
def test_a_named_file_that_is_not_text_is_an_error_with_the_offset(tmp_path: Path, content: bytes, offset: int) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.txt.*\b{offset}\b"):
        texts(file)


def test_in_a_folder_what_is_not_text_is_skipped_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "z.txt").write_text("last")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".secret.txt").write_text("no")
    (tmp_path / ".hidden" / "x.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert texts(tmp_path) == ["first", "last"]
    assert "picture.png" in capsys.readouterr().err


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("text")
    os.symlink(tmp_path, tmp_path / "a" / "again", target_is_directory=True)
    os.symlink(tmp_path / "nowhere", tmp_path / "a" / "broken")
    assert texts(tmp_path) == ["text"]


def test_json_lines_have_a_document_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    # U+2028 and U+0085 end lines for str.splitlines, but may stand inside a JSON string.
    expected = ["one\ntwo", "three\u2028four\u0085five"]
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in expected]
    file.write_bytes("\r\n".join([*lines, "", ""]).encode())
    assert texts(file) == expected


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "half',
        r'{"text": "\ud800"}',
        '{"body": 4}',
        '["text"]',
        "7",
        '{"text": null}',
        '{"text": 3}',
        "\xff",
    ],
)
def test_bad_json_lines_are_counted_and_the_first_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(f'{{"text": "good"}}\n{line}\n{{"text": "too"}}\n{line}\n'.encode("latin-1"))
    skipped: list[str] = []
    assert [d.text for d in iter_documents([file], separator=None, skipped=skipped)] == ["good", "too"]
    assert len(skipped) == 1
    assert "2 of its lines" in skipped[0]
    assert "line 2" in skipped[0]
    with pytest.raises(DataError, match="line 2"):
        list(iter_documents([file], separator=None, strict=True))
    file.write_bytes(f"{line}\n{line}\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.jsonl.*(line 1|columns: body|no column)"):
        texts(file)


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(f"\n \n{SEPARATOR}\n")
    (tmp_path / "folder").mkdir()
    for sources in ([tmp_path / "empty.txt"], [tmp_path / "blank.txt"], [tmp_path / "folder"], []):
        with pytest.raises(DataError):
            texts(*sources)
    with pytest.raises(DataError, match=r"no file or folder .*missing"):
        list_files([tmp_path / "missing"])


def test_a_prepared_corpus_in_a_folder_is_not_read_as_text(tmp_path: Path) -> None:
    prepared = tmp_path / "prepared" / "a-0123"
    prepared.mkdir(parents=True)
    for name in ("manifest.json", "tokenizer.json", "train.bin", "val.bin"):
        (prepared / name).write_text("{}")
    (tmp_path / "a.txt").write_text("text")
    assert list_files([tmp_path]) == [tmp_path / "a.txt"]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert texts(tmp_path / "a.txt", tmp_path) == ["text"]


def test_patterns_choose_files(tmp_path: Path) -> None:
    for name in ("a.md", "b.py", "notes/c.md", "notes/deep/d.md", "node_modules/e.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")

    def found(**patterns: list[str]) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in list_files([tmp_path], **patterns)]

    assert found(include=["*.md"], exclude=["node_modules"]) == ["a.md", "notes/c.md", "notes/deep/d.md"]
    assert found(include=["notes/*"]) == ["notes/c.md", "notes/deep/d.md"]
    assert found(include=["**/*.md"], exclude=["notes/deep/", "node_*/*"]) == ["a.md", "notes/c.md"]
    with pytest.raises(DataError, match="patterns"):
        found(include=["*.rs"])
    assert [d.text for d in iter_documents([tmp_path], separator=None, include=["b.py"])] == ["text"]


def test_strict_makes_an_unreadable_file_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_bytes(b"no\0text")
    skipped: list[str] = []
    assert [d.text for d in iter_documents([tmp_path], separator=None, skipped=skipped)] == ["text"]
    assert len(skipped) == 1
    assert "b.txt" in skipped[0]
    with pytest.raises(DataError, match=r"b\.txt"):
        list(iter_documents([tmp_path], separator=None, strict=True))


def test_a_folder_that_cannot_be_opened_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    scandir = os.scandir

    def guarded(path: str) -> object:  # the tests may run as a user whom no permission stops
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    skipped: list[str] = []
    assert [d.text for d in iter_documents([tmp_path], separator=None, skipped=skipped)] == ["text"]
    assert "closed cannot be opened: Permission denied" in skipped[0]
    with pytest.raises(DataError, match="closed cannot be opened"):
        list(iter_documents([tmp_path], separator=None, strict=True))
    with pytest.raises(DataError, match="closed cannot be opened"):
        list_files([tmp_path / "closed"])


def test_a_file_that_changes_or_vanishes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for change in (lambda: file.write_text("other text"), file.unlink):
        file.write_text("one|two")
        documents = documents_of_file(file, separator="|")
        assert next(documents).text == "one"
        change()
        with pytest.raises(DataError, match=r"a\.txt (changed|cannot be read)"):
            list(documents)


def test_the_record_of_a_downloaded_corpus_is_no_text(tmp_path: Path) -> None:
    record = json.dumps({"corpus": "tales", "licence": "MIT", "sha256": "0" * 64})
    for name in ("tales.json", "plays.json", "alone.json", "mine.json"):
        (tmp_path / name).write_text(record if name != "mine.json" else '{"text": "not a record"}')
    for name in ("tales.txt", "mine.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "plays").mkdir()
    (tmp_path / "plays" / "a.txt").write_text("a play")
    found = [path.relative_to(tmp_path).as_posix() for path in list_files([tmp_path])]
    assert found == ["alone.json", "mine.json", "mine.txt", "tales.txt", "plays/a.txt"]
    assert list_files([tmp_path / "tales.json"]) == [tmp_path / "tales.json"], "named by the user"


def test_what_download_writes_is_known_as_its_record(tmp_path: Path) -> None:
    download("python", data_dir=tmp_path)
    assert (tmp_path / "python.json").is_file()
    assert tmp_path / "python.json" not in list_files([tmp_path])
