from pathlib import Path
from typing import Any

from sheepop.learn.diagrams.module_map import file_map, imports_of, package_map


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "wool" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "wool"


def test_arrows_are_imports_wherever_they_stand(tmp_path: Path, read_mermaid: Any) -> None:
    wool = write(
        tmp_path,
        {
            "loom/__init__.py": '"""Weaves. And more."""',
            "loom/a.py": "from wool.yarn.b import c\nimport os",
            "loom/d.py": "def f():\n    import wool.dye",
            "yarn/__init__.py": '"""Spins."""',
            "yarn/b.py": "from wool import dye",
            "dye.py": '"""Colours, all of them."""',
        },
    )
    assert imports_of(wool, "loom") == {"yarn", "dye"}
    chart = read_mermaid(package_map(wool, [["loom"], ["yarn"], ["dye"]]))
    assert list(chart.lines.values()) == [["loom", "Weaves"], ["yarn", "Spins"], ["dye", "Colours, all of them"]]
    assert chart.arrows == [("n1", "", "n2"), ("n2", "", "n3")]  # loom → dye is implied


def test_floors_that_import_all_of_the_next_have_one_arrow(tmp_path: Path, read_mermaid: Any) -> None:
    both = "import wool.c, wool.d"
    wool = write(tmp_path, {"a.py": both, "b.py": both, "c.py": "", "d.py": ""})
    assert read_mermaid(package_map(wool, [["a", "b"], ["c", "d"]])).arrows == [("g1", "", "g2")]


def test_files_of_a_package(tmp_path: Path, read_mermaid: Any) -> None:
    wool = write(tmp_path, {"loom/a.py": "from wool.loom.b import c\nfrom wool.yarn import d", "loom/b.py": ""})
    chart = read_mermaid(file_map(wool, "loom"))
    assert chart.titles() == ["a.py", "b.py"]
    assert chart.arrows == [("n1", "", "n2")]
