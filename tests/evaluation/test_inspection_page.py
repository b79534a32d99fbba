import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sheepop.data.inspection import inspect_sources
from sheepop.evaluation.inspection_page import inspection_page, write_inspection_page
from sheepop.evaluation.inspection_plots import INSPECTION_PLOTS, render_inspection
from sheepop.evaluation.plots import DARK, LIGHT
from sheepop.utils.errors import ConfigError

VOID = {"meta", "img", "source"}


class Checker(HTMLParser):
    """Follows the tags of a page: what is open, what is loaded, what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("<b>texts")
    for number in range(6):
        sheep = f"The sheep with the number {number} goes home to the hill. "
        text = "<script>alert(1)</script> stands in every text.\n" + sheep * 9
        (folder / f"{number}.txt").write_text(text)
    (folder / "noise.bin").write_bytes(bytes(range(256)) * 8)
    return inspect_sources([folder], separator=None)


def test_the_page_is_whole_and_loads_nothing(result):
    page = inspection_page(result)
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert len(checker.addresses) == 2 * len(INSPECTION_PLOTS)
    assert all(address.startswith("data:image/png;base64,") for address in checker.addresses)
    assert "default-src 'none'" in page


def test_the_page_shows_the_figures_and_no_text_becomes_code(result):
    page = inspection_page(result)
    checker = Checker()
    checker.feed(page)
    shown = re.sub(r"\s+", " ", checker.text)
    for text in (*result["warnings"], *result["advice"]["text"], "noise.bin", "bpe"):
        assert text in shown
    assert "<script>alert(1)</script> stands in every text." in shown
    assert "<script" not in page
    assert "<b>texts" not in page


@pytest.mark.parametrize("name", INSPECTION_PLOTS)
def test_pictures_differ_by_day_and_by_night(name, result):
    by_day, by_night = (render_inspection(name, result, theme) for theme in (LIGHT, DARK))
    assert by_day.startswith(b"\x89PNG")
    assert by_night.startswith(b"\x89PNG")
    assert by_day != by_night


def test_places_where_no_page_can_be(result, tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        write_inspection_page(result, tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_inspection_page(result, tmp_path / "file" / "page.html")
    assert (tmp_path / "file").read_text() == "x"
    write_inspection_page(result, tmp_path / "new" / "page.html")
    assert Path(tmp_path / "new" / "page.html").read_text().rstrip().endswith("</html>")
