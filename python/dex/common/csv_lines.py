"""CSV files in which every cell can be read again, also one that contains a carriage return."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any


def csv_lines(rows: Iterable[Sequence[Any]]) -> str:
    """The rows as lines of CSV that end with a line feed; None is an empty cell.

    The writer ends lines with a carriage return too: it quotes only cells that contain a character of its line end.
    """
    lines = []
    for row in rows:
        text = io.StringIO()
        csv.writer(text).writerow(row)
        lines.append(text.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)
