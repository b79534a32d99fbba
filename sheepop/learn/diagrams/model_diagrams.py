"""The network as flowcharts, drawn from what happens in a real forward pass of the model that the settings describe.

Nothing here says in which order the parts of a model run, or which there are: boxes are the modules, functions and
operations that ran, and arrows are the tensors that one made and another read (`forward_trace.py`). What leads nowhere,
as the copy that something looking on keeps, is not drawn.
"""

import math
import re
from dataclasses import dataclass, replace

from sheepop.config import ModelConfig
from sheepop.learn.diagrams.flowchart import Flowchart, Node, wrap
from sheepop.learn.diagrams.forward_trace import Call, ForwardTrace, Operation, module_kind, trace_forward
from sheepop.learn.diagrams.wording import short

# Operations that lay the same numbers out anew: arrows pass through them.
LAYOUT = frozenset(
    {"contiguous", "expand", "flatten", "getitem", "invert", "reshape", "to", "transpose", "unsqueeze", "view"}
)
PARTS = frozenset({"split", "chunk"})  # what takes a tensor apart; its parts have names, which stand on the arrows
IDLE = (("dropout", (0.0,)), ("repeat_interleave", (1.0,)))
SIGNS = {"add": "+", "mul": "×"}
WORDS = {"matmul": "matrix product", "cat": "join", "div": "divide", "repeat_interleave": "repeat for each query head"}
WIDTH = 22
UNSAID = frozenset({"hidden", "embedded"})  # names of the residual stream, which is what arrows carry unless they say


def stack_diagram(config: ModelConfig) -> str:
    """Return the whole model as Mermaid text: embeddings, the blocks, the final norm and the head."""
    return _draw(trace_forward(config), "", opened={"TransformerModel"}, passed=LAYOUT | PARTS)


def block_diagram(config: ModelConfig) -> str:
    """Return one transformer block as Mermaid text, with what is inside its attention layer and feed-forward."""
    opened = {"TransformerBlock", "MultiHeadAttention", "FeedForward"}
    return _draw(trace_forward(config), "blocks.0", opened=opened, passed=LAYOUT | PARTS)


def attention_diagram(config: ModelConfig) -> str:
    """Return one attention layer as Mermaid text: how queries, keys and values are made, and what becomes of them.

    The attention is the one that is written out, whatever the settings ask for: fused kernels show nothing.
    """
    written_out = config.model_copy(update={"attention": "reference"})
    opened = {"MultiHeadAttention", "attention"}
    return _draw(trace_forward(written_out), "blocks.0.attention", opened=opened, passed=LAYOUT)


@dataclass(frozen=True)
class _Source:
    """The box that a tensor comes out of, and the tensor's name where arrows passed through what made it."""

    key: str
    name: str


def _draw(trace: ForwardTrace, root: str, *, opened: set[str], passed: frozenset[str]) -> str:
    """Return what happens inside the module `root`.

    Args:
        opened: classes and functions whose inside is drawn; others are one box.
        passed: operations that are not drawn.
    """
    chart = Flowchart()
    sources: dict[int, set[_Source]] = {}
    counts: dict[str, set[int]] = {}
    for operation in trace.operations:
        depth = next((place for place, call in enumerate(operation.calls) if call.module == root), None)
        if depth is None:
            continue
        calls = tuple(call for call in operation.calls[depth:] if call.owner not in PARTS)  # they say no more
        inside = 0
        while inside < len(calls) and calls[inside].owner in opened:
            inside += 1
        reader, closed = calls[inside - 1], calls[inside] if inside < len(calls) else None
        found = _sources_of(operation, reader, calls[0], chart, trace, sources)
        if closed is None and _is_passed(operation, passed):
            arriving = {source for _, some in found for source in some}
            for value in operation.outputs:
                sources[value.number] = arriving
            continue
        groups = _groups_of(calls[:inside], chart)
        key = _key_of(closed, operation, root)
        if closed is not None:
            counts.setdefault(key, set()).add(closed.number)
        node = _node_of(closed, operation, trace, len(counts.get(key, ())))
        chart.nodes[key] = replace(node, groups=groups)
        for name, some in found:
            for source in some:
                if source.key != key:
                    chart.connect(source.key, key, "" if (name or source.name) in UNSAID else name or source.name)
        for value in operation.outputs:
            sources[value.number] = {_Source(key, "")}
    out = chart.add("out", Node(["out"], "round"))
    for source in sources[trace.results[root]]:
        chart.connect(source.key, out)
    _keep_what_leads_to(chart, out)
    return chart.mermaid()


