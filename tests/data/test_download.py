import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from sheepop.data.download import download, list_corpora
from sheepop.utils.errors import ConfigError

pytest.importorskip("huggingface_hub", reason="needs the 'corpora' extra")
pyarrow = pytest.importorskip("pyarrow", reason="needs the 'corpora' extra")

PROJECT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"

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


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for the files of its class attribute."""

    files: ClassVar[dict[str, bytes]] = {}
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        match = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        body = self.files.get(f"{match[1]}/{match[2]}") if match else None
        if body is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag, size = hashlib.sha256(body).hexdigest(), len(body)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), int(asked[2] or size - 1)
            body = body[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def parquet_bytes(rows: list[str]) -> bytes:
    from pyarrow import BufferOutputStream, parquet, table

    buffer = BufferOutputStream()
    parquet.write_table(table({"text": rows}), buffer)
    return buffer.getvalue().to_pybytes()


@pytest.fixture
def hub() -> Iterator[str]:
    reviews = [{"title": "Good", "text": "I like it.<br />Very.", "rating": 5.0}, {"title": "Bad", "text": "No."}]
    Hub.files = {
        "Salesforce/wikitext/wikitext-2-raw-v1/train-00000-of-00001.parquet": parquet_bytes(WIKI_ROWS),
        "Salesforce/wikitext/wikitext-103-raw-v1/train-00000-of-00002.parquet": parquet_bytes(WIKI_ROWS),
        "Salesforce/wikitext/wikitext-103-raw-v1/train-00001-of-00002.parquet": parquet_bytes(
            [" = Third = \n", " é \n"]
        ),
        "roneneldan/TinyStories/TinyStoriesV2-GPT4-train.txt": b"One.\n<|endoftext|>\nTwo.\n<|endoftext|>\nThree.\n",
        "McAuley-Lab/Amazon-Reviews-2023/raw/review_categories/All_Beauty.jsonl": "\n".join(
            map(json.dumps, reviews)
        ).encode(),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run_download(folder: Path, endpoint: str, *words: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    # A process of its own: the hub's client reads its environment when it is imported.
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hub_cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": str(int(offline)),
        "PYTHONPATH": str(PROJECT),
    }
    for name in ("HF_HUB_CACHE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        environment.pop(name, None)
    code = (
        "import sys; from pathlib import Path; from sheepop.data.download import download\n"
        "from sheepop.utils.errors import SheepopError\n"
        "name, version, max_bytes = sys.argv[1:]\n"
        "try:\n"
        "    print(download(name, version=version or None, data_dir=Path('data'),"
        " max_bytes=int(max_bytes) if max_bytes else None))\n"
        "except SheepopError as error:\n"
        "    print(error, file=sys.stderr); sys.exit(error.exit_status)\n"
    )
    command = [sys.executable, "-c", code, *words, *[""] * (3 - len(words))]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "version", "file", "documents"),
    [
        ("wiki", "2", "wikitext_2.txt", WIKI_ARTICLES),
        ("wiki", "103", "wikitext_103.txt", [*WIKI_ARTICLES, "= Third = \n é "]),
        ("tinystories", "", "tinystories.txt", ["One.", "Two.", "Three."]),
        ("amazon", "", "amazon_reviews.txt", ["Good\nI like it.\nVery.", "Bad\nNo."]),
    ],
)
def test_a_corpus_of_the_hub_becomes_one_text_file(
    tmp_path: Path, hub: str, name: str, version: str, file: str, documents: list[str]
) -> None:
    result = run_download(tmp_path, hub, name, version)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(Path("data") / file)
    text = (tmp_path / "data" / file).read_text(encoding="utf-8")
    assert [document.strip() for document in text.split("<|endoftext|>")] == [text.strip() for text in documents]
    assert [path.name for path in (tmp_path / "data").iterdir()] == [file]


def test_max_bytes_ends_after_a_whole_document(tmp_path: Path, hub: str) -> None:
    assert run_download(tmp_path, hub, "tinystories", "", "5").returncode == 0
    assert (tmp_path / "data" / "tinystories.txt").read_text() == "One.\n<|endoftext|>\nTwo."


def test_what_is_there_is_not_fetched_again(tmp_path: Path, hub: str) -> None:
    file = tmp_path / "data" / "wikitext_2.txt"
    file.parent.mkdir()
    file.write_text("mine")
    result = run_download(tmp_path, hub, "wiki")
    assert result.returncode == 0
    assert "there already" in result.stderr
    assert file.read_text() == "mine"


def test_a_hub_that_cannot_be_reached_is_a_paragraph_and_leaves_nothing(tmp_path: Path) -> None:
    # Offline mode fails at once, where a refused connection is tried again for half a minute.
    result = run_download(tmp_path, "http://127.0.0.1:9", "wiki", offline=True)
    assert result.returncode == 3
    assert "HF_ENDPOINT" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "data").iterdir())


def test_a_file_that_the_hub_does_not_have_is_a_paragraph(tmp_path: Path, hub: str) -> None:
    Hub.files = {}
    result = run_download(tmp_path, hub, "tinystories")
    assert result.returncode == 3
    assert "TinyStoriesV2-GPT4-train.txt" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_names_and_versions_are_told_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'wiki'"):
        download("wikki", data_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"no version '3'.*2, 103"):
        download("wiki", version="3", data_dir=tmp_path)
    with pytest.raises(ConfigError, match="max-bytes"):
        download("wiki", data_dir=tmp_path, max_bytes=0)
    with pytest.raises(ConfigError, match="leave out"):
        download("python", version="2", data_dir=tmp_path)


def test_the_list_names_every_corpus() -> None:
    table = list_corpora()
    for name in ("wiki", "amazon", "tinystories", "plays", "python"):
        assert re.search(rf"^{name} ", table, flags=re.MULTILINE)
