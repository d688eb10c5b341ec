"""The API reference has an entry for every public name, and every entry has a docstring to show."""

import ast
import functools
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "dexkernels", ROOT / "python" / "dex")
API = ROOT / "docs" / "api"
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in sorted(API.glob("*.md")))
ENTRIES = re.findall(r"^::: (\S+)$", TEXT, re.M)
WITHOUT_ENTRY = {"dexkernels.__version__", "dexkernels.optim"}
"""A text, and a module whose class has its own entry."""


@functools.cache
def modules():
    """The text of every module of both packages, by its name."""
    texts = {}
    for package in PACKAGES:
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            texts[name] = path.read_text(encoding="utf-8")
    return texts


def promised():
    """Names in the ``__all__`` of a module, and names that a Python block of the documentation imports or reads."""
    names = set()
    for module, text in modules().items():
        for node in ast.parse(text).body if "__all__" in text else ():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names |= {f"{module}.{name}" for name in ast.literal_eval(node.value)}
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for block in re.findall(r"^```py\S*[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            tree = ast.parse(block)
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("dex", "dexkernels"):
                    names |= {f"{node.module}.{alias.name}" for alias in node.names}
                if isinstance(node, ast.Attribute) and re.fullmatch(r"(dex|dexkernels)(\.\w+)+", ast.unparse(node)):
                    names.add(ast.unparse(node))
    return names - set(modules()) - WITHOUT_ENTRY


def resolved(name):
    """The object; a skip if it needs a package of an extra that is not installed."""
    parts = name.split(".")
    for i in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:i])
        try:
            value = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in ("dex", "dexkernels"):
                continue
            pytest.skip(f"{module} needs {error.name}")
        for part in parts[i:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


def has_text(name):
    """Whether a text follows the assignment of this attribute, in the module that defines it."""
    attribute = name.rpartition(".")[2]
    assigned = re.compile(rf"^{attribute}\b[^\n=]*=[^\n]*(?:\n    [^\n]*|\n\))*\n\"\"\"", re.M)
    return any(assigned.search(text) for text in modules().values())


def test_every_public_name_has_an_entry():
    assert len(ENTRIES) == len(set(ENTRIES))
    names = promised()
    assert {"dexkernels.DEXLayer", "dex.load", "dex.data.augment", "dex.tasks.finetune.finetune"} <= names
    assert not names - set(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_has_a_docstring(name):
    value = resolved(name)
    if inspect.isclass(value) or inspect.isroutine(value):
        text = inspect.cleandoc(value.__doc__ or "")
        made = text.startswith(f"{name.rpartition('.')[2]}(")  # By NamedTuple or dataclass
        assert text and not made
    else:
        assert has_text(name)


def test_docstrings_of_entries_are_markdown():
    """``::`` before an example is reStructuredText; an indented block needs none."""
    assert not [name for name, text in modules().items() if re.search(r"^ *::$", text, re.M)]


def test_the_generator_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["docs"]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert extra and set(extra) <= set(pinned)
