"""Each check finds what was planted, and nothing where nothing is wrong."""

from pathlib import Path

import pytest
from website.check import (
    dead_links,
    drawn_otherwise,
    foreign_parts,
    is_well_formed,
    missing_from_navigation,
    missing_from_reference,
    read_page,
    undocumented,
)


def write(folder: Path, **pages: str) -> dict[str, object]:
    """Write pages of HTML, whose names have `__` for `/`, and return them as the checks see them."""
    for name, text in pages.items():
        path = folder / f"{name.replace('__', '/')}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return {path.relative_to(folder).as_posix(): read_page(path) for path in sorted(folder.rglob("*.html"))}


def test_links_that_lead_somewhere_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "wool%20fine.png").write_bytes(b"p")
    pages = write(
        tmp_path,
        index='<h1 id="top">x</h1><a href="#top">1</a><a href="docs/a.html">2</a><a href="docs/a.html#größe">3</a>'
        '<img src="wool%2520fine.png"><a href="https://example.org/a?b#c">4</a><a href="mailto:a@example.org">5</a>',
        docs__a='<h2 id="größe">x</h2><a href="../index.html#top">1</a><a href="../index.html#">2</a>'
        '<a href="#gr%C3%B6%C3%9Fe">3</a>',
    )
    assert dead_links(tmp_path, pages) == []


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ('<a href="docs/gone.html">x</a>', "docs/gone.html leads to nothing in the site"),
        ('<a href="docs">x</a>', "docs leads to nothing in the site"),
        ('<a href="../outside.txt">x</a>', "../outside.txt leads to nothing in the site"),
        ('<a href="/index.html">x</a>', "/index.html leads to nothing in the site"),
        ('<a href="#nowhere">x</a>', "#nowhere leads to a page without that heading"),
        ('<a href="docs/a.html#b">x</a>', "docs/a.html#b leads to a page without that heading"),
        ('<img src="images/gone.png">', "images/gone.png leads to nothing in the site"),
        ('<script src="gone.js"></script>', "gone.js leads to nothing in the site"),
        ('<link rel="stylesheet" href="gone.css">', "gone.css leads to nothing in the site"),
        ('<a href="https://">x</a>', "https:// is not an address"),
        ('<a href="http://no host/x">x</a>', "http://no host/x is not an address"),
        ('<a href="htps://example.org">x</a>', "htps://example.org is not an address"),
    ],
)
def test_a_planted_dead_link_is_named(planted: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("x", encoding="utf-8")
    site = tmp_path / "site"
    pages = write(site, index=planted, docs__a='<h1 id="a">x</h1>')
    assert dead_links(site, pages) == [f"index.html: {found}"]


@pytest.mark.parametrize(
    "address", ["https://example", "https://exa mple.org", "ftp://example.org", "mailto:", "https:/a.org"]
)
def test_what_is_no_address(address: str) -> None:
    assert not is_well_formed(address)


@pytest.mark.parametrize(
    "planted",
    [
        '<script src="https://example.org/a.js"></script>',
        '<script src="//example.org/a.js"></script>',
        '<img src="http://example.org/a.png">',
        '<link href="https://example.org/font.css" rel="stylesheet">',
        '<iframe src="https://example.org/"></iframe>',
    ],
)
def test_what_would_be_loaded_from_elsewhere_is_named(planted: str, tmp_path: Path) -> None:
    pages = write(tmp_path, index=planted)
    found = foreign_parts(tmp_path, pages)
    assert len(found) == 1
    assert "example.org" in found[0]


def test_style_sheets_may_not_load_from_elsewhere_either(tmp_path: Path) -> None:
    (tmp_path / "good.css").write_text("a { background: url(data:image/png;base64,xx) } b { src: url('f.ttf') }")
    assert foreign_parts(tmp_path, {}) == []
    (tmp_path / "bad.css").write_text("@import 'https://example.org/a.css'; b { src: url(//example.org/f.ttf) }")
    assert len(foreign_parts(tmp_path, {})) == 2


def test_a_link_to_elsewhere_is_not_loaded(tmp_path: Path) -> None:
    pages = write(
        tmp_path, index='<a href="https://example.org">x</a><link rel="canonical" href="https://example.org/">'
    )
    assert foreign_parts(tmp_path, pages) == []


def test_undocumented_symbols_are_named(tmp_path: Path) -> None:
    root = tmp_path / "flock"
    (root / "_inner").mkdir(parents=True)
    (root / "__init__.py").write_text('"""Flock."""\n')
    (root / "_hidden.py").write_text("def any(): ...\n")
    (root / "ram.py").write_text(
        '''
import typing

class Ram:
    """A ram."""
    def charge(self): ...
    def _rest(self): ...
    @property
    def weight(self):
        """Kilograms."""
    @weight.setter
    def weight(self, value): ...
    @typing.overload
    def eat(self, what: int): ...
    def eat(self, what):
        """Eat."""

class _Horn:
    def grow(self): ...

async def bleat():
    def inner(): ...
'''
    )
    assert undocumented(root) == [
        f"{name} has no docstring" for name in ("flock.ram", "flock.ram.Ram.charge", "flock.ram.bleat")
    ]


def test_symbols_that_the_reference_does_not_show_are_named(tmp_path: Path) -> None:
    root = tmp_path / "flock"
    (root / "wool").mkdir(parents=True)
    for name in ("__init__", "ram", "wool/__init__", "wool/spin"):
        (root / f"{name}.py").write_text('"""x"""\ndef go():\n    """Go."""\n')
    pages = write(tmp_path / "site", api__flock='<h2 id="flock.ram"></h2><h2 id="flock.ram.go"></h2>')
    missing = [line.split()[0] for line in missing_from_reference(root, pages)]
    assert missing == ["flock.go", "flock.wool.go", "flock.wool.spin", "flock.wool.spin.go"]


def test_navigation_names_every_page_once_and_no_other(tmp_path: Path) -> None:
    sources = tmp_path / "pages"
    (sources / "docs").mkdir(parents=True)
    for name in ("README.md", "docs/a.md", "docs/b.md"):
        (sources / name).write_text("x")
    settings = tmp_path / "mkdocs.yml"
    tags = "markdown_extensions:\n  - x:\n      a: !!python/name:a.b\n      b: !!python/object/apply:a.b { kwds: {} }\n"
    start = f"{tags}nav:\n  - Start: README.md\n  - Guide:\n"
    settings.write_text(f"{start}      - docs/a.md\n      - B: docs/b.md\n")
    assert missing_from_navigation(settings, sources) == []
    settings.write_text(f"{start}      - README.md\n      - B: docs/b.md\n      - c.md\n")
    assert missing_from_navigation(settings, sources) == [
        "docs/a.md is not in the navigation of mkdocs.yml",
        "the navigation of mkdocs.yml names c.md, which is not there",
        "the navigation of mkdocs.yml names README.md twice",
    ]


@pytest.mark.parametrize(
    ("source", "drawn", "tags"),
    [
        ("# A\n\n- a\n- b\n", "<h1>A</h1><ul><li>a</li><li>b</li></ul>", []),
        ("- a\n  - b\n", "<ul><li>a</li><li>b</li></ul>", ["ul"]),
        ("text\n- a\n", "<p>text - a</p>", ["ul", "li"]),
        ("| a |\n| - |\n| b |\n", "<table><tr><th>a</th></tr><tr><td>b</td></tr></table>", []),
        ("| a |\n| - |\n| b |\n", "<p>| a | | - | | b |</p>", ["tr"]),
        ("> [!NOTE]\n> a\n", "<div><p>a</p></div>", []),
        ("$$x$$\n", "<p><math><annotation>$$</annotation></math> <code>$$</code></p>", []),
        ("a $$x$$ b\n", "<p>a $<math>x</math>$ b</p>", ["$$"]),
    ],
)
def test_what_the_site_draws_otherwise_than_github_is_named(
    source: str, drawn: str, tags: list[str], tmp_path: Path
) -> None:
    pages = write(tmp_path, a=f"<ul><li>navigation</li></ul><article>{drawn}</article><h1>footer</h1>")
    found = drawn_otherwise("a.md", source, pages["a.html"])
    assert len(found) == len(tags)
    assert all(tag in line for tag, line in zip(tags, found, strict=True))
