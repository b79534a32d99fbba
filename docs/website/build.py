"""Build the site: gather, generate, draw the formulas, check."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from website.check import find_problems
from website.errors import SiteError
from website.formulas import draw_formulas
from website.pages import gather_pages

# The generator's offline search asks for this script from a server; ours is `assets/worker.js`.
FOREIGN_WORKER = re.compile(r"https://[^\"]*/iframe-worker/shim")
# In a cell, code and formulas keep the backslash that kept a bar from ending the cell; on GitHub they lose it.
CELL = re.compile(r"<td[^>]*>.*?</td>", re.DOTALL)
# What the search knows is loaded with every page; of the reference it is the words, not the code.
SOURCE_CODE = re.compile(r"Source code in <code>[^<]*</code>\s*<pre>.*?</pre>", re.DOTALL)


def build_site(project: Path, into: Path) -> Path:
    """Build the site of `project` in the folder `into` and return its folder.

    Raises:
        SiteError: the generator failed, a formula cannot be read, or a check found something; it names all of it.
    """
    if into != project:
        into.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(project / "mkdocs.yml", into / "mkdocs.yml")
    gather_pages(project, into / "build" / "pages")
    site = into / "build" / "site"
    shutil.rmtree(site, ignore_errors=True)
    run_generator(project, into)
    problems = finish_pages(site)
    shorten_index(site)
    problems += find_problems(project, into / "build" / "pages", site)
    if problems:
        raise SiteError("the site is not as it should be:\n" + "\n".join(f"  {problem}" for problem in problems))
    return site


def run_generator(project: Path, into: Path) -> None:
    """Let Zensical make HTML of what was gathered."""
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", str(into / "mkdocs.yml")],
        cwd=into,
        env=os.environ | {"PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)  # without its colours
        raise SiteError(f"zensical could not build the site:\n{said.partition('Traceback')[0] or said}")


def finish_pages(site: Path) -> list[str]:
    """Draw the formulas of all pages and make their search need no server; return what is wrong with formulas."""
    problems = []
    (site / "404.html").unlink(missing_ok=True)  # for servers; its links are a server's
    for path in sorted(site.rglob("*.html")):
        page = CELL.sub(lambda cell: cell[0].replace(r"\|", "|"), path.read_text(encoding="utf-8"))
        page, wrong = draw_formulas(page)
        problems += [f"{path.relative_to(site)}: {problem}" for problem in wrong]
        up = "../" * (len(path.relative_to(site).parts) - 1)
        path.write_text(FOREIGN_WORKER.sub(f"{up}assets/worker.js", page), encoding="utf-8")
    return problems


def shorten_index(site: Path) -> None:
    """Leave the source code out of what the search knows."""
    index = json.loads((site / "search.json").read_text(encoding="utf-8"))
    for item in index["items"]:
        item["text"] = SOURCE_CODE.sub("", item["text"])
    text = json.dumps(index, ensure_ascii=False, separators=(",", ":"))
    (site / "search.json").write_text(text, encoding="utf-8")
    (site / "search.js").write_text(f"var __index = {text}", encoding="utf-8")


def main() -> int:
    """Build the site of this project and return the exit status."""
    project = Path(__file__).parents[2]
    try:
        site = build_site(project, project)
    except SiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"The documentation is in {(site / 'index.html').relative_to(project)}")
    return 0
