"""The cases of a task: the target, patient and split of each image.

``open_task`` lists them, ``read`` reads a case, and ``check_targets`` reads every target once before training.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dex.data.folder import kind_of
from dex.prepare import modalities, readers, sources
from dex.prepare.ids import Names
from dex.prepare.readers.files import quiet
from dex.prepare.splits import PATIENT
from dex.tasks import own, patterns, splits
from dex.tasks.frames import Frames, Grid, read, read_target
from dex.tasks.own import Item, Own
from dex.tasks.patterns import Files, is_dicom
from dex.tasks.salt import salt_of
from dex.tasks.splits import Sample
from dex.tasks.task import SPLITS, Case, Parts, Split, Task, TaskData, find

ROOT = "DEX_TASKS"
"""Environment variable: the folder with a folder for each task of the catalogue, under its name."""
_NAMED = 5


class Count(NamedTuple):
    """Counts over the targets of a split."""

    cases: int
    frames: int
    pixels: tuple[int, ...]
    """Pixels of each class; () in classification."""
    present: tuple[int, ...]
    """Cases with each class."""


def open_task(
    task: str | os.PathLike[str] | Task,
    data: str | os.PathLike[str] | None = None,
    *,
    labels: str | os.PathLike[str] | None = None,
    split: str | None = None,
    patient: str | None = None,
    seed: int = 0,
    classes: Sequence[str] = (),
    modality: str | None = None,
    private: str | os.PathLike[str] | None = None,
    shots: int | None = None,
) -> TaskData:
    """The cases of a task, split by patient. Files are listed, but no image is read.

    Args:
        task: a name of the catalogue, a YAML file, or a folder of the user's own.
        data: the data folder. None: the task's folder, or the folder of its name in $DEX_TASKS.
        labels: a CSV file with columns file and label (or mask), optionally patient and split.
        split: None: as in the files, otherwise drawn. "draw": drawn in any case. "train", "val", "test": the split of
            all cases.
        patient: a regular expression, searched in the path; group 1 is the patient.
        seed: of random draws.
        classes: of the user's own task: NAME, or NAME=VALUE with the value in masks, or the label in the files.
        modality: of the user's own task, a name of ``dex.prepare.modalities``.
        private: the folder of the salt for ids and patients. None: beside the data, with the suffix ``.private``.
            A public task needs none.
        shots: number of training images kept per class, drawn with the seed.

    Raises: FileNotFoundError, NotADirectoryError; ValueError naming the argument, the file or the patients.
    """
    task = task if isinstance(task, Task) else find(task)
    _check_types(seed, shots, classes, modality)
    for name, value in (("data", data), ("labels", labels), ("private", private)):
        if value is not None and (not isinstance(value, str | os.PathLike) or not os.fspath(value)):
            raise ValueError(f"{name}: expected a path, got {value!r}")
    root = _root(task, data, labels)
    if modality is not None:
        task = replace(task, modality=modalities.resolve(modality).name)
    if classes:
        task = _classed(task, classes)
    files = patterns.listed(root)
    listed = _listed(task, files, Path(labels) if labels is not None else None)
    task = listed.task
    _check_modality(task, listed.items)
    task, targets = _resolved(task, listed.items, files)
    patients = _patients(listed.items, files, patient, by_folder=labels is None and not task.layout.rules)
    samples = [
        Sample(name, item.label if task.kind == "classification" else "", item.split, item.image)
        for item, name in zip(listed.items, patients.names, strict=True)
    ]
    sides, notes = _sides(task, samples, split, seed)
    places: Iterable[int] = range(len(samples))
    if shots is not None:
        places = splits.shots(samples, sides, shots, seed)
        notes = [*notes, f"few-shot: {shots} training images{' per class' if task.kind == 'classification' else ''}"]
    salt = b"" if task.public else salt_of(root, Path(private) if private is not None else None)
    ids = Names(sources.Source(task.name, "CT", "ct", public=task.public), salt)
    cases = tuple(
        Case(ids.unit(path), ids.patient(samples[i].patient), sides[i], root / path, targets[i])
        for i in places
        for path in [listed.items[i].image]
    )
    return TaskData(task, cases, (*_overlap(task), *listed.notes, *patients.notes, *notes))


def _check_types(seed: int, shots: int | None, classes: Sequence[str], modality: str | None) -> None:
    """ValueError naming the argument."""
    for name, value in (("seed", seed), ("shots", 1 if shots is None else shots)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name}: expected a whole number, got {value!r}")
    if isinstance(classes, str) or not all(isinstance(entry, str) for entry in classes):
        raise ValueError(f"classes: expected a list of texts, got {classes!r}")
    if not isinstance(modality, str | None):
        raise ValueError(f"modality: expected a name, got {modality!r}")


def _check_modality(task: Task, items: Sequence[Item]) -> None:
    """ValueError for files that do not state their modality, if none is given."""
    if task.modality:
        return
    for item in items:
        format = readers.format_of(item.image)
        if format is not None and not readers.reader_of(format).decides and kind_of(item.image) is None:
            raise ValueError(
                f"modality: expected --modality, one of {', '.join(modalities.NAMES)}, since a {format} file does not "
                f"state it, got none for {item.image}"
            )


def _root(task: Task, data: str | os.PathLike[str] | None, labels: str | os.PathLike[str] | None) -> Path:
    if data is not None:
        return Path(data)
    if task.root:
        return Path(task.root)
    if labels is not None:
        return Path(labels).parent
    if os.environ.get(ROOT):
        return Path(os.environ[ROOT]) / task.name
    raise ValueError(f"data: expected the folder of the data of {task.name}, got none, and ${ROOT} is not set")


def _classed(task: Task, entries: Sequence[str]) -> Task:
    classes, values = own.parse_classes(entries)
    layout = task.layout
    if task.classes and set(classes) != set(task.classes):
        raise ValueError(f"classes: expected those of {task.name}, {', '.join(task.classes)}, got {', '.join(classes)}")
    if values:
        labels = tuple((text, name) for text, name in values if name in classes)
        layout = replace(layout, values=values, labels=labels)
    return replace(task, classes=task.classes or classes, layout=layout)


def _listed(task: Task, files: Files, labels: Path | None) -> Own:
    """The task and its images, from the table, the form of the folder or the rules."""
    if labels is not None:
        items = own.of_table(labels, files.root)
        kind = "segmentation" if any(item.mask for item in items) else "classification"
        lacking = [item.image for item in items if not (item.mask if kind == "segmentation" else item.label)]
        if lacking:
            raise ValueError(f"labels: expected a mask for each file, or for none; {labels} has none for {lacking[0]}")
        _require_kind(task, kind)
        return Own(replace(task, kind=kind, metric=task.metric if task.kind == kind else ""), items)
    if not task.layout.rules:
        listed = own.of_folder(files, task)
        if task.layout.state == "unknown":
            _require_kind(task, listed.task.kind)
        return listed
    matches = patterns.matches(task.layout, files, task.classes)
    if not matches:
        raise ValueError(
            f"data: expected files of {task.name} below {files.root}, by {task.layout.source or 'its layout'}: "
            f"{patterns.expected(task.layout, files)}, got {_some(files)}"
        )
    items = list(own.of_rules(matches, files, task))
    return Own(task, _joined(task, items, files) if task.layout.table else items)


def _require_kind(task: Task, kind: str) -> None:
    if task.layout.state != "own" and task.kind != kind:
        targets = {"segmentation": "masks", "classification": "labels"}
        raise ValueError(
            f"data: expected {targets[task.kind]} for {task.name}, a {task.kind} task, got {targets[kind]}"
        )


def _joined(task: Task, items: list[Item], files: Files) -> list[Item]:
    """The items with label, patient and split of the layout's table, which may omit folders and suffixes of files."""
    name = task.layout.table
    paths = [path for path in files.files if path.rpartition("/")[2] == name]
    if not paths:
        raise ValueError(
            f"data: expected the table {task.layout.table} of {task.name} below {files.root}, by "
            f"{task.layout.source or 'its layout'}; no such file"
        )
    table = files.root / min(paths, key=len)
    lines = {_stem(line.image): line for line in own.of_table(table, files.root, dict(task.layout.columns), loose=True)}
    joined = []
    for item in items:
        line = lines.get(_stem(item.image))
        if line is None:
            raise ValueError(f"labels: expected a line for each image in {table}, got none for {item.image}")
        joined.append(
            item._replace(
                label=line.label or item.label,
                split=line.split or item.split,
                patient=line.patient or item.patient,
            )
        )
    return joined


