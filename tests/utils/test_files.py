import errno
import hashlib
import os

import pytest

from sheepop.utils import files
from sheepop.utils.errors import CheckpointError, NoSpaceError
from sheepop.utils.files import (
    HASHED_AT_ONCE,
    atomic_folder,
    read_json,
    sha256_of_file,
    to_json,
    write_atomic,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file.txt"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(files.os, failing, full_disk)
    with pytest.raises(NoSpaceError, match=r"file\.txt"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_written_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", "x")
        with atomic_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "target"
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"

    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "b").write_text("2")
        raise RuntimeError
    assert names(target) == ["sub"]

    with atomic_folder(target) as folder:
        (folder / "c").write_text("3")
    assert names(target) == ["c"]
    assert names(tmp_path) == ["target"]


def test_a_full_disk_while_publishing_a_folder(tmp_path, monkeypatch):
    target = tmp_path / "target"
    with atomic_folder(target) as folder:
        (folder / "old").write_text("1")
    with pytest.raises(NoSpaceError), atomic_folder(target) as folder:
        (folder / "new").write_text("2")
        monkeypatch.setattr(files.os, "fsync", full_disk)
    assert names(tmp_path) == ["target"]
    assert names(target) == ["old"]


def test_json_round_trip_and_errors(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"ü": [1, 2.5, None]})
    assert read_json(path, CheckpointError) == {"ü": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(float("nan"))
    for content in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.json"):
            read_json(path, CheckpointError)


def test_sha256(tmp_path):
    (tmp_path / "empty").touch()
    assert sha256_of_file(tmp_path / "empty").startswith("e3b0c44298fc1c14")
    for size in (1, HASHED_AT_ONCE, 2 * HASHED_AT_ONCE + 5):
        content = bytes(range(1, 252)) * (size // 251 + 1)
        (tmp_path / "file").write_bytes(content[:size])
        assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()
