import importlib.util
import shutil
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def small_project(tmp_path: Path) -> Path:
    """A project of four pages and five modules that builds without complaint."""
    for package in ("mermaidx", "ziamath"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs a file of the package {package}, which setup.sh installs where it can")
    project = tmp_path / "project"
    (project / "docs" / "chapters").mkdir(parents=True)
    (project / "sheepop" / "wool").mkdir(parents=True)
    settings = (PROJECT / "mkdocs.yml").read_text(encoding="utf-8")
    before, _, rest = settings.partition("\nnav:\n")
    nav = ["README.md", "docs/README.md", "docs/chapters/attention.md", "api/sheepop.md", "api/sheepop.wool.md"]
    rest = rest[rest.index("\nplugins:") :]
    (project / "mkdocs.yml").write_text(f"{before}\nnav: [{', '.join(nav)}]\n{rest}", encoding="utf-8")
    (project / "README.md").write_text(
        "# Sheep\n\n![Wool](docs/wool.png)\n\n[Settings](settings.json), [why](docs/chapters/attention.md#the-score)\n",
        encoding="utf-8",
    )
    (project / "settings.json").write_text("{}", encoding="utf-8")
    shutil.copyfile(PROJECT / "docs" / "images" / "demo_loss.png", project / "docs" / "wool.png")
    (project / "docs" / "README.md").write_text(
        "# Pages\n\n[The start](../README.md)\n\n"
        "| a | b |\n| --- | --- |\n| `x \\| y` | $z$ |\n| `w` | $`w_{i} * v_{i}`$ |\n",
        encoding="utf-8",
    )
    (project / "docs" / "chapters" / "attention.md").write_text(
        "# Attention\n\n## The score\n\nA weight $a_{t,s}$ and its sum:\n\n$$\n\\sum_{s \\le t} a_{t,s} = 1\n$$\n\n"
        "```math\n\\begin{cases} 0 & s \\le t \\\\ -\\infty & \\text{otherwise} \\end{cases}\n```\n\n"
        "```mermaid\nflowchart LR\n  queries --> scores\n  keys --> scores\n```\n",
        encoding="utf-8",
    )
    modules = {
        "__init__.py": '"""Sheep."""',
        "shears.py": '"""Shears."""\ndef cut(length: float) -> float:\n    """Return half."""\n    return length / 2',
        "wool/__init__.py": '"""Wool."""',
        "wool/spin.py": '"""Spinning."""\nclass Thread:\n    """Wool."""\n    def twist(self):\n        """Twist."""',
        "wool/_felt.py": "def press(): ...",
    }
    for name, text in modules.items():
        (project / "sheepop" / name).write_text(f"{text}\n", encoding="utf-8")
    return project
