"""Reads a case: its frames at their own size, and its mask cut in the same way.

A mask is first brought into the voxel order of the image's file, by the affines of both. Then the same code cuts both,
so they cannot be rotated against each other.
Shape letters: n frames of a case, H rows and W columns of a frame; F, R, C frames, rows and columns as stored.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dex.inference import preprocess
from dex.inference.preprocess import Opened
from dex.prepare import readers
from dex.prepare.slices import unscaled
from dex.tasks import masks
from dex.tasks.task import Case, Parts, Task

_NORMAL = {"sagittal": 0, "coronal": 1, "axial": 2}


class Grid(NamedTuple):
    """The position of frames in the volume from which they were cut."""

    affine: np.ndarray
    """float64 ``[4, 4]``: (i, j, k) of the stored volume to mm, right-anterior-superior; i along the columns of a
    stored frame, j along its rows, k along frames in the order of the file (NIfTI) or of positions (DICOM)."""
    shape: tuple[int, int, int]
    """Along i, j, k."""
    plane: str
    """Plane of the frames: axial, coronal, sagittal or stored."""
    axes: tuple[int, int, int]
    signs: tuple[int, int, int]
    """As in ``dex.prepare.readers.Geometry``."""
    files: tuple[str, ...]
    """For a DICOM series, the file name of each k; () for a single file."""
    even: bool = True
    """Whether frames are evenly spaced; if not, ``affine`` has their mean distance."""


class Frames(NamedTuple):
    """The contents of a case. Volumes and masks are cut in the plane of ``dex prepare``, oriented for a radiologist."""

    images: np.ndarray
    """uint8 ``[n, H, W]`` or ``[n, H, W, 3]``, normalised as by ``dex prepare``, at their own size."""
    masks: np.ndarray | None
    """uint8 ``[n, H, W]``: 0 background, i + 1 class i, 255 ignored."""
    label: int | None
    spacing_mm: tuple[float, float, float] | None
    """Between frames, rows and columns of these arrays; None if the file does not state it."""
    grid: Grid | None
    """The position of frames in a volume; None for pictures."""

    @property
    def affine(self) -> np.ndarray | None:
        """float64 ``[4, 4]`` of the volume as stored; see ``Grid``."""
        return None if self.grid is None else self.grid.affine


def read(case: Case, task: Task, beat: Callable[[], None] = lambda: None, series: str | None = None) -> Frames:
    """The frames of a case. beat: called for every frame read, as a sign of life. series: as for
    ``dex.inference.preprocess.opened_whole``.

    Raises: FileNotFoundError; ValueError naming a file that cannot be read, or a mask of another size or grid or with
    values without a meaning.
    """
    opened = _opened(case.image, task, beat, series=series)
    try:
        frames = list(unscaled(opened.stack, opened.source))
    except readers.Refused as error:
        raise ValueError(f"file: expected a readable image; {case.image}: {error}") from None
    shapes = {frame.image.shape for frame in frames}
    if len(shapes) != 1:
        raise ValueError(f"file: expected frames of one size; {case.image} has {sorted(shapes)}")
    label = case.target if isinstance(case.target, int) else None
    cut = None
    if label is None and case.target is not None:
        cut = _cut(masks.stored(case.target, task, opened.stack, case.image), opened)
    images = np.stack([frame.image for frame in frames])
    return Frames(images, cut, label, _spacing(opened, frames[0].spacing), _grid(opened))


def read_target(case: Case, task: Task) -> np.ndarray:
    """The masks only, as in ``Frames``; of the image, only the header is read. ValueError as in ``read``."""
    if not isinstance(case.target, Path | Parts):
        raise ValueError(f"target: expected the file of a mask, got {case.target!r}")
    opened = _opened(case.image, task, lambda: None, headers=True)
    return _cut(masks.stored(case.target, task, opened.stack, case.image), opened)


def _opened(
    image: Path, task: Task, beat: Callable[[], None], headers: bool = False, series: str | None = None
) -> Opened:
    planes = (task.plane,)
    return preprocess.opened_whole(image, task.modality or None, planes, headers=headers, series=series, beat=beat)


def _cut(stored: np.ndarray, opened: Opened) -> np.ndarray:
    """Cut a stored mask, uint8 ``[F, R, C]``, to uint8 ``[n, H, W]``, in the same way as its image."""
    stack = opened.stack
    of_mask = readers.Stack(
        quantity="display8",
        length=len(stored),
        shape=stored.shape[1:],
        dtype=stored.dtype,
        load=_never,
        holds=lambda stored: True,
        geometry=stack.geometry,
        spacing=stack.spacing,
        volume=stack.volume,
        whole=stored,
    )
    return np.stack([frame.pixels for frame in of_mask.frames(opened.source.planes, 1)])


def _never(*_: Any) -> Any:
    """Never called, since the stack holds all its frames."""


def _plane(opened: Opened) -> str:
    return next(planned.plane for planned in opened.stack.planned(opened.source.planes, 1))


def _spacing(opened: Opened, of_frame: tuple[float, float]) -> tuple[float, float, float] | None:
    geometry = opened.stack.geometry
    if geometry is None:
        return None if of_frame == (1.0, 1.0) else (1.0, *of_frame)
    plane = _plane(opened)
    between = geometry.spacing[2 if plane == "stored" else geometry.axes[_NORMAL[plane]]]
    return (float(between), float(of_frame[0]), float(of_frame[1]))


def _grid(opened: Opened) -> Grid | None:
    stack, geometry = opened.stack, opened.stack.geometry
    if geometry is None or stack.length is None:
        return None
    rows, columns = stack.shape
    files = tuple(name for name, _ in stack.origins)
    return Grid(
        masks.affine_of(geometry),
        (columns, rows, stack.length),
        _plane(opened),
        geometry.axes,
        geometry.signs,
        files if any(files) else (),
        geometry.even,
    )
