from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sheepop.learn.diagrams.flowchart import Flowchart, Node, without_implied

labels = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="`"), min_size=1, max_size=9)
places = st.sampled_from("abcdefg")
arrows = st.sets(st.tuples(places, places).filter(lambda ends: ends[0] != ends[1]))


def reach(graph: set[tuple[str, str]]) -> set[tuple[str, str]]:
    ways = set(graph)
    while more := {(a, d) for a, b in ways for c, d in ways if b == c} - ways:
        ways |= more
    return ways


@given(label=labels)
def test_any_label_survives(read_mermaid: Any, label: str) -> None:
    chart = Flowchart()
    chart.add("a", Node([label, "second"]))
    chart.add("b", Node(["b"], "decision"))
    chart.connect("a", "b", "yes")
    chart.connect("a", "b", "no")
    read = read_mermaid(chart.mermaid())
    assert read.lines == {"n1": [label, "second"], "n2": ["b"]}
    assert read.arrows == [("n1", "yes, no", "n2")]


def test_boxes_of_a_group_stand_together(read_mermaid: Any) -> None:
    chart = Flowchart(groups={"g": "outer", "h": "inner"})
    for key, groups in (("a", ()), ("b", ("g",)), ("c", ()), ("d", ("g", "h")), ("e", ("g",))):
        chart.add(key, Node([key], groups=groups))
    read = read_mermaid(chart.mermaid())
    assert read.titles() == list("abdec") == [lines[0] for lines in read.lines.values()]
    assert list(read.groups.values()) == [(), ("outer",), ("outer", "inner"), ("outer",), ()]


@given(graph=arrows)
def test_arrows_that_are_left_out_are_implied(graph: set[tuple[str, str]]) -> None:
    kept = without_implied(graph)
    assert kept <= graph
    assert reach(kept) == reach(graph)


@given(graph=arrows.map(lambda graph: {(a, b) for a, b in graph if a < b}))
def test_without_circles_no_arrow_is_too_many(graph: set[tuple[str, str]]) -> None:
    kept = without_implied(graph)
    for arrow in kept:
        assert reach(kept - {arrow}) != reach(graph)
