#!/usr/bin/env python3
"""Draws which package imports which, from the code: docs/images/architecture.svg.

usage: python scripts/architecture.py [--check]
--check: change nothing; exit 1 if the drawing is outdated. Needs no other package.
"""

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from charts import line, text  # noqa: E402
from generated import settle  # noqa: E402

PICTURE = ROOT / "docs/images/architecture.svg"
SOURCES = {"dex": ROOT / "python/dex", "dexkernels": ROOT / "dexkernels"}
"""Distribution package -> its folder."""

LAYERS = (
    ("common",),
    ("config",),
    ("model",),
    ("data",),
    ("prepare",),
    ("sizing",),
    ("analysis",),
    ("train",),
    ("inference",),
    ("tasks",),
    ("report",),
    ("cli",),
)
"""Packages of `dex`, the lowest first: each may import those below it. Others stand above all of them."""

TOP, LIBRARY = "dex", "dexkernels"
"""Names in the drawing: the top-level modules of `dex`, which stand above all packages; the kernel library."""

WIDTH, MARGIN, BOX, STEP, ROW, FIRST = 900, 16, 82, 58, 50, 78
"""Pixels: drawing width, margin, box width, column distance, row distance, vertical centre of the first row."""
LETTER, SMALL = 5.9, 11
"""Pixels per letter of the small text, and its font size."""
INK, QUIET, PAPER = "#26323a", "#6a767d", "#fcfbf8"
COLOURS = ("#5b6770", "#0d6e75", "#8a5a00", "#2f72c4", "#6a55b0", "#b03a5b", "#3d7d3a", "#cb5f12", "#1f7a8c", "#7a3f9d")
"""Colours of the columns, in turn."""


class Import(NamedTuple):
    """One import of a module by another, anywhere in the file."""

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
    """Every import between ``named`` modules, including those in functions and for annotations."""
    entries = []
    for importer, path in named.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for imported in _targets(node, importer, path.name == "__init__.py", named):
                if imported != importer:
                    entries.append(Import(importer, imported, node.lineno))
    return entries


def _targets(node: ast.AST, importer: str, is_package: bool, named: dict[str, Path]) -> Iterator[str]:
    """The modules among ``named`` that an import statement imports."""
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
    """The package of `dex` that contains a module, or the module itself: ``dex.data.loader`` -> ``data``,
    ``dex.config`` -> ``config``, ``dex`` -> ``dex``. Modules of the kernel library give ``dexkernels``."""
    parts = module.split(".")
    return parts[1] if parts[0] == "dex" and len(parts) > 1 else parts[0]


def box_of(module: str) -> str:
    """The module's box in the drawing."""
    package = package_of(module)
    return package if package == LIBRARY or any(package in layer for layer in LAYERS) else TOP


def boxes() -> list[str]:
    """The packages of `dex` in the drawing, from the top down."""
    return [TOP, *(name for layer in reversed(LAYERS) for name in reversed(layer))]


def counts(entries: Iterable[Import]) -> Counter[tuple[str, str]]:
    """(importer, imported) -> number of imports, between boxes."""
    pairs = ((box_of(entry.importer), box_of(entry.imported)) for entry in entries)
    return Counter((importer, imported) for importer, imported in pairs if importer != imported)


def contents(named: dict[str, Path], package: str) -> list[str]:
    """The direct contents of a package, by its dotted name: modules, and folders with a slash."""
    prefix = f"{package}."
    inside = {name.removeprefix(prefix): path for name, path in sorted(named.items()) if name.startswith(prefix)}
    plain = {name: path for name, path in inside.items() if "." not in name and not name.startswith("_")}
    return [f"{name}/" if path.name == "__init__.py" else name for name, path in plain.items()]


def wrapped(words: Iterable[str], width: float, most: int) -> list[str]:
    """Words with commas in at most ``most`` lines of ``width`` pixels; an ellipsis if more are needed."""
    lines = [""]
    for word in words:
        longer = f"{lines[-1]}, {word}" if lines[-1] else word
        if len(longer) * LETTER <= width:
            lines[-1] = longer
        elif len(lines) < most:
            lines[-1] += ","
            lines.append(word)
        else:
            lines[-1] += ", ..."
            break
    return lines


