"""From one file of a patient, or one DICOM folder, to images as training saw them.

With a modality, files go the way of `dex prepare`: its readers, the modality's normalisation, square slices. Without
one, PNG, JPEG and NPY files go the way of a plain folder of images (`dex.data.folder`): the centre square. DICOM files
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
from dex.data.folder import KINDS
from dex.prepare import filters, modalities, readers, routing, sources
from dex.prepare.readers.files import quiet
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
    file: str | os.PathLike[str], modality: str | None = None, planes: Sequence[str] = ("axial",)
) -> Preprocessed:
    """Every image of ``file``, except the files of a DICOM folder that `dex prepare` leaves out by their headers.

    Args:
        file: a file of any format that `dex prepare` reads, or a folder with the files of a DICOM series.
        modality: a name or alias of `dex.prepare.modalities`, which decides the normalisation. None: what the first
            DICOM header says that holds an image; pictures (PNG, JPEG, NPY) are then taken as a plain folder of images
            gives them; other formats do not say what they hold.
        planes: of volumes: axial, coronal, sagittal, stored.

    Raises: FileNotFoundError; ValueError naming the argument, with the reason for a file that is refused.
    """
    unit = unit_of(file)
    if modality is None and unit.format != "dicom":
        kind = KINDS.get(unit.files[0].suffix.lower())
        if kind is not None:
            return picture(unit.files[0], kind)
    try:
        return read(unit, source_of(unit.files[0].parent, modality_of(unit, modality), planes))
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


def modality_of(unit: Unit, modality: str | None) -> str:
    """The modality's name in the catalogue: the given one, else that of the first DICOM file that is not left out.

    ValueError; `dex.prepare.readers.Refused`, of the first file, when all are left out or unreadable.
    """
    if modality is not None:
        return modalities.resolve(modality).name
    if unit.format != "dicom":
        raise ValueError(
            f"modality: expected one of {', '.join(modalities.NAMES)}, since a {unit.format} file does not say what it "
            "holds; got none"
        )
    from dex.prepare.readers.dicom.file import read_header  # needs pydicom

    refused: list[readers.Refused] = []
    for file in unit.files:
        try:
            with quiet("DICOM header"):
                head, place = read_header(file, readers.Limits())
        except readers.Refused as error:
            refused.append(error)
            continue
        decision = routing.decide(routing.facts_of(head, place is not None))
        if not decision.left_out:
            return decision.modality
        refused.append(readers.Refused(decision.left_out, decision.detail))
    raise refused[0]


def source_of(folder: Path, modality: str, planes: Sequence[str]) -> sources.Source:
    """How `dex prepare` would take the files of ``folder``."""
    return sources.resolve(folder, modality=modality, planes=tuple(planes))[0]


def read(unit: Unit, source: sources.Source) -> Preprocessed:
    """Every slice of the unit. `dex.prepare.readers.Refused` for a unit that gives none."""
    parts = [part.images for part in read_stacks(unit, source)]
    return Preprocessed(
        torch.cat([part.images for part in parts]),
        tuple(label for part in parts for label in part.labels),
        source.modality,
        tuple(reason for part in parts for reason in part.dropped),
    )


class StackImages(NamedTuple):
    """What one stack of a unit gives."""

    images: Preprocessed
    patient: str
    """As the header has it, "" if unknown: for hashing only."""
    refused: tuple[readers.Refused, ...]
    """Parts of the unit that were left out."""


def read_stacks(unit: Unit, source: sources.Source) -> Iterator[StackImages]:
    """The stacks of the unit, one by one, without what a header says that `dex prepare` leaves out.
    `dex.prepare.readers.Refused` as in `read`."""
    source = source.for_format(unit.format)
    wanted = modalities.resolve(source.modality, source.normalisation)

    def decide(head: Any, has_pixels: bool) -> routing.Decision:
        return routing.decide(routing.facts_of(head, has_pixels), wanted)

    for number, stack in enumerate(readers.read(unit.files, unit.format, decide=decide)):
        cut = list(slices(stack, source, IMAGE_SIZE, 8))
        images = Preprocessed(
            torch.stack([_planes(one.image) for one in cut]),
            tuple(f"s{number:02d}-{one.label}" if number else one.label for one in cut),
            source.modality,
            tuple(filters.verdict(one.image, one.share, one.small, source) for one in cut),
        )
        yield StackImages(images, stack.patient, tuple(stack.refused))


def picture(file: Path, kind: str) -> Preprocessed:
    """A PNG, JPEG or NPY file as `dex.data.FolderDataset` gives it. ValueError, with the decoder's reason."""
    if file.stat().st_size > images.MAX_FILE_BYTES:
        raise ValueError(f"file: expected at most {images.MAX_FILE_BYTES} bytes; {file} has more")
    out = np.empty((3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    try:
        images.to_planes(images.decode(file.read_bytes(), kind), out)
    except ValueError as error:
        raise ValueError(f"file: expected a readable picture; {file}: {error}") from error
    return Preprocessed(torch.from_numpy(out)[None], ("image",), None, (None,))


def _planes(image: np.ndarray) -> Tensor:
    """uint8 ``[3, S, S]`` of uint8 ``[S, S]`` or ``[S, S, 3]``."""
    array = np.repeat(image[None], 3, axis=0) if image.ndim == 2 else image.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(array))


def _format(path: Path) -> str | None:
    return readers.format_of(path) or readers.recognised(path)
