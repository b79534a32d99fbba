"""The site, as the generator makes it: of a small project with things planted in it, and of this one."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from website import pages
from website.build import build_site
from website.errors import SiteError
from website.pages import borrow

PROJECT = Path(__file__).parents[2]


def open_page(browser: Any, path: Path, **options: Any) -> Any:
    """Open a page from its file; a request for anything but files, or an error, fails the test."""
    page = browser.new_page(**options)
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("requestfailed", lambda request: errors.append(f"{request.url} failed"))
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_function("!document.querySelector('figure.diagram > pre')")
    assert not [url for url in requests if not url.startswith(("file:", "data:", "blob:"))]
    assert not errors, f"{path}: {errors}"
    return page


def test_a_small_project_becomes_a_site(small_project: Path, tmp_path: Path) -> None:
    site = build_site(small_project, tmp_path / "out")
    assert not (small_project / "build").exists()
    names = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert names == {
        "index.html",
        "docs/index.html",
        "docs/chapters/attention.html",
        "api/sheepop.html",
        "api/sheepop.wool.html",
    }
    start = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="settings.json"' in start
    assert 'href="docs/chapters/attention.html#the-score"' in start
    assert json.loads((site / "settings.json").read_text(encoding="utf-8")) == {}
    table = (site / "docs" / "index.html").read_text(encoding="utf-8")
    assert "<code>x | y</code>" in table
    assert len(re.findall(r"<math\b", table)) == 2
    chapter = (site / "docs" / "chapters" / "attention.html").read_text(encoding="utf-8")
    assert len(re.findall(r"<math\b", chapter)) == 3
    assert len(re.findall(r"<math display=\"block\"", chapter)) == 2
    assert '<pre class="diagram"><code>flowchart LR' in chapter
    assert "arithmatex" not in chapter
    reference = (site / "api" / "sheepop.wool.html").read_text(encoding="utf-8")
    assert 'id="sheepop.wool.spin.Thread.twist"' in reference
    assert "press" not in reference
    known = (site / "search.json").read_text(encoding="utf-8")
    assert "Thread" in known
    assert "def twist" not in known
    assert (site / "search.js").read_text(encoding="utf-8").endswith(known)


@pytest.mark.parametrize(
    ("file", "planted", "found"),
    [
        ("README.md", "[x](docs/gone.md)", "gone"),
        ("README.md", "[x](docs/chapters/attention.md#no-such-heading)", "no-such-heading"),
        ("README.md", "![x](docs/gone.png)", "gone.png"),
        ("docs/README.md", "[x](../gone.json)", "gone.json"),
        ("docs/README.md", "[x](https://)", "https://"),
        ("docs/chapters/attention.md", r"a $\frc{1}{2}$ b", "frc"),
        ("docs/chapters/attention.md", "- a\n  - b", "<ul>"),
        ("docs/chapters/more.md", "# More", "docs/chapters/more.md is not in the navigation"),
        ("sheepop/wool/spin.py", "def knit(): ...", "sheepop.wool.spin.knit has no docstring"),
        ("sheepop/wool/dye/__init__.py", '"""Dye."""', "api/sheepop.wool.dye.md is not in the navigation"),
    ],
)
def test_what_is_planted_fails_the_build_and_is_named(
    file: str, planted: str, found: str, small_project: Path, tmp_path: Path
) -> None:
    path = small_project / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as page:
        page.write(f"\n{planted}\n")
    with pytest.raises(SiteError, match=re.escape(found)):
        build_site(small_project, tmp_path / "out")


def test_a_borrowed_file_must_be_there_and_be_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match=r"no_such_package==1\.2.*"):
        borrow("no_such_package", "1.2", "a.js", "0" * 64, tmp_path / "a.js")
    with pytest.raises(SiteError, match=r"SHA-256 is not 0000.*pip install --no-deps hypothesis==1\.2"):
        borrow("hypothesis", "1.2", "__init__.py", "0" * 64, tmp_path / "a.js")
    assert not (tmp_path / "a.js").exists()


def test_setup_installs_what_is_borrowed() -> None:
    script = (PROJECT / "setup.sh").read_text(encoding="utf-8")
    settings = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
    for package, version, *_ in pages.BORROWED:
        assert f"{package}=={version}" in script
        assert f'"{package}=={version}"' in settings


@pytest.mark.slow
def test_formulas_diagrams_and_search_work_from_a_folder(browser: Any, small_project: Path, tmp_path: Path) -> None:
    site = build_site(small_project, tmp_path / "a folder")
    page = open_page(browser, site / "docs" / "chapters" / "attention.html", color_scheme="dark")
    heights = page.eval_on_selector_all("math", "all => all.map(one => one.getBoundingClientRect().height)")
    assert len(heights) == 3
    assert heights[2] > heights[0]  # two cases are higher than a letter
    assert page.evaluate("document.fonts.check('16px \"STIX Two Math\"')")
    fill = "getComputedStyle(document.querySelector('figure.diagram svg .node rect')).fill"
    dark = page.evaluate(fill)
    page.evaluate("document.body.dataset.mdColorScheme = 'default'")
    page.wait_for_function(f"{fill} != '{dark}'")
    assert "queries" in page.text_content("figure.diagram svg")
    page.keyboard.press("Control+k")
    page.locator("input:visible").first.fill("twist")
    page.locator("a[href*='sheepop.wool.spin.Thread.twist']:visible").first.wait_for()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_this_project_becomes_a_site_that_opens_from_a_folder(request: Any, tmp_path: Path) -> None:
    for package, *_ in pages.BORROWED:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs a file of the package {package}, which setup.sh installs where it can")
    site = build_site(PROJECT, tmp_path)
    browser = request.getfixturevalue("browser")  # what needs none has been checked
    for path in sorted(site.rglob("*.html")):
        text = path.read_text(encoding="utf-8")
        assert "With the numbers of a real model, in the site" not in text, "an example was not computed"
        page = open_page(browser, path)
        assert page.locator("math").count() == len(re.findall(r"<math\b", text))
        assert page.locator("figure.diagram > svg").count() == text.count('<pre class="diagram">')
        page.close()