def _stem(path: str) -> str:
    name = path.rpartition("/")[2]
    suffix = next((s for s in (".nii.gz", Path(name).suffix) if s and name.lower().endswith(s)), "")
    return name.removesuffix(name[len(name) - len(suffix) :]) if suffix else name


def _some(files: Files) -> str:
    shown = sorted(files.files)[:_NAMED]
    more = ", ..." if len(files.files) > len(shown) else ""
    return f"{len(files.files):,} files: {', '.join(shown)}{more}" if shown else "no file"


def _resolved(task: Task, items: list[Item], files: Files) -> tuple[Task, list[Path | Parts | int | None]]:
    """The task with its classes, and the target of each image. Labels of ``items`` become names of classes."""
    if task.kind == "classification":
        names = dict(task.layout.labels)
        items[:] = [item._replace(label=names.get(item.label, item.label)) for item in items]
        labels = Counter(item.label for item in items)
        if not task.classes:
            task = replace(task, classes=tuple(sorted(labels)))
        unknown = sorted(label for label in labels if label not in task.classes)
        if unknown:
            example = next(item.image for item in items if item.label == unknown[0])
            raise ValueError(
                f"labels: expected {', '.join(task.classes)}, got {unknown[0]!r} for {labels[unknown[0]]:,} images, "
                f"such as {example}"
            )
        if len(labels) < 2:
            raise ValueError(f"labels: expected images of at least 2 classes, got {min(labels)!r} only")
        lacking = [name for name in task.classes if name not in labels]
        if lacking:
            raise ValueError(f"labels: expected images of each class, got none of {', '.join(lacking)}")
        return task, [task.classes.index(item.label) for item in items]
    if not task.classes:
        values = _first_values(items, files)
        raise ValueError(f"classes: expected --classes NAME=VALUE ..., the meaning of values in masks; {values}")
    return task, [_target(task, item, files) for item in items]


