"""Which parts of the project import which, from the import statements of all its files."""

import ast
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

from sheepop.learn.diagrams.flowchart import Flowchart, Node, without_implied, wrap
from sheepop.learn.diagrams.wording import first_sentence, short

WIDTH = 24


def package_map(folder: Path, floors: Sequence[Sequence[str]]) -> str:
    """Return the packages and what they import as Mermaid text; an arrow that a longer way implies is not drawn.

    Where all of a floor import all of the next, the arrow goes from floor to floor.

    Args:
        folder: of the project's package; its folders, and the files beside them, are the boxes.
        floors: which of them stand on each floor, the highest first.
    """
    chart = Flowchart()
    imports = {name: imports_of(folder, name) for floor in floors for name in floor}
    for number, floor in enumerate(floors):
        group = f"floor {number}"
        chart.groups[group] = " "
        if number:
            chart.above.append((floors[number - 1][0], floor[0]))
        for name in floor:
            chart.add(name, Node([name, *wrap(short(_documentation(folder, name)), WIDTH)], groups=(group,)))
    known = {(name, other) for name, others in imports.items() for other in others if other in imports}
    arrows = without_implied(known)
    for number, (upper, lower) in enumerate(pairwise(floors)):
        between = set(product(upper, lower))
        if len(between) > 1 and between <= arrows:
            arrows -= between
            chart.connect(f"floor {number}", f"floor {number + 1}")
    _connect(chart, arrows)
    return chart.mermaid()


def file_map(folder: Path, package: str) -> str:
    """Return the files of one package and what they import of each other, as Mermaid text, likewise."""
    chart = Flowchart()
    files = sorted(path for path in (folder / package).glob("*.py") if path.stem != "__init__")
    for path in files:
        chart.add(path.stem, Node([path.name]))
    inside = f"{package}."
    known = {
        (path.stem, name.removeprefix(inside).split(".")[0])
        for path in files
        for name in _imported(path, folder.name)
        if name.startswith(inside)
    }
    _connect(chart, without_implied(arrow for arrow in known if set(arrow) <= set(chart.nodes)))
    return chart.mermaid()


def _connect(chart: Flowchart, arrows: set[tuple[str, str]]) -> None:
    order = {name: place for place, name in enumerate(chart.nodes)}
    for source, target in sorted(arrows, key=lambda arrow: (order[arrow[0]], order[arrow[1]])):
        chart.connect(source, target)


def imports_of(folder: Path, name: str) -> set[str]:
    """Return the other parts of the project that a package, or a file beside the packages, imports from."""
    part = folder / name
    files = sorted(part.rglob("*.py")) if part.is_dir() else [folder / f"{name}.py"]
    return {imported.split(".")[0] for file in files for imported in _imported(file, folder.name)} - {name}


def _imported(file: Path, project: str) -> set[str]:
    """Return what a file imports of the project, as `package.module`, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix(f"{project}.") for name in found if name.startswith(f"{project}.")}


def _documentation(folder: Path, name: str) -> str:
    file = folder / name / "__init__.py"
    file = file if file.exists() else folder / f"{name}.py"
    return first_sentence(ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")
