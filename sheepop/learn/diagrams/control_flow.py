"""A function as a flowchart, read from its source: calls become boxes, conditions decisions, loops arrows back.

What is shown follows from rules and not from the function at hand: calls of the project's own functions, calls that are
a statement of their own (they are made for what they do), and those decisions that lead to something shown or out of
a loop. A decision about a single call is said inside of its box, which has a dashed border. What only looks on (times,
records, progress) and checks that end in an error are left out.
"""

import ast
import collections.abc
import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sheepop.learn.diagrams.code_reading import (
    LOOKING_ON,
    Scope,
    calls_in,
    function_of,
    is_never_returning,
    is_work,
    name_of,
    title_of,
)
from sheepop.learn.diagrams.flowchart import Flowchart, Node, wrap
from sheepop.learn.diagrams.wording import PREDICATES, condition_words, first_sentence, name_words, short

BOX_WIDTH = 28  # characters a line
DECISION_WIDTH = 18  # of a diamond, which is twice as wide as what it holds

Ends = list[tuple[str, str]]  # boxes from which the way goes on, and what stands on the arrow


def function_diagram(function: Callable[..., Any]) -> str:
    """Return the flowchart of a whole function as Mermaid text."""
    return _Reader(function, from_loop=False).draw()


def loop_diagram(function: Callable[..., Any]) -> str:
    """Return the flowchart of a function's loop as Mermaid text: from its first loop on, without what prepares it."""
    return _Reader(function, from_loop=True).draw()


@dataclass
class _Loop:
    """The loop around a statement, with the ways out of it."""

    header: str
    breaks: Ends = field(default_factory=list)


