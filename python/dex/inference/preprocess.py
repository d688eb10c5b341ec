"""From one file of a patient, or one DICOM folder, to images as training saw them.

With a modality, files go the way of `dex prepare`: its readers, the modality's normalisation, square slices. Without
one, pictures and NPY files go the way of a plain folder of images (`dex.data.folder`): the centre square. DICOM files
that `dex prepare` leaves out by their headers (`dex.prepare.routing`) are refused.
Shape letters: n images, S side of a stored image.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dex.data import images
from dex.data.dataset import IMAGE_SIZE
from dex.data.folder import kind_of
from dex.prepare import filters, modalities, readers, routing, sources
from dex.prepare.slices import slices


class Preprocessed(NamedTuple):
    """The images of one file or series."""

    images: Tensor
    """uint8 ``[n, 3, S, S]``; `Loaded.embed` takes them."""
    labels: tuple[str, ...]
    """Which image of the file each is: ``axial-012``, ``frame-0003``, ``image``."""
    modality: str | None
    """None where a picture was taken as it is."""
    dropped: tuple[str | None, ...]
    """Why `dex prepare` would leave an image out of a corpus (``blank``, ``foreground``, ``too small``); None: kept."""


class Unit(NamedTuple):
    """What is read at once: one file (and the one beside it that holds its data), or the files of a DICOM series."""

    files: tuple[Path, ...]
    format: str


def preprocess(
    file: str | os.PathLike[str], modality: str | None = None, planes: Sequence[str] = ("auto",)
) -> Preprocessed:
    """Every image of ``file``, except the files of a DICOM folder that `dex prepare` leaves out by their headers.

    Args:
        file: a file of any format that `dex prepare` reads, or a folder with the files of a DICOM series.
        modality: a name or alias of `dex.prepare.modalities`, which decides the normalisation. None: what the first
            DICOM header says that holds an image; pictures and NPY files are then taken as a plain folder of images
            gives them; other formats do not say what they hold.
        planes: of volumes: axial, coronal, sagittal, stored.

    Raises: FileNotFoundError; ValueError naming the argument, with the reason for a file that is refused.
    """
    unit = unit_of(file)
    if modality is None:
        kind = picture_kind(unit)
        if kind is not None:
            return picture(unit.files[0], kind)
        if not readers.reader_of(unit.format).decides:
            expected = f"modality: expected one of {', '.join(modalities.NAMES)}"
            raise ValueError(f"{expected}, since a {unit.format} file does not say what it holds; got none")
    source = source_of(unit.files[0].parent, None if modality is None else modalities.resolve(modality).name, planes)
    try:
        return read(unit, source)
    except readers.Refused as error:
        if error.reason in routing.REASONS:
            expected = "file: expected DICOM images that dex prepare takes"
        else:
            expected = f"file: expected a readable {unit.format} file"
        raise ValueError(f"{expected}; {file}: {error}") from None


def unit_of(file: str | os.PathLike[str]) -> Unit:
    """What ``file`` is, by its suffix or first bytes. FileNotFoundError, ValueError."""
    expected = f"file: expected a file of the formats {', '.join(readers.formats())}, or a folder of a DICOM series"
    if not isinstance(file, str | os.PathLike) or not os.fspath(file):
        raise ValueError(f"{expected}; got {file!r}")
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
        raise ValueError(f"{expected}; got {path}")
    beside = (path.with_name(name) for name in readers.beside(path, format))
    return Unit((path, *(other for other in beside if other.is_file())), format)


def picture_kind(unit: Unit) -> str | None:
    """``png``, ``jpg``, ``picture`` or ``npy`` for a file that a plain folder of images may hold; else None."""
    return None if readers.reader_of(unit.format).decides else kind_of(unit.files[0])


def source_of(folder: Path, modality: str | None, planes: Sequence[str]) -> sources.Source:
    """How `dex prepare` would take the files of ``folder``. modality: also ``from-folders``; None: as a file says."""
    return sources.resolve(folder, modality=modality or modalities.AUTO, planes=tuple(planes))[0]


def read(unit: Unit, source: sources.Source) -> Preprocessed:
    """Every slice of the unit. `dex.prepare.readers.Refused` for a unit that gives none."""
    parts = [part.images for part in read_stacks(unit, source, unit.files[0].name)]
    return Preprocessed(
        torch.cat([part.images for part in parts]),
        tuple(label for part in parts for label in part.labels),
        parts[0].modality,
        tuple(reason for part in parts for reason in part.dropped),
    )


class StackImages(NamedTuple):
    """What one stack of a unit gives."""

    images: Preprocessed
    patient: str
    """As the header has it, "" if unknown: for hashing only."""
    refused: tuple[readers.Refused, ...]
    """Parts of the unit that were left out."""


def read_stacks(unit: Unit, source: sources.Source, path: str) -> Iterator[StackImages]:
    """The stacks of the unit, one by one, without what a header says that `dex prepare` leaves out.
    `dex.prepare.readers.Refused` as in `read`.

    path: of the unit below the source's root, for its folders may name the modality.
    """
    source = source.for_format(unit.format)
    wanted = None if source.routed else source.modality_of(path)

    def decide(head: Any, has_pixels: bool) -> routing.Decision:
        return routing.decide(routing.facts_of(head, has_pixels), wanted)

    for number, stack in enumerate(readers.read(unit.files, unit.format, decide=decide)):
        of_stack = _for_stack(source, stack, path)
        cut = list(slices(stack, of_stack, IMAGE_SIZE, 8))
        images = Preprocessed(
            torch.stack([_planes(one.image) for one in cut]),
            tuple(f"s{number:02d}-{one.label}" if number else one.label for one in cut),
            of_stack.modality,
            tuple(filters.verdict(one.image, one.share, one.small, of_stack) for one in cut),
        )
        yield StackImages(images, stack.patient, tuple(stack.refused))


def _for_stack(source: sources.Source, stack: readers.Stack, path: str) -> sources.Source:
    """The source with the modality of the stack."""
    if stack.decision is not None:
        return source.for_modality(*stack.decision[:3])
    modality = source.modality_of(path)
    if modality is not None:
        return source.for_modality(modality.name, modality.normalisation)
    raise readers.Refused("unknown modality", "nothing says of which modality it is")


def picture(file: Path, kind: str) -> Preprocessed:
    """A PNG, JPEG or NPY file as `dex.data.FolderDataset` gives it. ValueError, with the decoder's reason."""
    if file.stat().st_size > images.MAX_FILE_BYTES:
        raise ValueError(f"file: expected at most {images.MAX_FILE_BYTES} bytes; {file} has more")
    out = np.empty((3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    try:
        images.to_planes(images.decode(file.read_bytes(), kind, images.PICTURES), out)
    except ValueError as error:
        raise ValueError(f"file: expected a readable picture; {file}: {error}") from error
    return Preprocessed(torch.from_numpy(out)[None], ("image",), None, (None,))


def _planes(image: np.ndarray) -> Tensor:
    """uint8 ``[3, S, S]`` of uint8 ``[S, S]`` or ``[S, S, 3]``."""
    array = np.repeat(image[None], 3, axis=0) if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(array))


def _format(path: Path) -> str | None:
    return readers.format_of(path) or readers.recognised(path)
