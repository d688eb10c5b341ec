"""The cases of a task: which image belongs to which target, patient and split, and what they hold.

Shape letters: n frames of a case, H rows and W columns of a frame.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dex.tasks.task import Task

Split = Literal["train", "val", "test"]


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


class Frames(NamedTuple):
    """What a case holds. Volumes are cut in the plane that `dex prepare` cuts them in, as a radiologist sees it; masks
    are cut in the same way."""

    images: np.ndarray
    """uint8 ``[n, H, W]`` or ``[n, H, W, 3]``, normalised as `dex prepare` does, at their own size."""
    masks: np.ndarray | None
    """uint8 ``[n, H, W]``: 0 background, i + 1 class i, 255 ignored."""
    label: int | None
    spacing_mm: tuple[float, float, float] | None
    """Between frames, rows and columns of these arrays; None where the file does not say."""
    grid: Grid | None
    """Of a volume: how its frames lie in the file; None for pictures."""

    @property
    def affine(self) -> np.ndarray | None:
        """float64 ``[4, 4]`` of the volume as stored; see `Grid`."""
        return None if self.grid is None else self.grid.affine


class Grid(NamedTuple):
    """How frames lie in the volume that they were cut from."""

    affine: np.ndarray
    """float64 ``[4, 4]``: (i, j, k) of the volume as stored to mm, right-anterior-superior; i along the columns of a
    stored frame, j along its rows, k along frames in the order of the file (NIfTI) or of positions (DICOM)."""
    shape: tuple[int, int, int]
    """Along i, j, k."""
    plane: str
    """Of the frames: axial, coronal, sagittal or stored."""
    axes: tuple[int, int, int]
    signs: tuple[int, int, int]
    """As in `dex.prepare.readers.Geometry`."""
    files: tuple[str, ...]
    """Of a DICOM series: the name of the file of each k; () for a file that holds all of them."""
