"""Tasks of the user's own: a table of labels, a folder of classes, or images with masks.

The form of a folder is found by trying rules of layouts (``dex.tasks.task.Layout``) with state "own".
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dex.prepare import readers
from dex.tasks.patterns import Files, Match, beside, matches
from dex.tasks.task import BACKGROUND, IGNORE, NONZERO, SPLITS, Layout, Rule, Task

MAX_TABLE_BYTES = 2**28
DATASET = "dataset.json"
_ALIASES = {"training": "train", "tr": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}
_SIDES = tuple(
    (text, side)
    for name, side in [*((name, name) for name in SPLITS), *_ALIASES.items()]
    for text in (name, name.capitalize())
)
"""Accepted folder names of splits: (name, split)."""
_MASK_FOLDERS = ("masks", "labels", "segmentations")
_MASK_ENDINGS = ("_mask", "_seg", "_label", "_labels", "_gt", "_segmentation")
FORMS = (
    "expected --labels labels.csv with columns file and label (or mask), optionally patient and split; or a folder for "
    "each class, [train|val|test/]CLASS/FILE; or [train|val|test/]images/NAME.* with masks/NAME.*; or NAME.* with "
    "NAME_mask.* beside it; or nnU-Net's imagesTr, labelsTr and dataset.json"
)


class Item(NamedTuple):
    """An image and what belongs to it, as text. Paths are below the data folder, or absolute."""

    image: str
    label: str = ""
    mask: str = ""
    parts: tuple[str, ...] = ()
    """Masks of one class each; "" for a missing one."""
    split: str = ""
    patient: str = ""


class Own(NamedTuple):
    """The contents of a data folder."""

    task: Task
    """With kind, classes and values, as far as the files state them."""
    items: list[Item]
    notes: tuple[str, ...] = ()


def split_of(text: str) -> str:
    """``train``, ``val`` or ``test`` for their usual names in any case; "" for no text. ValueError."""
    name = text.strip().lower()
    if name and name not in SPLITS and name not in _ALIASES:
        raise ValueError(f"split: expected train, val or test, got {text!r}")
    return _ALIASES.get(name, name)


def parse_classes(entries: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Classes, and the meaning of values in masks or of label texts, from ``liver tumour`` or ``lesion=255 ignore=3``.

    A value is a number, ``#rrggbb`` or ``nonzero``; ``background`` and ``ignore`` are not classes. Values are given for
    all classes or for none; without them class i has the value i + 1. ValueError naming the entry.
    """
    expected = "classes: expected NAME, or NAME=VALUE with a number, #rrggbb or nonzero"
    classes: list[str] = []
    values: list[tuple[str, str]] = []
    for entry in entries:
        name, sign, value = (part.strip() for part in entry.partition("="))
        if not name or (sign and not value):
            raise ValueError(f"{expected}, got {entry!r}")
        if name not in (BACKGROUND, IGNORE, *classes):
            classes.append(name)
        if sign:
            values.append((value.lower() if value.startswith("#") or value == NONZERO else value, name))
        elif name in (BACKGROUND, IGNORE):
            raise ValueError(f"{expected}: {name} needs a value, got {entry!r}")
    valued = {name for _, name in values}
    if valued and set(classes) - valued and (set(classes) & valued):
        raise ValueError(f"{expected}, for all classes or for none, got none for {', '.join(set(classes) - valued)}")
    if values and not set(classes) & valued:  # Only background or ignore
        values = [*((str(i), name) for i, name in enumerate(classes, 1)), *values]
    repeated = {value for value, _ in values if sum(value == other for other, _ in values) > 1}
    if repeated:
        raise ValueError(f"classes: expected each value once, got {', '.join(sorted(repeated))} again")
    if not classes:
        raise ValueError(f"{expected}, got no class")
    return tuple(classes), tuple(values)


