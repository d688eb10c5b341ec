"""Building blocks of the sections of an analysis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dex.analysis.conclusion import format_interval
from dex.analysis.examine import Findings
from dex.analysis.intervals import Interval
from dex.analysis.swap import Gap
from dex.common.csv_lines import csv_lines
from dex.inference.analyse_job import Analysis
from dex.report.charts import esc
from dex.report.parts import table
from dex.report.pictures import Bar, svg_file


class Block(NamedTuple):
    """A section, and the files beside the page that belong to it: name -> contents."""

    anchor: str
    title: str
    content: str
    files: dict[str, bytes]


class Model(NamedTuple):
    """One of the models compared."""

    name: str
    findings: Findings


def models(analysis: Analysis) -> list[Model]:
    """The run, the model that it started from and the run it is compared with; the latter two if there are any."""
    result = [Model(f"step {analysis.findings.step}", analysis.findings)]
    if analysis.start is not None:
        result.append(Model("step 0", analysis.start))
    if analysis.other is not None:
        result.append(Model(analysis.other.name, analysis.other.findings))
    return result


def gap_in_all_layers(model: Findings, kind: str) -> Gap | None:
    """The swap gap of one kind in all layers at once, if it was measured."""
    return next((gap for gap in model.gaps or () if gap.kind == kind and gap.layer is None), None)


def present(analysis: Analysis) -> list[int]:
    """The numbers of the modalities that have held-out images."""
    return sorted(set(analysis.material.held_out.modality.tolist()))


def names(analysis: Analysis) -> list[str]:
    return [analysis.material.modalities[m] for m in present(analysis)]


def numbered(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Row and column names of a square matrix; columns are named by the numbers of the rows."""
    return [f"{word} {i}" for i, word in enumerate(words, 1)], [str(i) for i in range(1, len(words) + 1)]


def bar(interval: Interval | None) -> Bar | None:
    return None if interval is None else Bar(*interval)


def block(
    anchor: str,
    title: str,
    read: str,
    drawn: str,
    figures: Sequence[str],
    data: tuple[Sequence[str], Iterable[Sequence[Any]]],
    columns: int = 2,
) -> Block:
    """A section with a CSV file of ``data`` (header, rows) and, if there are figures, an SVG file of them.

    read: plain text on how to read the section and when it misleads. drawn: HTML. columns: figures per row of the SVG.
    """
    header, rows = data
    files = {f"{anchor}.csv": csv_lines([header, *rows]).encode()}
    if picture := svg_file(figures, columns):
        files[f"{anchor}.svg"] = picture
    return Block(anchor, title, f"{reading(read)}{drawn}{_beside(files)}", files)


def reading(text: str) -> str:
    return f'<p class="read">{esc(text)}</p>'


def _beside(files: Iterable[str]) -> str:
    return f'<p class="files">Files beside this page: {", ".join(sorted(files))}</p>'


def pair(figures: Iterable[str]) -> str:
    return f'<div class="pair">{"".join(figures)}</div>'


def rows_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is a heading and whose others are numbers; cells are plain text."""
    head = f"<tr>{''.join(f'<th>{esc(h)}</th>' for h in header)}</tr>"
    body = [f"<tr><th>{esc(row[0])}</th>{''.join(f'<td>{esc(v)}</td>' for v in row[1:])}</tr>" for row in rows]
    return table(head, body, "numbers")


def cell(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def interval_cell(interval: Interval | None) -> str:
    return "–" if interval is None else format_interval(interval)
