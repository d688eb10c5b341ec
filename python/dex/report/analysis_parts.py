"""What the sections of an analysis are made of."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from dex.analysis.conclusion import told
from dex.analysis.examine import Findings
from dex.analysis.intervals import Interval
from dex.inference.analyse_job import Analysis
from dex.report.charts import esc
from dex.report.parts import table
from dex.report.pictures import Bar, svg_file


class Block(NamedTuple):
    """A section, and the files beside the page that belong to it."""

    anchor: str
    title: str
    content: str
    files: dict[str, bytes]


class Model(NamedTuple):
    """One of the models that are compared."""

    name: str
    found: Findings


def models(analysis: Analysis) -> list[Model]:
    """The run, the model that it started from, and another run, as far as there are any."""
    found = [Model(f"step {analysis.found.step}", analysis.found)]
    if analysis.start is not None:
        found.append(Model("step 0", analysis.start))
    if analysis.other is not None:
        found.append(Model(analysis.other.name, analysis.other.findings))
    return found


def present(analysis: Analysis) -> list[int]:
    """The modalities of which there are held-out images."""
    return sorted(set(analysis.material.held_out.modality.tolist()))


def names(analysis: Analysis) -> list[str]:
    return [analysis.material.modalities[m] for m in present(analysis)]


def numbered(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Rows and columns of a square matrix: the columns are the rows' numbers."""
    return [f"{word} {i}" for i, word in enumerate(words, 1)], [str(i) for i in range(1, len(words) + 1)]


def bar(interval: Interval | None) -> Bar | None:
    return None if interval is None else Bar(*interval)


def sheet(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A CSV file; numbers in full, None as nothing."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue().encode()


def block(
    anchor: str,
    title: str,
    read: str,
    drawn: str,
    figures: Sequence[str],
    data: tuple[Sequence[str], Iterable[Sequence[Any]]],
    columns: int = 2,
) -> Block:
    """read: how to read it and when it misleads, plain text; drawn: HTML; figures: those that the SVG file shows."""
    files = {f"{anchor}.csv": sheet(*data)}
    if picture := svg_file(figures, columns):
        files[f"{anchor}.svg"] = picture
    return Block(anchor, title, f"{reading(read)}{drawn}{_beside(files)}", files)


def reading(text: str) -> str:
    return f'<p class="read">{esc(text)}</p>'


def _beside(files: Iterable[str]) -> str:
    return f'<p class="files">Beside this page: {", ".join(sorted(files))}</p>'


def pair(figures: Iterable[str]) -> str:
    return f'<div class="pair">{"".join(figures)}</div>'


def rows_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is a heading, the others are numbers; cells are plain text."""
    head = f"<tr>{''.join(f'<th>{esc(h)}</th>' for h in header)}</tr>"
    body = [f"<tr><th>{esc(row[0])}</th>{''.join(f'<td>{esc(v)}</td>' for v in row[1:])}</tr>" for row in rows]
    return table(head, body, "numbers")


def cell(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def interval_cell(interval: Interval | None) -> str:
    return "–" if interval is None else told(interval)
