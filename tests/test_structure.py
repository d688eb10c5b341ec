"""The rules of the house, measured from the code: sizes, imports, one way to do a thing, a test for each module."""

import ast
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 90
MAX_PARAMETERS = 10

MEASURED = ("python", "dexkernels", "scripts", "benchmarks", "tests", "csrc")
SUFFIXES = {".py", ".cu", ".cuh", ".cpp", ".h", ".sh"}
COPIED = {"tests/recorded/conformance.py"}
"""A copy of the file that comes with the recorded cases."""

LONG_CONSTRUCTORS = {"DEXLayer", "MaskedAutoencoder", "VisionTransformer"}
"""Their parameters are what a user says about a network, by keyword, and are fixed by contract; VisionTransformer, the
encoder of MaskedAutoencoder, shares its names."""

RENAMES = {
    "dexkernels/verification/record.py": "a record moves into place; the kernel library stands without dex.common",
    "python/dex/common/atomic.py": "the one way to write a file atomically",
    "python/dex/data/shard_rewrite.py": "all files of a set at once, while its manifest names others",
    "python/dex/data/shard_writer.py": "several files become a set: each moves into place, the manifest last",
    "python/dex/prepare/chunk_files.py": "several files become a chunk: each moves into place, its record last",
    "python/dex/prepare/packages.py": "a file that pip or npm fetched moves into place",
    "python/dex/prepare/run.py": "the finished folder moves into place",
    "python/dex/train/checkpoint.py": "a folder that several ranks write, under one name, moves into place",
    "python/dex/train/runlog.py": "--overwrite sets the earlier run aside and may put it back",
}
"""What may move a file or a folder, and why."""

WITHOUT_TEST = {
    "python/dex/__main__.py": "it calls dex.cli.main",
    "python/dex/prepare/card_style.py": "text: the style sheet of the data card",
    "dexkernels/_version.py": "one literal",
    "dexkernels/_measured.py": "made by scripts/pages.py, whose tests check it",
    "dexkernels/_executed.py": "made by scripts/pages.py, whose tests check it",
}
"""Modules that hold nothing to test."""

TESTED_ELSEWHERE = {
    "python/dex/integrations.py": "tests/dropin/test_trainer.py",  # needs transformers
    "python/dex/checkpoint.py": "tests/dex/test_aliases.py",  # another name of a module
    "dexkernels/collect.py": "tests/dropin/test_collect.py",  # in models of others
    "dexkernels/upcycle.py": "tests/dropin/test_upcycle.py",  # in models of others
}


def files(*folders: str) -> list[Path]:
    """Source files below the folders; what was built or fetched lies in hidden folders or has another suffix."""
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SUFFIXES and not any(part.startswith((".", "__pycache__")) for part in path.parts)
    ]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


class Code(NamedTuple):
    """The nodes of one Python file, by kind."""

    functions: list[tuple[str, ast.FunctionDef]]
    """(name of the class or "", function)"""
    calls: list[ast.Call]
    names: list[ast.Name | ast.arg]
    constants: list[ast.Constant]


def read(path: Path) -> Code:
    code = Code([], [], [], [])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        owner = node.name if isinstance(node, ast.ClassDef) else ""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                code.functions.append((owner, child))
            elif isinstance(child, ast.Call):
                code.calls.append(child)
            elif isinstance(child, ast.Name | ast.arg):
                code.names.append(child)
            elif isinstance(child, ast.Constant):
                code.constants.append(child)
    return code


@pytest.fixture(scope="module")
def project() -> dict[str, Code]:
    """The Python files of the project, by path."""
    paths = [path for path in files(*MEASURED) if path.suffix == ".py" and name_of(path) not in COPIED]
    return {name_of(path): read(path) for path in paths}


@pytest.fixture(scope="module")
def product(project) -> dict[str, Code]:
    """What is no test."""
    return {name: code for name, code in project.items() if not name.startswith("tests/")}


@pytest.fixture(scope="module")
def architecture():
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "scripts/architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def imports(architecture):
    return architecture.imports(architecture.modules())


def decorators(function: ast.FunctionDef) -> str:
    return " ".join(ast.unparse(decorator) for decorator in function.decorator_list)


def is_kernel(function: ast.FunctionDef) -> bool:
    """Compiled for a GPU by Triton, so that its lines and parameters follow the hardware."""
    return re.search(r"\b(triton|gluon)\.jit\b", decorators(function)) is not None


def is_schema(function: ast.FunctionDef) -> bool:
    """Registered with torch.library, whose schemas have tensors and numbers, but no records."""
    return re.search(r"\b(custom_op|register_fake|register_kernel)\b", decorators(function)) is not None


def none(problems: Iterable[str]) -> None:
    """Fail with one line for each problem."""
    problems = sorted(problems)
    assert not problems, "\n" + "\n".join(problems)


def test_files_are_short():
    sizes = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files(*MEASURED)}
    assert len(sizes) > 100
    none(f"{name}: {size} lines" for name, size in sizes.items() if size > MAX_FILE_LINES and name not in COPIED)


def test_functions_are_short(project):
    none(
        f"{name}:{function.lineno} {function.name}: {size} lines"
        for name, code in project.items()
        for _, function in code.functions
        if (size := function.end_lineno - function.lineno + 1) > MAX_FUNCTION_LINES and not is_kernel(function)
    )