class _Reader:
    """Draws a function, statement after statement."""

    def __init__(self, function: Callable[..., Any], *, from_loop: bool) -> None:
        self.function = inspect.unwrap(function)
        self.scope = Scope(self.function)
        self.looked_on = looked_on_only(self.scope)
        self.chart = Flowchart()
        self.loops: list[_Loop] = []
        self.is_waiting = from_loop
        self.condition: ast.expr | None = None  # of the box that is drawn next, where it may be passed by
        self.explained: set[Any] = set()

    def draw(self) -> str:
        """Return the chart."""
        ends = self._step(Node([f"{self.function.__name__}()"], "round"), [])
        ends = self._block(self.scope.tree.body, ends)
        if ends:
            self._step(Node(["end"], "round"), ends)
        return self.chart.mermaid()

    def _step(self, node: Node, ends: Ends) -> Ends:
        """Draw a box behind the ends."""
        key = self.chart.add(str(len(self.chart.nodes)), node)
        self._connect(ends, key)
        return [(key, "")]

    def _connect(self, ends: Ends, key: str) -> None:
        for source, label in ends:
            self.chart.connect(source, key, label)

    def _block(self, statements: list[ast.stmt], ends: Ends) -> Ends:
        """Draw statements behind the ends, and return the ends behind them; none where no way leads on."""
        for statement in statements:
            if not ends:
                break
            ends = self._statement(statement, ends)
        return ends

    def _statement(self, statement: ast.stmt, ends: Ends) -> Ends:
        match statement:
            case ast.For() | ast.While():
                return self._loop(statement, ends)
            case ast.With(items=items, body=body):
                return self._block(body, self._calls([item.context_expr for item in items], ends))
            case ast.FunctionDef() | ast.Assert():
                return ends
            case _ if self.is_waiting:
                return ends
            case ast.If():
                return self._decide(statement, ends)
            case ast.Try():
                return self._try(statement, ends)
            case ast.Return(value=value):
                return self._leave(f"return {_what(value)}".strip(), self._calls([value] if value else [], ends))
            case ast.Raise(exc=error):
                return self._leave(_what(error) or "the same error", ends)
            case ast.Break():
                self.loops[-1].breaks += ends
                return []
            case ast.Continue():
                self._connect(ends, self.loops[-1].header)
                return []
            case ast.Assign(targets=[ast.Name(id=name)]) if name in self.looked_on:
                return ends
        return self._calls([statement], ends)

    def _decide(self, statement: ast.If, ends: Ends) -> Ends:
        body, orelse = self._shown_steps(statement.body), self._shown_steps(statement.orelse)
        ends = self._calls([statement.test], ends)
        if not body and not orelse:
            return ends
        if len(body) == 1 and not orelse and isinstance(body[0], ast.Call) and not self._is_last(body[0]):
            outer = [self.condition] if self.condition else []
            self.condition = ast.BoolOp(ast.And(), [*outer, statement.test]) if outer else statement.test
            ends = self._block(statement.body, ends)
            self.condition = None
            return ends
        words = condition_words(statement.test)
        ((decision, _),) = self._step(Node(wrap(f"{words}?", DECISION_WIDTH), "decision"), ends)
        yes = self._block(statement.body, [(decision, "yes")])
        return [*yes, *self._block(statement.orelse, [(decision, "no")])]

    def _loop(self, statement: ast.For | ast.While, ends: Ends) -> Ends:
        if not self._shown_steps(statement.body):
            return self._calls([statement.iter if isinstance(statement, ast.For) else statement.test], ends)
        if isinstance(statement, ast.For):
            ends = self._calls([statement.iter], ends)
            targets = statement.target.elts if isinstance(statement.target, ast.Tuple) else [statement.target]
            words = f"for each {', '.join(map(condition_words, targets))}"
        else:
            words = f"while {condition_words(statement.test)}"
        self.is_waiting = False
        ((header, _),) = self._step(Node(wrap(words, BOX_WIDTH), "loop"), ends)
        self.loops.append(_Loop(header))
        self._connect(self._block(statement.body, [(header, "next")]), header)
        loop = self.loops.pop()
        is_endless = isinstance(statement, ast.While) and isinstance(statement.test, ast.Constant)
        return [*([] if is_endless else [(header, "no more")]), *loop.breaks]

    def _try(self, statement: ast.Try, ends: Ends) -> Ends:
        tried = self._block(statement.body, ends)
        behind = self._block(statement.orelse, tried)
        for handler in statement.handlers:
            if any(isinstance(step, ast.Call) for step in self._shown_steps(handler.body)):
                failed = [(key, f"on {_what(handler.type)}") for key, _ in tried]
                behind = [*behind, *self._block(handler.body, failed)]
        return self._block(statement.finalbody, behind)

    def _shown_steps(self, statements: Sequence[ast.AST]) -> list[ast.AST]:
        """Return what of these statements is shown, or leads out of a loop or of the function."""
        found: list[ast.AST] = []
        for statement in statements:
            if isinstance(statement, ast.FunctionDef | ast.Raise | ast.Lambda):
                continue
            if isinstance(statement, ast.Break | ast.Continue | ast.Return):
                found.append(statement)
            if isinstance(statement, ast.Expr) and self._is_done(statement.value):
                found.append(statement.value)
                continue
            if isinstance(statement, ast.Call) and self._is_shown(statement):
                found.append(statement)
            found += self._shown_steps(list(ast.iter_child_nodes(statement)))
        return found

    def _calls(self, nodes: Sequence[ast.AST], ends: Ends) -> Ends:
        if self.is_waiting:
            return ends
        for node in nodes:
            done = node.value if isinstance(node, ast.Expr) else None
            for call in calls_in([node]):
                if self._is_shown(call) or (call is done and self._is_done(call)):
                    ends = self._step(self._box(call), ends)
                    if self._is_last(call):
                        return []
        return ends

    def _box(self, call: ast.Call) -> Node:
        """Return the box of a call: its name and, the first time, what the documentation begins with."""
        function = function_of(call, self.scope)
        lines = [title_of(call, self.scope)]
        if is_work(function) and function not in self.explained and callable(function):
            self.explained.add(function)
            text = short(first_sentence(inspect.getdoc(function) or ""))
            lines += wrap(text, BOX_WIDTH) if text else []
        node = Node(lines, "round" if self._is_last(call) else "box")
        if self.condition is None:
            return node
        words, self.condition = condition_words(self.condition), None
        return replace(node, lines=[*wrap(f"if {words}:", BOX_WIDTH), *lines], is_optional=True)

    def _is_last(self, call: ast.Call) -> bool:
        return is_never_returning(function_of(call, self.scope))

    def _is_shown(self, call: ast.Call) -> bool:
        """Say whether a call is of the project's functions, or of one that the caller gave, and no mere question."""
        function = function_of(call, self.scope)
        is_given = typing.get_origin(function) is collections.abc.Callable
        is_question = name_of(call).startswith(PREDICATES)
        return (is_given or (callable(function) and is_work(function))) and not is_question

    def _is_done(self, node: ast.expr) -> bool:
        """Say whether an expression that is a statement is a call that does something."""
        if not isinstance(node, ast.Call):
            return False
        return not str(getattr(function_of(node, self.scope), "__module__", "")).startswith(LOOKING_ON)

    def _leave(self, words: str, ends: Ends) -> Ends:
        if ends:
            self._step(Node(wrap(words, BOX_WIDTH), "round"), ends)
        return []


def looked_on_only(scope: Scope) -> set[str]:
    """Return the variables that nothing reads but calls that only look on."""
    watched: set[ast.AST] = set()
    for call in (node for node in ast.walk(scope.tree) if isinstance(node, ast.Call)):
        if str(getattr(scope.meaning(call.func), "__module__", "")).startswith(LOOKING_ON):
            watched |= set(ast.walk(call))
    names = [node for node in ast.walk(scope.tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    read = {node.id for node in names if node not in watched}
    return {node.id for node in names} - read


def _what(node: ast.expr | None) -> str:
    """Return what is given back or raised, in a word or two."""
    match node:
        case None:
            return ""
        case ast.Constant(value=None):
            return "nothing"
        case ast.Call():
            return name_of(node)
        case ast.ListComp(elt=entry):
            return f"a {_what(entry)} for each"
        case ast.Name(id=name):
            return name_words(name) if name[:1].islower() else name
    return condition_words(node)
