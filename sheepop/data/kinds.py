"""What kind of file this is: by its first bytes, and by the ending of its name where the bytes leave it open."""

import json
import re
from pathlib import PurePosixPath
from typing import Literal

from sheepop.data.encodings import byte_order_mark

Packed = Literal["gzip", "zstd", "xz", "bzip2", "zip", "tar"]
Readable = Literal["text", "html", "xml", "json", "jsonl", "csv", "parquet", "pdf", "image"]
Kind = Packed | Readable
HEAD_BYTES = 64 * 1024
SIGNATURES: tuple[tuple[bytes, Kind], ...] = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"PAR1", "parquet"),
    (b"\x89PNG\r\n\x1a\n", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"GIF87a", "image"),
    (b"GIF89a", "image"),
    (b"II*\0", "image"),
    (b"MM\0*", "image"),
)
# Where the bytes cannot be what the name says, the reader of that kind says what is wrong with them.
BINARY_ENDINGS: dict[str, Kind] = {
    ".gz": "gzip",
    ".tgz": "gzip",
    ".zst": "zstd",
    ".xz": "xz",
    ".txz": "xz",
    ".bz2": "bzip2",
    ".zip": "zip",
    ".tar": "tar",
    ".parquet": "parquet",
    ".pdf": "pdf",
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".bmp", ".webp"), "image"),
}
TABLE_ENDINGS = {".csv", ".tsv", ".tab"}
HTML_ENDINGS = {".html", ".htm", ".xhtml"}
JSON_LINES_ENDINGS = {".jsonl", ".ndjson"}
OPEN_ENDINGS = {"", ".txt"}  # names that say nothing about what is inside
COMPRESSION_ENDINGS = {".gz", ".zst", ".xz", ".bz2"}
HTML_START = re.compile(
    r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)


def kind_of(name: str, head: bytes) -> Kind:
    """Return the kind of a file from its name and its first HEAD_BYTES bytes (fewer where it is shorter)."""
    ending = PurePosixPath(name).suffix.lower()
    for signature, kind in SIGNATURES:
        if head.startswith(signature):
            return kind
    if re.match(rb"BZh[1-9]1AY&SY", head):
        return "bzip2"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image"
    if head[257:262] == b"ustar":
        return "tar"
    if head.lstrip(b"\xef\xbb\xbf\0\t\r\n ").startswith(b"%PDF-"):
        return "pdf"
    if head and ending in BINARY_ENDINGS:
        return BINARY_ENDINGS[ending]
    return _kind_of_text(ending, head)


def inner_name(name: str) -> str:
    """Return the name of what is inside a compressed file: `a.csv.gz` → `a.csv`, `a.tgz` → `a.tar`."""
    path = PurePosixPath(name)
    if path.suffix.lower() in {".tgz", ".txz"}:
        return f"{path.stem}.tar"
    return path.stem if path.suffix.lower() in COMPRESSION_ENDINGS else path.name


def _kind_of_text(ending: str, head: bytes) -> Kind:
    mark, encoding = byte_order_mark(head)
    text = head[len(mark) :].decode(encoding or "utf-8", errors="replace")
    start = text.lstrip()
    if ending in TABLE_ENDINGS:
        return "csv"
    if ending in JSON_LINES_ENDINGS:
        return "jsonl"
    if HTML_START.match(text) or (ending in HTML_ENDINGS and re.search(r"<[a-zA-Z!]", start)):
        return "html"
    if start.startswith("<?xml") or (ending == ".xml" and start.startswith("<")):
        return "xml"
    if ending == ".json" and start:
        return "jsonl" if _lines_are_objects(start) else "json"
    if ending in OPEN_ENDINGS and start[:1] in ("{", "["):
        if _lines_are_objects(start):
            return "jsonl"
        if len(head) < HEAD_BYTES and isinstance(_value(start), dict | list):
            return "json"
    return "text"


def _lines_are_objects(text: str) -> bool:
    lines = text.split("\n", 2)
    return len(lines) > 1 and isinstance(_value(lines[0]), dict) and lines[1].lstrip().startswith("{")


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