def test_functions_have_few_parameters(project):
    problems = []
    for name, code in project.items():
        for owner, function in code.functions:
            arguments = function.args
            count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]) - bool(owner)
            exempt = is_kernel(function) or is_schema(function)
            exempt |= function.name == "__init__" and owner in LONG_CONSTRUCTORS
            if count > MAX_PARAMETERS and not exempt:
                problems.append(f"{name}:{function.lineno} {function.name}: {count} parameters")
    none(problems)


def test_kernels_are_launched_by_keyword(product):
    library = {name: code for name, code in product.items() if name.startswith("dexkernels/")}
    kernels = {function.name for code in library.values() for _, function in code.functions if is_kernel(function)}
    launches, positional = 0, []
    for name, code in library.items():
        for call in code.calls:
            if isinstance(call.func, ast.Subscript):  # ``kernel[grid](...)``
                launched = ast.unparse(call.func.value).rpartition(".")[2]
                if launched in kernels or launched.endswith("kernel"):
                    launches += 1
                    positional += [f"{name}:{call.lineno} {launched}"] if call.args else []
    assert launches > 10
    none(positional)


def test_values_have_names(project):
    """``_`` for the one value that is not needed; with more of them, a record has fields instead."""
    none(
        f"{name}:{node.lineno}"
        for name, code in project.items()
        for node in code.names
        if re.fullmatch("_{2,}", node.id if isinstance(node, ast.Name) else node.arg)
    )


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one node, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == []


def test_imports_have_no_circle(imports):
    graph = defaultdict(set)
    for entry in imports:
        graph[entry.importer].add(entry.imported)
    assert len(graph) > 50
    none(" <-> ".join(circle) for circle in circles(graph))


def test_packages_import_downwards(architecture, imports):
    level = {name: number for number, names in enumerate(architecture.LAYERS) for name in names}
    top = len(level)
    upwards = []
    for entry in imports:
        importer, imported = (architecture.package_of(module) for module in (entry.importer, entry.imported))
        if importer != imported and imported != "dexkernels":
            if level.get(importer, top) <= level.get(imported, top):
                upwards.append(f"{entry.importer}:{entry.line} imports {entry.imported}")
    none(upwards)


def test_the_kernel_library_stands_alone(imports):
    none(
        f"{e.importer}:{e.line}"
        for e in imports
        if e.importer.startswith("dexkernels") and e.imported[:4] in ("dex", "dex.")
    )


def test_data_needs_neither_model_nor_configuration(architecture, imports):
    needed = defaultdict(set)
    for entry in imports:
        needed[architecture.package_of(entry.importer)].add(architecture.package_of(entry.imported))
    assert not (needed["data"] | needed["prepare"]) & {"model", "config", "dexkernels"}


def homes_of(module: str) -> list[Path]:
    """Where the tests of a module may lie, by its path."""
    if module in TESTED_ELSEWHERE:
        return [ROOT / TESTED_ELSEWHERE[module]]
    path = Path(module.removeprefix("python/"))
    mirrored = ROOT / "tests" / path.parent / f"test_{path.stem}.py"
    operator = re.match(r"dexkernels/ops/(\w+)", module)
    if operator and any("triton" in part for part in (path.parent.name, path.stem)):
        # These run in the interpreter of Triton, or compiled, and so in a process of their own.
        kernels = sorted((ROOT / "tests/kernels").glob("test_*.py"))
        return [mirrored, *(test for test in kernels if operator[1] in test.read_text(encoding="utf-8"))]
    if path.parent.parent.name == "ops":
        # Every backend of an operator has to pass the tests of the contract.
        return [mirrored, mirrored.with_name("test_contract.py")]
    return [mirrored]


def test_every_module_has_a_test_of_its_name(architecture):
    modules = [name_of(path) for path in architecture.modules().values() if path.name != "__init__.py"]
    missing = [m for m in modules if not any(path.is_file() for path in homes_of(m))]
    none(set(missing) - set(WITHOUT_TEST))
    assert set(WITHOUT_TEST) <= set(missing), "a module that has a test needs no exemption"


def moves_files(call: ast.Call) -> bool:
    """``os.replace(a, b)``, ``path.rename(b)``, ``path.replace(b)``, but not ``text.replace(a, b)``."""
    name = ast.unparse(call.func)
    plain = len(call.args) == 1 and not call.keywords and name.endswith(".replace")
    return plain or name.endswith(".rename") or name in ("os.replace", "os.renames", "os.link", "shutil.move")


def test_files_are_written_atomically_in_one_way(product):
    moving = {
        name
        for name, code in product.items()
        if any(moves_files(call) for call in code.calls if isinstance(call.func, ast.Attribute))
    }
    none(moving - set(RENAMES))
    assert set(RENAMES) <= moving, "what moves nothing needs no exemption"


def test_random_numbers_come_from_one_module(product):
    splitmix = {0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB}
    homes = {name for name, code in product.items() if any(c.value in splitmix for c in code.constants)}
    assert homes == {"python/dex/common/random.py"}


def test_signals_are_handled_in_one_module(product):
    homes = {name for name, code in product.items() if any(ast.unparse(c.func) == "signal.signal" for c in code.calls)}
    none(homes - {"python/dex/common/exits.py"})
