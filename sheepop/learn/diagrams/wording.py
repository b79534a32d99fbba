"""Names, conditions and documentation in the words of a label."""

import ast
import re

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
PREDICATES = ("is_", "are_", "has_", "allows_", "can_", "needs_", "may_")
FEW_CHARACTERS = 20  # a beginning that says little


def first_sentence(documentation: str) -> str:
    """Return the first sentence of a documentation, without its full stop."""
    paragraph = documentation.partition("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<!et al)\. ", paragraph)[0].rstrip(".")


def short(text: str, most: int = 70) -> str:
    """Return the beginning of a sentence without its asides: what stands in brackets of its own, or after a comma."""
    text = re.sub(r"(?<=\s)\([^()]*\),?", "", text.replace("`", "'")).removeprefix("Return ")
    depth, end = 0, len(text)
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0 and (character in ";:" or (character == "," and place >= FEW_CHARACTERS)):
            end = place
            break
    text = " ".join(text[:end].split())
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"


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
