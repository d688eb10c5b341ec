"""DICOM files to stacks: one series each, frames in spatial order, values in Hounsfield units or SUV if known.

A series is split where size, kind of pixels, orientation or localizer differ, and where positions recur (phases,
echoes, b-values), by the headers (``apart``). A mosaic is divided into its slices.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...label_maps import suspicious
from ...routing import REASONS as LEFT_OUT
from ...routing import Decision
from ..files import Limits, quiet
from ..reader import Decide
from ..stack import Geometry, Refused, Stack
from . import apart, suv
from .file import Pixels, Place, describe, digest, listed, read_header, text, without_pixels
from .file import number as number_of
from .mosaic import Mosaic, first_position, mosaic, tiles

_DOSE, _DIRECTORY = "1.2.840.10008.5.1.4.1.1.481.2", "1.2.840.10008.1.3.10"
_SEGMENTATIONS = tuple(f"1.2.840.10008.5.1.4.1.1.66.{n}" for n in (4, 5, 7))
_NO_IMAGE = {_DIRECTORY: "a directory of files", _DOSE: "a dose distribution"} | dict.fromkeys(
    _SEGMENTATIONS, "a segmentation"
)
_SAME_PLACE = 0.01  # mm along the normal
_UNEVEN = 0.1  # Share of the median distance
_TILT = math.cos(math.radians(3))
_SAME_COSINE, _SAME_SPACING = 0.01, 0.001  # Largest jitter between slices of one volume; the second is relative


class Repeated(Refused):
    """The same instance twice: the second file is left out, the series stays."""


@dataclass(slots=True)
class Slice:
    """One frame of one file: its place and the meaning of its values. ``order``: sorts frames at the same place.
    ``key_values``: from ``apart.key_values_of``. ``location``: mm along an unknown line. ``units``: of PET, if the
    frame has its own mapping, else ""."""

    pixels: Pixels
    number: int
    position: np.ndarray | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, float]
    slope: float
    intercept: float
    instance: int
    order: tuple[Any, ...]
    kind: tuple[Hashable, ...]
    quantity: str
    inverted: bool
    note: str
    tomographic: bool
    key_values: tuple[Hashable, ...] = field(repr=False, default=())
    location: float | None = None
    units: str = ""


class Group(NamedTuple):
    """Slices of one stack. volume: whether each is at its own place, parallel to the others. alone: whether the values
    of one say nothing about another's."""

    slices: list[Slice]
    volume: bool
    alone: bool


@dataclass
class Alike:
    """Files with the same identity: the first one, and digests of their pixels, computed when a second one comes."""

    path: Path
    place: Place
    digests: set[bytes] = field(default_factory=set)


@dataclass
class Series:
    decision: Decision | None = None
    patient: str = ""
    burned_in: bool = False
    named: bool = False
    slices: list[Slice] = field(default_factory=list)
    instances: dict[tuple[str, ...], Alike] = field(default_factory=dict)
    uptakes: list[suv.Uptake] = field(default_factory=list)


def read(
    files: Sequence[Path], limits: Limits, beat: Callable[[], None], decide: Decide | None = None
) -> Iterator[Stack]:
    """The stacks of one folder's files, by series identity. An unreadable file refuses its whole series, if that is
    known; objects without pixels, doses and segmentations are "no image". decide: leaves out further files, without
    refusing their series."""
    by_identity: dict[tuple[str, ...], Series] = defaultdict(Series)
    faulty: dict[tuple[str, ...], Refused] = {}
    refused: list[Refused] = []
    for path in files:
        beat()
        identity = None
        try:
            with quiet("DICOM header"):
                head, place = read_header(path, limits)
                identity = _identity(head)
                if decide is not None:
                    decision = decide(head, place is not None)
                    if decision.left_out == "no image" and place is None:
                        raise without_pixels(path, limits, decision.detail)
                    if decision.left_out:
                        raise Refused(decision.left_out, decision.detail)
                    identity = (*identity, decision.modality)
                    by_identity[identity].decision = decision
                _add(by_identity[identity], head, path, place, limits)
        except Refused as error:
            error.file = path.name
            refused.append(error)
            if identity is not None and error.reason not in LEFT_OUT and not isinstance(error, Repeated):
                faulty[identity] = error
    stacks = []
    for identity in sorted(by_identity):
        slices = by_identity[identity].slices
        if identity in faulty and slices:
            incomplete = Refused("inconsistent", f"{len(slices)} slices of a series with a refused file")
            refused.append(incomplete.about(_names(slices)))
        if identity in faulty or not slices:
            continue
        try:
            stacks.extend(_stacks(identity, by_identity[identity], limits, refused))
        except Refused as error:
            refused.append(error.about(_names(slices)))
    if not stacks:
        refused.sort(key=lambda error: error.reason in LEFT_OUT)
        refused[0].others = refused[1:]
        raise refused[0]
    stacks[0].refused.extend(refused)
    while stacks:  # Keep no reference to a yielded stack, which may hold much memory
        yield stacks.pop(0)


