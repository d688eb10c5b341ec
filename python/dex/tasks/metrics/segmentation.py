"""Scores of a segmented case by class: pixel counts, Dice, HD95 and NSD, and whether truth or prediction is empty.

Shape letters: n frames, C classes without background.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dex.tasks.metrics.surface import surface_scores

IGNORE = 255
"""Value of ignored pixels in the truth."""
TOLERANCE = 2.0
"""Tolerance of NSD, in mm, or in pixels without a spacing. Our default; the paper states none."""

Unit = Literal["mm", "pixels"]
State = Literal["scored", "empty", "missed", "spurious"]
"""Scored: truth and prediction contain the class; empty: neither; missed: only truth; spurious: only prediction."""


class ClassScores(NamedTuple):
    """One class of one case."""

    both: int
    """Pixels of the class in prediction and truth."""
    predicted: int
    truth: int
    hd95: float | None = None
    """In the case's unit; None unless truth and prediction contain the class and surfaces were requested."""
    nsd: float | None = None

    @property
    def state(self) -> State:
        if self.predicted and self.truth:
            return "scored"
        return "missed" if self.truth else "spurious" if self.predicted else "empty"

    @property
    def dice(self) -> float | None:
        """2 |P ∩ T| / (|P| + |T|), 0 if only one of them is empty; None if both are."""
        total = self.predicted + self.truth
        return 2 * self.both / total if total else None


class CaseScores(NamedTuple):
    """A case: one picture or one volume."""

    classes: tuple[ClassScores, ...]
    confusion: np.ndarray
    """int64 ``[C + 1, C + 1]``: pixels by truth (rows) and prediction, background first, without ignored pixels."""
    unit: Unit
    tolerance: float
    """Of NSD, in ``unit``."""


def mean_dice(classes: Sequence[ClassScores]) -> float | None:
    """The mean Dice of a case over the classes in prediction or truth; None if there are none."""
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

    predicted, truth: integers ``[n, H, W]`` or ``[H, W]``: 0 background, i + 1 class i; ``IGNORE`` in the truth for
    ignored pixels. Several frames form a volume; a single frame is scored in two dimensions.
    spacing_mm: (between frames, rows, columns); None measures in pixels. tolerance: of NSD, in the same unit.
    surfaces: False leaves out HD95 and NSD.

    ValueError naming the argument: different shapes, values of no class, an invalid spacing.
    """
    predicted, truth = _checked(predicted, truth, len(classes))
    spacing = _spacing(spacing_mm)
    if not (isinstance(tolerance, int | float) and 0 <= tolerance < float("inf")):
        raise ValueError(f"tolerance: expected a distance of 0 or more, got {tolerance!r}")
    confusion = _confusion(predicted, truth, len(classes))
    ignored = truth == IGNORE
    if ignored.any():
        # Background in both, so that the border of ignored pixels adds no distance.
        predicted, truth = np.where(ignored, 0, predicted), np.where(ignored, 0, truth)
    if len(truth) == 1:
        predicted, truth, spacing = predicted[0], truth[0], spacing[1:]
    counts = [
        ClassScores(int(confusion[c, c]), int(confusion[:, c].sum()), int(confusion[c].sum()))
        for c in range(1, len(classes) + 1)
    ]
    if surfaces:
        scored = {c for c, of_class in enumerate(counts, 1) if of_class.state == "scored"}
        for c, box in _boxes(predicted, truth, scored):
            hd95, nsd = surface_scores(predicted[box] == c, truth[box] == c, spacing, float(tolerance))
            counts[c - 1] = counts[c - 1]._replace(hd95=hd95, nsd=nsd)
    unit: Unit = "pixels" if spacing_mm is None else "mm"
    return CaseScores(tuple(counts), confusion, unit, float(tolerance))


def _checked(predicted: np.ndarray, truth: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Both as uint8 ``[n, H, W]``."""
    if not 1 <= classes < IGNORE:
        raise ValueError(f"classes: expected 1 to {IGNORE - 1} names, got {classes}")
    masks = []
    for name, mask in (("predicted", predicted), ("truth", truth)):
        mask = np.asarray(mask)
        if mask.dtype.kind not in "biu":
            raise ValueError(f"{name}: expected whole numbers, got {mask.dtype}; take the argmax of probabilities")
        if mask.ndim == 2:
            mask = mask[None]
        if mask.ndim != 3 or 0 in mask.shape:
            raise ValueError(f"{name}: expected [n, H, W] or [H, W] without an empty side, got {list(mask.shape)}")
        masks.append(mask)
    predicted, truth = masks
    if predicted.shape != truth.shape:
        raise ValueError(
            f"predicted: expected the shape of truth, {list(truth.shape)}, got {list(predicted.shape)}; resize "
            "predictions to the image's size before scoring"
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
        ignore = "" if name == "predicted" else f", or {IGNORE} to ignore a pixel"
        listed = ", ".join(map(str, wrong[:5].tolist())) + (" and others" if len(wrong) > 5 else "")
        raise ValueError(f"{name}: expected 0 for background to {classes} for the last class{ignore}, got {listed}")


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
    """int64 ``[C + 1, C + 1]``, frame by frame since counting takes eight bytes per pixel."""
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


def _boxes(predicted: np.ndarray, truth: np.ndarray, classes: set[int]) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Each class with the smallest box that contains it in prediction and truth."""
    from scipy import ndimage

    if not classes:
        return
    of_predicted, of_truth = (ndimage.find_objects(mask, max(classes)) for mask in (predicted, truth))
    for c in sorted(classes):
        axes = zip(of_predicted[c - 1], of_truth[c - 1], strict=True)
        yield c, tuple(slice(min(p.start, t.start), max(p.stop, t.stop)) for p, t in axes)
