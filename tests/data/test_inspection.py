import json
import random
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepop.cli import main
from sheepop.config import load_config, parse_overrides
from sheepop.data import inspection
from sheepop.data.inspection import inspect_sources, kind_of, lengths_of
from sheepop.data.inspection_advice import SHAPES, advise, parameters_of, warnings_about
from sheepop.data.inspection_table import format_inspection
from sheepop.data.prepare import Selection, prepare_corpus
from sheepop.data.sketches import EvenSample, FrequentCounter
from sheepop.data.tokenizer import Tokenizer
from sheepop.utils.errors import ConfigError, DataError

WORDS = "sheep dog hill sees the a old and path over runs slowly home again with its young shepherd rain comes".split()
FOOTER = "Subscribe to our letter about sheep."


def story(seed, sentences=12):
    random_words = random.Random(seed)
    return " ".join(
        " ".join(random_words.choices(WORDS, k=random_words.randrange(5, 12))).capitalize() + "."
        for _ in range(sentences)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Files with known contents: 60 stories, 10 exact copies, 6 near copies, a footer, and what is wrong with them."""
    folder = tmp_path_factory.mktemp("texts")
    stories = [story(seed, sentences=40) for seed in range(60)]
    near = [text.replace(text.split()[30], "lamb", 1) for text in stories[:6]]
    texts = [*stories, *stories[50:], *near]
    texts = [f"{text}\n{FOOTER}" if number % 2 else text for number, text in enumerate(texts[:60])] + texts[60:]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "stories.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "mail.txt").write_text("Write to jo@example.org or to +44 20 7946 0958. " + story(99), encoding="utf-8")
    (folder / "wide.md").write_bytes("\ufeff".encode("utf-16-le") + story(98).encode("utf-16-le"))
    (folder / "noise.bin").write_bytes(bytes(range(256)) * 8)
    return folder


@pytest.fixture(scope="module")
def result(folder):
    return inspect_sources([folder], separator="<|endoftext|>")


def test_sizes_are_those_of_the_documents(folder, result):
    texts = [json.loads(line)["text"] for line in (folder / "stories.jsonl").read_text().splitlines()]
    texts += [(folder / "mail.txt").read_text(), (folder / "wide.md").read_bytes().decode("utf-16")]
    assert result["documents"] == len(texts) == 78
    assert result["bytes"] == sum(len(text.encode()) for text in texts)
    assert result["characters"] == sum(map(len, texts))
    assert result["words"] == sum(len(text.split()) for text in texts)
    assert result["lengths"]["quantiles"]["1"] == max(map(len, texts))
    assert sum(result["lengths"]["histogram"]["documents"]) == 78
    assert sum(result["lengths"]["histogram"]["characters"]) == result["characters"]
    assert result["complete"]


def test_kinds_encodings_and_what_cannot_be_read(result):
    assert result["files"]["kinds"] == {".bin": 1, ".jsonl": 1, ".md": 1, ".txt": 1}
    assert result["encodings"]["utf-8"] == 77
    assert sum(result["encodings"].values()) == 78
    assert len(result["files"]["unreadable"]) == 1
    assert "noise.bin" in result["files"]["unreadable"][0]


def test_copies_are_counted(folder, result):
    copies = result["duplicates"]
    assert copies["exact"]["documents"] == 5  # of the ten copies, five had no footer
    assert copies["exact"]["share"] == 5 / 78
    assert copies["near"]["documents"] == 5 + 6
    assert copies["near"]["compared"] == 78
    assert all(pair["text"][:20] == pair["like"][:20] for pair in copies["near"]["examples"])


def test_recurring_lines_and_personal_data(result):
    line = result["boilerplate"]["lines"][0]
    assert (line["line"], line["documents"]) == (FOOTER, 30)
    assert result["boilerplate"]["share_of_characters"] == pytest.approx(29 * len(FOOTER) / result["characters"])
    assert result["pii"]["found"] == {"email": 1, "phone": 1}
    assert result["pii"]["documents_with"] == 1


def test_languages(result, tmp_path):
    assert next(iter(result["languages"]["shares"])) == "en"
    assert sum(result["languages"]["shares"].values()) == pytest.approx(1)
    (tmp_path / "de.txt").write_text("Der alte Schäfer hatte sein Haus verlassen, bevor die Sonne aufging. " * 9)
    assert next(iter(inspect_sources([tmp_path], separator=None)["languages"]["shares"])) == "de"


def test_the_split_is_that_of_a_preparation(folder, result, tmp_path):
    corpus = prepare_corpus(
        [folder],
        tmp_path / "out",
        tokenizer="char",
        vocab_size=300,
        val_fraction=0.1,
        seed=42,
        separator="<|endoftext|>",
        selection=Selection(cleaning="standard", deduplicate="exact"),
    )
    assert corpus.split("train").num_bytes == result["split"]["train_bytes"]
    assert corpus.split("val").num_bytes == result["split"]["val_bytes"]


def test_near_copies_across_the_split_are_counted(tmp_path):
    pairs = [story(seed, sentences=40) for seed in range(40)]
    pairs += [text.replace(text.split()[30], "lamb", 1) for text in pairs]
    for number, text in enumerate(pairs):
        (tmp_path / f"{number:02}.txt").write_text(text)
    split = inspect_sources([tmp_path], separator=None, val_fraction=0.2)["split"]
    corpus = prepare_corpus(
        [tmp_path],
        tmp_path / "out",
        tokenizer="char",
        vocab_size=300,
        val_fraction=0.2,
        seed=42,
        separator=None,
    )
    tokenizer = corpus.tokenizer()
    text = {side: tokenizer.decode(corpus.split(side).tokens.tolist()) for side in ("train", "val")}
    crossing = sum(
        (first in text["train"] and second in text["val"]) or (first in text["val"] and second in text["train"])
        for first, second in zip(pairs[:40], pairs[40:], strict=True)
    )
    assert 0 < crossing == split["near_duplicates_across"]


def test_compression_is_that_of_zlib(result, folder, tmp_path):
    text = story(5, sentences=300)
    (tmp_path / "one.txt").write_text(text)
    compression = inspect_sources([tmp_path], separator=None)["compression"]
    assert compression["bytes"] == len(text)
    assert compression["compressed"] == len(zlib.compress(text.encode()))


def test_tokens_of_a_named_tokenizer(folder, tmp_path):
    text = story(5, sentences=300)
    (tmp_path / "one.txt").write_text(text)
    tokenizer = Tokenizer.train("bpe", [text], vocab_size=300)
    tokenizer.save(tmp_path / "tokenizer.json")
    rows = inspect_sources([tmp_path / "one.txt"], tokenizers=[tmp_path / "tokenizer.json"], separator=None)[
        "tokenizers"
    ]
    assert [row["trained_here"] for row in rows] == [True] * (len(rows) - 1) + [False]
    assert rows[0]["name"] == "char"
    assert rows[0]["tokens"] == len(text)  # one byte a character
    assert rows[-1]["vocab_size"] == 300
    assert rows[-1]["tokens"] == pytest.approx(len(tokenizer.encode(text)), rel=0.02)
    trained = [row["bytes_per_token"] for row in rows[1:-1]]
    assert trained == sorted(trained)


def test_reading_stops_where_it_was_told_to(folder, result):
    part = inspect_sources([folder / "stories.jsonl"], separator=None, max_bytes=5000)
    assert not part["complete"]
    assert 5000 <= part["bytes"] < 5000 + result["lengths"]["quantiles"]["1"]
    assert "Only the beginning" in part["warnings"][0]


def test_patterns_choose_files(folder):
    assert inspect_sources([folder], separator=None, include=["*.txt"])["documents"] == 1
    assert inspect_sources([folder], separator=None, exclude=["*.jsonl", "*.bin"])["documents"] == 2


def test_samples_of_a_large_text(folder, monkeypatch, result):
    monkeypatch.setattr(inspection, "DEEP_CHARACTERS", result["bytes"] // 2)
    monkeypatch.setattr(inspection, "LANGUAGE_DOCUMENTS", 10)
    monkeypatch.setattr(inspection, "COMPARED_DOCUMENTS", 8)
    part = inspect_sources([folder], separator=None)
    assert part["documents"] == result["documents"]
    assert part["pii"]["documents"] == pytest.approx(39, abs=12)  # the files hold more than their text
    assert 5 <= part["languages"]["documents"] <= 10
    assert 4 <= part["duplicates"]["near"]["compared"] <= 8
    assert "(of " in format_inspection(part)


def test_the_same_text_gives_the_same_figures(folder, result):
    assert inspect_sources([folder], separator="<|endoftext|>") == result


def test_the_result_is_json_and_a_table(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    table = format_inspection(result)
    for words in ("documents  78", "exact duplicates  5 documents", "email 1", FOOTER, "noise.bin", "bytes/token"):
        assert words in table
    assert table.splitlines()[-1].strip() == result["advice"]["text"][-1]


def test_one_small_document(tmp_path):
    (tmp_path / "one.txt").write_text("Sheep.")
    one = inspect_sources([tmp_path], separator=None)
    assert one["split"]["near_duplicates_across"] is None
    assert "by position" in one["split"]["how"]
    assert any("is little" in text for text in one["warnings"])
    assert "learn much of the text by heart" in one["advice"]["text"][-1]
    assert "by position" in format_inspection(one)


def test_halves_of_surrogate_pairs_do_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "sheep \\ud83d\\ude00 and dogs on the hill"}\n')
    assert inspect_sources([tmp_path], separator=None)["documents"] == 1


def test_what_cannot_be_inspected(folder, tmp_path):
    with pytest.raises(DataError, match="no file or folder"):
        inspect_sources([tmp_path / "none"], separator=None)
    with pytest.raises(DataError, match="no text"):
        (tmp_path / "blank.txt").write_text(" \n")
        inspect_sources([tmp_path], separator=None)
    with pytest.raises(DataError, match="no tokenizer"):
        inspect_sources([folder], separator=None, tokenizers=[tmp_path / "none"])
    with pytest.raises(ConfigError, match="between 0 and 1"):
        inspect_sources([folder], separator=None, val_fraction=1)
    with pytest.raises(ConfigError, match="at least 1"):
        inspect_sources([folder], separator=None, max_bytes=0)


def test_kinds_of_files():
    assert [kind_of(name) for name in ("a.TXT", "b.txt.gz", "c.tar.xz", "LICENSE", "v1.2.md")] == [
        ".txt",
        ".txt.gz",
        ".tar.xz",
        "no ending",
        ".md",
    ]


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=50))
def test_lengths(characters):
    lengths = lengths_of(np.array(characters, dtype=np.int64))
    histogram = lengths["histogram"]
    inside = [length for length in characters if length >= 1]
    assert sum(histogram["documents"]) == len(inside)
    assert sum(histogram["characters"]) == pytest.approx(sum(inside))
    assert lengths["quantiles"]["0"] == min(characters)
    assert lengths["quantiles"]["1"] == max(characters)
    assert lengths["quantiles"]["0.5"] == sorted(characters)[(len(characters) - 1) // 2]


def figures(result, **tokens):
    rows = [
        {"name": name.replace("_", " "), "vocab_size": size, "tokens": count, "trained_here": True}
        for name, (size, count) in tokens.items()
    ]
    return result | {"tokenizers": rows}


@pytest.mark.parametrize("tokens", [10**5, 10**6, 10**7, 10**9, 10**12])
def test_advice_stays_within_what_the_text_can_feed(result, tokens):
    clean = result | {"duplicates": {"exact": {"bytes": 0}}}
    sizes = {"char": (100, 4 * tokens), "bpe_1024": (1024, 2 * tokens), "bpe_16384": (16384, tokens)}
    advice = advise(figures(clean, **sizes))
    parameters = parameters_of(advice["vocab_size"], advice["d_model"], advice["num_layers"])
    assert parameters <= advice["parameters"] == 4 * advice["tokens"] // 20
    assert advice["d_model"] % advice["num_heads"] == 0
    larger = SHAPES.index((advice["d_model"], advice["num_layers"])) + 1
    if larger < len(SHAPES):
        width, layers = SHAPES[larger]
        over = parameters_of(advice["vocab_size"], width, layers)
        assert over > advice["parameters"] or advice["vocab_size"] * width > over / 2
    assert advice["vocab_size"] == {10**5: 100, 10**6: 1024, 10**7: 1024}.get(tokens, 16384)


@pytest.mark.parametrize("shape", SHAPES)
def test_advice_is_settings_that_load(result, shape, monkeypatch):
    monkeypatch.setattr("sheepop.data.inspection_advice.SHAPES", (shape,))
    line = advise(figures(result, char=(100, 10**6)))["text"][2]
    words = line[line.index("--") :].split()
    config = load_config(overrides=parse_overrides(words))
    assert (config.model.d_model, config.model.num_layers) == shape
    assert (config.data.tokenizer, config.model.vocab_size) == ("char", 100)


def test_the_command(folder, tmp_path, capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(folder / "mail.txt"), *map(str, arguments)])
        assert ended.value.code == 0
        return capsys.readouterr().out

    page = tmp_path / "page.html"
    value = json.loads(run("--json", "--html", page))
    assert value == inspect_sources([folder / "mail.txt"], separator="<|endoftext|>")
    assert "mail.txt" in page.read_text()
    assert run() == format_inspection(value) + "\n"


def test_shapes_grow():
    sizes = [parameters_of(1000, *shape) for shape in SHAPES]
    assert sizes == sorted(sizes)


def test_warnings_come_from_the_figures(result):
    assert warnings_about(result) == result["warnings"]
    worse = json.loads(json.dumps(result))
    worse["duplicates"]["exact"]["share"] = 0.2
    worse["compression"]["ratio"] = 7.0
    worse["languages"]["shares"] = {"en": 0.5, "de": 0.5}
    worse["boilerplate"]["share_of_characters"] = 0.5
    text = " ".join(warnings_about(worse))
    for words in ("20.0% of the documents are exact", "7.0 times smaller", "en 50%, de 50%", "50.0% of the text"):
        assert words in text
        assert words not in " ".join(result["warnings"])


@given(st.integers(1, 20), st.integers(0, 300))
def test_an_even_sample(capacity, count):
    sample = EvenSample(capacity)
    for item in range(count):
        if sample.wants_next():
            sample.add(item)
        else:
            sample.skip()
    assert sample.items == list(range(0, count, sample.stride))
    assert len(sample.items) <= capacity
    assert sample.stride == 1 or len(sample.items) >= capacity // 2


@given(st.lists(st.integers(0, 30), max_size=300), st.integers(2, 12))
def test_frequent_items_are_counted_nearly_right(items, capacity):
    counter = FrequentCounter(capacity)
    for item in items:
        counter.update([item])
    counted = dict(counter.most_common(capacity + 1))
    assert len(counted) <= capacity
    assert counter.missed <= 2 * len(items) / capacity
    for item, count in Counter(items).items():
        assert count - counter.missed <= counted.get(item, 0) <= count
