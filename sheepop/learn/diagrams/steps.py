"""The steps of a long way through several functions, one below the other, read from their source.

Where `control_flow.py` shows how one function decides, this shows which functions do the work, in the order in which
the code calls them: functions of modules, and methods that return arrays or make an object of their class. Each stands
there once. One that may be passed by has a dashed border, with the condition where it is a plain one.
"""

import ast
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sheepop.learn.diagrams.code_reading import (
    Scope,
    calls_in,
    function_of,
    handed_over,
    hints_of,
    is_work,
    name_of,
    title_of,
)
from sheepop.learn.diagrams.flowchart import Flowchart, Node, wrap
from sheepop.learn.diagrams.wording import PREDICATES, condition_words, first_sentence, name_words, short

WIDTH = 40  # characters a line of a box
SHARE_OF_WORK = "sheepop.data.parts.Unit"  # who takes or gives one shares the work out, and does none of it
PLAIN = tuple(map(str, (bool, int, float, str)))  # what answers are, unless the same went in


def steps_diagram(*functions: Callable[..., Any], opened: Sequence[Callable[..., Any]], end: str) -> str:
    """Return the steps of functions that follow each other, as Mermaid text.

    Args:
        functions: each in a frame of its own.
        opened: functions that stand for the steps inside of them.
        end: what comes out.
    """
    reader = _Reader({inspect.unwrap(function) for function in opened})
    given = next(iter(inspect.signature(functions[0]).parameters))
    reader.put("in", Node([name_words(given)], "round"))
    for function in functions:
        reader.open(function)
    reader.put("out", Node([end], "round"))
    return reader.draw()


@dataclass
class _Place:
    """Where the reader is: in which function, frames, and under which condition, if any."""

    scope: Scope
    groups: tuple[str, ...]
    condition: str | None = None


class _Reader:
    """Collects the steps."""

    def __init__(self, opened: set[Any]) -> None:
        self.opened = opened
        self.chart = Flowchart()
        self.last: str | None = None
        self.conditions: dict[str, str | None] = {}
        self.places: list[_Place] = []

    def put(self, key: str, node: Node) -> None:
        """Draw a box below the last one."""
        self.chart.add(key, node)
        if self.last is not None:
            self.chart.connect(self.last, key)
        self.last = key

    def draw(self) -> str:
        """Return the chart; frames that hold nothing but other frames are left out."""
        own = {node.groups[-1] for node in self.chart.nodes.values() if node.groups}
        for key, node in self.chart.nodes.items():
            condition = self.conditions.get(key)
            self.chart.nodes[key] = replace(
                node,
                groups=tuple(group for group in node.groups if group in own),
                lines=[*wrap(condition, WIDTH), *node.lines] if condition else node.lines,
                is_optional=condition is not None,
            )
        return self.chart.mermaid()

    def open(self, function: Callable[..., Any]) -> None:
        """Draw the steps inside of a function; those of a private one stand in the frame of who calls it."""
        groups = self.places[-1].groups if self.places else ()
        if not function.__name__.startswith("_"):
            self.chart.groups[function.__name__] = f"{function.__name__}()"
            groups = (*groups, function.__name__)
        condition = self.places[-1].condition if self.places else None
        self.places.append(_Place(Scope(function), groups, condition))
        self._block(self.places[-1].scope.tree.body)
        self.places.pop()

    def _block(self, statements: Sequence[ast.stmt], condition: str | None = None) -> None:
        place = self.places[-1]
        outer = place.condition
        place.condition = condition if condition is not None else outer
        for statement in statements:
            self._statement(statement)
            if isinstance(statement, ast.If):
                last = statement.body[-1]
                if isinstance(last, ast.Continue):  # what follows is not done for all
                    place.condition = place.condition or ""
                if isinstance(last, ast.Return) and any(map(self._is_step, calls_in(statement.body))):
                    place.condition = "else:"
        place.condition = outer

    def _statement(self, statement: ast.stmt) -> None:
        match statement:
            case ast.If(test=test, body=body, orelse=orelse):
                self._calls([test])
                self._block(body, f"if {condition_words(test)}:")
                self._block(orelse, "else:")
            case ast.For(iter=source, body=body):
                self._calls([source])
                self._block(body)
            case ast.While(body=body):
                self._block(body)
            case ast.With(items=items, body=body):
                self._calls([item.context_expr for item in items])
                self._block(body)
            case ast.Try(body=body, orelse=orelse, finalbody=final):
                self._block([*body, *orelse, *final])
            case ast.Assign(targets=targets, value=ast.BoolOp(op=ast.Or(), values=[first, second])):
                missing = ast.UnaryOp(ast.Not(), first)
                self._statement(ast.If(missing, [ast.Assign(targets, second)], []))
            case ast.Assign(targets=targets, value=ast.IfExp(test=test, body=body, orelse=orelse)):
                self._statement(ast.If(test, [ast.Assign(targets, body)], [ast.Assign(targets, orelse)]))
            case ast.Return(value=ast.Name(id=name)) if name in self.places[-1].scope.inner:
                self._block(self.places[-1].scope.inner[name].body)  # what is given back will be called
            case ast.FunctionDef() | ast.Raise() | ast.Assert():
                pass
            case _:
                self._calls([statement])

    def _calls(self, nodes: Sequence[ast.AST]) -> None:
        scope = self.places[-1].scope
        for call in calls_in(nodes):
            for function in handed_over(call, scope):
                if function in self.opened or is_work(function):
                    self._step(function, f"{function.__name__}()")
            if isinstance(call.func, ast.Name) and call.func.id in scope.inner:
                self._block(scope.inner[call.func.id].body)
            elif self._is_step(call):
                self._step(function_of(call, scope), title_of(call, scope))

    def _step(self, function: Any, title: str) -> None:
        if function in self.opened:
            self.open(function)
            return
        place = self.places[-1]
        if title not in self.conditions:
            self.conditions[title] = place.condition
            text = short(first_sentence(inspect.getdoc(function) or ""))
            self.put(title, Node([title, *(wrap(text, WIDTH) if text else [])], groups=place.groups))
        elif not place.condition:  # it is called elsewhere under no condition that is plain, or for certain
            self.conditions[title] = place.condition

    def _is_step(self, call: ast.Call) -> bool:
        """Say whether a call is one of the steps: work on what goes the way, and not a question about it."""
        function = function_of(call, self.places[-1].scope)
        if function in self.opened:
            return True
        if not callable(function) or not is_work(function) or name_of(call).startswith(("_", *PREDICATES)):
            return False
        owner, _, name = function.__qualname__.rpartition(".")
        *taken, returned = (str(kind) for kind in hints_of(function).values())
        if name.startswith("load") or any(SHARE_OF_WORK in kind for kind in (*taken, returned)):
            return False
        if owner:  # a method that makes an object of its class, or an array
            return inspect.ismethod(function) or "ndarray" in returned
        return returned not in PLAIN or returned in taken
