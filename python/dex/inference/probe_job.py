"""``dex probe``: tests the features of labelled images with a linear probe, a kNN probe and few-shot probes.

    OUT/probe.csv    a row per result: balanced accuracy, its interval over patients, or one draw of the few-shot curve
    OUT/curve.png    the few-shot curve
    OUT.private/refused.jsonl    the files that gave nothing, if any, and why. Mode 0600

Labels are the sub-folders of the input, a CSV file, or the modalities of a shard set.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from dex.analysis.few_shot import Labelled, Point, few_shot, folds_of, knn, linear
from dex.analysis.intervals import Interval
from dex.common import atomic
from dex.common.csv_lines import csv_lines
from dex.inference.collection import Collection, Note, Row
from dex.inference.embed import joined
from dex.inference.embed_job import Options, embedded, private_folder, reasons
from dex.inference.load import Loaded

SHEET, CURVE, REFUSED = "probe.csv", "curve.png", "refused.jsonl"
COLUMNS = ("features", "probe", "shots", "seed", "draw", "accuracy", "low", "high", "images", "patients", "classes")
FEATURES = ("cls", "patches")
_NAMED = 5
"""Lines without an image named in a message, at most."""


class Label(NamedTuple):
    """The label and patient in a line of the CSV file."""

    label: str
    patient: str


class Labels(NamedTuple):
    """Where labels and patients come from."""

    table: dict[str, Label] | None = None
    """Path below the input, or id in a shard set -> label; None: the folder, or the modality in a shard set."""
    patient: re.Pattern[str] | None = None
    """Searched in the path; group 1 is the patient."""


class Settings(NamedTuple):
    features: str = "cls"
    folds: int = 5
    k: int = 20
    shots: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    draws: int = 10
    seeds: int = 3


class Result(NamedTuple):
    settings: Settings
    names: list[str]
    """Class names."""
    data: Labelled
    linear: Interval
    knn: Interval
    curve: list[Point]
    unlabelled: int
    """Number of images without a line in the CSV file."""
    unmatched: list[str]
    """Paths or ids in the CSV file without an image."""
    refused: list[Note]
    """Files, or parts of files, that gave nothing."""


def read_labels(path: Path | None, patient: str | None) -> Labels:
    """The labels of a CSV file with columns ``path`` (or ``id``), ``label`` and optionally ``patient``, and the regular
    expression for patients, which needs a group. ValueError or FileNotFoundError naming the argument."""
    pattern = None
    if patient is not None:
        try:
            pattern = re.compile(patient)
        except re.error as error:
            raise ValueError(f"patient: expected a regular expression; {error}") from None
        if not pattern.groups:
            raise ValueError(f"patient: expected a regular expression with a group, got {patient!r}")
    if path is None:
        return Labels(None, pattern)
    if not path.is_file():
        raise FileNotFoundError(f"labels: expected a CSV file; nothing at {path}")
    expected = "labels: expected a CSV file with columns path (or id), label and optionally patient"
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{expected}; {path}: {error}") from error
    key = next((name for name in ("path", "id") if rows and name in rows[0]), None)
    if key is None or "label" not in rows[0]:
        raise ValueError(f"{expected}; {path} has {', '.join(map(str, rows[0])) if rows else 'no line'}")
    table: dict[str, Label] = {}
    for number, row in enumerate(rows, 2):
        if row[key] in table:
            raise ValueError(f"labels: expected one line per {key}; {path}, row {number}, names {row[key]} again")
        if not row["label"]:
            raise ValueError(f"labels: expected a label for each {key}; {path}, row {number}, has none")
        table[row[key]] = Label(row["label"], row.get("patient") or "")
    return Labels(table, pattern)


def probe(loaded: Loaded, collection: Collection, labels: Labels, settings: Settings, options: Options) -> Result:
    """Embed all images and probe them. ValueError for labels that cannot be split by patient."""
    check(settings)
    parts = list(embedded(loaded, collection, range(len(collection.parts)), options, None))
    rows = [row for part in parts for row in part.rows]
    notes = {note.id: note for part in parts for note in part.notes if not note.refused}
    labelled = {i: label for i, row in enumerate(rows) if (label := _label(row, notes.get(row.id), labels)) is not None}
    names = _classes({label.label for label in labelled.values()}, len(rows))
    numbers = {patient: number for number, patient in enumerate(sorted({v.patient for v in labelled.values()}))}
    data = Labelled(
        getattr(joined([part.embedding for part in parts]), settings.features)[list(labelled)],
        torch.tensor([names.index(label.label) for label in labelled.values()]),
        torch.tensor([numbers[label.patient] for label in labelled.values()]),
    )
    try:
        folds_of(data, settings.folds, 0)
    except ValueError as error:
        classes = re.sub(r"class (\d+)", lambda match: f"class {names[int(match[1])]!r}", str(error))
        raise ValueError(f"{classes}; --patient, or a column patient, assigns images to patients") from None
    refused = [note for part in parts for note in part.notes if note.refused]
    return Result(
        settings,
        names,
        data,
        linear(data, settings.folds),
        knn(data, settings.k, settings.folds),
        few_shot(data, settings.shots, settings.draws, settings.seeds, settings.folds),
        len(rows) - len(labelled),
        _unmatched(collection, labels),
        refused,
    )


def check_labels(collection: Collection, labels: Labels) -> None:
    """ValueError if file names and the table, before anything is read, give no label or a single class."""
    if not collection.reader.has_paths and labels.table is None:
        return  # Labels are the modalities of a shard set
    names = _names(collection)
    if labels.table is not None:
        classes = {labels.table[name].label for of_unit in names for name in of_unit if name in labels.table}
    else:
        classes = {_folder_of(of_unit[-1]) for of_unit in names}
    _classes(classes, len(names))


def _classes(names: set[str], images: int) -> list[str]:
    if not names:
        raise ValueError(
            f"labels: expected some of the {images:,} files or images to have one, by paths below INPUT (or ids of a "
            "shard set), got none"
        )
    if len(names) < 2:
        raise ValueError(f"labels: expected at least 2 classes, got {min(names)!r} only")
    return sorted(names)


def _names(collection: Collection) -> list[list[str]]:
    """The names of each unit, as from ``Reader.names``."""
    units = (unit for item in range(collection.items) for unit in collection.units(item))
    return [collection.reader.names(unit) for unit in units]


def _unmatched(collection: Collection, labels: Labels) -> list[str]:
    return [] if labels.table is None else sorted(set(labels.table).difference(*_names(collection)))


def _folder_of(path: str) -> str:
    if "/" not in path:
        raise ValueError(f"labels: expected a sub-folder for each class, or --labels; {path} is in none")
    return path.partition("/")[0]


def check(settings: Settings) -> None:
    """ValueError naming the argument."""
    if settings.features not in FEATURES:
        raise ValueError(f"features: expected one of {', '.join(FEATURES)}, got {settings.features!r}")
    for name, least in (("folds", 2), ("k", 1), ("draws", 1), ("seeds", 1)):
        if getattr(settings, name) < least:
            raise ValueError(f"{name}: expected at least {least}, got {getattr(settings, name)}")
    if list(settings.shots) != sorted(set(settings.shots)) or min(settings.shots, default=1) < 1:
        raise ValueError(f"shots: expected ascending positive numbers, got {list(settings.shots)}")


def write(result: Result, out: Path) -> None:
    """Write the sheet and, if there are any, the curve and the refused files."""
    out.mkdir(parents=True, exist_ok=True)
    common = {"images": len(result.data.labels), "classes": len(result.names)}
    common |= {"patients": int(result.data.patients.max()) + 1, "features": result.settings.features}
    rows = []
    for name, accuracy in (("linear", result.linear), ("knn", result.knn)):
        rows.append({**common, "probe": name, "accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high})
    rows += [{**common, "probe": "few-shot linear", **point._asdict()} for point in result.curve]
    atomic.write(out / SHEET, csv_lines([COLUMNS, *([row.get(name) for name in COLUMNS] for row in rows)]))
    if result.refused:
        private = private_folder(out)
        private.mkdir(mode=0o700, exist_ok=True)
        lines = "".join(json.dumps({"path": note.path, "refused": note.refused}) + "\n" for note in result.refused)
        atomic.write(private / REFUSED, lines, mode=0o600)
    if result.curve:
        from dex.analysis.plots import few_shot_curve, pixels, save  # Imports matplotlib

        save(pixels(few_shot_curve(result.curve, result.linear.value, len(result.names))), out / CURVE)


def _label(row: Row, note: Note | None, labels: Labels) -> Label | None:
    """Class and patient of an image; None if the table does not name it."""
    path = note.path if note is not None else row.id
    if note is not None and note.file and (labels.table is None or note.file in labels.table):
        path = note.file
    if labels.table is not None:
        label = labels.table.get(path)
        if label is None:
            return None
    elif note is None:
        label = Label(row.modality, "")
    else:
        label = Label(_folder_of(path), "")
    return label._replace(patient=label.patient or _patient(row, note, path, labels))


def _patient(row: Row, note: Note | None, path: str, labels: Labels) -> str:
    """The patient by the pattern, else by the header or the group of a shard set, else by the folder below the class,
    else by the file."""
    match = labels.patient.search(path) if labels.patient else None
    if match and match[1]:
        return match[1]
    if note is None or note.patient:
        return row.group
    folders = PurePosixPath(path).parts[:-1]
    return "/".join(folders[:2]) if note.file or len(folders) > 1 else path


def table(result: Result) -> str:
    """The result as text for the terminal."""
    lines = []
    for name, accuracy in (("linear", result.linear), (f"kNN, k = {result.settings.k}", result.knn)):
        interval = f"95 % interval {accuracy.low:.3f} to {accuracy.high:.3f}"
        lines.append(f"{name:<14} balanced accuracy {accuracy.value:.3f}, {interval}")
    for shots in sorted({point.shots for point in result.curve}):
        values = [point.accuracy for point in result.curve if point.shots == shots]
        spread = torch.tensor(values, dtype=torch.float64).std(correction=0)
        mean = sum(values) / len(values)
        lines.append(f"{shots:>3} per class   balanced accuracy {mean:.3f}, sd {spread:.3f} over {len(values)} draws")
    return "\n".join(lines)


def left_out(result: Result, out: Path) -> list[str]:
    """What was left out, as lines for the terminal. Call ``write`` first."""
    lines = []
    if result.unlabelled:
        lines.append(f"left out: {result.unlabelled:,} images without a label")
    if result.unmatched:
        some = ", ".join(result.unmatched[:_NAMED]) + (", ..." if len(result.unmatched) > _NAMED else "")
        lines.append(f"labels without an image: {len(result.unmatched):,} ({some})")
    if result.refused:
        counts = ", ".join(f"{reason} {n:,}" for reason, n in reasons(note.refused for note in result.refused).items())
        file = private_folder(out) / REFUSED
        lines.append(f"refused: {len(result.refused):,} files or parts of files ({counts}); {file} lists them")
    return lines


def describe(counts: Sequence[int], names: Sequence[str]) -> str:
    """``a 12, b 30``."""
    return ", ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))