def _sources_of(
    operation: Operation,
    reader: Call,
    root: Call,
    chart: Flowchart,
    trace: ForwardTrace,
    sources: dict[int, set[_Source]],
) -> list[tuple[str, set[_Source]]]:
    """Return for each tensor that is read its name where it is read, and the boxes that it comes from."""
    found = []
    for value in operation.inputs:
        if value.parameter is not None:
            continue
        name = value.names.get(reader.number, "")
        if value.number not in sources:
            title = value.names.get(root.number) or name or "input"
            lines = [title, trace.shape_text(value.shape)]
            key = chart.add(f"input {value.number}", Node(lines, "round"))
            sources[value.number] = {_Source(key, "")}
            name = "" if name == title else name
        some = {replace(source, name=name) if name else source for source in sources[value.number]}
        from_input = all(source.key.startswith("input") for source in some)
        found.append(("" if from_input else name, {replace(s, name="") for s in some} if from_input else some))
    return found


def _is_passed(operation: Operation, passed: frozenset[str]) -> bool:
    """Say whether arrows pass through: also where nothing is dropped, or everything repeated once."""
    return operation.name in passed or (operation.name, operation.numbers[:1]) in IDLE


def _groups_of(calls: tuple[Call, ...], chart: Flowchart) -> tuple[str, ...]:
    """Return the groups of what is inside of these calls: one for each but the first, methods of a module together."""
    groups: list[str] = []
    for call in calls:
        key = call.owner if call.module is None else call.module
        if key != (calls[0].module if calls[0].module is not None else calls[0].owner) and key not in groups:
            groups.append(key)
            chart.groups.setdefault(key, call.owner)
    return tuple(groups)


def _key_of(closed: Call | None, operation: Operation, root: str) -> str:
    """Return what tells boxes apart: modules of one list, which follow each other, are one box."""
    if closed is None:
        return f"operation {operation.outputs[0].number}"
    if closed.module is None:
        return f"call {closed.number}"
    path = closed.module.removeprefix(root).lstrip(".")
    listed = re.sub(r"\d+", "*", path)
    return listed if listed != path else f"call {closed.number}"


def _node_of(closed: Call | None, operation: Operation, trace: ForwardTrace, count: int) -> Node:
    shape = trace.shape_text(operation.outputs[0].shape)
    if closed is None:
        if operation.name in SIGNS and len(operation.inputs) > 1:
            return Node([SIGNS[operation.name]], "sign")
        number = "".join(f" {_number_text(number, trace)}" for number in operation.numbers if _says(operation, number))
        title = f"{WORDS.get(operation.name, operation.name)}{number}"
        shapes = {trace.shape_text(value.shape): None for value in operation.outputs}
        return Node([*wrap(title, WIDTH), *shapes])
    weights = [name for value in operation.inputs if value.parameter for name in value.parameter.split(" = ")]
    if closed.module is None:
        return Node([f"{closed.owner}()", *wrap(" = ".join(weights) or short(closed.text), WIDTH), shape])
    kind = module_kind(trace.model.get_submodule(closed.module))
    name = closed.module.rpartition(".")[2]
    shared = [f"= {weight}" for weight in weights if not weight.startswith(f"{closed.module}.")]
    return Node([f"{kind} × {count}", shape] if name.isdigit() else [name, kind, *shared, shape])


def _says(operation: Operation, number: float) -> bool:
    """Say whether a number is what is computed with, and not an axis or a size."""
    return operation.name in ("add", "mul", "div", "masked_fill", "dropout", "pow") and not math.isnan(number)


def _number_text(number: float, trace: ForwardTrace) -> str:
    square = round(number**2) if math.isfinite(number) else 0
    if square in trace.letters and math.isclose(number, math.sqrt(square)):
        return f"by √{trace.letters[square]}"
    return str(number).replace("-inf", "−∞")


def _keep_what_leads_to(chart: Flowchart, out: str) -> None:
    """Take away boxes from which no way leads to `out`."""
    kept: set[str] = set()
    waiting = [out]
    while waiting:
        key = waiting.pop()
        if key not in kept:
            kept.add(key)
            waiting += [source for source, target in chart.arrows if target == key]
    chart.nodes = {key: node for key, node in chart.nodes.items() if key in kept}
    chart.arrows = {arrow: labels for arrow, labels in chart.arrows.items() if set(arrow) <= kept}
