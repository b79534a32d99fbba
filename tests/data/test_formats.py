import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.data.documents import documents_of_file, iter_documents
from sheepop.data.encodings import TextStream
from sheepop.data.records import json_values
from sheepop.data.splitting import split_at, split_stream, split_utf8
from sheepop.utils.errors import DataError

PROSE = "The shepherd counted his sheep before the evening came, and one of them was missing again. "


def texts(file: Path) -> list[str]:
    return [document.text for document in documents_of_file(file, separator=None)]


# Encodings


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("latin-1", "Le café était fermé, où l'élève déçu pleurait à côté du garçon. "),
        ("cp1252", "“Hello,” she said — it’s fine… Über die Straße gehen wir nach Köln. "),
        ("cp1251", "Все счастливые семьи похожи друг на друга, каждая несчастлива по-своему. "),
        ("koi8-r", "Все счастливые семьи похожи друг на друга, каждая несчастлива по-своему. "),
        ("shift_jis", "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。"),
        ("gb18030", "道可道，非常道。名可名，非常名。无名天地之始。"),
        ("iso8859-7", "Η Ελλάδα είναι μια χώρα στη νότια Ευρώπη. "),
        ("utf-16-le", "Plain words in two bytes each. "),
        ("utf-16", "Ünïcode with a mark 😀. "),
        ("utf-32", "Ünïcode with a mark 😀. "),
        ("utf-8-sig", "Ünïcode with a mark 😀. "),
    ],
)
def test_any_encoding_is_read_and_reported(tmp_path: Path, encoding: str, text: str) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes((text * 20).encode(encoding))
    (document,) = documents_of_file(file, separator=None)
    assert document.text == text * 20
    marked = {"utf-16": "utf-16-le", "utf-32": "utf-32-le", "utf-8-sig": "utf-8"}
    assert text.encode(document.encoding) == text.encode(marked.get(encoding, encoding))


