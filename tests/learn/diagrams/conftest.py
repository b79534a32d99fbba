"""A reader of the part of Mermaid that the diagrams use, strict enough to find what Mermaid would not draw."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

NODE = re.compile(r'(n\d+)(\["|\(\["|\{"|\{\{"|\(\("|\[\(")([^"<>]*(?:<br/>[^"<>]*)*)("\]|"\]\)|"\}|"\}\}|"\)\)|"\)\])')
ARROW = re.compile(r'([ng]\d+) (?:-- "([^"<>]+)" )?--> ([ng]\d+)')
ABOVE = re.compile(r"(n\d+) ~~~ (n\d+)")
GROUP = re.compile(r'subgraph (g\d+)\["([^"<>]+)"\]')
CLASS = re.compile(r"class (n\d+(?:,n\d+)*) optional")
CODES = {"#quot;": '"', "#lt;": "<", "#gt;": ">", "#35;": "#"}
SHAPES = {'["': '"]', '(["': '"])', '{"': '"}', '{{"': '"}}', '(("': '"))', '[("': '")]'}


@dataclass
class Chart:
    """Boxes by their names: lines, the bracket that says the shape, and the groups around."""

    lines: dict[str, list[str]] = field(default_factory=dict)
    shapes: dict[str, str] = field(default_factory=dict)
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    arrows: list[tuple[str, str, str]] = field(default_factory=list)
    optional: set[str] = field(default_factory=set)

    def named(self, first_line: str) -> str:
        """Return the only box that begins so."""
        (name,) = (name for name, lines in self.lines.items() if lines[0] == first_line)
        return name

    def after(self, name: str, label: str = "") -> set[str]:
        """Return the first lines of the boxes to which arrows lead, with that label where one is given."""
        return {self.lines[end][0] for start, said, end in self.arrows if start == name and label in ("", said)}

    def titles(self) -> list[str]:
        return [lines[0] for lines in self.lines.values()]


def _read(text: str) -> Chart:
    """Read a diagram.

    Raises:
        AssertionError: it is not a flowchart, or a line of it is none that Mermaid knows.
    """
    first, second, *lines = text.splitlines()
    assert re.fullmatch(r"%%\{init: \{.*\}\}%%", first)
    assert first.count("{") == first.count("}")
    assert second in ("flowchart TB", "flowchart LR")
    chart, opened, known = Chart(), [], set()
    for line in map(str.strip, lines):
        if node := NODE.fullmatch(line):
            name, begin, label, end = node.groups()
            assert SHAPES[begin] == end
            assert name not in known, "a name is given twice"
            known.add(name)
            chart.lines[name] = [_decoded(line) for line in label.split("<br/>")]
            chart.shapes[name] = begin.rstrip('"')
            chart.groups[name] = tuple(opened)
        elif group := GROUP.fullmatch(line):
            known.add(group[1])
            opened.append(group[2].strip("\u2003\u200b "))
        elif line == "end":
            opened.pop()
        elif arrow := ARROW.fullmatch(line):
            assert {arrow[1], arrow[3]} <= known
            chart.arrows.append((arrow[1], arrow[2] or "", arrow[3]))
        elif above := ABOVE.fullmatch(line):
            assert set(above.groups()) <= known
        elif some := CLASS.fullmatch(line):
            chart.optional = set(some[1].split(","))
            assert chart.optional <= known
        else:
            assert line.startswith("classDef optional "), line
    assert not opened, "a group has no end"
    return chart


def _decoded(label: str) -> str:
    for code, character in CODES.items():
        label = label.replace(code, character)
    return label


@pytest.fixture(scope="session")
def read_mermaid() -> Callable[[str], Chart]:
    return _read
