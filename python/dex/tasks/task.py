"""What a downstream task is: classes, metric, where its images and labels lie, and what is known of its data.

A task is a YAML file: `catalogue/NAME.yaml` for the 26 of the paper, or one's own. ``layout`` says in patterns which
files belong together (`dex.tasks.layout`), so that a task needs no code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CATALOGUE = Path(__file__).parent / "catalogue"
MAX_YAML_BYTES = 2**20
Kind = Literal["segmentation", "classification"]
State = Literal["verified", "loader", "unknown", "own"]
SPLITS = ("train", "val", "test")
BACKGROUND, IGNORE = "background", "ignore"
"""Names that values of a mask may have beside those of the classes."""
NONZERO = "nonzero"
"""Stands for every value but 0: masks of one class, and of numbered instances."""
IGNORED = 255
"""Value of pixels in `Frames.masks` that count neither as a class nor as background."""


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

    state: "verified" on files; "loader": as a public loader describes it; "unknown": nobody here knows; "own": the
    user's own files. source: where it was read. rules: none where the state is unknown.
    splits: (text of ``split`` in the rules, one of `SPLITS`). table: a CSV file below the data with columns ``file``,
    ``label``, ``patient``, ``split``, under the names that ``columns`` gives them.
    values: (value in a mask, class, "background" or "ignore"); a value is a number, "#rrggbb" or "nonzero".
    labels: (text of a label in the data, class) where they are called otherwise.
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


@dataclass(frozen=True)
class Published:
    """What the paper prints of a task: its row, the number of classes, and how many images are on each side."""

    row: str = ""
    targets: str = ""
    classes: int = 0
    train: int = 0
    val: int = 0
    test: int = 0


@dataclass(frozen=True)
class Task:
    """A downstream task.

    name: of its file, or of the user's folder. modality: as `dex.prepare.modalities` knows it; it decides how images
    are normalised. classes: segmentation: without background, class i has the value i + 1 in masks; classification:
    class i is label i. Empty: the data's own label map names them. metric: the primary one. plane: of volumes, as
    `dex prepare` has them. licence, citation, url: of the data; "unknown" where nobody here knows. overlap: with the
    pretraining corpus, "" where none is known. public: the data is, so that ids may be readable.
    """

    name: str
    title: str = ""
    kind: Kind = "segmentation"
    modality: str = ""
    anatomy: str = ""
    classes: tuple[str, ...] = ()
    metric: str = "dice"
    plane: str = "auto"
    licence: str = "unknown"
    citation: str = "unknown"
    url: str = ""
    overlap: str = ""
    public: bool = False
    note: str = ""
    layout: Layout = Layout()
    published: Published = Published()
