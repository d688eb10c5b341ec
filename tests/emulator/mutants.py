"""Changes of single kernel lines, drawn from their source: what `mutations.py` interprets and emulates."""

import ast
import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

OPS = Path(__file__).resolve().parents[2] / "dexkernels/ops"

OPERATORS = {"+": "-", "-": "+", "*": "+", "/": "*", "//": "*", "%": "//", "&": "|", "|": "&", "<<": ">>"}
COMPARISONS = {"<": ("<=", ">="), "<=": ("<", ">"), ">": (">=", "<="), ">=": (">", "<"), "==": ("!=",), "!=": ("==",)}
OTHER_NAMES = {"tl.minimum": "tl.maximum", "tl.maximum": "tl.minimum", "tl.max": "tl.min", "tl.min": "tl.max"}
OTHER_TYPES = {"tl.int64": "tl.int32", "tl.float32": "tl.float16"}


class Edit(NamedTuple):
    """``text[start:end]`` becomes ``after``."""

    start: int
    end: int
    after: str


class Mutant(NamedTuple):
    """One change of a kernel's source."""

    module: str
    """As in `modules`."""
    function: str
    before: str
    """The lines that change, joined and stripped."""
    after: str
    number: int
    """Among the changes of this function that read the same: 0 but where it holds a line twice."""
    edit: Edit

    @property
    def key(self) -> str:
        again = f" ({self.number + 1})" if self.number else ""
        return f"{self.module} {self.function}{again}: {self.before} -> {self.after}"


def modules() -> dict[str, Path]:
    """Name -> source, of every module that holds kernels of Triton."""
    files = [OPS / "triton_common.py", *sorted(OPS.glob("*/triton.py")), *sorted(OPS.glob("*/triton/*_kernels.py"))]
    return {file.relative_to(OPS).with_suffix("").as_posix(): file for file in files}


