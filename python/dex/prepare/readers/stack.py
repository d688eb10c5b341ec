"""A decoded volume, series, video or picture, frame by frame.

Shape letters: F frames, H rows, W columns. Index axes of a volume: i along columns, j along rows, k along frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..label_maps import LABEL_MAP, PROBABILITY_MAP
from ..routing import REASONS as LEFT_OUT
from ..routing import Decision

REASONS = (
    "unreadable",
    "unsupported",
    "too large",
    "not finite",
    "constant",
    "burned-in",
    "inconsistent",
    "timeout",
    "crash",
    *LEFT_OUT,
    LABEL_MAP,
    PROBABILITY_MAP,
)
"""Why a file or a stack gives no image."""
PLANES = ("axial", "coronal", "sagittal", "stored", "auto")
"""Directions in which slices are cut; see ``Stack.frames``."""
QUANTITIES = ("HU", "SUV", "raw", "display8")

_NORMAL = {"sagittal": 0, "coronal": 1, "axial": 2}  # Patient axis along each plane's normal
_CHUNK = 2**20
_MOST_NAN = 0.98  # Largest share of NaN in a stack that is not refused
_THICK = 2.0  # Times the spacing of rows and columns: slices further apart are useless in other planes


class Refused(ValueError):
    """A file or stack that cannot be used. ``reason``: one of REASONS; ``detail``: only our own words and numbers.
    ``file``: the name of the file concerned, if it is one of a unit's files; "" for all, several or unknown ones. It is
    never printed. ``files``: the names of several; ``others``: further refusals of a unit without stacks."""

    def __init__(self, reason: str, detail: str = ""):
        if reason not in REASONS:
            raise ValueError(f"reason: expected one of {REASONS}, got {reason!r}")
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.file: str = ""
        self.files: tuple[str, ...] = ()
        self.others: list[Refused] = []

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason

    def about(self, names: Iterable[str]) -> Refused:
        """Itself, with the names of the files concerned, unless it has some already."""
        distinct = tuple(sorted({name for name in names if name}))
        if not self.file and not self.files:
            if len(distinct) == 1:
                self.file = distinct[0]
            else:
                self.files = distinct
        return self


class Frame(NamedTuple):
    """``label`` is unique in its stack. ``pixels``: float32 [H, W] in the stack's quantity, or uint8 [H, W] or
    [H, W, 3] if that is "display8". ``spacing``: mm between rows and between columns; (1, 1) if unknown. ``part``: see
    ``Stack.parts``. ``number``: of the stored frame that it shows; None if it is cut across several."""

    label: str
    pixels: np.ndarray
    spacing: tuple[float, float]
    part: int = 0
    number: int | None = None


class Planned(NamedTuple):
    """The images of one plane of a stack before any pixel is decoded: their number, H and W, and mm between rows and
    between columns."""

    plane: str
    count: int
    shape: tuple[int, int]
    spacing: tuple[float, float]


@dataclass(frozen=True)
class Geometry:
    """The directions of a volume's index axes (i, j, k).

    ``axes[a]``: the index axis nearest to patient axis a (right, anterior, superior), ``signs[a]``: 1 or -1.
    ``spacing``: mm along i, j, k. ``even``: False if the frames are not evenly spaced along their normal, so that no
    other planes can be shown. ``affine``: four rows that map (i, j, k, 1) to the centre of a voxel in mm
    right-anterior-superior; None if the file does not give the position of its first voxel.
    """

    axes: tuple[int, int, int]
    signs: tuple[int, int, int]
    spacing: tuple[float, float, float]
    even: bool = True
    affine: tuple[tuple[float, float, float, float], ...] | None = None

    @classmethod
    def from_affine(cls, affine: np.ndarray, spacing: Sequence[float] | None = None, even: bool = True) -> Geometry:
        """``affine [3 or 4, 3 or 4]`` maps (i, j, k) to mm right-anterior-superior; with 3 rows it lacks the position
        of the first voxel. Raises Refused if it is singular."""
        linear = np.asarray(affine, np.float64)[:3, :3]
        lengths = np.sqrt((linear**2).sum(axis=0))
        if not np.isfinite(linear).all() or not lengths.all() or abs(np.linalg.det(linear / lengths)) < 1e-3:
            raise Refused("inconsistent", "the header's axes do not span a volume; correct its directions and spacing")
        cosines = linear / lengths
        axes = max(itertools.permutations(range(3)), key=lambda order: sum(abs(cosines[a, order[a]]) for a in range(3)))
        signs = tuple(1 if cosines[a, axes[a]] > 0 else -1 for a in range(3))
        known = [float(v) for v in (lengths if spacing is None else spacing)]
        if not all(np.isfinite(v) and v > 0 for v in known):
            known = [1.0, 1.0, 1.0]
        whole = np.asarray(affine, np.float64)
        placed = whole.shape == (4, 4) and np.isfinite(whole).all()
        rows = tuple(tuple(float(v) for v in row) for row in whole) if placed else None
        return cls(axes, signs, tuple(known), even, rows)

    def canonical(self, frames: np.ndarray) -> np.ndarray:
        """A view of [F, H, W, ...] with axes right, anterior, superior; further axes are unchanged."""
        rest = range(3, frames.ndim)
        array = frames.transpose(2, 1, 0, *rest).transpose(*self.axes, *rest)
        return array[tuple(slice(None, None, sign) for sign in self.signs)]

    def plane_spacing(self, plane: str) -> tuple[float, float]:
        right, anterior, superior = (self.spacing[axis] for axis in self.axes)
        return {
            "axial": (anterior, right),
            "coronal": (superior, right),
            "sagittal": (superior, anterior),
        }[plane]


def cut(canonical: np.ndarray, plane: str, n: int) -> np.ndarray:
    """Slice ``n`` of [right, anterior, superior, ...] in radiological orientation: the patient's right on the left,
    front or head up; sagittal with the front on the left."""
    if plane == "axial":
        return canonical[::-1, ::-1, n].swapaxes(0, 1)
    if plane == "coronal":
        return canonical[::-1, n, ::-1].swapaxes(0, 1)
    return canonical[n, ::-1, ::-1].swapaxes(0, 1)


@dataclass
class Stack:
    """One volume, series, video or picture from a reader. Its frames can be read several times.

    quantity: "HU", "SUV", "raw" (arbitrary values) or "display8" (0..255, MONOCHROME1 already inverted, RGB).
    length: number of stored frames, None if a video does not say. shape: H, W of a stored frame.
    load(wanted): (number, stored frame) for each frame number that ``wanted`` accepts, in ascending order.
    whole: [F, H, W, ...] if the reader holds all frames anyway.
    slope, intercept: numbers, or float64 [F]; value = slope * stored + intercept.
    holds(bytes): whether that many bytes may be kept in memory in addition to the work on one frame.
    inverted: "raw" values of MONOCHROME1: the normalised image is 1 - image.
    described: the file does not say what its values are, so the source's description does.
    extent: rows and columns of a frame that the image fills, if a file was read at a smaller size: the last row and
        column may be filled in part. None: all.
    sides: rows and columns of the upright picture in the file, if its frames are smaller. None: shape.
    windowed: "display8" of a picture or video for viewing: any window of its modality has been applied.
    parts: for each frame, the number of its image, if independent images were read together; the values of one say
        nothing about another's. () if all frames belong together.
    origins: for each stored frame, the name of its file and its number there, from 0; "" names the unit's only file.
        () if that is the frame's number in the stack.
    labels: of the stored frames; () to use their numbers. peek: frames for judging the stack, if its own are not as
        they were stored.
    volume: neighbouring frames are neighbours in space. note: why the quantity is only "raw".
    decision: what its header says it is, if the reader was given ``decide``. declared: another reason in the header to
        leave it out, or "". named: its header names it like a label map.
    series_number: the header's, "" if unknown.
    patient, study, series: raw identities, only for hashing; "" if unknown. Never printed.
    refused: refused parts of the unit. beat: called for every decoded frame.

    NaN is background that was masked out. It is replaced by the lowest value of the stack, and ``masked`` tells whether
    there was any. ``frames`` and ``percentiles`` may raise Refused: then use nothing of the stack.
    """

    quantity: str
    length: int | None
    shape: tuple[int, int]
    dtype: np.dtype
    load: Callable[[Callable[[int], bool]], Iterator[tuple[int, np.ndarray]]] = field(repr=False)
    holds: Callable[[int], bool] = field(repr=False)
    channels: int = 1
    slope: float | np.ndarray = 1.0
    intercept: float | np.ndarray = 0.0
    spacing: tuple[float, float] = (1.0, 1.0)
    geometry: Geometry | None = None
    parts: tuple[int, ...] = ()
    origins: tuple[tuple[str, int], ...] = field(default=(), repr=False)
    labels: tuple[str, ...] = field(default=(), repr=False)
    peek: Callable[[], Iterator[np.ndarray]] | None = field(default=None, repr=False)
    volume: bool = False
    inverted: bool = False
    described: bool = False
    windowed: bool = False
    extent: tuple[float, float] | None = None
    sides: tuple[int, int] | None = None
    burned_in: bool = False
    note: str = ""
    decision: Decision | None = None
    declared: str = ""
    named: bool = False
    patient: str = field(default="", repr=False)
    study: str = field(default="", repr=False)
    series: str = field(default="", repr=False)
    series_number: str = ""
    refused: list[Refused] = field(default_factory=list)
    whole: np.ndarray | None = field(default=None, repr=False)
    beat: Callable[[], None] = field(default=lambda: None, repr=False)
    _percentiles: dict = field(default_factory=dict, repr=False)
    _lowest: np.float32 | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.quantity not in QUANTITIES:
            raise ValueError(f"quantity: expected one of {QUANTITIES}, got {self.quantity!r}")
        if not (np.isfinite(self.slope).all() and np.isfinite(self.intercept).all() and np.all(self.slope)):
            raise Refused("inconsistent", "a rescale slope of zero, or a rescale that is not finite")

    def frames(self, planes: tuple[str, ...], stride: int) -> Iterator[Frame]:
        """Every stride-th frame of each plane, from number 0; a stack that is not a volume yields its frames once.
        "auto": axial, or the acquired plane if axial slices would be cut across thick or unevenly spaced ones."""
        planes, across = self._chosen(planes, stride)
        for plane in planes:
            if plane == "stored":
                yield from self._stored(stride)
            elif plane in across:
                yield from self._across(plane, stride)
            else:
                yield from self._along(plane, stride)

    def planned(self, planes: tuple[str, ...], stride: int) -> Iterator[Planned]:
        """The images that ``frames`` would yield of each plane, from the header alone; none if the length is
        unknown."""
        planes, across = self._chosen(planes, stride)
        for plane in planes if self.length is not None else ():
            if plane in across and self.whole is None:
                self._most(plane)
            count, shape, spacing = self.length, self.extent or self.shape, self.spacing
            if self.geometry is not None:
                spacing = (self.geometry.spacing[1], self.geometry.spacing[0])
            if plane != "stored":
                sides = (self.shape[1], self.shape[0], self.length)
                right, anterior, superior = (sides[axis] for axis in self.geometry.axes)
                rows, columns, count = {
                    "axial": (anterior, right, superior),
                    "coronal": (superior, right, anterior),
                    "sagittal": (superior, anterior, right),
                }[plane]
                shape, spacing = (rows, columns), self.geometry.plane_spacing(plane)
            yield Planned(plane, -(-count // stride), shape, spacing)

    def _chosen(self, planes: tuple[str, ...], stride: int) -> tuple[tuple[str, ...], list[str]]:
        """The planes to cut, and those of them that lie across the stored frames."""
        unknown = [plane for plane in planes if plane not in PLANES]
        if unknown or not planes:
            raise ValueError(f"planes: expected some of {PLANES}, got {list(planes)}")
        if stride < 1:
            raise ValueError(f"stride: expected at least 1, got {stride}")
        if self.geometry is not None and "auto" in planes:
            planes = tuple(dict.fromkeys(self._plane() if plane == "auto" else plane for plane in planes))
        if self.geometry is None:
            planes = ("stored",)
        elif not self.volume and planes != ("stored",):
            planes = (self._slow_plane(),)
        across = [p for p in planes if p != "stored" and self._slow_plane() != p]
        if across and not self.geometry.even:
            uneven = Refused("inconsistent", f"{' and '.join(across)}: slices are unevenly spaced")
            planes = tuple(plane for plane in planes if plane not in across)
            if not planes:
                raise uneven
            self.refused.append(uneven)
        return planes, across

    def percentiles(self, low: float, high: float, part: int = 0) -> tuple[float, float]:
        """Percentiles of all values of the stack, or of one of its parts, equal to numpy.percentile (linear). If the
        stack may not be kept, at most one frame is in memory."""
        key = (low, high, part)
        if key not in self._percentiles:
            if self.whole is None and self.length is not None and not self.parts and self.holds(self._bytes()):
                self._keep()
            self._percentiles[key] = self._count((low, high), part)
        return self._percentiles[key]

    def _plane(self) -> str:
        spacing, coarse = self.geometry.spacing, 2
        if self.geometry.even:
            coarse = max(range(3), key=lambda axis: spacing[axis])
            if spacing[coarse] <= _THICK * max(spacing[axis] for axis in range(3) if axis != coarse):
                return "axial"
        plane = next(plane for plane, axis in _NORMAL.items() if self.geometry.axes[axis] == coarse)
        if not self.volume or plane == "axial":
            return "axial"
        return "stored" if coarse == 2 else plane  # Acquired in this plane, and rotated later

    def rescale(self, slope: float, intercept: float) -> None:
        """Replace values by slope * value + intercept; the source's description says what they are."""
        if self.channels > 1:
            raise Refused("inconsistent", "slope and intercept of colours; give them only for grey images")
        self.slope, self.intercept = self.slope * slope, self.intercept * slope + intercept
        self.quantity, self.described, self.windowed = "raw", True, False

    def sample(self, numbers: Collection[int]) -> Iterator[np.ndarray]:
        """The frames with these numbers, as they are stored. A stack with a single frame keeps it in memory if it
        may."""
        if self.peek is not None:
            yield from self.peek()
            return
        if self.length == 1 and self.whole is None and self.holds(self._bytes()):
            self._keep()
        yield from (pixels for _, pixels in self._loaded(lambda number: number in numbers))

    @property
    def masked(self) -> bool:
        return self._lowest is not None

    def _slow_plane(self) -> str:
        return next(plane for plane, axis in _NORMAL.items() if self.geometry.axes[axis] == 2)

    def _stored(self, stride: int) -> Iterator[Frame]:
        spacing = self.spacing if self.geometry is None else (self.geometry.spacing[1], self.geometry.spacing[0])
        for number, pixels in self._loaded(lambda number: number % stride == 0):
            label = "image" if self.length == 1 else f"frame-{number:04d}"
            label = self.labels[number] if self.labels else label
            part = self.parts[number] if self.parts else 0
            yield Frame(label, self._numbers(pixels, *self._scale(number)), spacing, part, number)

    def _along(self, plane: str, stride: int) -> Iterator[Frame]:
        reverse = self.geometry.signs[_NORMAL[plane]] < 0

        def place(number: int) -> int:
            return self.length - 1 - number if reverse else number

        for number, pixels in self._loaded(lambda number: place(number) % stride == 0):
            numbers = self._numbers(pixels, *self._scale(number))
            image = cut(self.geometry.canonical(numbers[None]), plane, 0)
            label, spacing = f"{plane}-{place(number):03d}", self.geometry.plane_spacing(plane)
            yield Frame(label, np.ascontiguousarray(image), spacing, number=number)

    def _across(self, plane: str, stride: int) -> Iterator[Frame]:
        for begin, end in self._blocks(plane):
            yield from self._slices_of(self._block(plane, begin, end), plane, range(begin, end), stride)

    def _slices_of(self, part: np.ndarray, plane: str, numbers: range, stride: int) -> Iterator[Frame]:
        """Every stride-th slice across [F, H, W, ...], which holds the slices ``numbers``."""
        values = self.geometry.canonical(part)
        slope, intercept = (
            self.geometry.canonical(np.broadcast_to(np.reshape(v, (-1, 1, 1)), part.shape[:3]))
            for v in (self.slope, self.intercept)
        )
        for n in numbers:
            if n % stride == 0:
                image, *scale = (cut(v, plane, n - numbers.start) for v in (values, slope, intercept))
                image = np.ascontiguousarray(self._numbers(image, *scale))
                yield Frame(f"{plane}-{n:03d}", image, self.geometry.plane_spacing(plane))

    def _blocks(self, plane: str) -> Iterator[tuple[int, int]]:
        """The slices of a plane across the stored frames, in ranges that may be in memory together."""
        if self.whole is None and self.holds(self._bytes()):
            self._keep()
        count = self.shape[1 - self.geometry.axes[_NORMAL[plane]]]
        most = count if self.whole is not None else self._most(plane)
        return ((begin, min(begin + most, count)) for begin in range(0, count, most))

    def _most(self, plane: str) -> int:
        """How many slices of a plane across the stored frames may be in memory together. Raises Refused if not even
        one may."""
        count = self.shape[1 - self.geometry.axes[_NORMAL[plane]]]
        for most in range(count, 0, -1):
            if self.holds(2 * -(-self._bytes() * most // count)):  # Twice: the caller may still hold the last range
                return most
        raise Refused("too large", f"{plane} slices need at least {self._bytes() // count:,} bytes at once")

    def _block(self, plane: str, begin: int, end: int) -> np.ndarray:
        """[F, H, W, ...] of the stored frames, with only the rows or columns of slices begin .. end - 1."""
        if self.whole is not None:
            return self.whole
        axis = _NORMAL[plane]
        side = 1 - self.geometry.axes[axis]  # Of a frame: 0 rows, 1 columns
        if self.geometry.signs[axis] < 0:
            begin, end = self.shape[side] - end, self.shape[side] - begin
        part = (slice(begin, end), slice(None))[:: 1 if side == 0 else -1]
        out: np.ndarray | None = None
        for number, pixels in self._loaded(lambda number: True):
            if out is None:
                out = np.empty((self.length, *pixels[part].shape), pixels.dtype)
            out[number] = pixels[part]
        return out

    def _loaded(self, wanted: Callable[[int], bool]) -> Iterator[tuple[int, np.ndarray]]:
        if self.whole is not None:
            yield from ((number, self.whole[number]) for number in range(len(self.whole)) if wanted(number))
            return
        number = -1
        for number, pixels in self.load(wanted):
            if pixels.dtype != self.dtype or pixels.shape[:2] != self.shape:
                raise Refused("inconsistent", f"frame {number} is {pixels.shape} of {pixels.dtype}")
            self.beat()
            yield number, pixels
        if number < 0:
            raise Refused("no image", "no frame could be decoded")

    def _bytes(self) -> int:
        return self.length * self.shape[0] * self.shape[1] * self.channels * self.dtype.itemsize

    def _keep(self) -> None:
        if self.length == 1:
            self.whole = next(self._loaded(lambda number: True))[1][None]
            return
        shape = (self.length, *self.shape) + ((self.channels,) if self.channels > 1 else ())
        whole = np.empty(shape, self.dtype)
        count = 0
        for number, pixels in self._loaded(lambda number: True):
            whole[number] = pixels
            count += 1
        if count != self.length:
            raise Refused("inconsistent", f"{self.length} frames declared, {count} read")
        self.whole = whole

    def _scale(self, number: int) -> tuple[float, float]:
        return tuple(v[number] if isinstance(v, np.ndarray) else v for v in (self.slope, self.intercept))

    def _numbers(self, stored: np.ndarray, slope, intercept) -> np.ndarray:
        """The values of a frame, with NaN replaced by the lowest value of the stack."""
        if self.quantity == "display8":
            return stored
        numbers = self._rescaled(stored, slope, intercept)
        if self.dtype.kind != "f":
            return numbers
        rows = max(1, _CHUNK // max(1, stored.shape[1]))
        for top in range(0, len(numbers), rows):
            strip = slice(top, top + rows)
            finite = np.isfinite(numbers[strip])
            if finite.all():
                continue
            if numbers is stored:
                numbers = stored.copy()
            numbers[strip][np.isnan(numbers[strip])] = self._background()
            if not np.isfinite(numbers[strip]).all():
                raise Refused("not finite", "a value is infinite; replace it by a number")
        return numbers

    def _rescaled(self, stored: np.ndarray, slope, intercept) -> np.ndarray:
        plain = np.ndim(slope) == 0 and slope == 1 and intercept == 0
        if plain and stored.dtype == np.float32:
            return stored
        out = np.empty(stored.shape, np.float32)
        rows = max(1, _CHUNK // max(1, stored.shape[1]))
        with np.errstate(over="ignore", invalid="ignore"):
            for top in range(0, len(stored), rows):  # In strips: a whole frame as float64 would be its largest copy
                strip = slice(top, top + rows)
                if plain:
                    out[strip] = stored[strip]
                elif np.ndim(slope) == 0:
                    out[strip] = stored[strip] * np.float64(slope) + intercept
                else:
                    out[strip] = stored[strip] * slope[strip] + intercept[strip]
        return out

    def _background(self) -> np.float32:
        """The lowest value of the stack. Raises Refused if nearly all are NaN."""
        if self._lowest is None:
            lowest, count, total = np.float32(np.inf), 0, 0
            for number, pixels in self._loaded(lambda number: True):
                numbers = self._rescaled(pixels, *self._scale(number))
                finite = np.isfinite(numbers)
                lowest = np.float32(min(lowest, numbers.min(where=finite, initial=np.inf)))
                count, total = count + int(np.isnan(numbers).sum()), total + numbers.size
            if count > _MOST_NAN * total or not np.isfinite(lowest):
                raise Refused("not finite", f"{count} of {total} values are NaN: leave it out")
            self._lowest = lowest
        return self._lowest

    def _of_part(self, part: int) -> Callable[[int], bool]:
        return lambda number: not self.parts or self.parts[number] == part

    def _count(self, percents: tuple[float, float], part: int) -> tuple[float, float]:
        uniform = not isinstance(self.slope, np.ndarray) or (
            np.ptp(self.slope) == 0 and np.ptp(np.broadcast_to(self.intercept, self.slope.shape)) == 0
        )
        if self.dtype.kind in "iub" and self.dtype.itemsize <= 2 and uniform:
            return self._count_integers(percents, part)
        return self._count_floats(percents, part)

    def _count_integers(self, percents: tuple[float, float], part: int) -> tuple[float, float]:
        lowest = 0 if self.dtype.kind in "ub" else int(np.iinfo(self.dtype).min)
        counts = np.zeros(256**self.dtype.itemsize, np.int64)
        for _, pixels in self._loaded(self._of_part(part)):
            for chunk in _chunks(pixels):
                counts += np.bincount(chunk.astype(np.int64) - lowest, minlength=len(counts))
        slope, intercept = self._scale(0) if self.quantity != "display8" else (1.0, 0.0)
        values = (np.arange(len(counts)) + lowest) * float(slope) + float(intercept)
        if slope < 0:
            values, counts = values[::-1], counts[::-1]
        ends = np.cumsum(counts)
        return _interpolate(percents, int(ends[-1]), lambda rank: values[np.searchsorted(ends, rank, side="right")])

    def _count_floats(self, percents: tuple[float, float], part: int) -> tuple[float, float]:
        """Order statistics of float32 values by two counting passes: the high, then the low half of an ascending
        key."""

        def keys() -> Iterator[np.ndarray]:
            for number, pixels in self._loaded(self._of_part(part)):
                for chunk in _chunks(self._numbers(pixels, *self._scale(number))):
                    bits = chunk.view(np.uint32)
                    yield np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))

        high = np.zeros(2**16, np.int64)
        for key in keys():
            high += np.bincount(key >> 16, minlength=2**16)
        ends = np.cumsum(high)
        total = int(ends[-1])
        ranks = sorted({rank for percent in percents for rank in _ranks(percent, total)[:2]})
        places = {rank: int(np.searchsorted(ends, rank, side="right")) for rank in ranks}
        low = {place: np.zeros(2**16, np.int64) for place in places.values()}
        for key in keys():
            upper = key >> 16
            for place, counts in low.items():
                counts += np.bincount((key & 0xFFFF)[upper == place], minlength=2**16)
        values = {}
        for rank, place in places.items():
            before = int(ends[place] - high[place])
            key = (place << 16) | int(np.searchsorted(np.cumsum(low[place]), rank - before, side="right"))
            bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
            values[rank] = float(np.uint32(bits).view(np.float32))
        return _interpolate(percents, total, values.__getitem__)


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _CHUNK // max(1, array[0].size))
    for top in range(0, len(array), rows):
        yield array[top : top + rows].ravel()


def _ranks(percent: float, total: int) -> tuple[int, int, float]:
    place = percent / 100 * (total - 1)
    below = int(np.floor(place))
    return below, min(below + 1, total - 1), place - below


def _interpolate(percents: tuple[float, float], total: int, value: Callable[[int], float]) -> tuple[float, float]:
    def percentile(percent: float) -> float:
        below, above, share = _ranks(percent, total)
        low, high = float(value(below)), float(value(above))
        return low + (high - low) * share

    return percentile(percents[0]), percentile(percents[1])
