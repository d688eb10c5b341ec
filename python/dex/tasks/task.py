"""The description of a downstream task: classes, metric, the layout of its files, and facts about its data.

A task is a YAML file: ``catalogue/NAME.yaml`` for the 26 of the paper, or the user's own. ``layout`` states in patterns
which files belong together (``dex.tasks.patterns``), so a task needs no code.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml

from dex.common import fields
from dex.prepare import modalities
from dex.prepare.readers import PLANES

CATALOGUE = Path(__file__).parent / "catalogue"
MAX_YAML_BYTES = 2**20
Kind = Literal["segmentation", "classification"]
State = Literal["verified", "loader", "unknown", "own"]
Split = Literal["train", "val", "test"]
"""Names of the splits of a task."""
SPLITS: tuple[Split, ...] = get_args(Split)
"""The values of ``Split``, in this order."""
BACKGROUND, IGNORE, NONZERO = "background", "ignore", "nonzero"
"""``background`` and ``ignore``: meanings that mask values may have besides the classes. ``nonzero``: every value but
0, for masks of one class and of numbered instances."""
IGNORED = 255
"""Value of mask pixels that count neither as a class nor as background."""
MAX_CLASSES = IGNORED - 1
METRICS = {"segmentation": "dice", "classification": "auc"}
"""The default primary metric."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_COLUMNS = ("file", "label", "patient", "split", "mask")


@dataclass(frozen=True)
class Rule:
    """Patterns of images and of the files that belong to them: paths below the data folder with placeholders in braces,
    such as ``{split}/Original/{case}.png``. A placeholder matches any text without "/", and the same text wherever it
    recurs. ``*`` matches any text within a name, ``**`` any folders.

    image: the image, or the folder of a DICOM series. mask: its mask, with the placeholders of ``image``.
    masks: (class, pattern) of masks with one class each, at all values but 0; a missing file means an empty mask.
    polygons: an XML file of polygons in ImageScope's format. label: the class, from placeholders: ``{class}``.
    split, patient: also from placeholders; "" if the rule does not state them.
    """

    image: str = ""
    mask: str = ""
    masks: tuple[tuple[str, str], ...] = ()
    polygons: str = ""
    label: str = ""
    split: str = ""
    patient: str = ""


