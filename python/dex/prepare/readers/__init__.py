"""Readers of medical image files: one unit (a file with the one that holds its data, or a folder's DICOM files) in, its
stacks out.

Files are opened as regular files only, declared sizes are checked before anything is allocated, nothing is unpickled,
and no text of a library, which could hold a header's, leaves a reader.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .files import Limits, has_magic, opened
from .layout import images_of, layout
from .stack import PLANES, REASONS, Frame, Geometry, Refused, Stack

FORMATS = ("dicom", "nifti", "metaimage", "picture", "array", "video")

_SUFFIXES = {
    "dicom": (".dcm", ".dicom", ".ima"),
    "nifti": (".nii", ".nii.gz", ".hdr", ".hdr.gz"),
    "metaimage": (".mha", ".mhd", ".nrrd", ".nhdr"),
    "picture": (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"),
    "array": (".npy", ".npz"),
    "video": (".mp4", ".avi", ".mov", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg"),
}
_NEEDS = {
    "dicom": ("pydicom", "pylibjpeg", "openjpeg", "libjpeg", "rle", "nibabel"),
    "nifti": ("nibabel",),
    "metaimage": ("SimpleITK",),
    "picture": ("PIL.Image",),
    "array": (),
    "video": ("cv2",),
}
_BEAT = ("dicom", "nifti", "metaimage")
_CALLED = {"PIL.Image": "Pillow", "cv2": "opencv-python-headless"}


def format_of(path: bytes | str | os.PathLike) -> str | None:
    """The format that a file's suffix names, in any case; None for another or no suffix. Nothing is read: whether a
    file without suffix is DICOM, `is_dicom` says."""
    name = os.path.basename(os.fsdecode(path)).lower()
    return next((format for format, suffixes in _SUFFIXES.items() if name.endswith(suffixes)), None)


def is_dicom(path: Path) -> bool:
    """Whether a regular file has the magic of DICOM at byte 128."""
    try:
        with opened(path) as file:
            return has_magic(file)
    except (Refused, OSError):
        return False


def beside(path: Path, format: str) -> list[str]:
    """What the file beside it that holds its data may be called, by its name or header; nothing where it has them
    itself, or says so in a way that is refused."""
    if format == "nifti":
        return images_of(path.name)
    if format != "metaimage":
        return []
    try:
        with opened(path) as file:
            name = layout(file).name
    except (Refused, OSError):
        return []
    return [name] if name not in ("", path.name) else []


def series_of(path: Path, limits: Limits) -> str:
    """A name for what `read` puts a DICOM file together with, by its header; "" where that cannot be read."""
    load("dicom")
    found = importlib.import_module(".dicom", __name__).series_of(path, limits)
    return hashlib.sha256("\0".join(found).encode("utf-8", "surrogatepass")).hexdigest()[:16] if found else ""


def load(format: str) -> None:
    """Import what reading a format takes, so that a limit on the process's memory can be set afterwards.
    Refused("unsupported") names a library that is not installed."""
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {FORMATS}, got {format!r}")
    for module in _NEEDS[format]:
        try:
            importlib.import_module(module)
        except ImportError as error:
            if error.name != module.partition(".")[0]:
                raise
            raise Refused("unsupported", f"{_CALLED.get(module, module)} is not installed (extra 'data')") from None
    importlib.import_module(f".{format}", __name__)


def read(
    files: Sequence[Path],
    format: str,
    *,
    limits: Limits = Limits(),  # noqa: B008
    beat: Callable[[], None] | None = None,
) -> Iterator[Stack]:
    """The stacks of one unit, in a fixed order: a folder's DICOM files, or one file of another format and, after it,
    the one that `beside` names.

    Refused is raised for a unit that gives nothing; a part that was left out stands in a stack's `refused`. `beat` is
    called for every DICOM file whose header was read, for every frame that was decoded and while volumes are read.
    """
    load(format)
    reader = importlib.import_module(f".{format}", __name__)
    if not files:
        raise ValueError("files: expected at least one")
    beat = beat or (lambda: None)
    paths = [Path(os.fsdecode(path)) for path in files]
    for stack in reader.read(paths, limits, beat) if format in _BEAT else reader.read(paths, limits):
        stack.beat = beat
        yield stack
        del stack


__all__ = [
    "FORMATS",
    "PLANES",
    "REASONS",
    "Frame",
    "Geometry",
    "Limits",
    "Refused",
    "Stack",
    "beside",
    "format_of",
    "is_dicom",
    "load",
    "read",
    "series_of",
]
