"""The `download` command against a real HTTP server that speaks the hub's protocol, and misbehaves as networks do."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import TracebackType
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepop.data.download import download, list_corpora
from sheepop.data.hub_corpora import SEPARATOR, articles, stories
from sheepop.utils.errors import ConfigError

pytest.importorskip("huggingface_hub", reason="needs the 'corpora' extra")
pytest.importorskip("pyarrow", reason="needs the 'corpora' extra")

PROJECT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
STORIES = "roneneldan/TinyStories/TinyStoriesV2-GPT4-train.txt"
WIKI = "Salesforce/wikitext/wikitext-2-raw-v1/train-00000-of-00001.parquet"
REVIEWS = "McAuley-Lab/Amazon-Reviews-2023/raw/review_categories/All_Beauty.jsonl"
# 27 MB: the hub's client writes to the disk in pieces of 10 MB.
MANY_STORIES = f"\n{SEPARATOR}\n".join(f"Story {number}. " + "word " * 2500 for number in range(2150))

WIKI_ROWS = [
    "",
    " = First = \n",
    "",
    " Text of it . \n",
    " = = Part = = \n",
    " More . \n",
    "",
    " = Second = \n",
    " Text \n",
]
WIKI_ARTICLES = ["= First = \n\n Text of it . \n = = Part = = \n More . ", "= Second = \n Text "]


class HubServer:
    """Data sets by `owner/name/path`, what was asked of them, and how to fail.

    Attributes:
        cut_after: bytes of a body that are sent before the connection is cut, by turns; then bodies come whole.
        announced_size: the size that HEAD says, where it is not the true one.
        announced_sha256: likewise.
        status: answers everything with this status.
        seconds_a_piece: how slowly bodies come, in pieces of 64 kB.
        requests: method, path and range of each request, in order.
        bytes_sent: by path of the file.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.cut_after: list[int] = []
        self.announced_size: int | None = None
        self.announced_sha256: str | None = None
        self.status: int | None = None
        self.seconds_a_piece = 0.0
        self.requests: list[tuple[str, str, str]] = []
        self.bytes_sent: dict[str, int] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def gets(self) -> list[tuple[str, str]]:
        """Path and range of each file that was read."""
        return [(path, ranges) for method, path, ranges in self.requests if method == "GET" and "/resolve/" in path]

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.status is not None:
            self.refuse(self.hub.status)
        elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self.send_file(f"{match[1]}/{match[2]}")
        elif match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            self.send_tree(match[1], match[2])
        else:
            self.refuse(404)

    def refuse(self, status: int) -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_tree(self, repository: str, folder: str) -> None:
        paths = [name.removeprefix(f"{repository}/") for name in self.hub.files if name.startswith(f"{repository}/")]
        inside = [path for path in paths if str(PurePosixPath(path).parent) == (folder or ".")]
        if not inside:
            self.refuse(404)
            return
        entries = [
            {"type": "file", "path": path, "oid": "0" * 40, "size": len(self.hub.files[f"{repository}/{path}"])}
            for path in inside
        ]
        body = json.dumps(entries).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, name: str) -> None:
        hub, body = self.hub, self.hub.files.get(name)
        if body is None:
            self.refuse(404)
            return
        size, sha256 = len(body), hub.announced_sha256 or hashlib.sha256(body).hexdigest()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
            if first >= size:
                self.refuse(416)
                return
            body = body[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{sha256}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        announced = hub.announced_size if self.command == "HEAD" and hub.announced_size is not None else len(body)
        self.send_header("Content-Length", str(announced))
        self.end_headers()
        if self.command == "HEAD":
            return
        is_cut = bool(hub.cut_after)
        body = body[: hub.cut_after.pop(0)] if is_cut else body
        try:
            for start in range(0, len(body), 2**16):
                piece = body[start : start + 2**16]
                self.wfile.write(piece)
                hub.bytes_sent[name] = hub.bytes_sent.get(name, 0) + len(piece)
                time.sleep(hub.seconds_a_piece)
        except OSError:  # the reader has gone
            self.close_connection = True
        if is_cut:
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


def parquet_bytes(rows: list[str], rows_per_group: int | None = None) -> bytes:
    from pyarrow import BufferOutputStream, parquet, table

    buffer = BufferOutputStream()
    columns = {"id": list(range(len(rows))), "text": rows}
    parquet.write_table(table(columns), buffer, row_group_size=rows_per_group, compression="zstd")
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def web_pages(shard: int, count: int) -> list[str]:
    """Text that hardly compresses, so that sizes on the wire mean something."""
    draw = random.Random(shard)
    return [f"Page {shard}.{number} " + draw.randbytes(1500).hex() for number in range(count)]


@pytest.fixture
def hub() -> Iterator[HubServer]:
    reviews = [{"title": "Good", "text": "I like it.<br />Very.", "rating": 5.0}, {"title": "Bad", "text": "No."}]
    files = {
        WIKI: parquet_bytes(WIKI_ROWS),
        # The second article runs over the end of the first file.
        "Salesforce/wikitext/wikitext-103-raw-v1/train-00000-of-00002.parquet": parquet_bytes(WIKI_ROWS),
        "Salesforce/wikitext/wikitext-103-raw-v1/train-00001-of-00002.parquet": parquet_bytes(
            [" goes on . \n", " = Third = \n", " é \n"]
        ),
        STORIES: b"One.\n<|endoftext|>\nTwo.\n<|endoftext|>\nThree.\n",
        REVIEWS: "\n".join(map(json.dumps, reviews)).encode(),
    }
    for shard in range(3):
        content = parquet_bytes(web_pages(shard, 400), rows_per_group=100)
        files[f"Skylion007/openwebtext/plain_text/train-{shard:05d}-of-00003.parquet"] = content
        files[f"HuggingFaceFW/fineweb-edu/sample/10BT/00{shard}_00000.parquet"] = content
    with HubServer(files) as server:
        yield server


CODE = """
import sys
from pathlib import Path
from sheepop.data.download import download
from sheepop.utils.errors import SheepopError
name, version, max_bytes, max_documents = sys.argv[1:]
try:
    print(download(name, version=version or None, data_dir=Path("data"), max_bytes=int(max_bytes) or None,
                   max_documents=int(max_documents) or None))
except SheepopError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_status)
"""


def start_download(
    folder: Path,
    endpoint: str,
    name: str,
    version: str = "",
    *,
    max_bytes: int = 0,
    max_documents: int = 0,
    offline: bool = False,
) -> subprocess.Popen[str]:
    # A process of its own: the hub's client reads its environment when it is imported.
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hub_cache"),
        "HF_HUB_OFFLINE": str(int(offline)),
        "PYTHONPATH": str(PROJECT),
    }
    for variable in ("HF_HUB_CACHE", "HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        environment.pop(variable, None)
    command = [sys.executable, "-c", CODE, name, version, str(max_bytes), str(max_documents)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a download; return its status and what it said, which must be no trace."""
    _, said = process.communicate(timeout=120)
    assert "Traceback" not in said, said
    return process.returncode, said


def run_download(folder: Path, hub: HubServer, name: str, version: str = "", **limits: int) -> tuple[int, str]:
    return finish(start_download(folder, hub.endpoint, name, version, **limits))


def documents_in(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").split(f"\n{SEPARATOR}\n")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "version", "stem", "documents"),
    [
        ("wiki", "2", "wikitext_2", WIKI_ARTICLES),
        (
            "wiki",
            "103",
            "wikitext_103",
            [WIKI_ARTICLES[0], WIKI_ARTICLES[1] + "\n goes on . ", " = Third = \n é "],
        ),
        ("tinystories", "", "tinystories", ["One.", "Two.", "Three."]),
        ("amazon", "", "amazon_reviews", ["Good\nI like it.\nVery.", "Bad\nNo."]),
        ("openwebtext", "", "openwebtext", [page for shard in range(3) for page in web_pages(shard, 400)]),
        ("fineweb-edu", "10BT", "fineweb_edu_10BT", [page for shard in range(3) for page in web_pages(shard, 400)]),
    ],
)
def test_a_corpus_of_the_hub_becomes_one_text_file_and_its_record(
    tmp_path: Path, hub: HubServer, name: str, version: str, stem: str, documents: list[str]
) -> None:
    status, said = run_download(tmp_path, hub, name, version)
    assert status == 0, said
    assert "licence" in said
    text = tmp_path / "data" / f"{stem}.txt"
    assert [document.strip() for document in documents_in(text)] == [document.strip() for document in documents]
    assert names_in(text.parent) == {f"{stem}.txt", f"{stem}.json"}
    record = json.loads((tmp_path / "data" / f"{stem}.json").read_text())
    assert record["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert (record["bytes"], record["documents"]) == (text.stat().st_size, len(documents))
    assert record["complete"]
    assert record["revision"] == COMMIT
    assert record["licence"] in said
    for file in record["files"]:
        content = hub.files[f"{record['source']}/{file['path']}"]
        assert (file["bytes"], file["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert file["fetched"] == "whole"


@pytest.mark.parametrize(
    ("name", "limits", "count"),
    [
        ("tinystories", {"max_bytes": 5}, 2),
        ("tinystories", {"max_documents": 1}, 1),
        ("tinystories", {"max_documents": 9}, 3),
        ("wiki", {"max_documents": 1}, 1),
        ("amazon", {"max_bytes": 1}, 1),
        ("openwebtext", {"max_documents": 3}, 3),
        ("openwebtext", {"max_documents": 401}, 401),
        ("openwebtext", {"max_bytes": 10_000}, 4),
        ("openwebtext", {"max_bytes": 10_000_000}, 1200),
        ("openwebtext", {"max_bytes": 10_000, "max_documents": 2}, 2),
    ],
)
def test_a_slice_is_the_beginning_of_the_corpus(
    tmp_path: Path, hub: HubServer, name: str, limits: dict[str, int], count: int
) -> None:
    status, said = run_download(tmp_path, hub, name, **limits)
    assert status == 0, said
    (tmp_path / "whole").mkdir()
    assert run_download(tmp_path / "whole", hub, name)[0] == 0
    (part,), (whole,) = (sorted((folder / "data").glob("*.txt")) for folder in (tmp_path, tmp_path / "whole"))
    assert documents_in(part) == documents_in(whole)[:count]
    record = json.loads(part.with_suffix(".json").read_text())
    assert record["documents"] == count
    assert record["complete"] == (count == len(documents_in(whole)))


def test_a_slice_fetches_only_the_row_groups_that_it_needs(tmp_path: Path, hub: HubServer) -> None:
    assert run_download(tmp_path, hub, "fineweb-edu", max_documents=20)[0] == 0
    (name,) = hub.bytes_sent
    assert name.endswith("000_00000.parquet")
    assert hub.bytes_sent[name] < 0.5 * len(hub.files[name])  # one group of four, and the footer
    record = json.loads((tmp_path / "data" / "fineweb_edu_10BT.json").read_text())
    assert [file["fetched"] for file in record["files"]] == ["in part"]


def test_a_large_slice_takes_whole_files_with_their_sums(tmp_path: Path, hub: HubServer) -> None:
    size = len(hub.files["Skylion007/openwebtext/plain_text/train-00000-of-00003.parquet"])
    assert run_download(tmp_path, hub, "openwebtext", max_bytes=4 * size)[0] == 0
    record = json.loads((tmp_path / "data" / "openwebtext.json").read_text())
    assert [file["fetched"] for file in record["files"]] == ["whole", "in part", "in part"]


def test_a_moved_folder_of_the_data_set_is_found(tmp_path: Path, hub: HubServer) -> None:
    hub.files = {name.replace("/plain_text/", "/data/"): content for name, content in hub.files.items()}
    assert run_download(tmp_path, hub, "openwebtext", max_documents=2)[0] == 0
    hub.files = {name.replace("/data/", "/elsewhere/"): content for name, content in hub.files.items()}
    (tmp_path / "other").mkdir()
    status, said = run_download(tmp_path / "other", hub, "openwebtext", max_documents=2)
    assert status == 3
    assert "data/train-*.parquet" in said


def test_what_is_there_is_not_fetched_again(tmp_path: Path, hub: HubServer) -> None:
    file = tmp_path / "data" / "wikitext_2.txt"
    file.parent.mkdir()
    file.write_text("mine")
    status, said = run_download(tmp_path, hub, "wiki")
    assert status == 0
    assert "there already" in said
    assert file.read_text() == "mine"
    assert not hub.requests


def test_another_slice_is_not_taken_for_the_one_that_is_asked_for(tmp_path: Path, hub: HubServer) -> None:
    assert run_download(tmp_path, hub, "tinystories", max_documents=2)[0] == 0
    before = (tmp_path / "data" / "tinystories.txt").read_bytes()
    status, said = run_download(tmp_path, hub, "tinystories")
    assert status == 3
    assert "--max-documents 2" in said
    assert run_download(tmp_path, hub, "tinystories", max_documents=2)[0] == 0
    assert (tmp_path / "data" / "tinystories.txt").read_bytes() == before


def test_a_json_file_of_the_users_is_left_alone(tmp_path: Path, hub: HubServer) -> None:
    (tmp_path / "data").mkdir()
    mine = tmp_path / "data" / "tinystories.json"
    mine.write_text('{"my": 1}')
    status, said = run_download(tmp_path, hub, "tinystories")
    assert status == 3
    assert str(mine.name) in said
    assert mine.read_text() == '{"my": 1}'


def test_a_connection_that_is_cut_is_gone_on_with(tmp_path: Path, hub: HubServer) -> None:
    hub.files[STORIES] = MANY_STORIES.encode()
    hub.cut_after = [12_000_000, 11_000_000]
    status, said = run_download(tmp_path, hub, "tinystories")
    assert status == 0, said
    assert (tmp_path / "data" / "tinystories.txt").read_text().split() == MANY_STORIES.split()
    assert [ranges for _, ranges in hub.gets()] == ["", f"bytes={10 * 2**20}-", f"bytes={20 * 2**20}-"]


def test_a_cut_connection_does_not_hurt_a_slice(tmp_path: Path, hub: HubServer) -> None:
    hub.files[STORIES] = MANY_STORIES.encode()
    hub.cut_after = [100_000]  # of the first megabyte
    assert run_download(tmp_path, hub, "tinystories", max_documents=300)[0] == 0
    assert documents_in(tmp_path / "data" / "tinystories.txt") == MANY_STORIES.split(f"\n{SEPARATOR}\n")[:300]


def test_a_killed_download_goes_on_where_it_stopped(tmp_path: Path, hub: HubServer) -> None:
    hub.files[STORIES] = MANY_STORIES.encode()
    hub.seconds_a_piece = 0.01
    process = start_download(tmp_path, hub.endpoint, "tinystories")
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob("data/.tinystories.txt.parts/*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "data" / "tinystories.txt").exists()
    hub.seconds_a_piece = 0
    hub.requests.clear()
    status, said = run_download(tmp_path, hub, "tinystories")
    assert status == 0, said
    assert (tmp_path / "data" / "tinystories.txt").read_text().split() == MANY_STORIES.split()
    ((_, asked),) = hub.gets()
    assert int(asked.removeprefix("bytes=").removesuffix("-")) > 0
    assert names_in(tmp_path / "data") == {"tinystories.txt", "tinystories.json"}


def test_a_copy_in_the_shared_cache_is_used(tmp_path: Path, hub: HubServer) -> None:
    snapshot = tmp_path / "hub_cache" / "hub" / "datasets--roneneldan--TinyStories" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    cached = snapshot / "TinyStoriesV2-GPT4-train.txt"
    cached.write_bytes(hub.files[STORIES])
    assert run_download(tmp_path, hub, "tinystories")[0] == 0
    assert not hub.gets()
    cached.write_bytes(hub.files[STORIES].replace(b"O", b"0"))
    (tmp_path / "data" / "tinystories.txt").unlink()
    status, said = run_download(tmp_path, hub, "tinystories")
    assert status == 3
    assert str(cached) in said
    assert cached.exists()


@pytest.mark.parametrize("size_error", [-7, 7])
def test_a_wrong_size_is_refused(tmp_path: Path, hub: HubServer, size_error: int) -> None:
    hub.announced_size = len(hub.files[STORIES]) + size_error
    status, said = run_download(tmp_path, hub, "tinystories")
    assert status == 3
    assert "TinyStoriesV2-GPT4-train.txt" in said
    assert not {"tinystories.txt", "tinystories.json"} & names_in(tmp_path / "data")
    hub.announced_size = None
    assert run_download(tmp_path, hub, "tinystories")[0] == 0
    assert documents_in(tmp_path / "data" / "tinystories.txt") == ["One.", "Two.", "Three."]


def test_a_wrong_hash_is_refused_and_the_next_try_starts_anew(tmp_path: Path, hub: HubServer) -> None:
    hub.announced_sha256 = "ab" * 32
    status, said = run_download(tmp_path, hub, "tinystories")
    assert status == 3
    assert "ab" * 32 in said
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    hub.announced_sha256 = None
    assert run_download(tmp_path, hub, "tinystories")[0] == 0


@pytest.mark.parametrize("damage", ["footer", "pages"])
def test_damaged_parquet_is_a_paragraph(tmp_path: Path, hub: HubServer, damage: str) -> None:
    content = hub.files[WIKI]
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    hub.files[WIKI] = content[:-20] if damage == "footer" else b"PAR1" + bytes(footer - 4) + content[footer:]
    status, said = run_download(tmp_path, hub, "wiki")
    assert status == 3
    assert "Parquet" in said
    assert not list((tmp_path / "data").glob("*.txt"))


def test_reviews_that_are_none_are_named_by_their_line(tmp_path: Path, hub: HubServer) -> None:
    hub.files[REVIEWS] += b'\n\n{"title": "cut'
    status, said = run_download(tmp_path, hub, "amazon")
    assert status == 3
    assert "Line 4" in said


@pytest.mark.parametrize(("status", "advice"), [(401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "status 404")])
@pytest.mark.parametrize("name", ["tinystories", "openwebtext"])
def test_what_the_hub_does_not_give_out_is_a_paragraph(
    tmp_path: Path, hub: HubServer, name: str, status: int, advice: str
) -> None:
    if status == 404:
        hub.files.clear()
    else:
        hub.status = status
    result, said = run_download(tmp_path, hub, name)
    assert result == 3
    assert advice in said or "no files" in said
    assert not names_in(tmp_path / "data")


def test_a_hub_that_cannot_be_reached_is_a_paragraph_and_leaves_nothing(tmp_path: Path) -> None:
    # Offline mode fails at once, where a refused connection is tried again for half a minute.
    status, said = finish(start_download(tmp_path, "http://127.0.0.1:9", "wiki", offline=True))
    assert status == 3
    assert "HF_ENDPOINT" in said
    assert not names_in(tmp_path / "data")


@pytest.mark.parametrize("limits", [{}, {"max_bytes": 10**18}])
def test_too_little_space_is_seen_before_anything_is_fetched(
    tmp_path: Path, hub: HubServer, limits: dict[str, int]
) -> None:
    hub.announced_size = 10**18
    status, said = run_download(tmp_path, hub, "tinystories", **limits)
    assert status == 6
    assert re.search(r"needs about \d+T bytes", said)
    assert not hub.gets()
    assert not names_in(tmp_path / "data")


def test_two_processes_at_once_end_well_with_one_text(tmp_path: Path, hub: HubServer) -> None:
    hub.files[STORIES] = MANY_STORIES.encode()
    hub.seconds_a_piece = 0.002
    processes = [start_download(tmp_path, hub.endpoint, "tinystories") for _ in range(2)]
    results = [finish(process) for process in processes]
    assert [status for status, _ in results] == [0, 0], results
    assert any("waiting for it" in said for _, said in results)
    assert len(hub.gets()) == 1
    assert (tmp_path / "data" / "tinystories.txt").read_text().split() == MANY_STORIES.split()
    assert names_in(tmp_path / "data") == {"tinystories.txt", "tinystories.json"}


def test_unknown_names_and_versions_are_told_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'wiki'"):
        download("wikki", data_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"no version '3'.*2, 103"):
        download("wiki", version="3", data_dir=tmp_path)
    with pytest.raises(ConfigError, match="max-bytes"):
        download("wiki", data_dir=tmp_path, max_bytes=0)
    with pytest.raises(ConfigError, match="max-documents"):
        download("wiki", data_dir=tmp_path, max_documents=-1)
    with pytest.raises(ConfigError, match="leave out"):
        download("python", version="2", data_dir=tmp_path)


def test_an_installed_corpus_has_its_record(tmp_path: Path) -> None:
    folder = download("python", data_dir=tmp_path)
    record = json.loads((tmp_path / "python.json").read_text())
    files = sorted(folder.iterdir())
    assert record["documents"] == len(files)
    assert record["bytes"] == sum(file.stat().st_size for file in files)
    assert record["sha256"] == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def test_the_list_names_every_corpus_with_its_licence() -> None:
    table = list_corpora()
    for name in ("wiki", "amazon", "tinystories", "openwebtext", "fineweb-edu", "plays", "messages", "factbook"):
        assert re.search(rf"^{name} ", table, flags=re.MULTILINE)
    assert {"CDLA-Sharing-1.0", "CC BY-SA 3.0", "ODC-By 1.0"} <= set(
        re.findall(r"CDLA-Sharing-1.0|CC BY-SA 3.0|ODC-By 1.0", table)
    )


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|"), min_size=1), min_size=1))
def test_stories_are_what_stands_between_separators(texts: list[str]) -> None:
    file = SEPARATOR.join(texts)
    lines = file.split("\n")
    lines = [f"{line}\n" for line in lines[:-1]] + lines[-1:]
    assert list(stories(lines)) == [text.strip("\r\n") for text in texts]


@given(st.lists(st.lists(st.text(st.characters(exclude_characters="=\n", exclude_categories=["Cs"])), min_size=1)))
def test_articles_begin_at_their_titles(bodies: list[list[str]]) -> None:
    rows = [row for body in bodies for row in (" = Title = \n", *(f"x{line}\n" for line in body))]
    expected = [" = Title = \n" + "\n".join(f"x{line}" for line in body) for body in bodies]
    assert [article for article in articles(rows) if article] == expected
