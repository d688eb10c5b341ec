#!/usr/bin/env python3
"""Draws which package imports which, from the code: docs/images/architecture.svg.

usage: python scripts/architecture.py [--check]
--check: change nothing; exit 1 when the drawing is not what the code says. Needs no other package.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"dex": ROOT / "python/dex", "dexkernels": ROOT / "dexkernels"}
"""Distribution package -> its folder."""

LAYERS = (
    ("common", "config"),
    ("model",),
    ("data",),
    ("prepare",),
    ("sizing",),
    ("analysis",),
    ("train",),
    ("inference",),
    ("report",),
    ("cli",),
)
"""Packages of `dex`, the lowest first: each may import those below it. What is not named stands above all of them."""


class Import(NamedTuple):
    """One import of a module by another, wherever in the file it stands."""

    importer: str
    imported: str
    line: int


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of both packages; a package has the name of its folder."""
    named = {}
    for name, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            named[".".join(parts).removesuffix(".__init__")] = path
    return named


def imports(named: dict[str, Path]) -> list[Import]:
    """Every import between ``named`` modules, those inside of functions and for annotations included."""
    found = []
    for importer, path in named.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for imported in _targets(node, importer, path.name == "__init__.py", named):
                if imported != importer:
                    found.append(Import(importer, imported, node.lineno))
    return found


def _targets(node: ast.AST, importer: str, is_package: bool, named: dict[str, Path]) -> Iterator[str]:
    """The modules among ``named`` that an import statement means."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in named)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = importer.split(".")
            package = parts[: len(parts) - node.level + is_package]
            base = ".".join([*package, *filter(None, [node.module])])
        for alias in node.names:
            if f"{base}.{alias.name}" in named:
                yield f"{base}.{alias.name}"
            elif base in named:
                yield base


def package_of(module: str) -> str:
    """The package of `dex` that a module lies in, or the module itself where it lies in none: ``dex.data.loader`` ->
    ``data``, ``dex.config`` -> ``config``, ``dex`` -> ``dex``; of the kernel library always ``dexkernels``."""
    parts = module.split(".")
    return parts[1] if parts[0] == "dex" and len(parts) > 1 else parts[0]
