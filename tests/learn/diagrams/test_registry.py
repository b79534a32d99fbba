import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sheepop.learn.diagrams.registry import all_diagrams

PROJECT = Path(__file__).parents[3]
FLOORS = [
    ["cli"],
    ["learn", "serving"],
    ["training"],
    ["evaluation", "generation", "interop"],
    ["models", "data"],
    ["config", "utils"],
]
DIAGRAMS = all_diagrams(FLOORS)


@pytest.mark.parametrize("name", DIAGRAMS)
def test_each_diagram_is_mermaid_in_which_everything_is_connected(name: str, read_mermaid: Any) -> None:
    chart = read_mermaid(DIAGRAMS[name]())
    assert len(chart.lines) >= 5
    ends = {end for start, _, target in chart.arrows for end in (start, target)}
    if not name.startswith(("files-", "packages")):  # a file may import nothing, and a floor stands for its boxes
        assert set(chart.lines) == ends
    assert max(len(line) for lines in chart.lines.values() for line in lines) <= 42


def test_every_diagram_stands_on_a_page() -> None:
    marks = {
        name
        for page in [PROJECT / "README.md", *PROJECT.glob("docs/*.md")]
        for name in re.findall(r"^<!-- diagram: (.*) -->$", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert marks == set(DIAGRAMS)


def test_the_input_goes_from_files_to_the_device(read_mermaid: Any) -> None:
    chart = read_mermaid(DIAGRAMS["input"]())
    titles = [next(line for line in lines if line.endswith("()") or len(lines) == 1) for lines in chart.lines.values()]
    way = ["list_files()", "raw_documents_of_file()", "clean()", "Tokenizer.train()", "join_parts()", "read_windows()"]
    way += ["to_device()", "micro-batches"]
    places = [titles.index(step) for step in way]
    assert places == sorted(places)
    assert {"prepare_corpus()", "gather()", "batch_loader()"} == {
        group for row in chart.groups.values() for group in row
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its pages, which may be changed."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("sheepop", "docs"):
        shutil.copytree(PROJECT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy2(PROJECT / name, folder)
    return folder


def check(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(checkout / "docs" / "generate.py"), "--check"],
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "line", "planted", "stale"),
    [
        (
            "training/trainer.py",
            '            begin_part("between steps")\n',
            "            run.sampler.windows_of(step)\n",
            {"training-loop"},
        ),
        (
            "models/blocks.py",
            "        hidden = self.input(hidden)  # (B, T, F), or (B, T, 2F) when gated\n",
            "        hidden = hidden * hidden\n",
            {"block", "block-classic", "block-parallel"},
        ),
        ("utils/seeds.py", "def derive_seed", "import sheepop.models.linear\n\n\n", {"packages"}),
    ],
)
def test_the_check_finds_code_that_its_pictures_do_not_show(
    checkout: Path, file: str, line: str, planted: str, stale: set[str]
) -> None:
    path = checkout / "sheepop" / file
    before = path.read_text(encoding="utf-8")
    assert line in before
    is_above = line.startswith("def")
    changed = before.replace(line, planted + line if is_above else line + planted, 1)
    path.write_text(changed, encoding="utf-8")
    try:
        done = check(checkout)
    finally:
        path.write_text(before, encoding="utf-8")
    assert done.returncode == 1, done.stderr
    (named,) = re.findall(
        r"^docs/diagrams.md is out of date \(diagram (.*)\): run `make docs`$", done.stderr, re.MULTILINE
    )
    assert set(named.split(", ")) == stale


@pytest.fixture
def generator(checkout: Path) -> ModuleType:
    """`docs/generate.py` of the copy."""
    spec = importlib.util.spec_from_file_location("generate", checkout / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_edited_diagram_is_found_and_mended(
    checkout: Path, generator: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = checkout / "README.md"
    fresh = page.read_text(encoding="utf-8")
    page.write_text(fresh.replace("TransformerBlock × 4", "TransformerBlock × 5"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generator.main() == 1
    assert capsys.readouterr().err == "README.md is out of date (diagram stack): run `make docs`\n"
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generator.main() == 0
    assert page.read_text(encoding="utf-8") == fresh


@pytest.mark.parametrize(
    ("marks", "complaint"),
    [
        ("<!-- diagram: sheep -->\n<!-- end of diagram -->\n", "'sheep' does not exist; there are input, stack, "),
        ("<!-- diagram: stack -->\n", "'stack' has no end"),
    ],
)
def test_a_wrong_mark_is_named(generator: ModuleType, marks: str, complaint: str) -> None:
    with pytest.raises(SystemExit, match=f"page.md: the diagram {complaint}"):
        generator.Diagrams().fill(f"A page\n{marks}", "page.md")


def test_the_floors_of_this_test_are_those_that_are_checked() -> None:
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    assert [re.findall(r"sheepop\.(\w+)", layer) for layer in layers] == FLOORS