def of_table(path: Path, root: Path, columns: dict[str, str] | None = None, loose: bool = False) -> list[Item]:
    """The rows of a CSV file. columns: of ``Layout``. loose: keep file names as they are and do not check the files.

    Raises: FileNotFoundError; ValueError naming the file and the row.
    """
    expected = "labels: expected a CSV file with columns file and label (or mask), optionally patient and split"
    if not path.is_file():
        raise FileNotFoundError(f"{expected}; nothing at {path}")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise ValueError(f"{expected}, at most {MAX_TABLE_BYTES:,} bytes large, got {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        header = text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter))
    except UnicodeDecodeError as error:
        raise ValueError(f"{expected}, in UTF-8; {path} has another encoding: save it as CSV UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{expected}; {path}: {error}") from None
    column_of = {name: name for name in ("file", "label", "patient", "split", "mask")} | (columns or {})
    present = [str(name) for name in (rows[0] if rows else ())]
    if column_of["file"] not in present and "path" in present:
        column_of["file"] = "path"
    if column_of["file"] not in present or (column_of["label"] not in present and column_of["mask"] not in present):
        raise ValueError(f"{expected}; {path} has {', '.join(present) if present else 'no line'}")
    items, row_of = [], {}
    for number, row in enumerate(rows, 2):
        values = {name: (row.get(column) or "").strip() for name, column in column_of.items()}
        if None in row or not values["file"]:
            raise ValueError(f"{expected}; {path}, row {number}, has {'too many values' if None in row else 'no file'}")
        if not values["label"] and not values["mask"]:
            raise ValueError(f"labels: expected a label for each file; {path}, row {number}, has none")
        if values["file"] in row_of:
            raise ValueError(
                f"labels: expected one line per file; {path}, rows {row_of[values['file']]} and {number}, "
                f"name {values['file']}"
            )
        row_of[values["file"]] = number
        try:
            split = split_of(values["split"])
        except ValueError as error:
            raise ValueError(f"{error}, in {path}, row {number}") from None
        file, mask = values["file"], values["mask"]
        if not loose:
            file, mask = (_found(text, root, path, number) if text else "" for text in (file, mask))
        items.append(Item(file, values["label"], mask, (), split, values["patient"]))
    return items


def _found(text: str, root: Path, table: Path, number: int) -> str:
    """The existing path of a file that a table names, below ``root`` or beside the table."""
    for base in (root, table.parent):
        for name in (text, text.replace("\\", "/")):
            place = base / name
            if place.exists():
                return name if base == root and not Path(name).is_absolute() else str(place.absolute())
    raise FileNotFoundError(f"labels: expected files below {root}; {table}, row {number}: nothing at {root / text}")


def of_folder(files: Files, task: Task) -> Own:
    """The contents of a folder, by its form. task: known fields, such as kind and classes.

    ValueError listing the accepted forms if none fits.
    """
    for form in (_nnunet, _pairs, _classes):
        own = form(files, task)
        if own is not None:
            return own
    raise ValueError(f"data: {FORMS}, got {files.root} with {_described(files)}")


def _described(files: Files) -> str:
    top = sorted({path.split("/")[0] for path in files.files | files.folders})
    shown = ", ".join(top[:6]) + (", ..." if len(top) > 6 else "")
    return f"{len(files.files):,} files: {shown}" if top else "no files"


def _nnunet(files: Files, task: Task) -> Own | None:
    if "imagesTr" not in files.folders or task.kind != "segmentation" and task.layout.state != "own":
        return None
    rules = [
        Rule(image="images{side}/{case}_0000.{ext}", mask="labels{side}/{case}.{ext}"),
        Rule(image="images{side}/{case}.{ext}", mask="labels{side}/{case}.{ext}"),
    ]
    second_channels = sorted(path for path in files.files if path.startswith("images") and "_0001." in path)
    if second_channels:
        raise ValueError(
            f"data: expected one channel per case, since a task has images of one modality, got a second channel, "
            f"{files.root / second_channels[0]}"
        )
    images = [m for m in matches(Layout("own", rules=tuple(rules)), files) if m.names["side"] in ("Tr", "Ts")]
    images = [m for m in images if m.names["side"] == "Tr" or _mask(m, files)]
    has_test = any(m.names["side"] == "Ts" for m in images)
    sides = {"Tr": "train" if has_test else "", "Ts": "test"}
    items = [Item(m.image, mask=_needed(m, files), split=sides[m.names["side"]]) for m in images]
    task = replace(task, kind="segmentation", metric=_metric(task, "segmentation"))
    if not task.classes and DATASET in files.files:
        task = _labels_of(files.root / DATASET, task)
    return Own(task, items)


def _labels_of(path: Path, task: Task) -> Task:
    """The task with classes and values from nnU-Net's description, version 1 (value to name) or 2 (name to value)."""
    try:
        labels = json.loads(path.read_bytes()[:MAX_TABLE_BYTES])["labels"]
        pairs = [(str(v), str(k)) if isinstance(v, int) else (str(int(k)), str(v)) for k, v in labels.items()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"data: expected labels with names and whole numbers in {path}, got {type(error).__name__}: {error}"
        ) from None
    by_value = sorted((int(value), name) for value, name in pairs)
    classes = tuple(name for value, name in by_value if value and name not in (BACKGROUND, IGNORE))
    values = tuple((str(v), name if v and name in (*classes, IGNORE) else BACKGROUND) for v, name in by_value)
    return replace(task, classes=classes, layout=replace(task.layout, values=values))


def _pairs(files: Files, task: Task) -> Own | None:
    rules = []
    for start in ("", "{split}/"):
        for folder in _MASK_FOLDERS:
            for end in ("", *_MASK_ENDINGS):
                rules.append(Rule(image=f"{start}images/{{case}}.{{ext}}", mask=f"{start}{folder}/{{case}}{end}.*"))
            rules.append(Rule(image=f"{start}images/{{case}}", mask=f"{start}{folder}/{{case}}*"))
    for start in ("", "{split}/", "{folder}/", "{split}/{folder}/"):
        for end in _MASK_ENDINGS:
            rules.append(Rule(image=f"{start}{{case}}.{{ext}}", mask=f"{start}{{case}}{end}.*"))
    for start in ("images/{split}", "images/{split}/{folder}"):
        for folder in _MASK_FOLDERS:
            mask = start.replace("images", folder)
            rules.append(Rule(image=f"{start}/{{case}}.{{ext}}", mask=f"{mask}/{{case}}.*"))
            rules.append(Rule(image=f"{start}/{{case}}.{{ext}}", mask=f"{mask}/{{case}}_mask.*"))
    for rule in rules:
        parts = rule.mask.split("/")
        if any(part in _MASK_FOLDERS and not _has_folder(part, files) for part in parts[:-1]):
            continue
        images = matches(Layout("own", rules=(rule,), splits=_SIDES), files)
        masks = [_mask(match, files) for match in images]
        if not any(masks):
            continue
        lacking = [match.image for match, mask in zip(images, masks, strict=True) if not mask]
        if "images" in rule.image and lacking:
            raise ValueError(
                f"data: expected a mask for each image; {files.root / lacking[0]} has none in "
                f"{parts[-2]}/ ({len(lacking):,} of {len(images):,} images have none)"
            )
        items = [
            Item(
                match.image,
                mask=mask,
                split=split_of(match.names.get("split", "")),
                patient=match.names.get("folder", ""),
            )
            for match, mask in zip(images, masks, strict=True)
            if mask
        ]
        _check_no_mask_twice(items, files)
        task = replace(task, kind="segmentation", metric=_metric(task, "segmentation"))
        return Own(task, items, _unused_masks(items, files))
    return None


def _check_no_mask_twice(items: Sequence[Item], files: Files) -> None:
    """ValueError if two images, such as copies in two formats, share a mask: a split could separate them."""
    images: dict[str, list[str]] = {}
    for item in items:
        images.setdefault(item.mask, []).append(item.image)
    for mask, paths in images.items():
        if len(paths) > 1:
            raise ValueError(
                f"data: expected one image per mask; {files.root / mask} has {len(paths)}: {', '.join(sorted(paths))}; "
                "move the copies away, or list the images in a table (--labels)"
            )


def _unused_masks(items: Sequence[Item], files: Files) -> tuple[str, ...]:
    """A sentence about masks without an image, if there are any."""
    used = {item.mask for item in items}
    image_folders = {item.image.rpartition("/")[0] for item in items}
    folders = {mask.rpartition("/")[0] for mask in used} - image_folders
    paths = [path for folder in sorted(folders) for path in files.within(folder)]
    unused = [path for path in paths if readers.format_of(path) is not None and path not in used]
    if not unused:
        return ()
    return (f"{len(unused):,} masks belong to no image, such as {unused[0]}",)


def _has_folder(name: str, files: Files) -> bool:
    return any(path.rpartition("/")[2] == name for path in files.folders)


def _classes(files: Files, task: Task) -> Own | None:
    if task.kind == "segmentation" and task.layout.state != "own":
        return None
    rules = tuple(
        Rule(image=f"{start}{{class}}/{inside}{{case}}", label="{class}")
        for start in ("{split}/", "")
        for inside in ("", "{patient}/", "{patient}/**/")
    )
    split_names = {text for text, _ in _SIDES}
    images = matches(Layout("own", rules=rules, splits=_SIDES), files)
    images = [match for match in images if match.names["class"] not in split_names]
    series = {match.image for match in images if match.image in files.folders}
    images = [match for match in images if match.image.rpartition("/")[0] not in series]
    sides = {match.names.get("split", "") for match in images}
    if len(sides) > 1 and "" in sides:
        images = [match for match in images if "split" in match.names]
    if not images:
        return None
    items = [
        Item(
            match.image,
            match.names["class"],
            split=split_of(match.names.get("split", "")),
            patient=match.names.get("patient", ""),
        )
        for match in images
    ]
    return Own(replace(task, kind="classification", metric=_metric(task, "classification")), items)


def _metric(task: Task, kind: str) -> str:
    return task.metric if task.kind == kind else ""


def _mask(match: Match, files: Files) -> str:
    """The path of the mask, "" for none. ValueError for several."""
    paths = [path for path in beside(match, match.rule.mask, files) if _readable(path, files)]
    if len(paths) > 1:
        raise ValueError(
            f"data: expected one mask per image; {files.root / match.image} has {len(paths)}: {', '.join(paths)}"
        )
    return paths[0] if paths else ""


def _readable(path: str, files: Files) -> bool:
    return path in files.folders or readers.format_of(path) is not None or path.lower().endswith(".xml")


def _needed(match: Match, files: Files) -> str:
    mask = _mask(match, files)
    if not mask:
        raise ValueError(
            f"data: expected a mask for each image; {files.root / match.image} has none at "
            f"{files.root / (match.prefix + match.text(match.rule.mask))}"
        )
    return mask


def _check_parts(images: Sequence[Match], files: Files) -> None:
    """ValueError for a class of which no image has a mask."""
    for title, pattern in {part: None for match in images for part in match.rule.masks}:
        of_rule = [match for match in images if (title, pattern) in match.rule.masks]
        if not any(beside(match, pattern, files) for match in of_rule):
            first = of_rule[0]
            raise ValueError(
                f"data: expected masks of {title}, for {files.root / first.image} at "
                f"{files.root / (first.prefix + first.text(pattern))}, got none for any of {len(of_rule):,} images"
            )


def of_rules(images: Sequence[Match], files: Files, task: Task) -> Iterator[Item]:
    """The images that match a task's rules, with their targets. ValueError if a mask is missing, or if no image has a
    mask of some class."""
    sides = dict(task.layout.splits)
    _check_parts(images, files)
    for match in images:
        rule = match.rule
        side = match.text(rule.split) if rule.split else ""
        parts = [next(iter(beside(match, pattern, files)), "") for _, pattern in rule.masks]
        mask = ""
        if rule.mask or rule.polygons:
            mask = _needed(match._replace(rule=replace(rule, mask=rule.mask or rule.polygons)), files)
        yield Item(
            match.image,
            match.text(rule.label) if rule.label else "",
            mask,
            tuple(parts),
            split_of(sides.get(side, sides.get("*", side))),
            match.text(rule.patient) if rule.patient else "",
        )