def series_of(path: Path, limits: Limits) -> tuple[str, ...]:
    """What the files share that ``read`` puts into one series; () for a file with an unreadable header."""
    try:
        with quiet("DICOM header"):
            return _identity(read_header(path, limits)[0])
    except Refused:
        return ()


def _names(slices: Sequence[Slice]) -> Iterator[str]:
    return (piece.pixels.path.name for piece in slices)


def _identity(head) -> tuple[str, ...]:
    # Careless anonymisers give the series of several patients the same UID, or none.
    return text(head, "SeriesInstanceUID"), text(head, "StudyInstanceUID"), _patient(head)


def _add(series: Series, head, path: Path, place: Place | None, limits: Limits) -> None:
    kind = str(head.get("SOPClassUID", ""))
    modality = str(head.get("Modality", ""))
    if kind in _NO_IMAGE or modality in ("SEG", "RTDOSE"):
        raise Refused("no image", _NO_IMAGE.get(kind, "not an image"))
    if place is None:
        raise without_pixels(path, limits)
    slabs = mosaic(head)
    # Careless anonymisers give all files the same UID, so the place in the series and then the pixels must agree too.
    instance = tuple(text(head, name) for name in ("SOPInstanceUID", "InstanceNumber", "ImagePositionPatient"))
    if instance[0]:
        alike = series.instances.setdefault(instance, Alike(path, place))
        if alike.path != path:
            _check_new(alike, path, place, limits)
    series.patient = _patient(head)
    names = (head.get("SeriesDescription"), head.get("ProtocolName"), *listed(head.get("ImageType")))
    series.named |= suspicious(" ".join(str(name) for name in names if name))
    series.burned_in |= str(head.get("BurnedInAnnotation", "")).strip().upper() == "YES"
    pixels = describe(path, head, place, limits)
    if slabs is None:
        slices = list(_slices(head, pixels, modality, path.name))
    else:
        slices = _of_mosaic(slabs, head, pixels, modality, path.name)
    if modality == "PT":
        units = {piece.units for piece in slices}
        series.uptakes.append(suv.uptake(head, units.pop() if len(units) == 1 else "several"))
    series.slices.extend(slices)


def _check_new(alike: Alike, path: Path, place: Place, limits: Limits) -> None:
    """Raise Repeated if a file with the same identity has the same pixels."""
    if not alike.digests:
        alike.digests.add(digest(alike.path, alike.place, limits))
    pixels = digest(path, place, limits)
    if pixels in alike.digests:
        raise Repeated("inconsistent", "a copy of another instance")
    alike.digests.add(pixels)


def _patient(head) -> str:
    names = "\0".join(filter(None, (text(head, "PatientName"), text(head, "PatientBirthDate"))))
    return text(head, "PatientID") or names


