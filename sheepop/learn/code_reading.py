"""Code read as a person would say it: which function a call means, and what a condition asks."""

import ast
import builtins
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Eq: "is",
    ast.NotEq: "is not",
    ast.Is: "is",
    ast.IsNot: "is not",
    ast.Lt: "is below",
    ast.LtE: "is at most",
    ast.Gt: "is above",
    ast.GtE: "is at least",
    ast.In: "is among",
    ast.NotIn: "is not among",
}
OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "−", ast.Mult: "×", ast.Div: "÷", ast.FloorDiv: "÷"}
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
PREDICATES = ("is_", "are_", "has_", "allows_", "can_", "needs_", "may_")


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


def name_words(name: str) -> str:
    """Return a name as words."""
    return name.strip("_").replace("_", " ")


def condition_words(node: ast.expr) -> str:
    """Return what an expression says or asks, in words."""
    if isinstance(node, ast.BoolOp):
        operands = [operand for place, operand in enumerate(node.values) if not _is_guard(node, place)]
        said = [
            f"either {condition_words(operand)}" if isinstance(operand, ast.BoolOp) else condition_words(operand)
            for operand in operands
        ]
        return (" and " if isinstance(node.op, ast.And) else " or ").join(said)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return _negated(node.operand)
    if isinstance(node, ast.Compare):
        return _comparison_words(node.left, node.ops[0], node.comparators[0])
    if isinstance(node, ast.Attribute):
        words = name_words(node.attr)
        return f"{_owner_words(node)} {words}" if _says_little(node) else words
    if isinstance(node, ast.Name):
        return name_words(node.id)
    if isinstance(node, ast.Call):
        return _call_words(node)
    if isinstance(node, ast.Subscript):
        return condition_words(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return f"{condition_words(node.left)} {OPERATORS[type(node.op)]} {condition_words(node.right)}"
    if isinstance(node, ast.Constant):
        return f"‘{node.value}’" if isinstance(node.value, str) else str(node.value)
    return ast.unparse(node)


def _comparison_words(left: ast.expr, operator: ast.cmpop, right: ast.expr) -> str:
    if isinstance(right, ast.Constant) and right.value is None:
        what = name_words(left.attr) if isinstance(left, ast.Attribute) else condition_words(left)
        return f"{'no' if isinstance(operator, ast.Is | ast.Eq) else 'there is a'} {what}"
    if isinstance(left, ast.BinOp) and isinstance(left.op, ast.Mod) and isinstance(right, ast.Constant):
        return f"{condition_words(left.left)} divides by {condition_words(left.right)}"
    return f"{condition_words(left)} {COMPARISONS[type(operator)]} {condition_words(right)}"


def _negated(node: ast.expr) -> str:
    words = condition_words(node)
    if isinstance(node, ast.Attribute) and " " not in name_words(node.attr):
        return f"{_owner_words(node)} not {name_words(node.attr)}"
    for verb in (" is ", " was ", " has "):
        before, found, behind = words.partition(verb)
        if found and not isinstance(node, ast.BoolOp):
            return f"{before}{verb}not {behind}"
    return f"no {words}" if isinstance(node, ast.Attribute) else f"not {words}"


def _says_little(node: ast.Attribute) -> bool:
    return node.attr.startswith(PREDICATES) or "_" not in node.attr.strip("_")


def _owner_words(node: ast.Attribute) -> str:
    """Return what an attribute belongs to, without what that belongs to in turn."""
    return name_words(node.value.attr) if isinstance(node.value, ast.Attribute) else condition_words(node.value)


def _call_words(node: ast.Call) -> str:
    arguments = ", ".join(map(condition_words, node.args))
    if isinstance(node.func, ast.Attribute):
        if node.func.attr == "isfinite":
            return f"{arguments} is finite"
        return f"{node.func.attr}()"
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    if name == "len":
        return f"number of {arguments}"
    return arguments if name in ("enumerate", "list", "tuple", "bool") else f"{name}()"


def _is_guard(node: ast.BoolOp, place: int) -> bool:
    """Say whether an operand asks only whether there is something that a later one works with."""
    operand = node.values[place]
    if not isinstance(operand, ast.Compare) or not isinstance(operand.ops[0], ast.IsNot):
        return False
    what = ast.dump(operand.left)
    return any(what == ast.dump(inner) for later in node.values[place + 1 :] for inner in ast.walk(later))


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
