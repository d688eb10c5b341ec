"""Turns one file of a patient, or one DICOM folder, into images as used in training.

With a modality, files are processed as by ``dex prepare``: its readers, the modality's normalisation, square slices.
Without one, pictures and NPY files are processed as a plain folder of images is (``dex.data.folder``): the centre
square. DICOM files that ``dex prepare`` leaves out by their headers (``dex.prepare.routing``) are refused.
Shape letters: n images, S side of a stored image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dex.data import images
from dex.data.dataset import IMAGE_SIZE
from dex.data.folder import kind_of
from dex.prepare import filters, modalities, readers, routing, sources
from dex.prepare.no_images import not_an_image
from dex.prepare.readers.files import opened
from dex.prepare.reading import Reading
from dex.prepare.slices import slices


class Preprocessed(NamedTuple):
    """The images of one file or series."""

    images: Tensor
    """uint8 ``[n, 3, S, S]``; ``Loaded.embed`` takes them."""
    labels: tuple[str, ...]
    """The place of each image in the file: ``axial-012``, ``frame-0003``, ``image``."""
    modality: str | None
    """None for a picture that was taken as it is."""
    dropped: tuple[str | None, ...]
    """Why ``dex prepare`` would leave an image out of a corpus: ``blank``, ``foreground``, ``too small``, or, for all
    images of a stack, ``label map``, ``probability map``, ``burned-in``. None: it would keep the image."""


class Unit(NamedTuple):
    """The files read at once: one file (and the one beside it with its data), or those of a DICOM series."""

    files: tuple[Path, ...]
    format: str


def preprocess(
    file: str | os.PathLike[str], modality: str | None = None, planes: Sequence[str] = ("auto",), **overrides: Any
) -> Preprocessed:
    """Every image of ``file``, except the files of a DICOM folder that ``dex prepare`` leaves out by their headers.

    Args:
        file: a file of any format that ``dex prepare`` reads, or a folder with the files of a DICOM series.
        modality: a name or alias of ``dex.prepare.modalities``, which sets the normalisation. None: that of the first
            DICOM header with an image; pictures and NPY files are taken as a plain folder of images gives them; other
            formats need a modality.
        planes: of volumes: axial, coronal, sagittal, stored.
        overrides: other settings with which the training set was prepared: ``normalisation``, ``volumes``, ``slope``
            and ``intercept``, ``frame_stride`` (``dex.prepare.sources.Source``).

    Raises: FileNotFoundError; ValueError naming the argument, with the reason if the file is refused.
    """
    unit = unit_of(file)
    if modality is None:
        kind = None if overrides else picture_kind(unit)
        if kind is not None:
            return picture(unit.files[0], kind)
        if not readers.reader_of(unit.format).decides:
            expected = f"modality: expected one of {', '.join(modalities.NAMES)}"
            raise ValueError(f"{expected}, since a {unit.format} file does not say what it holds, got none")
    known = None if modality is None else modalities.resolve(modality).name
    source = source_of(unit.files[0].parent, known, planes, **overrides)
    try:
        return read(unit, source)
    except readers.Refused as error:
        if error.reason in routing.REASONS:
            expected = "file: expected DICOM images that dex prepare takes"
        else:
            expected = f"file: expected a readable {unit.format} file"
        raise ValueError(f"{expected}; {file}: {error}") from None


def unit_of(file: str | os.PathLike[str]) -> Unit:
    """The files and the format of ``file``, by its suffix or first bytes. FileNotFoundError, ValueError."""
    expected = f"file: expected a file of the formats {', '.join(readers.formats())}, or a folder of a DICOM series"
    if not isinstance(file, str | os.PathLike) or not os.fspath(file):
        raise ValueError(f"{expected}, got {file!r}")
    path = Path(file)
    if not path.exists():
        raise FileNotFoundError(f"{expected}; nothing at {path}")
    if path.is_dir():
        files = tuple(sorted(p for p in path.iterdir() if p.is_file() and _format(p) == "dicom"))
        if not files:
            raise ValueError(f"{expected}; {path} holds no DICOM file. `dex embed` takes folders of other files")
        return Unit(files, "dicom")
    format = _format(path)
    if format is None:
        raise ValueError(f"{expected}, got {path}")
    beside = (path.with_name(name) for name in readers.beside(path, format))
    return Unit((path, *(other for other in beside if other.is_file())), format)


def picture_kind(unit: Unit) -> str | None:
    """``png``, ``jpg``, ``picture`` or ``npy`` for a file that a plain folder of images may hold; else None."""
    return None if readers.reader_of(unit.format).decides else kind_of(unit.files[0])


def source_of(folder: Path, modality: str | None, planes: Sequence[str], **overrides: Any) -> sources.Source:
    """The settings of ``dex prepare`` for ``folder``. modality: also ``from-folders``; None: as the headers say."""
    return sources.resolve(folder, modality=modality or modalities.AUTO, planes=tuple(planes), **overrides)[0]


def read(unit: Unit, source: sources.Source) -> Preprocessed:
    """Every slice of the unit. ``dex.prepare.readers.Refused`` if there is none."""
    parts = list(read_stacks(unit, source, unit.files[0].name))
    return Preprocessed(
        torch.cat([torch.from_numpy(part.images).expand(-1, 3, -1, -1) for part in parts]),
        tuple(label for part in parts for label in part.labels),
        parts[0].modality,
        tuple(reason for part in parts for reason in part.dropped),
    )


class StackImages(NamedTuple):
    """The images of one stack of a unit, or of a picture; labels, modality and dropped as in ``Preprocessed``."""

    images: np.ndarray
    """uint8 ``[n, C, S, S]``, C = 1 if all images are grey, else 3."""
    labels: tuple[str, ...]
    modality: str | None
    dropped: tuple[str | None, ...]
    patient: str
    """From the header, "" if unknown; for hashing only."""
    files: tuple[str, ...]
    """The file name of each image, in a unit of several files; "" for an image that is not from a single file."""
    refused: tuple[readers.Refused, ...]
    """Parts of the unit that were left out."""


def read_stacks(
    unit: Unit, source: sources.Source, path: str, beat: Callable[[], None] = lambda: None
) -> Iterator[StackImages]:
    """The stacks of the unit, one by one, without files that ``dex prepare`` leaves out by their headers.
    ``dex.prepare.readers.Refused`` as in ``read``.

    path: of the unit below the source's root; its folders may name the modality. beat: called for every frame and
    slice, as a sign of life.
    """
    reading = Reading(source.for_format(unit.format), path)
    for number, stack in enumerate(reading.stacks(unit.files, unit.format, size=IMAGE_SIZE, beat=beat)):
        of_stack = reading.for_stack(stack)
        if of_stack.routed:
            raise readers.Refused("unknown modality", "nothing states its modality")
        refused = None if source.trusted else not_an_image(stack, unit.format, path, of_stack.modality)
        stack_dropped = "burned-in" if stack.burned_in else refused and refused.reason
        reading.rescale(stack, unit.format)
        images, labels, dropped, files = [], [], [], []
        for cut in slices(stack, of_stack, IMAGE_SIZE, 8):
            beat()
            images.append(cut.image)
            labels.append(f"s{number:02d}-{cut.label}" if number else cut.label)
            dropped.append(stack_dropped or filters.verdict(cut.image, cut.share, cut.small, of_stack))
            files.append(stack.origins[cut.number][0] if stack.origins and cut.number is not None else "")
        yield StackImages(
            _planes(images),
            tuple(labels),
            of_stack.modality,
            tuple(dropped),
            stack.patient,
            tuple(files),
            tuple(stack.refused),
        )


class Opened(NamedTuple):
    """The only stack of a unit, and its settings of normalisation and slicing."""

    stack: readers.Stack
    source: sources.Source


def opened_whole(
    file: str | os.PathLike[str],
    modality: str | None = None,
    planes: Sequence[str] = ("auto",),
    *,
    headers: bool = False,
    series: str | None = None,
    beat: Callable[[], None] = lambda: None,
) -> Opened:
    """The only stack of a picture, a volume or a DICOM series, to be sliced at its own size (``dex.prepare.slices``):
    normalised and oriented as by ``preprocess``, but not resized, and with nothing left out.

    modality: as for ``preprocess``; without one, pictures are taken as they are. headers: read no pixels. series: of a
    DICOM folder with several: the ``key`` of one of ``series_in``, its Series Number or its Series Instance UID.
    Raises: FileNotFoundError; ValueError naming a file that cannot be read or holds several series.
    """
    unit, reading = _reading(file, modality, planes)
    try:
        stacks = list(reading.stacks(unit.files, unit.format, size=None, beat=beat, headers=headers))
        stack = _chosen(stacks, series) if series else stacks[0]
        if len(stacks) > 1 and not series:
            raise readers.Refused("inconsistent", f"{_listed(stacks)}; each needs a folder of its own")
        of_stack = reading.for_stack(stack)
        if of_stack.routed:
            raise readers.Refused("unknown modality", "nothing states its modality")
    except readers.Refused as error:
        raise ValueError(f"file: expected one readable {unit.format} image or series; {file}: {error}") from None
    return Opened(stack, of_stack)


class Series(NamedTuple):
    """One of the series or volumes in a DICOM folder or file."""

    key: str
    """Distinguishes it from the others; contains identities from the header, and is never printed."""
    number: str
    """Series Number, "" if unknown."""
    uid: str
    """Series Instance UID, "" if unknown; never printed."""

    def answers(self, name: str) -> bool:
        """Whether ``name`` is its key, Series Number or Series Instance UID."""
        return bool(name) and name in self


def series_in(
    file: str | os.PathLike[str], modality: str | None = None, planes: Sequence[str] = ("auto",)
) -> tuple[Series, ...]:
    """The series that ``opened_whole`` can open in a DICOM folder or file, from the headers; () for other formats.

    Raises: FileNotFoundError; ValueError naming a file that cannot be read.
    """
    unit, reading = _reading(file, modality, planes)
    if not readers.reader_of(unit.format).decides:
        return ()
    try:
        stacks = reading.stacks(unit.files, unit.format, size=None, headers=True)
        return tuple(_series_of(stack) for stack in stacks)
    except readers.Refused as error:
        raise ValueError(f"file: expected readable DICOM files; {file}: {error}") from None


def _series_of(stack: readers.Stack) -> Series:
    key = "\0".join((stack.series, stack.study, stack.patient))
    return Series(key, stack.series_number, stack.series.partition("\0")[0])


def _chosen(stacks: Sequence[readers.Stack], series: str) -> readers.Stack:
    matching = [stack for stack in stacks if _series_of(stack).answers(series)]
    if len(matching) != 1:
        raise readers.Refused("inconsistent", f"{_listed(stacks)}; {len(matching)} of them match the requested series")
    return matching[0]


def _listed(stacks: Sequence[readers.Stack]) -> str:
    numbers = ", ".join(f"{stack.series_number or '?'} ({stack.length} images)" for stack in stacks)
    return f"it holds {len(stacks)} series or volumes, by Series Number {numbers}"


def _reading(file: str | os.PathLike[str], modality: str | None, planes: Sequence[str]) -> tuple[Unit, Reading]:
    """The files of ``file``, and the settings of their normalisation and slicing."""
    unit = unit_of(file)
    overrides: dict[str, Any] = {}
    if modality is None and picture_kind(unit) is not None:
        modality, overrides = "picture", {"normalisation": "display"}
    elif modality is None and not readers.reader_of(unit.format).decides:
        expected = f"modality: expected one of {', '.join(modalities.NAMES)}"
        raise ValueError(f"{expected}, since a {unit.format} file does not say what it holds, got none for {file}")
    elif modality is not None:
        modality = modalities.resolve(modality).name
    source = source_of(unit.files[0].parent, modality, planes, **overrides).for_format(unit.format)
    return unit, Reading(source, unit.files[0].name)


def picture(file: Path, kind: str) -> Preprocessed:
    """A PNG, JPEG or NPY file as ``dex.data.FolderDataset`` gives it. ValueError with the decoder's reason."""
    try:
        planes = picture_planes(file, kind)
    except readers.Refused as error:
        raise ValueError(f"file: expected a readable picture; {file}: {error.detail}") from None
    return Preprocessed(torch.from_numpy(planes)[None], ("image",), None, (None,))


def picture_planes(file: Path, kind: str) -> np.ndarray:
    """uint8 ``[3, S, S]`` of a PNG, JPEG or NPY file. ``dex.prepare.readers.Refused`` with the decoder's reason."""
    out = np.empty((3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    with opened(file) as stream:
        if stream.size > images.MAX_FILE_BYTES:
            raise readers.Refused("too large", f"{stream.size} bytes, at most {images.MAX_FILE_BYTES}")
        data = stream.read()
    try:
        images.to_planes(images.decode(data, kind, images.PICTURES), out)
    except ValueError as error:
        raise readers.Refused("unreadable", str(error)) from error
    return out


def _planes(images: list[np.ndarray]) -> np.ndarray:
    """uint8 ``[n, C, S, S]`` from n images, uint8 ``[S, S]`` or ``[S, S, 3]``; C = 1 if all are grey, else 3."""
    channels = 3 if any(image.ndim == 3 for image in images) else 1
    out = np.empty((len(images), channels, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for target, image in zip(out, images, strict=True):
        target[:] = image if image.ndim == 2 else image.transpose(2, 0, 1)
    return out


def _format(path: Path) -> str | None:
    return readers.format_of(path) or readers.recognised(path)