def _slices(head, pixels: Pixels, modality: str, name: str) -> Iterator[Slice]:
    image_type = tuple(str(v).upper() for v in listed(head.get("ImageType")))
    shared = (head.get("SharedFunctionalGroupsSequence") or [{}])[0]
    each = head.get("PerFrameFunctionalGroupsSequence") or []
    if each and len(each) != pixels.count:
        raise Refused("inconsistent", f"{pixels.count} frames, {len(each)} functional groups")
    tomogram = (head.get("DetectorInformationSequence") or [{}])[0] if "RECON TOMO" in image_type else {}
    enhanced = bool(each) or bool(shared)
    between = number_of(head.get("SpacingBetweenSlices"))
    base = (
        _integer(head.get("AcquisitionNumber")),
        _integer(head.get("TemporalPositionIdentifier")),
        _integer(_first(head.get("EchoNumbers"))),
        number_of(head.get("EchoTime")) or 0.0,
        number_of(head.get("DiffusionBValue")) or 0.0,
        number_of(head.get("TriggerTime")) or 0.0,
        _integer(head.get("InstanceNumber")),
        name,
    )
    several = pixels.options["number_of_frames"] > 1
    localizer = "LOCALIZER" in image_type or "SCOUT" in image_type
    for number in range(pixels.count):
        if each or not number:  # Otherwise all frames are like the first one
            groups = (each[number], shared) if each else (shared,)
            content = _group(groups, "FrameContentSequence")
            transform = _group(groups, "PixelValueTransformationSequence") or head
            measures = _group(groups, "PixelMeasuresSequence") or head
            plane = _group(groups, "PlanePositionSequence") or ({} if enhanced or several else head)
            turned = _group(groups, "PlaneOrientationSequence") or ({} if enhanced else head)
            if tomogram:
                plane = turned = tomogram
            first = position = _vector(plane.get("ImagePositionPatient"), 3)
            orientation = _orientation(turned.get("ImageOrientationPatient"))
            spacing = _spacing(measures, head)
            slope, intercept = _rescale(transform)
            mapped = suv.mapping(groups) if modality == "PT" and pixels.modality_lut is None else None
            units, slope, intercept = mapped or ("", slope, intercept)
            quantity, note = _quantity(pixels, modality, localizer, transform)
            times = (_integer(content.get("TemporalPositionIndex")), *map(_integer, listed(content.get("StackID"))))
            indices = tuple(_integer(v) for v in listed(content.get("DimensionIndexValues")))
            key_values = apart.key_values_of(head, groups, content)
        if tomogram and first is not None and orientation is not None and between:
            position = first + number * between * _normal(orientation)
        yield Slice(
            pixels=pixels,
            number=number,
            position=position,
            orientation=orientation,
            spacing=spacing,
            slope=1.0 if pixels.modality_lut is not None else slope,
            intercept=0.0 if pixels.modality_lut is not None else intercept,
            instance=base[6],
            order=(*base, times, indices, number),
            kind=(
                localizer,
                pixels.shape,
                pixels.dtype.str,
                pixels.colour,
                quantity,
                pixels.photometric,
                pixels.inverse,
            ),
            quantity=quantity,
            inverted=quantity == "raw" and pixels.inverse,
            note=note,
            tomographic=not localizer and (modality in ("CT", "MR", "PT") or bool(tomogram)),
            key_values=key_values,
            location=None if enhanced or several else number_of(head.get("SliceLocation")),
            units=units,
        )


def _of_mosaic(slabs: Mosaic, head, pixels: Pixels, modality: str, name: str) -> list[Slice]:
    """The slices of a mosaic, each at its own place; if the places are unknown, each file becomes its own stack."""
    if pixels.count != 1:
        raise Refused("unsupported", "several mosaics in one file; convert it, to NIfTI for instance")
    pixels.slices, pixels.beside = slabs.count, tiles(pixels.sides, slabs.count)
    step = number_of(head.get("SpacingBetweenSlices")) or number_of(head.get("SliceThickness"))
    slices = list(_slices(head, pixels, modality, name))
    for piece in slices:
        if piece.position is None or piece.orientation is None or slabs.normal is None or not step:
            piece.position, piece.kind = None, (*piece.kind, name)
            continue
        first = first_position(piece.position, piece.orientation, piece.spacing, pixels.sides, pixels.beside)
        piece.position = first + piece.number * step * slabs.normal
    return slices


def _quantity(pixels: Pixels, modality: str, localizer: bool, transform) -> tuple[str, str]:
    """The quantity of the values, and a note if it is less than the modality promises. PET becomes SUV later, when the
    whole series is known."""
    if pixels.eight:
        return "display8", ""
    if modality != "CT":
        return "raw", ""
    if localizer:
        return "raw", "a localizer's values are not Hounsfield units"
    kind = str(transform.get("RescaleType") or "HU").strip().upper()
    if pixels.modality_lut is not None or kind not in ("HU", "US") or transform.get("RescaleIntercept") is None:
        return "raw", "no rescale to Hounsfield units"
    return "HU", ""


def _stacks(identity: tuple[str, ...], series: Series, limits: Limits, refused: list[Refused]) -> list[Stack]:
    kinds: dict[tuple, list[Slice]] = defaultdict(list)
    for piece in series.slices:
        kinds[piece.kind].append(piece)
    groups = []
    for kind in sorted(kinds, key=repr):
        groups.extend(_groups(kinds[kind], refused))
    factor, note = None, ""
    if series.uptakes:
        try:
            factor = suv.factor(series.uptakes)
        except Refused as error:
            note = error.detail
    stacks = []
    for group in groups:
        try:
            stacks.append(_stack(group, series, factor, note, limits))
        except Refused as error:
            refused.append(error.about(_names(group.slices)))
    for number, stack in enumerate(stacks):
        stack.series = identity[0] if len(stacks) == 1 else f"{identity[0]}\0{number}"
        stack.study = identity[1]
    return stacks


