"""The sheet of results: a CSV file with a row for each task, model, mode, path, number of shots and seed.

It only grows, so an interrupted series of runs can continue: ``Sheet.done`` tells which rows exist. A row is written
whole or not at all, even if the process is killed. Concurrent processes, also on several machines, wait for a lock on a
file beside the sheet.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dex.common import atomic, locks
from dex.common.csv_lines import csv_lines
from dex.tasks.metrics.evaluation import METRICS, Evaluation

_WAIT = 60.0
"""Seconds to wait for a lock at most, and between two attempts."""


class Score(NamedTuple):
    """A metric with its interval over patients."""

    value: float | None
    low: float | None
    high: float | None
    patients: int


class Key(NamedTuple):
    """The identity of a result: rows with equal keys are the same result."""

    task: str
    checkpoint: str
    """Hash of the pretrained weights."""
    data: str
    """Fingerprint of the labelled cases and their split."""
    mode: str
    """full, frozen, linear or lora."""
    path: str
    """experts or director."""
    shots: int | None
    """Labelled training cases per class; None for all."""
    seed: int
    settings: str = ""
    """Hash of the recipe."""


class Row(NamedTuple):
    key: Key
    run: str
    """Name of the pretrained run."""
    finetuned: str
    """Hash of the evaluated weights."""
    metric: str
    """The primary metric."""
    cases: int
    leak: str
    """Result of the leak check against the pretraining set; "not checked" if it did not run."""
    seconds: float | None
    versions: str
    scores: Mapping[str, Score]
    """By name of ``METRICS``; only metrics of this kind of task."""


_ABOUT = ("run", "finetuned", "metric", "cases", "leak", "seconds", "versions")
_WHOLE = ("shots", "seed", "cases")
COLUMNS = (
    *Key._fields,
    *_ABOUT,
    *(f"{name}{part}" for name in METRICS for part in ("", "_low", "_high", "_patients")),
)


class Sheet:
    """The sheet at ``path``, which need not exist yet.

    wait: seconds to wait for another process at most. Every method raises ValueError naming the sheet if its columns or
    values are invalid.
    """

    def __init__(self, path: str | os.PathLike[str], *, wait: float = _WAIT):
        self.path: Path = Path(os.path.realpath(path))
        self._wait = wait

    def rows(self) -> list[Row]:
        """All rows, in the order they were added; none if there is no file."""
        return [_row(cells, line, self.path) for line, cells in self._cells()]

    def done(self, key: Key) -> bool:
        """Whether there is a row with this key."""
        return any(row.key == key for row in self.rows())

    def add(self, row: Row) -> bool:
        """Append a row and wait until it is on the disk. Return False, without a change, if its key exists.

        ValueError: values that the sheet cannot hold, or a sheet that stays locked.
        """
        cells = _written(row)
        _row(cells, 0, self.path)  # Check that it can be read again
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            existing = list(self._cells())
            if any(_row(old, line, self.path).key == row.key for line, old in existing):
                return False
            mode = self.path.stat().st_mode & 0o777 if existing else 0o666
            rows = [COLUMNS, *([row[name] for name in COLUMNS] for row in (*(old for _, old in existing), cells))]
            data = csv_lines(rows).encode("utf-8", "surrogateescape")
            atomic.write(self.path, data, sync=True, mode=mode, locked=True)
        return True

    def _cells(self) -> Iterator[tuple[int, dict[str, str]]]:
        """The line number of every row, and its cells by column."""
        try:
            # "utf-8-sig": spreadsheet programs may save a byte order mark.
            text = self.path.read_bytes().decode("utf-8-sig", "surrogateescape")
        except FileNotFoundError:
            return
        except OSError as error:
            raise ValueError(f"sheet: expected a CSV file, got {self.path} ({os.strerror(error.errno)})") from None
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            header = next(reader, [])
            self._check_header(header)
            for cells in reader:
                if len(cells) != len(header):
                    raise ValueError(
                        f"sheet: expected {len(header)} cells in line {reader.line_num} of {self.path}, "
                        f"got {len(cells)}; complete or remove that line"
                    )
                yield reader.line_num, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise ValueError(
                f"sheet: expected a CSV file, got {self.path}, whose line {reader.line_num} is invalid ({error})"
            ) from None

    def _check_header(self, header: list[str]) -> None:
        missing, unknown = [c for c in COLUMNS if c not in header], [c for c in header if c not in COLUMNS]
        if missing or unknown or len(header) != len(COLUMNS):
            parts = [
                f"{word} {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
                for word, names in (("without", missing), ("with", unknown))
                if names
            ]
            difference = " and ".join(parts) or "with a repeated column"
            raise ValueError(
                f"sheet: expected the columns of this version, got {self.path} {difference}; choose another file"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclusive access, also within this process; the system releases the lock whenever the process ends."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locks.exclusive(self.path.with_name(f".{self.path.name}.lock"), wait=self._wait))
            except BlockingIOError:
                raise ValueError(
                    f"sheet: expected {self.path} to become free; another process is still writing to it"
                ) from None
            except locks.NoLocks as error:
                raise ValueError(
                    f"sheet: expected a file system with locks, got {self.path} on one without ({error.strerror}); "
                    "keep it on a local disk"
                ) from None
            yield


def row_of(
    evaluation: Evaluation,
    key: Key,
    *,
    leak: str = "not checked",
    seconds: float | None = None,
    versions: str = "",
) -> Row:
    """The row of an evaluation under the key given to ``Sheet.done``.

    run and checkpoint are taken from ``Evaluation.about``. ValueError: the key has another task or seed.
    """
    about = evaluation.about
    for name, value in (("task", evaluation.task), ("seed", about.get("seed", key.seed))):
        if getattr(key, name) != value:
            raise ValueError(f"key: expected the {name} of the evaluation, {value!r}, got {getattr(key, name)!r}")
    scores = {name: Score(e.value, e.low, e.high, e.patients) for name, e in evaluation.summary().items()}
    run, finetuned = (str(about.get(name) or "") for name in ("run", "checkpoint"))
    return Row(key, run, finetuned, evaluation.metric, len(evaluation.cases), leak, seconds, versions, scores)


def _written(row: Row) -> dict[str, str]:
    """The cells of a row by column."""
    unknown = set(row.scores) - set(METRICS)
    if unknown:
        raise ValueError(f"scores: expected metrics among {', '.join(METRICS)}, got {', '.join(sorted(unknown))}")
    values: dict[str, Any] = row.key._asdict() | {name: getattr(row, name) for name in _ABOUT}
    for name in METRICS:
        score = row.scores.get(name)
        for part in Score._fields:
            values[name if part == "value" else f"{name}_{part}"] = None if score is None else getattr(score, part)
    return {name: _cell(name, values[name]) for name in COLUMNS}


def _cell(name: str, value: Any) -> str:
    if value is None and name not in _TEXTS:
        return ""
    expected = str if name in _TEXTS else int if _is_whole(name) else (int, float)
    if not isinstance(value, expected) or isinstance(value, bool):
        kind = "text" if name in _TEXTS else "a whole number" if _is_whole(name) else "a number"
        raise ValueError(f"{name}: expected {kind}, got {value!r}")
    if name in _TEXTS:
        if "\0" in value:
            raise ValueError(f"{name}: expected text without a zero byte, got {value!r}")
        return value
    return str(value) if _is_whole(name) else repr(float(value))


_TEXTS = frozenset(
    {"task", "checkpoint", "data", "mode", "path", "settings", "run", "finetuned", "metric", "leak", "versions"}
)


def _is_whole(name: str) -> bool:
    return name in _WHOLE or name.endswith("_patients")


def _row(cells: Mapping[str, str], line: int, path: Path) -> Row:
    """The row in the cells of a line, converted to types."""
    values = {name: _read(name, text, line, path) for name, text in cells.items()}
    scores = {
        name: Score(values[name], values[f"{name}_low"], values[f"{name}_high"], values[f"{name}_patients"])
        for name in METRICS
        if values[f"{name}_patients"] is not None
    }
    return Row(Key(*(values[n] for n in Key._fields)), *(values[n] for n in _ABOUT), scores)


def _read(name: str, text: str, line: int, path: Path) -> Any:
    if name in _TEXTS:
        return text
    if text == "" and name not in ("seed", "cases"):
        return None
    with contextlib.suppress(ValueError):
        value = int(text) if _is_whole(name) else float(text)
        if math.isfinite(value):
            return value
    kind = "a whole number" if _is_whole(name) else "a finite number"
    where = f" in line {line} of {path}" if line else ""
    raise ValueError(f"{name}: expected {kind}{where}, got {text!r}")
