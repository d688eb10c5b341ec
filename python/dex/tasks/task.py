"""What a downstream task is: classes, metric, where its images and labels lie, and what is known of its data.

A task is a YAML file: ``catalogue/NAME.yaml`` for the 26 of the paper, or one's own. ``layout`` says in patterns which
files belong together (`dex.tasks.patterns`), so that a task needs no code.
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
SPLITS = get_args(Split)
BACKGROUND, IGNORE, NONZERO = "background", "ignore", "nonzero"
"""Names that values of a mask may have beside those of the classes; what stands for every value but 0: masks of one
class, and of numbered instances."""
IGNORED = 255
"""Value of pixels in masks that count neither as a class nor as background."""
MAX_CLASSES = IGNORED - 1
METRICS = {"segmentation": "dice", "classification": "auc"}
"""The primary metric where a task does not name one."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_COLUMNS = ("file", "label", "patient", "split", "mask")


@dataclass(frozen=True)
class Rule:
    """Which images there are, and what belongs to each. Patterns are paths below the folder of the data, with names in
    braces: ``{split}/Original/{case}.png``. A name stands for any text without "/", and for the same text wherever it
    recurs. ``*`` is any text within a name, ``**`` any folders.

    image: of the image, or of the folder of a DICOM series. mask: of its mask, with the names of ``image``.
    masks: (class, pattern) of masks of one class each, all values but 0; a file that is missing holds nothing.
    polygons: of an XML file with polygons as ImageScope writes them. label: the class by those names: ``{class}``.
    split, patient: by those names too; "" where the rule does not say.
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
    """How the files of a task are found, and how that is known.

    state: "verified" on files; "loader": as a public loader, or a public description, has it; "unknown": nobody here
    knows; "own": the user's own files. source: where it was read. rules: none where the state is unknown.
    splits: (text of ``split`` in the rules, one of `SPLITS`); "*" is every other text. table: a CSV file below the
    data, with the columns ``file``, ``label``, ``patient``, ``split``, ``mask`` under the names of ``columns``.
    values: (value in a mask, class, "background" or "ignore"); a value is a number, "#rrggbb", "nonzero" or, of
    polygons and of DICOM segmentations, the name that the file gives. labels: (text of a label in the data, class)
    where they are called otherwise. outline: masks show the outline of what they are about; it is filled.
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
    """What the paper prints of a task: its row, the number of classes (0: not printed), images on each side.
    difference: why ``classes`` has another number of names."""

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

    name: of its file, or of the user's folder. modality: as `dex.prepare.modalities` knows it; it decides how images
    are normalised. classes: segmentation: without background, class i has the value i + 1 in masks; classification:
    class i is label i. Empty: the data says. metric: the primary one. plane: of volumes, as `dex prepare` has them.
    licence, citation, url: of the data; "unknown" where nobody here knows. overlap: with the pretraining corpus, ""
    where none is known. public: the data is, so that ids may be readable. root: the user's own folder; "" for all
    others.
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
    """Masks of one class each, in the order of the task's classes; None: the class is not in the image."""

    files: tuple[Path | None, ...]


class Case(NamedTuple):
    """One picture, one volume or one DICOM series."""

    id: str
    """Salted as in `prepare`, or readable where the task is public; sheets may print it."""
    patient: str
    """Salted too."""
    split: Split
    image: Path
    """Private: printed only in messages on the user's own terminal. A folder where it is a DICOM series."""
    target: Path | Parts | int | None
    """The file of the mask, or the files of one class each; the class's number; None: nothing is known."""


class TaskData(NamedTuple):
    """The cases of a task."""

    task: Task
    cases: tuple[Case, ...]
    notes: tuple[str, ...]
    """What the user should know, one sentence each."""

    def of(self, split: Split) -> tuple[Case, ...]:
        """The cases of one side, in order."""
        return tuple(case for case in self.cases if case.split == split)


def names() -> list[str]:
    """The tasks of the catalogue, sorted."""
    return sorted(path.stem for path in CATALOGUE.glob("*.yaml"))