def _groups(slices: list[Slice], refused: list[Refused]) -> list[Group]:
    """The stacks of one kind of slices: volumes first."""
    loose = [piece for piece in slices if piece.position is None or piece.orientation is None]
    placed = [piece for piece in slices if piece.position is not None and piece.orientation is not None]
    groups = []
    single: list[Slice] = []  # Slices that are not known to belong to a volume with others
    for parallel in _parallel(placed):
        normal = _upwards(parallel[0].orientation)
        along = [float(piece.position @ normal) for piece in parallel]
        for volume in _apart(parallel, along, single, refused):
            groups.append(Group(volume, volume=True, alone=False))
    known = [piece for piece in loose if piece.location is not None and piece.tomographic]
    if len(known) == len(loose):  # Headers without positions
        along = [piece.location for piece in known]
        groups.extend(Group(volume, False, False) for volume in _apart(known, along, single, refused))
    else:
        groups.extend(_without_places(loose, alone=False))
    groups.extend(_without_places(single, alone=True))
    return groups


def _apart(slices: list[Slice], along: list[float], single: list[Slice], refused: list[Refused]) -> list[list[Slice]]:
    """The volumes of slices at these positions along a line, each in order; slices of no volume are added to
    ``single``."""
    if not slices:
        return []
    places = apart.numbered(along, _SAME_PLACE)
    if len(set(places)) < 2:  # One picture, a film at one place, or a rotating camera
        single.extend(slices)
        return []
    stacks, alone, copies = apart.split(slices, places, _pixels_of)
    for piece in copies:
        copy = Repeated("inconsistent", "a copy of another image")
        copy.file = piece.pixels.path.name
        refused.append(copy)
    single.extend(alone)
    single.extend(stack[0] for stack in stacks if len(stack) == 1)
    return [stack for stack in stacks if len(stack) > 1]


def _pixels_of(piece: Slice) -> bytes:
    (frame,) = piece.pixels.frames([piece.number])
    return hashlib.sha256(np.ascontiguousarray(frame)).digest()


def _without_places(slices: list[Slice], alone: bool) -> list[Group]:
    """Groups in the order of instance numbers. alone: whether each tomographic slice stands alone."""
    groups = []
    by_spacing: dict[tuple, list[Slice]] = defaultdict(list)
    for piece in slices:
        by_spacing[piece.spacing].append(piece)
    for key in sorted(by_spacing):
        parts = [by_spacing[key]] if alone else apart.separate(by_spacing[key])
        for part in parts:
            part.sort(key=lambda piece: (piece.instance, piece.order))
            groups.append(Group(part, False, alone and part[0].tomographic))
    return groups


def _parallel(slices: list[Slice]) -> list[list[Slice]]:
    """Lists of slices with the same orientation and spacing, within the tolerances of the first slice of each list."""
    lists: list[list[Slice]] = []
    for piece in sorted(slices, key=lambda piece: (piece.orientation, piece.spacing, piece.order)):
        for other in reversed(lists):
            first = other[0]
            if piece.orientation[0] - first.orientation[0] > _SAME_COSINE:  # Sorted: earlier lists are no nearer
                lists.append([piece])
                break
            turn = max(abs(a - b) for a, b in zip(piece.orientation, first.orientation, strict=True))
            scale = max(abs(a / b - 1) for a, b in zip(piece.spacing, first.spacing, strict=True))
            if turn <= _SAME_COSINE and scale <= _SAME_SPACING:
                other.append(piece)
                break
        else:
            lists.append([piece])
    return lists


def _stack(group: Group, series: Series, factor, note: str, limits: Limits) -> Stack:
    slices, first = group.slices, group.slices[0]
    pixels = first.pixels
    quantity = first.quantity
    slope, intercept = (np.array([getattr(piece, name) for piece in slices]) for name in ("slope", "intercept"))
    if quantity == "raw" and factor is not None:
        quantity, slope, intercept = "SUV", slope * factor, intercept * factor
    if (slope == slope[0]).all() and (intercept == intercept[0]).all():
        slope, intercept = float(slope[0]), float(intercept[0])
    height, width = pixels.sides
    channels = 3 if pixels.colour else 1
    files: dict[int, int] = {}  # Identity of a file's pixels -> its number
    parts = tuple(files.setdefault(id(piece.pixels), len(files)) for piece in slices)
    several = pixels.slices or len(files) > 1
    stacked = group.volume or bool(len(slices) > 1 and first.tomographic and several)
    if group.alone and len(slices) > 1:
        parts = tuple(range(len(slices)))
    elif stacked or len(files) == 1:
        parts = ()
    return Stack(
        quantity=quantity,
        length=len(slices),
        shape=pixels.shape,
        dtype=pixels.dtype,
        load=_loader([(piece.pixels, piece.number) for piece in slices]),
        holds=lambda stored: limits.holds(stored, height, width, channels * pixels.dtype.itemsize),
        channels=channels,
        slope=slope if quantity != "display8" else 1.0,
        intercept=intercept if quantity != "display8" else 0.0,
        spacing=first.spacing,
        geometry=_geometry(slices) if group.volume else None,
        parts=parts,
        origins=tuple((piece.pixels.path.name, piece.number) for piece in slices),
        volume=stacked,
        inverted=first.inverted and quantity == "raw",
        burned_in=series.burned_in,
        decision=series.decision,
        named=series.named,
        note=first.note or (note if quantity == "raw" else ""),
        patient=series.patient,
        series_number=str(first.key_values[apart.SERIES_NUMBER]) if first.key_values else "",
    )


