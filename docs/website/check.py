"""What must be true of the site: nothing dead, nothing foreign, nothing missing, nothing drawn other than on GitHub."""

import re
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from markdown_it import MarkdownIt

from website.pages import packages, public_symbols

# Attributes through which a page loads something by itself, and through which it only leads somewhere.
LOADS = {"link": "href", **dict.fromkeys(("audio", "iframe", "img", "script", "source", "video"), "src")}
NOT_LOADED = {"canonical", "next", "prev", "alternate"}  # kinds of <link> that only tell
# What both Markdown and the site's HTML have, so that it can be counted in both.
COUNTED = ("h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "tr", "blockquote")


@dataclass
class Page:
    """What the checks need of one page of HTML."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    text: str = ""


class PageReader(HTMLParser):
    """Reads a page; counts and text are those of its article alone."""

    def __init__(self) -> None:
        super().__init__()
        self.page = Page()
        self.is_article = False
        self.hidden = 0  # depth inside what is no prose: code, scripts, formulas

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag names, loads and leads to."""
        values = dict(attrs)
        page = self.page
        page.anchors.update(value for name, value in attrs if name in ("id", "name") and value)
        if tag == "a" and values.get("href") is not None:
            page.links.append(values["href"] or "")
        if tag in LOADS and values.get(LOADS[tag]) and values.get("rel") not in NOT_LOADED:
            page.loaded.append(values[LOADS[tag]] or "")
        self.is_article = self.is_article or tag == "article"
        self.hidden += tag in ("code", "script", "style", "math")
        if self.is_article and tag in COUNTED:
            page.counts[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        """Note where the article and what is no prose end."""
        self.is_article = self.is_article and tag != "article"
        self.hidden -= tag in ("code", "script", "style", "math")

    def handle_data(self, data: str) -> None:
        """Gather the article's prose."""
        if self.is_article and not self.hidden:
            self.page.text += data


def read_page(path: Path) -> Page:
    """Return what the checks need of a page of HTML."""
    reader = PageReader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader.page


def find_problems(project: Path, sources: Path, site: Path) -> list[str]:
    """Return all that is wrong with a built site, one line each; `sources` are the pages that it was made from."""
    pages = {path.relative_to(site).as_posix(): read_page(path) for path in sorted(site.rglob("*.html"))}
    found = missing_from_navigation(project / "mkdocs.yml", sources)
    found += undocumented(project / "sheepop")
    found += missing_from_reference(project / "sheepop", pages)
    found += dead_links(site, pages)
    found += foreign_parts(site, pages)
    for source in sorted(sources.rglob("*.md")):
        name = source.relative_to(sources)
        if name.parts[0] != "api":
            found += drawn_otherwise(name.as_posix(), source.read_text(encoding="utf-8"), pages[html_name(name)])
    return found


def html_name(page: Path) -> str:
    """Return the name in the site of a Markdown page."""
    return page.with_name("index.html" if page.name == "README.md" else f"{page.stem}.html").as_posix()


def undocumented(root: Path) -> list[str]:
    """Name the public modules, classes, functions and methods below `root` that have no docstring."""
    return [f"{name} has no docstring" for name, is_documented in public_symbols(root).items() if not is_documented]


def missing_from_reference(root: Path, pages: dict[str, Page]) -> list[str]:
    """Name the public symbols that the reference page of their package does not show."""
    drawn = {package: pages.get(f"api/{package}.html", Page()).anchors for package in packages(root)}
    found = []
    for name in public_symbols(root):
        package = max((package for package in drawn if f"{name}.".startswith(f"{package}.")), key=len)
        if name not in drawn[package] and name != package:
            found.append(f"{name} is not in api/{package}.html")
    return found


class _NavigationLoader(yaml.SafeLoader):
    """Reads `mkdocs.yml` without acting on its tags that name Python objects."""


_NavigationLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def missing_from_navigation(settings: Path, sources: Path) -> list[str]:
    """Name the pages that the navigation of `mkdocs.yml` does not name, and what it names and is not there."""
    with settings.open(encoding="utf-8") as file:
        navigation = yaml.load(file, Loader=_NavigationLoader)["nav"]
    named = Counter(pages_in(navigation))
    there = {path.relative_to(sources).as_posix() for path in sources.rglob("*.md")}
    return [
        *(f"{page} is not in the navigation of mkdocs.yml" for page in sorted(there - set(named))),
        *(f"the navigation of mkdocs.yml names {page}, which is not there" for page in sorted(set(named) - there)),
        *(f"the navigation of mkdocs.yml names {page} twice" for page, times in sorted(named.items()) if times > 1),
    ]


def pages_in(navigation: object) -> list[str]:
    """Return the pages of a navigation: nested lists of names, or of titles with what they stand for."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in parts for page in pages_in(part)]


def dead_links(site: Path, pages: dict[str, Page]) -> list[str]:
    """Name the links and files of pages that lead nowhere; a link to another site only needs to be well-formed."""
    found = []
    for name, page in pages.items():
        folder = (site / name).parent
        for link in dict.fromkeys([*page.links, *page.loaded]):  # once each
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if not is_well_formed(link):
                    found.append(f"{name}: {link} is not an address")
                continue
            target = (folder / unquote(parts.path)).resolve() if parts.path else site.resolve() / name
            if not target.is_file() or not target.is_relative_to(site.resolve()):
                found.append(f"{name}: {link} leads to nothing in the site")
            elif parts.fragment and target.suffix == ".html":
                anchors = pages[target.relative_to(site.resolve()).as_posix()].anchors
                if unquote(parts.fragment) not in anchors:
                    found.append(f"{name}: {link} leads to a page without that heading")
    return found


def is_well_formed(address: str) -> bool:
    """Say whether an address outside the site could be one; whether it answers is not asked."""
    parts = urlsplit(address)
    if parts.scheme in ("mailto", "data", "javascript"):
        return bool(parts.path)
    host = parts.hostname or ""
    is_host = host == "localhost" or re.fullmatch(r"[\w-]+(\.[\w-]+)+", host) is not None
    return parts.scheme in ("http", "https") and is_host and not re.search(r"\s", address)


def foreign_parts(site: Path, pages: dict[str, Page]) -> list[str]:
    """Name what pages and style sheets would load from elsewhere, which a site that needs no network must not."""
    found = [
        f"{name} would load {part} from elsewhere"
        for name, page in pages.items()
        for part in page.loaded
        if part.startswith("//") or urlsplit(part).scheme not in ("", "data")
    ]
    for sheet in sorted(site.rglob("*.css")):
        text = sheet.read_text(encoding="utf-8")
        for part in re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)", text):
            found.append(f"{sheet.relative_to(site).as_posix()} would load {part} from elsewhere")
    return found


def drawn_otherwise(name: str, source: str, page: Page) -> list[str]:
    """Name the kinds of element of which the site shows more or fewer than GitHub does.

    Their Markdown differs in details: here it wants an empty line before a list or a table, and four spaces before a
    list inside a list.
    """
    tokens = MarkdownIt("commonmark").enable("table").parse(source)
    expected = Counter(token.tag for token in tokens if token.nesting == 1 and token.tag in COUNTED)
    callouts = re.findall(r"^> \[!(?:NOTE|TIP|IMPORTANT|WARNING|CAUTION)\]", source, re.MULTILINE)
    expected["blockquote"] -= len(callouts)
    found = [
        f"{name}: {expected[tag]} <{tag}> on GitHub, {page.counts[tag]} in the site (a list or table needs an "
        "empty line before it, and a list inside a list four spaces)"
        for tag in COUNTED
        if expected[tag] != page.counts[tag]
    ]
    if "$$" in page.text:
        found.append(f"{name}: a $$ is left as it is; a formula between $$ and $$ needs empty lines around it")
    return found