def draw(named: dict[str, Path], entries: Iterable[Import]) -> str:
    """The SVG: a box for each package on a diagonal, above the packages that it imports. The number of imports stands
    where the column of the importer meets the row of the imported package."""
    names, arrows = boxes(), counts(entries)
    below = FIRST + ROW * len(names) + 8
    height = below + 168
    rows = {name: FIRST + ROW * i for i, name in enumerate(names)} | {LIBRARY: below}
    columns = {name: MARGIN + BOX / 2 + STEP * i for i, name in enumerate(names)}
    for importer, imported in arrows:
        if importer == LIBRARY or rows[importer] > rows[imported]:
            raise ValueError(f"{importer}: expected imports of lower packages, got {imported}")
    parts = [
        text(MARGIN, 26, "Who imports whom", "start", INK, 16),
        text(
            MARGIN,
            44,
            "Each number counts imports: the package at the top of its column imports the one at the end of its row.",
            "start",
            QUIET,
        ),
    ]
    for name in names:
        parts += _lines_into(name, rows, columns, arrows)
    for name, colour in _coloured(names):
        parts += _lines_out_of(name, colour, rows, columns, arrows)
    for name, colour in _coloured(names):
        inside = contents(named, TOP if name == TOP else f"dex.{name}")
        if name == TOP:
            inside = [module for module in inside if box_of(f"dex.{module.removesuffix('/')}") == TOP]
        parts += _box(name, colour, columns[name], rows[name], inside)
    parts += _library(named, entries, below, height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" role="img" '
        f'aria-label="Packages in layers; each arrow is an import and points down">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="{PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _coloured(names: list[str]) -> Iterator[tuple[str, str]]:
    return ((name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(names))


def _lines_into(name: str, rows: dict, columns: dict, arrows: Counter) -> list[str]:
    """The line along the row of a package, from the first column that imports it, and its arrow."""
    importers = [columns[importer] for importer, imported in arrows if imported == name]
    if not importers:
        return []
    end = columns[name] - BOX / 2
    return [
        line([(min(importers), rows[name]), (end - 6, rows[name])], "#c3c8ca", width=1.5),
        _arrow(end, rows[name], "M0 0L-8-4V4Z", QUIET),
    ]


def _lines_out_of(name: str, colour: str, rows: dict, columns: dict, arrows: Counter) -> list[str]:
    """The line down the column of a package, and its numbers."""
    x, imported = columns[name], {other: count for (importer, other), count in arrows.items() if importer == name}
    if not imported:
        return []
    last = max(rows[other] for other in imported)
    parts = [line([(x, rows[name] + 16), (x, last - 6 * (LIBRARY in imported))], colour, width=1.5)]
    if LIBRARY in imported:
        parts.append(_arrow(x, last, "M0 0L-4-8H4Z", colour))
    for other, count in sorted(imported.items()):
        y = rows[other] - 24 * (other == LIBRARY)
        parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="9" fill="{PAPER}" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(text(x, y + 4, str(count), colour=INK, size=SMALL))
    return parts


def _arrow(x: float, y: float, path: str, colour: str) -> str:
    return f'<path transform="translate({x:.1f} {y:.1f})" d="{path}" fill="{colour}"/>'


def _box(name: str, colour: str, x: float, y: float, inside: list[str]) -> list[str]:
    """The box of a package, with its contents beside it."""
    left = x - BOX / 2
    parts = [_rectangle(left, y - 16, BOX, 32, colour), text(x, y + 5, name, colour="#fff", size=13)]
    beside = left + BOX + 12
    lines = wrapped(inside, WIDTH - MARGIN - beside, 4) if inside else []
    for i, words in enumerate(lines):
        parts.append(text(beside, y + 4 + 12 * (i - (len(lines) - 1) / 2), words, "start", QUIET, SMALL))
    return parts


def _rectangle(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="6" fill="{fill}" '
        f'stroke="{stroke}"/>'
    )


def _library(named: dict[str, Path], entries: Iterable[Import], top: int, bottom: int) -> list[str]:
    """The kernel library: its modules, and below them its operators, each with its backends."""
    width = WIDTH - 2 * MARGIN
    parts = [_rectangle(MARGIN, top, width, bottom - top - MARGIN, "#eef2f1", "#9fb3b0")]
    parts.append(text(MARGIN + 14, top + 24, LIBRARY, "start", INK, 14))
    modules = [name for name in contents(named, LIBRARY) if name != "ops/"]
    for i, words in enumerate(wrapped(modules, width - 130, 2)):
        parts.append(text(MARGIN + 110, top + 24 + 14 * i, words, "start", QUIET, SMALL))
    prefix = f"{LIBRARY}.ops."
    operators = [name.removesuffix("/") for name in contents(named, f"{LIBRARY}.ops") if name.endswith("/")]
    into = sum(e.imported.startswith(prefix) and not e.importer.startswith(f"{LIBRARY}.ops") for e in entries)
    y = top + 74
    if into:
        x = MARGIN + 60
        parts.append(line([(x, top + 32), (x, y - 6)], INK, width=1.5))
        parts.append(_arrow(x, y, "M0 0L-4-8H4Z", INK))
        parts.append(f'<circle cx="{x}" cy="{y - 22}" r="9" fill="{PAPER}" stroke="{INK}" stroke-width="1.5"/>')
        parts.append(text(x, y - 18, str(into), colour=INK, size=SMALL))
    parts.append(_rectangle(MARGIN + 10, y, width - 20, bottom - y - MARGIN - 12, "#fff", "#c9d4d2"))
    parts.append(text(MARGIN + 24, y + 40, "ops/", "start", INK, 13))
    each = (width - 90) / max(1, len(operators))
    for i, operator in enumerate(operators):
        left = MARGIN + 70 + each * i
        parts.append(_rectangle(left, y + 10, each - 10, bottom - y - MARGIN - 32, "#dcebe9", "#0d6e75"))
        parts.append(text(left + each / 2 - 5, y + 28, operator, colour=INK, size=12))
        backends = contents(named, f"{prefix}{operator}")
        for j, words in enumerate(wrapped(backends, each - 22, 2)):
            parts.append(text(left + each / 2 - 5, y + 45 + 13 * j, words, colour=QUIET, size=SMALL))
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    named = modules()
    drawing = draw(named, imports(named))
    check = parser.parse_args().check
    return settle(PICTURE, drawing, check=check, source="the code", command="scripts/architecture.py")


if __name__ == "__main__":
    sys.exit(main())