def _target(task: Task, item: Item, files: Files) -> Path | Parts:
    if item.mask:
        return files.root / item.mask
    rule = next(rule for rule in task.layout.rules if rule.masks)
    by_class = {name: path for (name, _), path in zip(rule.masks, item.parts, strict=True)}
    return Parts(tuple(files.root / by_class[name] if by_class.get(name) else None for name in task.classes))


def _first_values(items: list[Item], files: Files) -> str:
    """The values in the first masks, for a message."""
    from dex.tasks.masks import values_in

    values: set[str] = set()
    for item in items[:_NAMED]:
        values |= set(values_in(files.root / item.mask))
    shown = ", ".join(sorted(values, key=lambda v: (len(v), v))[:20])
    return f"the first {min(len(items), _NAMED)} masks contain {shown}"


class _Patients(NamedTuple):
    names: list[str]
    """The patient of each image."""
    notes: list[str]


def _patients(items: list[Item], files: Files, pattern: str | None, by_folder: bool) -> _Patients:
    """The patient of each image, by the pattern, else by rules or a table, else by the DICOM header, else the file.
    by_folder: items have only folders for patients, so a header takes precedence."""
    expression = _pattern(pattern)
    names, unknown = [], 0
    for item in items:
        match = expression.search(item.image) if expression else None
        name = match[1] if match else ""
        if not name and (by_folder or not item.patient):
            name = _header_patient(files.root / item.image)
        name = name or item.patient
        unknown += not name
        names.append(name or f"file {item.image}")
    if not unknown:
        return _Patients(names, [])
    which = "the images" if unknown == len(items) else f"{unknown:,} of {len(items):,} images"
    return _Patients(names, [f"the patients of {which} are unknown: each image counts as a patient; {splits.HOW}"])