def find(task: str | os.PathLike[str]) -> Task:
    """The task of that name, or of that YAML file, or one of one's own in that folder, of which nothing is known yet.

    Raises: ValueError naming the argument or, in a YAML file, the field; FileNotFoundError.
    """
    expected = "task: expected a name of `dex tasks`, a YAML file, or a folder of one's own"
    if not isinstance(task, str | os.PathLike) or not os.fspath(task):
        raise ValueError(f"{expected}; got {task!r}")
    text = os.fspath(task)
    if text.lower() in names():
        return load(CATALOGUE / f"{text.lower()}.yaml")
    path = Path(text)
    if path.is_dir():
        return Task(own_name(path), root=str(path), layout=Layout("own"))
    if path.suffix.lower() in (".yaml", ".yml") and path.is_file():
        return load(path)
    close = [name for name in names() if text.lower() in name or name in text.lower()]
    hint = f"; perhaps {', '.join(close)}" if close else ""
    if os.sep in text or path.suffix:
        raise FileNotFoundError(f"{expected}; nothing at {text}")
    raise ValueError(f"{expected}; got {text!r}{hint}")


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
        raise ValueError(f"task: expected at most {MAX_YAML_BYTES} bytes; got more in {path}")
    try:
        values = yaml.load(data.decode("utf-8"), fields.OnceLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"task: expected YAML; {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"task: expected fields and their values; got {type(values).__name__} in {path}")
    return from_dict({"name": path.stem, **values}, str(path))


def from_dict(values: Mapping[str, Any], source: str = "the description") -> Task:
    """The task that plain values describe, as `to_dict` gives them. ValueError naming the field and ``source``."""
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


def to_dict(task: Task) -> dict[str, Any]:
    """Plain values, for JSON and YAML; without ``root``, which names the user's folder."""
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
        raise ValueError(f"layout: expected fields and their values; got {values!r} in {source}")
    values = dict(values)
    rules = values.pop("rules", ())
    if not isinstance(rules, list | tuple):
        raise ValueError(f"layout.rules: expected a list; got {rules!r} in {source}")
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
    """A mapping, or pairs, of texts; numbers become text."""
    entries = value.items() if isinstance(value, Mapping) else value
    try:
        pairs = tuple((first, second) for first, second in entries)
    except (TypeError, ValueError):
        pairs = (((), ""),)
    if any(not isinstance(entry, str | int) or isinstance(entry, bool) for pair in pairs for entry in pair):
        raise ValueError(f"{name}: expected texts or numbers and what each stands for; got {value!r} in {source}")
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
    sound = all(name and name == name.strip() for name in classes) and len(set(classes)) == len(classes)
    _require(sound and not reserved & set(classes), "classes", f"names, each once, other than {reserved}", classes)
    layout = task.layout
    _require(layout.state in get_args(State), "layout.state", f"one of {', '.join(get_args(State))}", layout.state)
    _require(
        layout.state in ("unknown", "own") or (len(layout.rules) > 0 and layout.source != ""),
        "layout",
        "rules, and a source that says them",
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
        strange = set(re.findall(r"\{(\w+)\}", getattr(rule, field))) - known
        _require(not strange, f"{name}.{field}", f"names of the image's pattern, {sorted(known)}", sorted(strange))
    for title, pattern in rule.masks:
        _require(title in task.classes, f"{name}.masks", f"classes, of {', '.join(task.classes)}", title)
        strange = set(re.findall(r"\{(\w+)\}", pattern)) - known
        _require(
            not strange, f"{name}.masks.{title}", f"names of the image's pattern, {sorted(known)}", sorted(strange)
        )
    targets = [bool(rule.mask), bool(rule.masks), bool(rule.polygons)]
    if task.kind == "segmentation":
        _require(sum(targets) == 1 or bool(task.layout.table), name, "one of mask, masks and polygons", sum(targets))
    else:
        _require(bool(rule.label) or bool(task.layout.table), name, "a label, or a table of the layout", "none")


def _require(sound: bool, name: str, expected: str, got: Any) -> None:
    if not sound:
        raise ValueError(f"{name}: expected {expected}; got {got!r}")
