"""A flowchart, written as Mermaid text, which GitHub and many viewers of Markdown draw."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Shape = Literal["box", "round", "decision", "loop", "sign", "store"]
BRACKETS: dict[Shape, tuple[str, str]] = {
    "box": ("[", "]"),
    "round": ("([", "])"),
    "decision": ("{", "}"),
    "loop": ("{{", "}}"),
    "sign": ("((", "))"),
    "store": ("[(", ")]"),
}
# Closer together than by default, so that a whole chart is seen at once.
SPACING = (
    '%%{init: {"flowchart": {"nodeSpacing": 30, "rankSpacing": 32, "padding": 9, '
    '"wrappingWidth": 400, "subGraphTitleMargin": {"top": 2, "bottom": 10}}}}%%'
)
# Pixels: of a usual character, of an em space, and around what a box in a group says.
CHARACTER, EM, BORDERS = 8, 16, 106
# What would end a label, or be read as HTML or as a code.
CODES = str.maketrans({'"': "#quot;", "#": "#35;", "<": "#lt;", ">": "#gt;", "`": "", "\n": " "})


@dataclass
class Node:
    """A box: its lines, its shape, the groups that it stands in from the outermost, and whether it may be passed by."""

    lines: list[str]
    shape: Shape = "box"
    groups: tuple[str, ...] = ()
    is_optional: bool = False


@dataclass
class Flowchart:
    """Boxes, the groups around them, and arrows between either with what stands on them; all in order."""

    direction: Literal["TB", "LR"] = "TB"
    nodes: dict[str, Node] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    arrows: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    above: list[tuple[str, str]] = field(default_factory=list)  # boxes that stand above others, without an arrow

    def add(self, key: str, node: Node) -> str:
        """Add a box unless it is there, and return its key."""
        self.nodes.setdefault(key, node)
        return key

    def connect(self, source: str, target: str, label: str = "") -> None:
        """Draw an arrow; several labels between the same boxes stand on one."""
        labels = self.arrows.setdefault((source, target), [])
        if label and label not in labels:
            labels.append(label)

    def mermaid(self) -> str:
        """Return the chart as Mermaid text; boxes and groups are numbered in order, so that names cannot clash."""
        names = {key: f"n{number}" for number, key in enumerate(self.nodes, start=1)}
        names |= {key: f"g{number}" for number, key in enumerate(self.groups, start=1)}
        lines = [SPACING, f"flowchart {self.direction}"]
        opened: list[str] = []
        for key, node in self._by_group():
            while tuple(opened) != node.groups[: len(opened)]:
                opened.pop()
                lines.append("    " * (len(opened) + 1) + "end")
            for group in node.groups[len(opened) :]:
                indent = "    " * (len(opened) + 1)
                room = self._room(group)
                lines.append(f'{indent}subgraph {names[group]}["{escape(self.groups[group])}{room}"]')
                opened.append(group)
            begin, end = BRACKETS[node.shape]
            text = "<br/>".join(map(escape, node.lines))
            lines.append("    " * (len(opened) + 1) + f'{names[key]}{begin}"{text}"{end}')
        while opened:
            opened.pop()
            lines.append("    " * (len(opened) + 1) + "end")
        for (source, target), labels in self.arrows.items():
            arrow = f'-- "{escape(", ".join(labels))}" -->' if labels else "-->"
            lines.append(f"    {names[source]} {arrow} {names[target]}")
        lines += [f"    {names[upper]} ~~~ {names[lower]}" for upper, lower in self.above]
        if optional := [names[key] for key, node in self.nodes.items() if node.is_optional]:
            lines += ["    classDef optional stroke-dasharray: 5 4", f"    class {','.join(optional)} optional"]
        return "\n".join(lines) + "\n"

    def _room(self, group: str) -> str:
        """Return what makes a group's title as wide as its widest box.

        Titles stand in the middle, where arrows enter; behind one of this width there is nothing, so it stands left.
        """
        inside = [line for node in self.nodes.values() if group in node.groups for line in node.lines]
        pixels = CHARACTER * (max(map(len, inside)) - len(self.groups[group])) + BORDERS
        # Blanks at the end would be cut off, so what ends the title is one that nobody calls a blank.
        return "\u2003" * max(0, pixels // EM) + "\u200b" if self.groups[group].strip() else ""

    def _by_group(self) -> list[tuple[str, Node]]:
        """Return the boxes with those of a group together, at the place of its first one."""
        places: dict[tuple[str, ...], int] = {}
        for place, node in enumerate(self.nodes.values()):
            for depth in range(len(node.groups) + 1):
                places.setdefault(node.groups[:depth], place)
        order = {key: place for place, key in enumerate(self.nodes)}

        def place_of(item: tuple[str, Node]) -> list[int]:
            key, node = item
            return [*(places[node.groups[:depth]] for depth in range(1, len(node.groups) + 1)), order[key]]

        return sorted(self.nodes.items(), key=place_of)


def escape(text: str) -> str:
    """Return a label without the characters that Mermaid would read as its own."""
    return text.translate(CODES)


def wrap(text: str, width: int) -> list[str]:
    """Return a label's text in lines of about `width` characters."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def without_implied(arrows: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the arrows that no longer way implies (the transitive reduction); those of circles are all kept."""
    arrows = set(arrows)
    followers: dict[str, set[str]] = {}
    for source, target in arrows:
        followers.setdefault(source, set()).add(target)

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        waiting = list(followers.get(start, ()))
        while waiting:
            place = waiting.pop()
            if place not in found:
                found.add(place)
                waiting += followers.get(place, ())
        return found

    ways = {place: reached(place) for arrow in arrows for place in arrow}
    implied = {
        (source, target)
        for source, target in arrows
        for other in followers[source] - {target}
        if target in ways[other] and other not in ways[target] and source not in ways[other]
    }
    return arrows - implied