def sources() -> str:
    """A hash of these sources."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in modules().values())).hexdigest()[:16]


def draw(count: int, seed: int) -> list[Mutant]:
    """``count`` changes, of all kernel functions in turn; the same for the same seed and sources."""
    chance, queues = random.Random(seed), []
    for module, file in modules().items():
        text = file.read_text()
        for function in jitted(text):
            found = list(mutants(module, text, function))
            chance.shuffle(found)
            queues.append(found)
    drawn = []
    while len(drawn) < count and any(queues):
        drawn += [queue.pop() for queue in queues if queue]
    return drawn[:count]


def apply(text: str, edit: Edit) -> str:
    return text[: edit.start] + edit.after + text[edit.end :]


def jitted(text: str) -> list[ast.FunctionDef]:
    tree = ast.parse(text)
    return [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in node.decorator_list)
    ]


def called(function: ast.FunctionDef) -> set[str]:
    """The names of what a function calls."""
    return {n.func.id for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


def mutants(module: str, text: str, function: ast.FunctionDef) -> Iterator[Mutant]:
    seen = {}
    source = _Source(text)
    for edit in dict.fromkeys(_edits(source, function)):
        before, after = source.lines(edit)
        if before == after:
            continue
        number = seen[before, after] = seen.get((before, after), -1) + 1
        yield Mutant(module, function.name, before, after, number, edit)


class _Source:
    """A text whose nodes are found by their places."""

    def __init__(self, text: str):
        if not text.isascii():
            raise ValueError("text: expected ASCII, by which columns of the syntax tree are those of the text")
        self.text, self.starts = text, [0]
        for line in text.split("\n"):
            self.starts.append(self.starts[-1] + len(line) + 1)

    def span(self, node) -> tuple[int, int]:
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, node) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def instead(self, node, after: str) -> Edit:
        return Edit(*self.span(node), after)

    def between(self, left, right, pattern: str, after: str) -> Edit:
        """The operator between two operands becomes ``after``."""
        start, end = self.span(left)[1], self.span(right)[0]
        match = re.search(pattern, self.text[start:end])
        return Edit(start + match.start(), start + match.end(), after)

    def lines(self, edit: Edit) -> tuple[str, str]:
        first = self.text.rfind("\n", 0, edit.start) + 1
        last = self.text.find("\n", edit.end)
        before = self.text[first:last]
        after = self.text[first : edit.start] + edit.after + self.text[edit.end : last]
        return tuple(" ".join(t.split()) for t in (before, after))


def _edits(source: _Source, function: ast.FunctionDef) -> Iterator[Edit]:
    body = function.body[1:] if ast.get_docstring(function) else function.body
    for statement in body:
        for node in ast.walk(statement):
            kind = type(node).__name__
            if kind in _KINDS:
                yield from _KINDS[kind](source, node)


def _operation(source, node):
    left, right = source.of(node.left), source.of(node.right)
    sign = next(s for s in sorted(OPERATORS, key=len, reverse=True) if _has_sign(source, node, s))
    yield source.between(node.left, node.right, re.escape(sign), OPERATORS[sign])
    if sign in ("+", "-", "&", "*", "%", "//", "|"):
        yield source.instead(node, f"({left})")
    if sign in ("+", "&", "*", "|"):
        yield source.instead(node, f"({right})")


def _has_sign(source, node, sign):
    return sign in source.text[source.span(node.left)[1] : source.span(node.right)[0]]


def _comparison(source, node):
    right = node.comparators[0]
    between = source.text[source.span(node.left)[1] : source.span(right)[0]]
    sign = next((s for s in sorted(COMPARISONS, key=len, reverse=True) if s in between), None)
    for other in COMPARISONS.get(sign, ()):
        yield source.between(node.left, right, re.escape(sign), other)


def _constant(source, node):
    value = node.value
    if value == "ieee":
        yield source.instead(node, '"tf32"')
    if type(value) is int:
        yield from (source.instead(node, str(n)) for n in (value + 1, value - 1) if n >= 0)
    if type(value) is float:
        yield source.instead(node, repr(value + 1 if value in (0, 1) else value * 1.01))


def _call(source, node):
    name, args = source.of(node.func), node.args
    if name in OTHER_NAMES:
        yield source.instead(node.func, OTHER_NAMES[name])
    if name == "tl.where":
        start, end = source.span(args[1])[0], source.span(args[2])[1]
        yield Edit(start, end, f"{source.of(args[2])}, {source.of(args[1])}")
    if name == "tl.cdiv":
        yield source.instead(node, f"(({source.of(args[0])}) // ({source.of(args[1])}))")
    if name == "range" and len(args) > 1:
        yield source.instead(args[1], f"({source.of(args[1])}) - 1")
    if isinstance(node.func, ast.Attribute) and node.func.attr == "to" and source.of(args[0]) in OTHER_TYPES:
        yield source.instead(node, source.of(node.func.value))
        yield source.instead(args[0], OTHER_TYPES[source.of(args[0])])
    if name in ("tl.load", "tl.store"):
        kept = [source.of(argument) for argument in args]
        if any(keyword.arg == "mask" for keyword in node.keywords):
            yield source.instead(node, f"{name}({', '.join(kept)})")
    elif not name.startswith("tl.") or name == "tl.dot":
        for one, other in zip(args, args[1:], strict=False):
            start, end = source.span(one)[0], source.span(other)[1]
            yield Edit(start, end, f"{source.of(other)}, {source.of(one)}")


def _index(source, node):
    turned = {":, None": "None, :", "None, :": ":, None"}.get(source.of(node.slice))
    if turned:
        yield source.instead(node.slice, turned)


def _dropped(source, node):
    value = node.value
    if isinstance(node, ast.Assign):
        names = {one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)}
        if not names & {one.id for one in ast.walk(value) if isinstance(one, ast.Name)}:
            return
    if not isinstance(value, ast.Constant):
        yield source.instead(node, "pass")


def _branch(source, node):
    if len(node.body) == 1 and isinstance(node.body[0], ast.Return):
        yield source.instead(node.body[0], "pass")


def _sign(source, node):
    if isinstance(node.op, ast.USub):
        yield source.instead(node, source.of(node.operand))


_KINDS = {
    "BinOp": _operation,
    "Compare": _comparison,
    "Constant": _constant,
    "Call": _call,
    "Subscript": _index,
    "AugAssign": _dropped,
    "Assign": _dropped,
    "Expr": _dropped,
    "If": _branch,
    "UnaryOp": _sign,
}