def _loader(places: list[tuple[Pixels, int]]) -> Callable:
    def load(wanted: Callable[[int], bool]) -> Iterator[tuple[int, np.ndarray]]:
        numbers = [number for number in range(len(places)) if wanted(number)]
        start = 0
        while start < len(numbers):  # Open each file once for its consecutive frames
            end = start
            pixels = places[numbers[start]][0]
            while end < len(numbers) and places[numbers[end]][0] is pixels:
                end += 1
            run = numbers[start:end]
            yield from zip(run, pixels.frames([places[number][1] for number in run]), strict=True)
            start = end

    return load


def _geometry(slices: list[Slice]) -> Geometry:
    orientation = np.array(slices[0].orientation)
    normal = _upwards(slices[0].orientation)
    along = np.array([piece.position @ normal for piece in slices])
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    step = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    straight = float(step @ normal) >= _TILT * float(np.linalg.norm(step))
    even = straight and bool((np.abs(gaps - usual) <= _UNEVEN * usual + _SAME_PLACE).all())
    rows, columns = slices[0].spacing
    affine = np.eye(4)
    affine[:3] = np.stack([orientation[:3] * columns, orientation[3:] * rows, step, slices[0].position], axis=1)
    affine[:2] *= -1  # DICOM's patient axes are left, posterior, superior
    directions = affine[:3, :3].copy()
    directions[:, 2] = normal * (-1, -1, 1)
    geometry = Geometry.from_affine(directions, (columns, rows, usual), even)
    return replace(geometry, affine=tuple(tuple(float(v) for v in row) for row in affine))


def _group(groups: tuple, name: str):
    for group in groups:
        items = group.get(name)
        if items:
            return items[0]
    return {}


def _rescale(source) -> tuple[float, float]:
    slope, intercept = source.get("RescaleSlope"), source.get("RescaleIntercept")
    return (1.0 if slope is None else float(slope)), (0.0 if intercept is None else float(intercept))


def _spacing(measures, head) -> tuple[float, float]:
    for source, name in (
        (measures, "PixelSpacing"),
        (head, "PixelSpacing"),
        (head, "ImagerPixelSpacing"),
        (head, "NominalScannedPixelSpacing"),
        (head, "PixelAspectRatio"),
    ):
        values = _vector(source.get(name), 2)
        if values is not None and (values > 0).all():  # 0 means an unknown pixel size
            return float(values[0]), float(values[1])
    return 1.0, 1.0


def _vector(values, count: int) -> np.ndarray | None:
    try:
        array = np.array([float(v) for v in values])
    except (TypeError, ValueError):
        return None
    return array if len(array) == count and np.isfinite(array).all() else None


def _orientation(values) -> tuple[float, ...] | None:
    """Two orthogonal unit vectors, or None."""
    array = _vector(values, 6)
    if array is None:
        return None
    row, column = array[:3], array[3:]
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if min(lengths) < 0.9 or max(lengths) > 1.1 or abs(row @ column) > 0.02:
        return None
    return tuple(float(v) for v in (*(row / lengths[0]), *(column / lengths[1])))


def _normal(orientation: tuple[float, ...]) -> np.ndarray:
    return np.cross(orientation[:3], orientation[3:])


def _upwards(orientation: tuple[float, ...]) -> np.ndarray:
    """Of the two normals, the one that points mainly right, forward or up."""
    normal = _normal(orientation)
    towards = int(np.abs(normal).argmax())
    return normal if (normal[towards] > 0) == (towards == 2) else -normal  # DICOM's axes: left, posterior, superior


def _first(value):
    return next(iter(listed(value)), None)


def _integer(value) -> int:
    number = number_of(value)
    return 0 if number is None else int(number)