@dataclass(frozen=True)
class Layout:
    """Where the files of a task are, and how this is known.

    state: "verified" on files; "loader": taken from a public loader or description; "unknown"; "own": the user's own
    files. source: the origin of this layout. rules: none if the state is unknown.
    splits: (text of ``split`` in the rules, one of ``SPLITS``); "*" is every other text. table: a CSV file below the
    data with the columns ``file``, ``label``, ``patient``, ``split``, ``mask``, which ``columns`` may rename.
    values: (value in a mask, class, "background" or "ignore"); a value is a number, "#rrggbb", "nonzero" or, in
    polygons and DICOM segmentations, the name in the file. labels: (text of a label in the data, class), if they
    differ. outline: masks show outlines, which are filled.
    """

    state: State = "unknown"
    source: str = ""
    note: str = ""
    rules: tuple[Rule, ...] = ()
    splits: tuple[tuple[str, str], ...] = ()
    table: str = ""
    columns: tuple[tuple[str, str], ...] = ()
    values: tuple[tuple[str, str], ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    outline: bool = False


@dataclass(frozen=True)
class Published:
    """What the paper states about a task: its row, the number of classes (0: not stated), the images of each split.
    difference: why ``classes`` has a different number of names."""

    row: str = ""
    targets: str = ""
    classes: int = 0
    train: int = 0
    val: int = 0
    test: int = 0
    difference: str = ""


@dataclass(frozen=True)
class Task:
    """A downstream task.

    name: of its file, or of the user's folder. modality: a name of ``dex.prepare.modalities``, which sets the
    normalisation of images. classes: in segmentation without background, class i has the value i + 1 in masks; in
    classification class i is label i; empty: taken from the data. metric: the primary metric. plane: of volumes, as in
    ``dex prepare``. licence, citation, url: of the data, "unknown" if not known. overlap: with the pretraining corpus,
    "" if none is known. public: the data are public, so ids may be readable. root: the user's own folder, else "".
    """

    name: str
    title: str = ""
    kind: Kind = "segmentation"
    modality: str = ""
    anatomy: str = ""
    classes: tuple[str, ...] = ()
    metric: str = ""
    plane: str = "auto"
    licence: str = "unknown"
    citation: str = "unknown"
    url: str = ""
    overlap: str = ""
    public: bool = False
    note: str = ""
    root: str = ""
    layout: Layout = Layout()
    published: Published = Published()

    def __post_init__(self) -> None:
        if not self.metric:
            object.__setattr__(self, "metric", METRICS.get(self.kind, ""))
        _check(self)


class Parts(NamedTuple):
    """Masks of one class each, in the order of the task's classes; None: the image does not contain the class."""

    files: tuple[Path | None, ...]


class Case(NamedTuple):
    """One picture, one volume or one DICOM series."""

    id: str
    """Hashed with a salt as by ``dex prepare``, or readable if the task is public; sheets may contain it."""
    patient: str
    """Hashed as well."""
    split: Split
    image: Path
    """Private: appears only in messages on the user's own terminal. A folder for a DICOM series."""
    target: Path | Parts | int | None
    """The mask's file, or files of one class each; the class's number; None: unknown."""


class TaskData(NamedTuple):
    """The cases of a task."""

    task: Task
    cases: tuple[Case, ...]
    notes: tuple[str, ...]
    """Notes for the user, one sentence each."""

    def of(self, split: Split) -> tuple[Case, ...]:
        """The cases of one split, in order."""
        return tuple(case for case in self.cases if case.split == split)


def names() -> list[str]:
    """The tasks of the catalogue, sorted."""
    return sorted(path.stem for path in CATALOGUE.glob("*.yaml"))


def find(task: str | os.PathLike[str]) -> Task:
    """The task with this name or in this YAML file, or a task of the user's own in this folder, still without facts.

    Raises: ValueError naming the argument or, in a YAML file, the field; FileNotFoundError.
    """
    expected = "task: expected a name of `dex tasks`, a YAML file, or a folder of your own"
    if not isinstance(task, str | os.PathLike) or not os.fspath(task):
        raise ValueError(f"{expected}, got {task!r}")
    text = os.fspath(task)
    if text.lower() in names():
        return load(CATALOGUE / f"{text.lower()}.yaml")
    path = Path(text)
    if path.is_dir():
        return Task(own_name(path), root=str(path), layout=Layout("own"))
    if path.suffix.lower() in (".yaml", ".yml") and path.is_file():
        return load(path)
    close = [name for name in names() if text.lower() in name or name in text.lower()]
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    if os.sep in text or path.suffix:
        raise FileNotFoundError(f"{expected}; nothing at {text}")
    raise ValueError(f"{expected}, got {text!r}{hint}")


def own_name(folder: Path) -> str:
    """A name for a task in the user's folder: letters, digits, ".", "_" and "-"."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._")
    return name[:64] or "own"


def load(path: Path) -> Task:
    """The task that a YAML file describes. ValueError naming the file and the field."""
    try:
        data = path.read_bytes()[: MAX_YAML_BYTES + 1]
    except OSError as error:
        raise ValueError(f"task: expected a description; {path}: {error.strerror}") from None
    if len(data) > MAX_YAML_BYTES:
        raise ValueError(f"task: expected at most {MAX_YAML_BYTES} bytes, got more in {path}")
    try:
        values = yaml.load(data.decode("utf-8"), fields.OnceLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"task: expected YAML; {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"task: expected fields and values, got {type(values).__name__} in {path}")
    return from_dict({"name": path.stem, **values}, str(path))


def from_dict(values: Mapping[str, Any], source: str = "the description") -> Task:
    """The task described by plain values, as from ``to_dict``. ValueError naming the field and ``source``."""
    values = dict(values)
    layout, published = values.pop("layout", {}), values.pop("published", {})
    name = values.get("name", "")
    task = _named(lambda: fields.merge(Task(name if isinstance(name, str) else ""), values, source), source)
    return _named(
        lambda: dataclasses.replace(
            task, layout=_layout(layout, source), published=fields.merge(Published(), published, source, "published.")
        ),
        source,
    )


def without_texts(task: Task) -> Task:
    """The task without texts and published figures, which do not influence cases, targets or scores."""
    defaults = Task(task.name)
    texts = ("title", "anatomy", "licence", "citation", "url", "overlap", "note", "root", "published")
    layout = dataclasses.replace(task.layout, note="")
    return dataclasses.replace(task, layout=layout, **{name: getattr(defaults, name) for name in texts})


def to_dict(task: Task) -> dict[str, Any]:
    """The task as plain values for JSON and YAML, without ``root``, the user's folder."""
    return _plain(dataclasses.asdict(dataclasses.replace(task, root="")))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _named(make: Any, source: str) -> Any:
    try:
        return make()
    except ValueError as error:
        raise ValueError(str(error) if source in str(error) else f"{error}, in {source}") from None


def _layout(values: Any, source: str) -> Layout:
    if not isinstance(values, Mapping):
        raise ValueError(f"layout: expected fields and values, got {values!r} in {source}")
    values = dict(values)
    rules = values.pop("rules", ())
    if not isinstance(rules, list | tuple):
        raise ValueError(f"layout.rules: expected a list, got {rules!r} in {source}")
    for name in ("splits", "columns", "values", "labels"):
        values[name] = _pairs(values.get(name, ()), f"layout.{name}", source)
    given = {name: value for name, value in values.items() if value != ()}
    layout = fields.merge(Layout(), given, source, "layout.")
    return dataclasses.replace(layout, rules=tuple(_rule(v, f"layout.rules.{i}.", source) for i, v in enumerate(rules)))


def _rule(values: Any, prefix: str, source: str) -> Rule:
    if isinstance(values, Mapping) and "masks" in values:
        values = {**values, "masks": _pairs(values["masks"], f"{prefix}masks", source)}
        if not values["masks"]:
            del values["masks"]
    return fields.merge(Rule(), values, source, prefix)


def _pairs(value: Any, name: str, source: str) -> tuple[tuple[str, str], ...]:
    """Pairs of texts from a mapping or a list of pairs; numbers become text."""
    entries = value.items() if isinstance(value, Mapping) else value
    try:
        pairs = tuple((first, second) for first, second in entries)
    except (TypeError, ValueError):
        pairs = (((), ""),)
    if any(not isinstance(entry, str | int) or isinstance(entry, bool) for pair in pairs for entry in pair):
        raise ValueError(f"{name}: expected texts or numbers with their meanings, got {value!r} in {source}")
    return tuple((str(first), str(second)) for first, second in pairs)


def _check(task: Task) -> None:
    """ValueError naming the field."""
    _require(_NAME.fullmatch(task.name) is not None, "name", 'up to 64 letters, digits, ".", "_", "-"', task.name)
    _require(task.kind in get_args(Kind), "kind", f"one of {', '.join(get_args(Kind))}", task.kind)
    _require(task.plane in PLANES, "plane", f"one of {', '.join(PLANES)}", task.plane)
    if task.modality:
        modalities.resolve(task.modality)
    classes = task.classes
    _require(len(classes) <= MAX_CLASSES, "classes", f"at most {MAX_CLASSES}", len(classes))
    reserved = {BACKGROUND, IGNORE} if task.kind == "segmentation" else set()
    distinct = all(name and name == name.strip() for name in classes) and len(set(classes)) == len(classes)
    _require(distinct and not reserved & set(classes), "classes", f"names, each once, other than {reserved}", classes)
    layout = task.layout
    _require(layout.state in get_args(State), "layout.state", f"one of {', '.join(get_args(State))}", layout.state)
    _require(
        layout.state in ("unknown", "own") or (len(layout.rules) > 0 and layout.source != ""),
        "layout",
        "rules, and their source",
        layout.state,
    )
    for text, split in layout.splits:
        _require(split in SPLITS, f"layout.splits.{text}", f"one of {', '.join(SPLITS)}", split)
    for column, _ in layout.columns:
        _require(column in _COLUMNS, "layout.columns", f"some of {', '.join(_COLUMNS)}", column)
    allowed = set(classes) | {BACKGROUND, IGNORE}
    for value, meaning in layout.values:
        _require(meaning in allowed, f"layout.values.{value}", f"a class, {BACKGROUND} or {IGNORE}", meaning)
        _require(not value.startswith("#") or _COLOUR.fullmatch(value) is not None, "layout.values", "#rrggbb", value)
    for text, name in layout.labels:
        _require(name in classes, f"layout.labels.{text}", f"one of {', '.join(classes)}", name)
    for number, rule in enumerate(layout.rules):
        _check_rule(rule, task, f"layout.rules.{number}")


def _check_rule(rule: Rule, task: Task, name: str) -> None:
    _require(rule.image != "", f"{name}.image", "a pattern", rule.image)
    known = set(re.findall(r"\{(\w+)\}", rule.image))
    for field in ("mask", "polygons", "label", "split", "patient"):
        _check_placeholders(getattr(rule, field), known, f"{name}.{field}")
    for title, pattern in rule.masks:
        _require(title in task.classes, f"{name}.masks", f"classes, of {', '.join(task.classes)}", title)
        _check_placeholders(pattern, known, f"{name}.masks.{title}")
    targets = [bool(rule.mask), bool(rule.masks), bool(rule.polygons)]
    if task.kind == "segmentation":
        _require(sum(targets) == 1 or bool(task.layout.table), name, "one of mask, masks and polygons", sum(targets))
    else:
        _require(bool(rule.label) or bool(task.layout.table), name, "a label, or a table of the layout", "none")


def _check_placeholders(pattern: str, known: set[str], name: str) -> None:
    unknown = set(re.findall(r"\{(\w+)\}", pattern)) - known
    _require(not unknown, name, f"names of the image's pattern, {sorted(known)}", sorted(unknown))


def _require(valid: bool, name: str, expected: str, got: Any) -> None:
    if not valid:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")
