"""Reads masks from DICOM segmentations: frames with one segment each, positioned in the patient.

Shape letters: F frames, R rows and C columns as the image's series stores them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dex.common import faults
from dex.prepare import readers
from dex.prepare.readers.dicom.file import read_header
from dex.prepare.readers.files import quiet
from dex.tasks.patterns import is_dicom
from dex.tasks.task import BACKGROUND, IGNORE, IGNORED, Task

_KINDS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_OFF = 0.1
"""Tolerated distance of a frame from a slice, and of a direction over the whole frame, in voxels."""
_EXPECTED = "mask: expected a DICOM segmentation of the series of its image"


def read(target: Path, task: Task, stack: readers.Stack, image: Path) -> np.ndarray:
    """uint8 ``[F, R, C]``: 0 background, i + 1 class i, 255 ignored; where segments overlap, the later class counts.

    target: the file, or a folder that contains only this file. ValueError naming the file.
    """
    file = _file(target)
    data = _dataset(file)
    if stack.geometry is None or stack.geometry.affine is None:
        raise ValueError(f"{_EXPECTED}; {image} does not state its position in the patient")
    to_image = np.linalg.inv(np.array(stack.geometry.affine, np.float64))
    numbers = _segments(data, task, file)
    out = np.zeros((stack.length, *stack.shape), np.uint8)
    try:
        with quiet("DICOM segmentation"):
            frames = np.asarray(data.pixel_array)
    except Exception as error:  # From the library and its decoders
        raise ValueError(f"{_EXPECTED}; {file}: {faults.sentence(error)}") from None
    frames = frames[None] if frames.ndim == 2 else frames
    if frames.shape[1:] != stack.shape:
        raise ValueError(
            f"mask: expected the size of its image, {stack.shape[0]} x {stack.shape[1]}, got {frames.shape[1]} x "
            f"{frames.shape[2]} in {file}, whose image is {image}"
        )
    half = float(data.get("MaximumFractionalValue", 1)) / 2
    groups = data.PerFrameFunctionalGroupsSequence
    if len(groups) != len(frames):
        raise ValueError(f"{_EXPECTED}; {file} has {len(frames)} frames and {len(groups)} functional groups")
    shared = data.SharedFunctionalGroupsSequence[0] if data.get("SharedFunctionalGroupsSequence") else {}
    entries = []
    for group, pixels in zip(groups, frames, strict=True):
        number = numbers[int(_item(group, shared, "SegmentIdentificationSequence").ReferencedSegmentNumber)]
        entries.append((number, _slice(group, shared, stack, to_image, file), pixels))
    for number, place, pixels in sorted(entries, key=lambda entry: entry[0]):
        if number:
            out[place][pixels > half if data.SegmentationType == "FRACTIONAL" else pixels > 0] = number
    return out


def _file(target: Path) -> Path:
    if not target.is_dir():
        return target
    files = [path for path in sorted(target.iterdir()) if is_dicom(path)]
    if len(files) != 1:
        raise ValueError(f"{_EXPECTED}, in one file; {target} holds {len(files)} DICOM files")
    return files[0]


def _dataset(file: Path) -> Any:
    """The segmentation, after a check of its declared size."""
    import pydicom

    limits = readers.Limits()
    try:
        with quiet("DICOM header"):
            head, place = read_header(file, limits)
    except readers.Refused as error:
        raise ValueError(f"{_EXPECTED}; {file}: {error}") from None
    if str(head.get("SOPClassUID", "")) not in _KINDS or place is None:
        raise ValueError(f"{_EXPECTED}; {file} is not a segmentation, but {head.get('Modality', 'of no modality')}")
    size = int(head.get("NumberOfFrames") or 1) * int(head.get("Rows") or 0) * int(head.get("Columns") or 0)
    if size > limits.memory * 2:
        raise ValueError(f"{_EXPECTED}, with at most {limits.memory * 2:,} pixels in all, got {size:,} in {file}")
    try:
        data = pydicom.dcmread(file)
        for name in ("SegmentSequence", "PerFrameFunctionalGroupsSequence", "SegmentationType"):
            if not data.get(name):
                raise ValueError(name)
    except Exception as error:
        if isinstance(error, ValueError) and str(error) in ("SegmentSequence", "PerFrameFunctionalGroupsSequence"):
            raise ValueError(f"{_EXPECTED}; {file} lacks {error}") from None
        raise ValueError(f"{_EXPECTED}; {file}: {faults.sentence(error)}") from None
    return data


def _segments(data: Any, task: Task, file: Path) -> dict[int, int]:
    """Segment number -> class number, by the segment's label or number in the task's values, else by the class named
    like its label, else by its number."""
    numbers = {name.lower(): i for i, name in enumerate(task.classes, 1)} | {BACKGROUND: 0, IGNORE: IGNORED}
    values = {value.lower(): numbers[name.lower()] for value, name in task.layout.values}
    segments: dict[int, int] = {}
    unknown = []
    for segment in data.SegmentSequence:
        number, label = int(segment.SegmentNumber), str(segment.get("SegmentLabel", "")).strip().lower()
        meaning = values.get(label, values.get(str(number), numbers.get(label)))
        if meaning is None and not values and number <= len(task.classes):
            meaning = number
        if meaning is None:
            unknown.append(f"{number} {label!r}")
        else:
            segments[number] = meaning
    if unknown:
        raise ValueError(
            f"masks: expected segments of {', '.join(task.classes)}, got {', '.join(unknown[:6])} "
            f"({len(unknown)} of {len(data.SegmentSequence)} segments) in {file}; --classes NAME=VALUE ..., with the "
            "label or number of a segment as VALUE, gives its meaning"
        )
    return segments


def _item(group: Any, shared: Any, name: str) -> Any:
    for place in (group, shared):
        if place.get(name):
            return place.get(name)[0]
    return {}


def _slice(group: Any, shared: Any, stack: readers.Stack, to_image: np.ndarray, file: Path) -> int:
    """The number of the image's stored frame on which a frame of the segmentation lies."""
    position = _item(group, shared, "PlanePositionSequence").get("ImagePositionPatient")
    orientation = _item(group, shared, "PlaneOrientationSequence").get("ImageOrientationPatient")
    spacing = _item(group, shared, "PixelMeasuresSequence").get("PixelSpacing")
    if position is None or orientation is None or spacing is None:
        raise ValueError(f"{_EXPECTED}; {file} has a frame without position, orientation or spacing")
    flip = np.array([-1.0, -1.0, 1.0])  # Left, posterior, superior to right, anterior, superior
    origin = np.array(position, np.float64) * flip
    along_columns = np.array(orientation[:3], np.float64) * flip * float(spacing[1])
    along_rows = np.array(orientation[3:], np.float64) * flip * float(spacing[0])
    rows, columns = stack.shape
    place = to_image[:3, :3] @ origin + to_image[:3, 3]
    steps = to_image[:3, :3] @ np.stack([along_columns, along_rows], axis=1)
    number = round(float(place[2]))
    off_direction = np.abs((steps - np.eye(3)[:, :2]) * np.array([columns, rows])).max()
    off_position = np.abs(place - np.array([0.0, 0.0, number])).max()
    if off_direction > _OFF * 2 or off_position > _OFF or not 0 <= number < stack.length:
        where = ", ".join(f"{value:g}" for value in position)
        raise ValueError(
            f"mask: expected frames on the slices of its image, got one at ({where}) mm in {file} that lies on none of "
            f"the {stack.length}"
        )
    return number
