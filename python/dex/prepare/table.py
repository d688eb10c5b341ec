"""Tables that describe files: CSV, TSV, JSON lines, Parquet, or a list of paths.

    path;modality;patient;split            column names in any letter case and order; COLUMNS lists their aliases
    p1/a.dcm;CT;P-001;train                "," and tabs work too; UTF-8, with or without a byte order mark
    p2/scan.nii.gz;MRI;P-002;val           other columns are skipped, and reported

An error names the line, but never its contents: paths and patients are private.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import modalities
from .modalities import key

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".parquet")
COLUMNS = {
    "path": ("path", "file", "filename", "filepath", "imagepath", "image", "uri", "url"),
    "modality": ("modality",),
    "patient": ("patient", "patientid", "subject", "subjectid", "participantid", "participant", "case", "caseid"),
    "split": ("split", "subset", "partition", "side"),
}
"""Meaning of a column -> its possible names without spaces, "-" and "_"; the first that occurs is used."""
NAMED_BY = ("pathorpatient", "name", "id", "key")
"""Columns of a split file that hold a path or a patient."""
SIDES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "heldout": "val"}
DELIMITERS = ",;\t"
NAMED = 5
"""Number of lines that an error names one by one."""


class Row(NamedTuple):
    """A row, with "" for missing values. line: its number, from 1. name: a path or a patient, in a split file."""

    line: int
    path: str = ""
    modality: str = ""
    patient: str = ""
    split: str = ""
    name: str = ""


class Table(NamedTuple):
    """passed_over: the names of columns that are not used."""

    rows: list[Row]
    passed_over: list[str]


class _Text(NamedTuple):
    """columns: names of the columns; rows: (line, cells)."""

    columns: list[str]
    rows: Iterator[tuple[int, Sequence[Any]]]


def is_table(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def read(path: Path, patient: str = "") -> Table:
    """The table in a file. patient: the name of the patient column, instead of the usual ones.

    Raises ValueError, naming the file and the line, if it is not text or not a table, has no column of paths, or holds
    an invalid value.
    """
    text = _open(path)
    meaning = _meanings(path, text.columns, ("path", "modality", "patient", "split"), patient)
    if "path" not in meaning.values():
        aliases = ", ".join(COLUMNS["path"][:4])
        raise _fault(path, 1, f"expected a column of paths ({aliases}, ...), got {_others(text)}")
    rows = _rows(path, text, meaning)
    missing = [row.line for row in rows if not row.path]
    if missing:
        raise _fault(path, missing, "expected a path, got none")
    if not rows:
        raise ValueError(f"{path.name}: expected a row for each file, got none")
    return Table(rows, [name for number, name in enumerate(text.columns) if number not in meaning])


def read_split(path: Path) -> list[Row]:
    """The rows of a table of paths or patients and the side of each. Raises ValueError as ``read`` does."""
    text = _open(path)
    meaning = _meanings(path, text.columns, ("path", "patient", "split"))
    named = [number for number, name in enumerate(text.columns) if key(name) in NAMED_BY and number not in meaning]
    if named and not {"path", "patient"} & set(meaning.values()):
        meaning[named[0]] = "name"
    if "split" not in meaning.values() or len(meaning) < 2:
        raise _fault(path, 1, f"expected a column of paths or patients and one called split, got {_others(text)}")
    rows = _rows(path, text, meaning)
    if nameless := [row.line for row in rows if not (row.path or row.patient or row.name)]:
        raise _fault(path, nameless, "expected a path or a patient, got none")
    if sideless := [row.line for row in rows if not row.split]:
        raise _fault(path, sideless, "split: expected train or val, got nothing")
    if not rows:
        raise ValueError(f"{path.name}: expected a row for each path or patient, got none")
    return rows


def lines(numbers: Sequence[int]) -> str:
    """Line numbers in words, for a message."""
    listed = ", ".join(map(str, numbers[:NAMED]))
    more = f" and {len(numbers) - NAMED:,} more" if len(numbers) > NAMED else ""
    return f"line{'' if len(numbers) == 1 else 's'} {listed}{more}"


def _others(text: _Text) -> str:
    """The number of columns, in words. If the line of names is missing, the first line is private data."""
    if not text.columns:
        return "nothing"
    columns = f"{len(text.columns)} column{'' if len(text.columns) == 1 else 's'}"
    return f"{columns} with other names; the first line must name them"


def _open(path: Path) -> _Text:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path.name}: expected a table ({', '.join(SUFFIXES)}), got another suffix")
    if suffix == ".parquet":
        return _parquet(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name}: expected a table; {error.strerror}") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _fault(path, 1, "expected UTF-8, got UTF-16: save it as CSV UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _fault(path, data.count(b"\n", 0, error.start) + 1, "expected UTF-8, got bytes that are not") from None
    if "\0" in text:
        raise _fault(path, text.count("\n", 0, text.index("\0")) + 1, "expected text, got a zero byte")
    if suffix == ".txt":
        named = ((number, [line.strip()]) for number, line in enumerate(text.splitlines(), 1) if line.strip())
        return _Text(["path"], named)
    return _json_lines(path, text) if suffix in (".jsonl", ".ndjson") else _csv(path, text)


def _csv(path: Path, text: str) -> _Text:
    head = next(iter(text.splitlines()), "")
    wanted = {*NAMED_BY, *(alias for aliases in COLUMNS.values() for alias in aliases)}
    counts = [sum(key(name.strip('"')) in wanted for name in head.split(mark)) for mark in DELIMITERS]
    reader = csv.reader(text.splitlines(keepends=True), delimiter=DELIMITERS[counts.index(max(counts))], strict=True)

    def rows() -> Iterator[tuple[int, Sequence[Any]]]:
        try:
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, cells
        except csv.Error as error:
            raise _fault(path, reader.line_num, f"expected CSV; {error}") from None

    records = rows()
    return _Text([name.strip() for name in next(records, (1, []))[1]], records)


def _json_lines(path: Path, text: str) -> _Text:
    objects: list[tuple[int, dict[str, Any]]] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise _fault(path, number, "expected a JSON object")
        columns |= dict.fromkeys(row)
        objects.append((number, row))
    return _Text(list(columns), ((number, [row.get(name) for name in columns]) for number, row in objects))


def _parquet(path: Path) -> _Text:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path.name}: Parquet needs pyarrow, which is not installed (extra 'adapt')") from None
    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError):
        raise ValueError(f"{path.name}: expected a Parquet file") from None
    return _Text(table.column_names, enumerate(zip(*(column.to_pylist() for column in table.columns), strict=True), 1))


def _meanings(path: Path, columns: Sequence[str], wanted: Sequence[str], patient: str = "") -> dict[int, str]:
    """The number of a column -> its meaning."""
    keys = [key(name) for name in columns]
    meaning = {}
    for column in wanted:
        aliases = (key(patient),) if column == "patient" and patient else COLUMNS[column]
        for alias in aliases:
            if keys.count(alias) > 1:
                raise _fault(path, 1, f"expected one column called {column}, got {keys.count(alias)}")
            if alias in keys:
                meaning[keys.index(alias)] = column
                break
        else:
            if column == "patient" and patient and "path" in meaning.values():
                got = ", ".join(columns)
                raise ValueError(
                    f"patient: expected a column of {path.name} ({got}), 'folder', or a regular expression with a group"
                )
    return meaning


def _rows(path: Path, text: _Text, meaning: dict[int, str]) -> list[Row]:
    rows = []
    for line, cells in text.rows:
        if len(cells) != len(text.columns):
            raise _fault(path, line, f"expected {len(text.columns)} cells, got {len(cells)}")
        values = {column: _text(path, line, column, cells[number]) for number, column in meaning.items()}
        if modality := values.get("modality"):
            known = modalities.known(modality)
            if known is None:
                raise _fault(path, line, f"modality: expected one of {', '.join(modalities.NAMES)}, got another word")
            values["modality"] = known.name
        if side := values.get("split"):
            if key(side) not in SIDES:
                raise _fault(path, line, "split: expected train or val, got another word")
            values["split"] = SIDES[key(side)]
        rows.append(Row(line, **values))
    return rows


def _text(path: Path, line: int, column: str, value: Any) -> str:
    if value is None or value != value:  # Nothing, or NaN
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _fault(path, line, f"{column}: expected text, got {type(value).__name__}")
    return str(value).strip()


def _fault(path: Path, line: int | Sequence[int], message: str) -> ValueError:
    return ValueError(f"{path.name}: {lines([line] if isinstance(line, int) else line)}: {message}")