def _pattern(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    if not isinstance(pattern, str):
        raise ValueError(f"patient: expected a regular expression, got {pattern!r}")
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"patient: expected a regular expression; {error}") from None
    if not expression.groups:
        raise ValueError(f"patient: expected a regular expression with a group, got {pattern!r}")
    return expression


def _header_patient(image: Path) -> str:
    """The patient in a DICOM header; "" for other files, and if the header names none."""
    if image.is_dir():
        image = next((path for path in sorted(image.iterdir()) if is_dicom(path)), image)
    if not is_dicom(image):
        return ""
    from dex.prepare.readers.dicom.file import read_header, text

    try:
        with quiet("DICOM header"):
            head, _ = read_header(image, readers.Limits())
    except readers.Refused:
        return ""
    patient = text(head, "PatientID") or text(head, "PatientName")
    names = Names(sources.Source("own", "CT", "ct"), b"")
    return patient if names.identity("file", patient).by == PATIENT else ""


def _sides(task: Task, samples: list[Sample], split: str | None, seed: int) -> tuple[list[Split], list[str]]:
    if split not in (None, splits.DRAW, *SPLITS):
        raise ValueError(f"split: expected draw, train, val or test, got {split!r}")
    if split in SPLITS:
        return [split] * len(samples), []
    counts = (task.published.train, task.published.val, task.published.test)
    shares = tuple(count / sum(counts) for count in counts) if all(counts) else splits.SHARES
    return splits.sides_of(samples, seed, shares, redraw=split == splits.DRAW)


def _overlap(task: Task) -> list[str]:
    return [f"overlap with the pretraining corpus: {task.overlap}"] if task.overlap else []


def check_targets(data: TaskData) -> dict[Split, Count]:
    """Read every target once.

    Raises: ValueError naming the file if a mask differs in size from its image or has values without a meaning, or
    naming the classes that no mask of a split contains.
    """
    task = data.task
    counts: dict[Split, Count] = {}
    for side in SPLITS:
        cases = data.of(side)
        if not cases:
            continue
        pixels, present, frames = Counter[int](), Counter[int](), 0
        for case in cases:
            if task.kind == "classification":
                present[int(case.target)] += 1
                continue
            masks = read_target(case, task)
            frames += len(masks)
            levels = np.bincount(masks.ravel(), minlength=256)
            for number in range(len(task.classes)):
                pixels[number] += int(levels[number + 1])
                present[number] += bool(levels[number + 1])
        numbers = range(len(task.classes))
        by_class = tuple(pixels[n] for n in numbers) if task.kind == "segmentation" else ()
        counts[side] = Count(len(cases), frames or len(cases), by_class, tuple(present[n] for n in numbers))
        require_classes(task, side, len(cases), [present[n] for n in numbers])
    return counts


def require_classes(task: Task, side: str, cases: int, present: Sequence[int]) -> None:
    """ValueError naming the classes that none of a split's cases contains. present: by class, 0 if it is missing."""
    lacking = [name for name, count in zip(task.classes, present, strict=True) if not count]
    if lacking:
        given = "masks" if task.kind == "segmentation" else "labels"
        raise ValueError(
            f"{given}: expected each class in {side}; none of its {cases:,} cases contains {', '.join(lacking)}; leave "
            "these classes out of --classes, or draw the split with another seed"
        )


__all__ = [
    "SPLITS",
    "Case",
    "Count",
    "Frames",
    "Grid",
    "Parts",
    "Split",
    "Task",
    "TaskData",
    "check_targets",
    "open_task",
    "read",
    "require_classes",
]
