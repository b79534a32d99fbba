"""Source code, and what is known of it without running it: which function a call means, and which calls there are."""

import ast
import builtins
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Modules whose calls only look on, or only say how work is shared out and kept.
LOOKING_ON = (
    "sheepop.data.gathered",
    "sheepop.data.parts",
    "sheepop.data.workers",
    "sheepop.data.working_folder",
    "sheepop.training.metrics",
    "sheepop.training.profiling",
    "sheepop.utils",
)


@dataclass(frozen=True)
class Instance:
    """What is known of a value: the class that it is an object of."""

    kind: Any


def tree_of(function: Callable[..., Any]) -> ast.FunctionDef:
    """Return the syntax tree of a function's definition."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    return tree


class Scope:
    """What the names inside of a function mean, as far as annotations and assignments tell."""

    def __init__(self, function: Callable[..., Any]) -> None:
        function = inspect.unwrap(function)
        self.tree = tree_of(function)
        self.globals: Mapping[str, Any] = function.__globals__
        self.names: dict[str, Any] = {name: Instance(kind) for name, kind in hints_of(function).items()}
        self.inner: dict[str, ast.FunctionDef] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef) and node is not self.tree:
                self.inner[node.name] = node
        for node in ast.walk(self.tree):
            self._learn(node)

    def _learn(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._bind(node.target, node.value)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._bind(node.optional_vars, node.context_expr)
        elif isinstance(node, ast.For):
            self._bind_each(node.target, node.iter)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.names.setdefault(target.id, self.meaning(value))
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for part, given in zip(target.elts, value.elts, strict=False):
                self._bind(part, given)

    def _bind_each(self, target: ast.expr, source: ast.expr) -> None:
        """Learn what a loop's variable is: an entry of a sequence whose entries are annotated."""
        if isinstance(source, ast.Call) and isinstance(source.func, ast.Name) and source.func.id == "enumerate":
            source = source.args[0]
            target = target.elts[1] if isinstance(target, ast.Tuple) else target
        known = self.meaning(source)
        arguments = typing.get_args(known.kind) if isinstance(known, Instance) else ()
        if isinstance(target, ast.Name) and len(arguments) == 1:
            self.names.setdefault(target.id, Instance(arguments[0]))

    def meaning(self, node: ast.expr) -> Any:
        """Return the function or class that an expression names, the `Instance` that it yields, or None."""
        if isinstance(node, ast.Name):
            known = self.names.get(node.id)
            return known if known is not None else self.globals.get(node.id, getattr(builtins, node.id, None))
        if isinstance(node, ast.Attribute):
            return _attribute(self.meaning(node.value), node.attr)
        if isinstance(node, ast.Call):
            return _result(self.meaning(node.func))
        if isinstance(node, ast.BinOp):
            return self.meaning(node.left)
        if isinstance(node, ast.IfExp):
            return self.meaning(node.body)
        return None


def hints_of(thing: Any) -> dict[str, Any]:
    """Return annotations as what they mean; those of names that only type checkers import are left out."""
    try:
        return typing.get_type_hints(thing)
    except (NameError, TypeError):
        return {}


def plain(kind: Any) -> Any:
    """Return a type without `| None`, or None."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        rest = [part for part in typing.get_args(kind) if part is not type(None)]
        return rest[0] if len(rest) == 1 else None
    return kind


def _attribute(owner: Any, name: str) -> Any:
    if not isinstance(owner, Instance):
        return getattr(owner, name, None)
    kind = plain(owner.kind)
    kind = typing.get_origin(kind) or kind
    found = inspect.getattr_static(kind, name, None) if inspect.isclass(kind) else None
    if isinstance(found, property):
        return Instance(hints_of(found.fget).get("return"))
    if name in hints_of(kind):
        return Instance(hints_of(kind)[name])
    return getattr(kind, name, None) if found is not None else None


def _result(called: Any) -> Any:
    if inspect.isclass(called):
        return Instance(called)
    if isinstance(called, Instance):
        called = getattr(called.kind, "forward", None)
    kind = hints_of(called).get("return") if callable(called) else None
    if typing.get_origin(kind) is not None and "Iterator" in str(typing.get_origin(kind)):
        arguments = typing.get_args(kind)  # a context manager yields what `with` binds
        return Instance(arguments[0]) if hasattr(called, "__wrapped__") else Instance(kind)
    return Instance(kind) if kind is not None else None


def is_never_returning(function: Any) -> bool:
    """Say whether a function is annotated to end by an error always."""
    return callable(function) and hints_of(function).get("return") is typing.NoReturn


def is_work(function: Any) -> bool:
    """Say whether something is a function of the project, and not of a module that only looks on."""
    module = str(getattr(function, "__module__", ""))
    return module.startswith("sheepop.") and not module.startswith(LOOKING_ON) and not inspect.isclass(function)


def name_of(call: ast.Call) -> str:
    """Return the name that is called, without the object that it belongs to."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)


def title_of(call: ast.Call, scope: Scope) -> str:
    """Return a call as the title of a box: the name, and of a method the object's."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    while isinstance(owner, ast.Subscript):
        owner = owner.value
    if isinstance(owner, ast.Name | ast.Attribute) and not isinstance(scope.meaning(owner), types.ModuleType):
        return f"{owner.attr if isinstance(owner, ast.Attribute) else owner.id}.{name_of(call)}()"
    return f"{name_of(call)}()"


def function_of(call: ast.Call, scope: Scope) -> Any:
    """Return the function that a call means; of an object that is called, its `forward` or type; None if unknown."""
    called = scope.meaning(call.func)
    if isinstance(called, Instance):
        kind = plain(called.kind)
        called = getattr(kind, "forward", kind)
    return inspect.unwrap(called) if inspect.isfunction(called) else called


def handed_over(call: ast.Call, scope: Scope) -> list[Callable[..., Any]]:
    """Return the functions that a call gets as arguments: somebody calls them then."""
    known = [scope.meaning(node) for node in call.args if isinstance(node, ast.Name)]
    return [function for function in known if inspect.isfunction(function)]


def calls_in(nodes: Sequence[ast.AST]) -> Iterator[ast.Call]:
    """Yield the calls inside of expressions that are made for certain, in order."""
    for node in nodes:
        if isinstance(node, ast.BoolOp):
            yield from calls_in(node.values[:1])
        elif not isinstance(node, ast.Lambda):
            yield from calls_in(list(ast.iter_child_nodes(node)))
        if isinstance(node, ast.Call):
            yield node