def test_the_first_byte_beyond_ascii_decides_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    ascii_part = PROSE * (9_000_000 // len(PROSE))  # beyond the first block
    accents = "L'élève déçu était fâché à côté du café. " * 50
    for encoding, expected in (("utf-8", "utf-8"), ("latin-1", "cp1252")):
        file.write_bytes((ascii_part + accents).encode(encoding))
        documents = list(documents_of_file(file, separator=None))
        assert "".join(document.text for document in documents) == ascii_part + accents
        assert documents[-1].encoding == expected


def test_damage_behind_the_first_block_is_an_error_with_its_offset(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    good = ("é" + PROSE).encode() * 100_000
    file.write_bytes(good + b"\xff\xff" + good)
    with pytest.raises(DataError, match=rf"0xff at offset {len(good)} "):
        texts(file)


@pytest.mark.parametrize(
    "content",
    [
        bytes(range(256)) * 9,
        b"\x7fELF\0\0",
        b"text\0text",
        bytes(range(1, 32)) * 9,
        "\ud800".encode("utf-8", "surrogatepass") + b" x",
    ],
)
def test_binary_with_a_text_ending_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.txt is not .*text.*offset"):
        texts(file)


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from(["a.txt", "a.json", "a.csv", "a.html", "a.xml", "a.gz", "a.tar", "a.zip", "a.pdf"]),
)
def test_any_bytes_under_any_name_give_text_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    file = tmp_path_factory.mktemp("any") / name
    file.write_bytes(content)
    try:
        for document in documents_of_file(file, separator="|", skipped=[]):
            document.text.encode("utf-8")
    except DataError:
        pass


# Streams


@settings(deadline=None)
@given(
    st.lists(st.text(alphabet="ab\n \r\x1c\u3000é|<>", max_size=30), max_size=30),
    st.sampled_from([None, "<|>", "\n\n", "b", "é"]),
    st.sampled_from([3, 17, 10**6]),
)
def test_bytes_are_split_as_the_text_is(chunks: list[str], separator: str | None, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sheepop.data.splitting.MAX_DOCUMENT_CHARACTERS", limit)
        pieces = split_utf8((chunk.encode() for chunk in chunks), separator, "a")
        assert [piece.decode() for piece in pieces] == list(split_stream(chunks, separator, "a"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "ascii"])
def test_a_stream_gives_the_same_text_in_utf8(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks end in the middle of characters here."""
    monkeypatch.setattr("sheepop.data.encodings.FIRST_BLOCK_BYTES", 700)
    monkeypatch.setattr("sheepop.data.encodings.BLOCK_BYTES", 13)
    text = "Plain. " * 50 if encoding == "ascii" else "Ein schöner Gruß – für “alle”. " * 50
    raw = text.encode(encoding)
    stream = TextStream(io.BytesIO(raw), "a")
    blocks = list(stream.in_utf8())
    assert b"".join(blocks).decode() == "".join(TextStream(io.BytesIO(raw), "a")) == text
    assert all(block.decode() for block in blocks)
    for damaged in (raw[:900] + b"\x00" + raw[900:], raw[:-30] + b"\xff\xfe\xc3" + raw[-30:]):
        reasons = []
        for read in (TextStream.__iter__, TextStream.in_utf8):
            try:
                reasons.append(str(list(map(str, read(TextStream(io.BytesIO(damaged), "a"))))[:0]))
            except DataError as error:
                reasons.append(str(error))
        assert reasons[0] == reasons[1]


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab\n |<>", max_size=30), max_size=30), st.sampled_from([None, "<|>", "\n\n", "b"]))
def test_how_a_text_comes_in_chunks_makes_no_difference(chunks: list[str], separator: str | None) -> None:
    whole = "".join(chunks)
    assert list(split_stream(chunks, separator, "a")) == split_at(whole, separator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sheepop.data.splitting.MAX_DOCUMENT_CHARACTERS", 17)
        pieces = list(split_stream(chunks, separator, "a"))
        assert pieces == list(split_stream([whole], separator, "a")) == list(split_stream(whole, separator, "a"))
        assert all(len(piece) <= 17 + len(separator or "") for piece in pieces)
        # Only white space is ever lost.
        assert "".join("".join(pieces).split()) == "".join(
            (whole.replace(separator, "") if separator else whole).split()
        )


def test_a_long_text_is_cut_at_paragraph_ends_and_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.txt"
    paragraph = PROSE * 500 + "\n\n"
    whole = paragraph * (20_000_000 // len(paragraph))
    file.write_text(whole)
    pieces = texts(file)
    assert "".join(pieces) == whole
    assert len(pieces) == 3
    assert all(piece.endswith("\n\n") and 7_900_000 < len(piece) <= 8_000_000 for piece in pieces[:2])
    assert capsys.readouterr().err.count("cut at paragraph ends") == 1


def test_a_large_file_is_read_in_little_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with file.open("w") as out:
        for _ in range(300):
            out.write((PROSE * 10 + "\n\n") * 600)  # 164 MB in all
    script = (
        "import resource, sys; from pathlib import Path; from sheepop.data.documents import documents_of_file\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "characters = sum(len(d.text) for d in documents_of_file(Path(sys.argv[1]), separator='<|endoftext|>'))\n"
        "print(characters, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=True)
    characters, kilobytes = map(int, done.stdout.split())
    assert characters == file.stat().st_size
    assert kilobytes < 80_000


# Records


def test_csv_gives_the_named_column_with_its_line_breaks(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(
        'id,Text,note\n1,"one, with\na line",a much longer note than the text itself is\n2,"two ""quoted""",b\n'
    )
    assert texts(file) == ["one, with\na line", 'two "quoted"']


def test_csv_without_a_usual_name_gives_the_longest_column_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.csv"
    file.write_text("id;plot;title\n" + "".join(f"{n};{PROSE}{n};film {n}\n" for n in range(3)))
    assert texts(file) == [f"{PROSE}{n}" for n in range(3)]
    assert '"plot"' in capsys.readouterr().err


def test_tables_without_a_header_or_with_odd_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tsv").write_text(f'17\t{PROSE}\n18\tit is 5" long\n19\ttoo\tmany\n')
    assert texts(tmp_path / "a.tsv") == [PROSE, 'it is 5" long']
    assert "1 of its rows left out" in capsys.readouterr().err
    (tmp_path / "long.csv").write_text("text\n" + "x" * 1_000_000 + "\n")
    assert [len(text) for text in texts(tmp_path / "long.csv")] == [1_000_000]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([{"text": "a"}, {"text": "b"}], ["a", "b"]),
        (["a", "b"], ["a", "b"]),
        ({"title": "t", "body": "the body"}, ["the body"]),
        ({"version": "1", "data": [{"content": "x"}, {"content": "y"}]}, ["x", "y"]),
        ([{"id": 1, "long": PROSE, "short": "s"}], [PROSE]),
        ([{"text": "good"}, {"text": "\ud800"}, 7, None], ["good"]),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_documents(tmp_path: Path, value: object, expected: list[str], indent: int | None) -> None:
    for name in ("a.json", "a.txt", "noending"):
        (tmp_path / name).write_text(json.dumps(value, indent=indent))
        assert texts(tmp_path / name) == expected


@settings(deadline=None)
@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        )
    ),
    st.integers(1, 7),
    st.booleans(),
)
def test_a_json_array_in_chunks_is_what_the_json_module_reads(
    values: list[object], size: int, ascii_only: bool
) -> None:
    text = json.dumps(values, ensure_ascii=ascii_only)
    chunks = [text[start : start + size] for start in range(0, len(text), size)]
    assert list(json_values(chunks, "a")) == json.loads(text) == values
    if values:
        with pytest.raises(DataError):
            list(json_values([text[:-1]], "a"))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('[{"text": "a"}, {"text": }]', "character 2[45]"),
        ('[{"text": "a"}, {"te', "not JSON"),
        ('[{"text": "a"}', "cut off"),
        ("[" * 100_000, "nested|not JSON"),
        ("[1, 2]", "no value is a string"),
        ('{"a": 1, "b": 2}', "its columns: a, b"),
    ],
)
def test_broken_json_says_where(tmp_path: Path, content: str, match: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=match):
        texts(tmp_path / "a.json")


