"""Scores of one segmented case, by class: counts of pixels, Dice, HD95 and NSD, and whether a side is empty.

Shape letters: n frames, C classes without background.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dex.tasks.metrics.surface import surface_scores

IGNORE = 255
"""Value of the truth where pixels do not count."""
TOLERANCE = 2.0
"""Of NSD, in mm, or in pixels without a spacing. Our default: the paper states none."""

Unit = Literal["mm", "pixels"]
State = Literal["scored", "empty", "missed", "spurious"]
"""Both sides hold the class; neither does; only the truth does; only the prediction does."""


class ClassScores(NamedTuple):
    """One class of one case."""

    both: int
    """Pixels of the class in prediction and truth."""
    predicted: int
    truth: int
    hd95: float | None = None
    """In the case's unit; None unless both sides hold the class, or where surfaces were not asked for."""
    nsd: float | None = None

    @property
    def state(self) -> State:
        if self.predicted and self.truth:
            return "scored"
        return "missed" if self.truth else "spurious" if self.predicted else "empty"

    @property
    def dice(self) -> float | None:
        """2 |P ∩ T| / (|P| + |T|), 0 where one side alone is empty; None where both are, which is counted instead."""
        total = self.predicted + self.truth
        return 2 * self.both / total if total else None


class CaseScores(NamedTuple):
    """A case: one picture or one volume."""

    classes: tuple[ClassScores, ...]
    confusion: np.ndarray
    """int64 ``[C + 1, C + 1]``: pixels by truth (rows) and prediction, background first, ignored ones left out."""
    unit: Unit
    tolerance: float
    """Of NSD, in `unit`."""


def mean_dice(classes: Sequence[ClassScores]) -> float | None:
    """Of a case, over the classes that prediction or truth holds; None without any."""
    values = [c.dice for c in classes if c.dice is not None]
    return sum(values) / len(values) if values else None


def segmentation_scores(
    predicted: np.ndarray,
    truth: np.ndarray,
    classes: Sequence[str],
    spacing_mm: tuple[float, float, float] | None,
    *,
    tolerance: float = TOLERANCE,
    surfaces: bool = True,
) -> CaseScores:
    """The scores of a case.

    predicted, truth: integers ``[n, H, W]`` or ``[H, W]``: 0 background, i + 1 the class i; `IGNORE` in the truth for
    pixels that count nowhere. Several frames are one volume, one frame is a picture in two dimensions.
    spacing_mm: (between frames, rows, columns); None measures in pixels. tolerance: of NSD, in the same unit.
    surfaces: False leaves out HD95 and NSD.

    ValueError, naming the argument: shapes that differ, values that are no class, a spacing that cannot be.
    """
    predicted, truth = _checked(predicted, truth, len(classes))
    spacing = _spacing(spacing_mm)
    if not (isinstance(tolerance, int | float) and 0 <= tolerance < float("inf")):
        raise ValueError(f"tolerance: expected a distance of 0 or more, got {tolerance!r}")
    confusion = _confusion(predicted, truth, len(classes))
    ignored = truth == IGNORE
    if ignored.any():
        # Background on both sides: what reaches into ignored pixels is cut alike, so that the cut is no distance.
        predicted, truth = np.where(ignored, 0, predicted), np.where(ignored, 0, truth)
    if len(truth) == 1:
        predicted, truth, spacing = predicted[0], truth[0], spacing[1:]
    counts = [
        ClassScores(int(confusion[c, c]), int(confusion[:, c].sum()), int(confusion[c].sum()))
        for c in range(1, len(classes) + 1)
    ]
    if surfaces:
        both = {c for c, of in enumerate(counts, 1) if of.state == "scored"}
        for c, box in _boxes(predicted, truth, both):
            hd95, nsd = surface_scores(predicted[box] == c, truth[box] == c, spacing, float(tolerance))
            counts[c - 1] = counts[c - 1]._replace(hd95=hd95, nsd=nsd)
    unit: Unit = "pixels" if spacing_mm is None else "mm"
    return CaseScores(tuple(counts), confusion, unit, float(tolerance))


def _checked(predicted: np.ndarray, truth: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Both as uint8 ``[n, H, W]``."""
    if not 1 <= classes < IGNORE:
        raise ValueError(f"classes: expected 1 to {IGNORE - 1} names, got {classes}")
    found = []
    for name, mask in (("predicted", predicted), ("truth", truth)):
        mask = np.asarray(mask)
        if mask.dtype.kind not in "biu":
            raise ValueError(f"{name}: expected whole numbers, got {mask.dtype}; take the argmax of probabilities")
        if mask.ndim == 2:
            mask = mask[None]
        if mask.ndim != 3 or 0 in mask.shape:
            raise ValueError(f"{name}: expected [n, H, W] or [H, W] without an empty side, got {list(mask.shape)}")
        found.append(mask)
    predicted, truth = found
    if predicted.shape != truth.shape:
        raise ValueError(
            f"predicted: expected the shape of truth, {list(truth.shape)}, got {list(predicted.shape)}; "
            "a prediction is brought back to the image's size before it is scored"
        )
    for name, mask in (("predicted", predicted), ("truth", truth)):
        _check_values(name, mask, classes)
    return predicted.astype(np.uint8, copy=False), truth.astype(np.uint8, copy=False)


def _check_values(name: str, mask: np.ndarray, classes: int) -> None:
    most = int(mask.max())
    if int(mask.min()) >= 0 and most <= classes:
        return
    allowed = np.arange(classes + 1) if name == "predicted" else np.append(np.arange(classes + 1), IGNORE)
    wrong = np.setdiff1d(mask, allowed)
    if len(wrong):
        also = "" if name == "predicted" else f", or {IGNORE} to ignore a pixel"
        listed = ", ".join(map(str, wrong[:5].tolist())) + (" and others" if len(wrong) > 5 else "")
        raise ValueError(f"{name}: expected 0 for background to {classes} for the last class{also}; got {listed}")


def _spacing(spacing_mm: tuple[float, float, float] | None) -> tuple[float, ...]:
    if spacing_mm is None:
        return (1.0, 1.0, 1.0)
    try:
        spacing = tuple(float(s) for s in spacing_mm)
    except (TypeError, ValueError):
        spacing = ()
    if len(spacing) != 3 or not all(0 < s < float("inf") for s in spacing):
        raise ValueError(
            "spacing_mm: expected three positive numbers (between frames, rows, columns) or None for pixels, "
            f"got {spacing_mm!r}"
        )
    return spacing


def _confusion(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """int64 ``[C + 1, C + 1]``; frame by frame, as counting takes eight bytes a pixel."""
    side = classes + 1
    count = np.zeros(side * side, np.int64)
    for p, t in zip(predicted, truth, strict=True):
        counted = t != IGNORE
        if counted.all():
            pairs = t.astype(np.int32) * side + p
        else:
            pairs = t[counted].astype(np.int32) * side + p[counted]
        count += np.bincount(pairs.ravel(), minlength=side * side)
    return count.reshape(side, side)


def _boxes(predicted: np.ndarray, truth: np.ndarray, wanted: set[int]) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Each wanted class and the smallest box that holds it on both sides."""
    from scipy import ndimage

    if not wanted:
        return
    there = [ndimage.find_objects(mask, max(wanted)) for mask in (predicted, truth)]
    for c in sorted(wanted):
        pair = zip(there[0][c - 1], there[1][c - 1], strict=True)
        yield c, tuple(slice(min(p.start, t.start), max(p.stop, t.stop)) for p, t in pair)
