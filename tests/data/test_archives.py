import bz2
import gzip
import io
import lzma
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.data import archives
from sheepop.data.documents import documents_of_file, iter_documents
from sheepop.utils.errors import DataError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
}
WORDS = random.Random(5)
TEXT = "\n".join(" ".join(WORDS.choices(["sheep", "may", "safely", "graze", "été"], k=9)) for _ in range(4000))


def texts(file: Path, separator: str | None = None) -> list[str]:
    return [document.text for document in documents_of_file(file, separator=separator)]


def tar_of(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_of(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files_by_name_and_by_content(tmp_path: Path, ending: str) -> None:
    content = COMPRESS[ending](TEXT.encode())
    for name in (f"a.txt.{ending}", "a.dat"):
        (tmp_path / name).write_bytes(content)
        assert texts(tmp_path / name) == [TEXT]
    (tmp_path / f"a.csv.{ending}").write_bytes(COMPRESS[ending](b"id,text\n1,one\n2,two\n"))
    (document, _) = documents_of_file(tmp_path / f"a.csv.{ending}", separator=None)
    assert (document.text, document.source) == ("one", str(tmp_path / f"a.csv.{ending}"))


@pytest.mark.parametrize("ending", COMPRESS)
def test_several_streams_in_one_file_are_one_text(tmp_path: Path, ending: str) -> None:
    (tmp_path / "a").write_bytes(COMPRESS[ending](b"one ") + COMPRESS[ending](b"") + COMPRESS[ending](b"two"))
    assert texts(tmp_path / "a") == ["one two"]


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_cut_or_changed_compressed_file_is_an_error(tmp_path: Path, ending: str) -> None:
    content = COMPRESS[ending](TEXT.encode())
    changed = bytearray(content)
    changed[len(content) // 2] ^= 0x55
    for broken in (content[:-1], content[: len(content) // 2], content[:20], bytes(changed), content + b"garbage"):
        (tmp_path / "a.txt").write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.txt (is damaged|cannot be read)"):
            texts(tmp_path / "a.txt")


MEMBERS = {
    "one.txt": b"first",
    "inner/b.jsonl": b'{"text": "second"}\n{"text": "third"}\n',
    ".hidden": b"no",
    "__MACOSX/one.txt": b"no",
    "inner/c.txt.gz": gzip.compress(b"fourth"),
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.zip", zip_of(MEMBERS)),
        ("a.tar", tar_of(MEMBERS)),
        *((f"a.tar.{ending}", compress(tar_of(MEMBERS))) for ending, compress in COMPRESS.items()),
        ("a.tgz", gzip.compress(tar_of(MEMBERS))),
        ("renamed", zip_of(MEMBERS)),
    ],
)
def test_members_of_archives(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    documents = list(documents_of_file(tmp_path / name, separator=None))
    assert [document.text for document in documents] == ["first", "second", "third", "fourth"]
    found = [document.source.removeprefix(str(tmp_path / name)) for document in documents]
    assert found == ["!one.txt", "!inner/b.jsonl", "!inner/b.jsonl", "!inner/c.txt.gz"]


def test_archives_in_archives_up_to_a_depth(tmp_path: Path) -> None:
    content = zip_of({"x/y.txt": b"deep"})
    (tmp_path / "a.tar").write_bytes(tar_of({"in.zip": content}))
    (document,) = documents_of_file(tmp_path / "a.tar", separator=None)
    assert (document.text, document.source) == ("deep", f"{tmp_path / 'a.tar'}!in.zip!x/y.txt")
    for _ in range(archives.MAX_DEPTH):
        content = zip_of({"in.zip": content})
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match="times over"):
        texts(tmp_path / "a.zip")


def test_a_member_that_cannot_be_read_is_left_out_and_listed(tmp_path: Path) -> None:
    members = {"a.txt": b"good", "b.txt": b"no\0text", "c.gz": gzip.compress(TEXT.encode())[:50], "d.txt": b"also"}
    for name, content in (("a.zip", zip_of(members)), ("a.tar", tar_of(members))):
        (tmp_path / name).write_bytes(content)
        skipped: list[str] = []
        found = [d.text for d in iter_documents([tmp_path / name], separator=None, skipped=skipped)]
        assert found == ["good", "also"]
        assert [f"{name}!{member}" in reason for member, reason in zip(("b.txt", "c.gz"), skipped, strict=True)] == [
            True
        ] * 2
        with pytest.raises(DataError, match=r"!b\.txt"):
            list(iter_documents([tmp_path / name], separator=None, strict=True))
    (tmp_path / "a.zip").write_bytes(zip_of({"b.txt": b"no\0text"}))
    with pytest.raises(DataError, match="nothing that can be read"):
        texts(tmp_path / "a.zip")


def test_damaged_archives(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    whole = zip_of({"a.txt": TEXT.encode(), "b.txt": b"good"})
    changed = bytearray(whole)
    changed[200] ^= 0xFF  # in the first member's data: its checksum fails
    file.write_bytes(changed)
    skipped: list[str] = []
    assert [d.text for d in documents_of_file(file, separator=None, skipped=skipped)] == ["good"]
    assert "a.zip!a.txt" in skipped[0]
    file.write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"a\.zip is damaged"):
        texts(file)
    tar = tar_of({"a.txt": b"x" * 700, "b.txt": b"y" * 700})
    file = tmp_path / "a.tar"
    for length in (100, 600, 1700, 2100, 2400):  # in headers and in data
        file.write_bytes(tar[:length])
        with pytest.raises(DataError, match=r"a\.tar"):
            list(documents_of_file(file, separator=None, strict=True))
    spoiled = bytearray(tar)
    spoiled[1540:1560] = b"?" * 20  # the second header
    file.write_bytes(spoiled)
    with pytest.raises(DataError, match="behind its member 1"):
        texts(file)


def test_locked_zip_and_office_documents_say_what_they_are(tmp_path: Path) -> None:
    content = bytearray(zip_of({"a.txt": b"secret"}))
    content[6] |= 1  # "encrypted", in the member's header and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match="password"):
        texts(tmp_path / "a.zip")
    (tmp_path / "a.docx").write_bytes(zip_of({"[Content_Types].xml": b"<x/>", "word/document.xml": b"<x>t</x>"}))
    with pytest.raises(DataError, match="office document"):
        texts(tmp_path / "a.docx")


@pytest.mark.parametrize("pack", [*COMPRESS, "zip", "tar.gz"])
def test_bombs_are_stopped(tmp_path: Path, pack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    monkeypatch.setattr(archives, "MAX_RATIO", 20)
    zeros = b"ha\n" * 3_000_000
    content = {"zip": lambda: zip_of({"a.txt": zeros}), "tar.gz": lambda: gzip.compress(tar_of({"a.txt": zeros}))}.get(
        pack, lambda: COMPRESS[pack](zeros)
    )()
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match="bomb"):
        texts(tmp_path / "a.txt")


def test_the_budget_holds_over_layers_and_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 2**20)
    monkeypatch.setattr(archives, "MAX_RATIO", 2)
    (tmp_path / "a.zip").write_bytes(zip_of({f"{n}.txt": b"ha\n" * 100_000 for n in range(9)}))
    with pytest.raises(DataError, match="bomb"):
        texts(tmp_path / "a.zip")
    monkeypatch.setattr(archives, "MAX_MEMBERS", 5)
    for name, content in (("b.zip", zip_of), ("b.tar", tar_of)):
        (tmp_path / name).write_bytes(content({f"{n}.txt": b"x" for n in range(6)}))
        with pytest.raises(DataError, match="more than 5 files"):
            texts(tmp_path / name)


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=5),
        st.text("xyz é\n", min_size=1, max_size=2000).filter(str.strip),
        min_size=1,
    ),
    st.sampled_from(["zip", "tar", *COMPRESS]),
)
def test_what_was_packed_comes_out(
    tmp_path_factory: pytest.TempPathFactory, members: dict[str, str], pack: str
) -> None:
    raw = {f"{name}.txt": text.encode() for name, text in members.items()}
    content = {"zip": zip_of, "tar": tar_of}.get(pack, lambda files: COMPRESS[pack](tar_of(files)))(raw)
    file = tmp_path_factory.mktemp("packed") / "a"
    file.write_bytes(content)
    assert texts(file) == list(members.values())