def test_a_label_is_not_the_text_and_many_columns_are_not_all_listed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"kind": PROSE, "said": f"short {n}"} for n in range(3)]))
    assert texts(tmp_path / "a.json") == ["short 0", "short 1", "short 2"]
    (tmp_path / "b.json").write_text(json.dumps({f"c{n}": n for n in range(1030)}))
    with pytest.raises(DataError, match=r"c0, c1, .*c29 and 1,000 more\."):
        texts(tmp_path / "b.json")


def test_json_lines_under_other_names(tmp_path: Path) -> None:
    content = "".join(json.dumps({"text": f"t{n}", "id": n}) + "\n" for n in range(3))
    for name in ("a.json", "a.txt", "a.ndjson", "a"):
        (tmp_path / name).write_text(content)
        assert texts(tmp_path / name) == ["t0", "t1", "t2"]


def test_code_that_looks_like_json_stays_text(tmp_path: Path) -> None:
    for name, content in (("a.txt", "{ not json }\n{ at all }\n"), ("a.js", '{"text": 1}\n'), ("a.md", "[link](to)\n")):
        (tmp_path / name).write_text(content)
        assert texts(tmp_path / name) == [content]


def write_parquet(path: Path, columns: dict[str, list[object]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=400)


def test_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_parquet(tmp_path / "a.parquet", {"id": list(range(1000)), "text": [f"row {n}" for n in range(999)] + [None]})
    assert texts(tmp_path / "a.parquet") == [f"row {n}" for n in range(999)]
    (tmp_path / "a.parquet").rename(tmp_path / "data.bin")  # by content
    assert len(texts(tmp_path / "data.bin")) == 999
    write_parquet(tmp_path / "b.parquet", {"key": ["k"], "plot": [PROSE]})
    assert texts(tmp_path / "b.parquet") == [PROSE]
    assert '"plot"' in capsys.readouterr().err
    write_parquet(tmp_path / "c.parquet", {"id": [1], "price": [2.5]})
    with pytest.raises(DataError, match=r"its columns: id \(int64\), price \(double\)"):
        texts(tmp_path / "c.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="damaged or cut off"):
        texts(tmp_path / "cut.parquet")


# Pages


PAGE = f"""<!DOCTYPE html><html><head><meta charset="{{charset}}"><title>T</title></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/login">Log in</a></li></ul></nav>
<article><h1>Sheep and café</h1><p>{PROSE * 4}</p><p>{PROSE * 3}</p></article>
<script>var hidden = 1;</script><footer>All rights reserved</footer></body></html>"""


@pytest.mark.parametrize(("charset", "found"), [("utf-8", "utf-8"), ("iso-8859-2", "iso8859-2")])
def test_html_gives_the_main_text(tmp_path: Path, charset: str, found: str) -> None:
    for name in ("a.html", "page.php-output"):
        (tmp_path / name).write_bytes(PAGE.format(charset=charset).encode(charset))
        (document,) = documents_of_file(tmp_path / name, separator=None)
        assert "café" in document.text
        assert document.text.count(PROSE.strip()) == 7
        assert not any(word in document.text for word in ("Log in", "hidden", "<p>"))
        assert document.encoding == found


def test_short_html_and_empty_html(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<p>Only a <b>few</b> words</p>")
    assert texts(tmp_path / "a.html")[0].split() == "Only a few words".split()
    (tmp_path / "b.html").write_text("<html><body><img src='x.png'></body></html>")
    with pytest.raises(DataError, match="without text"):
        texts(tmp_path / "b.html")


def test_xml_gives_the_text_of_its_elements(tmp_path: Path) -> None:
    file = tmp_path / "a.xml"
    file.write_text("<?xml version='1.0'?>\n<r a='no'><t>One &amp; <b>bo</b>ld</t><t>two</t>\n  <t>three</t></r>")
    assert texts(file) == ["One & bold\ntwo\nthree"]
    file.write_bytes("<?xml version='1.0' encoding='iso-8859-1'?><r>café</r>".encode("latin-1"))
    assert texts(file) == ["café"]
    file.write_text("<r><t>cut")
    with pytest.raises(DataError, match="not XML"):
        texts(file)


def test_xml_entities_are_neither_expanded_nor_fetched(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret words")
    levels = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    laughs = f'<!DOCTYPE r [<!ENTITY l0 "ha">{levels}]><r>start &l9; end</r>'
    outside = f'<!DOCTYPE r [<!ENTITY x SYSTEM "{(tmp_path / "secret").as_uri()}">]><r>start &x; end</r>'
    for content in (laughs, outside):
        (tmp_path / "a.xml").write_text(content)
        try:
            found = "".join(texts(tmp_path / "a.xml"))
        except DataError:
            continue
        assert "start" in found
        assert "secret" not in found
        assert "hahaha" not in found


def pdf_with(text: str) -> bytes:
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode() if text else b""
    parts = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, start=1):
        places.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, part)
    table = b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
    return out + table + b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % len(out)


def locked(pdf: bytes, user_password: str) -> bytes:
    import pypdf

    writer = pypdf.PdfWriter(io.BytesIO(pdf))
    writer.encrypt(user_password, "owner", algorithm="AES-256")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_pdf(tmp_path: Path) -> None:
    file = tmp_path / "a.pdf"
    file.write_bytes(pdf_with("Sheep may safely graze"))
    assert texts(file) == ["Sheep may safely graze"]
    file.write_bytes(locked(pdf_with("Sheep may safely graze"), ""))
    assert texts(file) == ["Sheep may safely graze"]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda: pdf_with(""), "no text in its 1 pages"),
        (lambda: locked(pdf_with("Sheep"), "secret"), "locked with a password"),
        (lambda: pdf_with("Sheep")[:60], "cannot be read|no text"),
        (lambda: b"just words", "cannot be read"),
    ],
)
def test_pdfs_that_give_nothing_say_why(tmp_path: Path, content: Callable[[], bytes], match: str) -> None:
    (tmp_path / "a.pdf").write_bytes(content())
    with pytest.raises(DataError, match=match):
        texts(tmp_path / "a.pdf")


def picture(path: Path) -> None:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (900, 160), "white")
    ImageDraw.Draw(image).text((30, 40), "Sheep may safely graze", fill="black", font=ImageFont.load_default(size=64))
    image.save(path)


def test_image_by_ocr(tmp_path: Path) -> None:
    import pytesseract

    try:
        pytesseract.get_tesseract_version()
    except pytesseract.TesseractNotFoundError:
        pytest.skip("Tesseract is not installed")
    for name in ("a.png", "a.tiff", "no-ending"):
        picture(tmp_path / "a.png")
        if name.endswith("tiff"):
            picture(tmp_path / name)
        else:
            (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
        assert texts(tmp_path / name) == ["Sheep may safely graze"]


def test_without_tesseract_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="apt install tesseract-ocr"):
        texts(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("text")
    skipped: list[str] = []
    assert [d.text for d in iter_documents([tmp_path], separator=None, skipped=skipped)] == ["text"]
    assert len(skipped) == 1


@pytest.mark.parametrize(
    ("module", "name", "content"),
    [
        ("trafilatura", "a.html", b"<html><p>words"),
        ("lxml", "a.xml", b"<?xml version='1.0'?><r>x</r>"),
        ("pypdf", "a.pdf", pdf_with("x")),
        ("pyarrow", "a.parquet", b"PAR1PAR1"),
        ("zstandard", "a.zst", b"\x28\xb5\x2f\xfd  "),
        ("charset_normalizer", "a.txt", "élève déçu à côté".encode("latin-1")),
        ("pytesseract", "a.png", b"\x89PNG\r\n\x1a\n"),
    ],
)
def test_a_missing_library_is_an_error_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, content: bytes
) -> None:
    for loaded in [loaded for loaded in sys.modules if loaded == module or loaded.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"pip install 'sheepop\[(formats|ocr)\]'"):
        texts(tmp_path / name)
