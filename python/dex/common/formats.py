"""The file formats of images: suffixes, the libraries that read them, and which ones a plain folder may hold.

One table for the readers of ``dex prepare``, for plain folders (``dex.data.folder``), for ``dex doctor`` and for the
documentation. The format of a file is determined by its suffix, ignoring case.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

EXTRA = "pip install -e '.[data]'"
"""Installs all libraries of the table, in the clone."""


@dataclass(frozen=True)
class Format:
    """A file format."""

    name: str
    """Name of its reader in ``dex.prepare.readers``."""
    title: str
    """Name for display."""
    suffixes: tuple[str, ...]
    """In lower case."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Modules, and the distributions that contain them."""
    plain: tuple[str, ...] = ()
    """Suffixes of files with one image that a plain folder may hold."""
    note: str = ""
    """How files without any of the suffixes are recognised, and other remarks."""

    def missing(self) -> list[str]:
        """The distributions that are not installed."""
        absent = (package for module, package in self.needs.items() if not _installed(module))
        return list(dict.fromkeys(absent))


_PICTURES = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".j2k"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
FORMATS = (
    Format(
        "dicom",
        "DICOM",
        (".dcm", ".dicom", ".ima", ".dcm.gz"),
        {
            "pydicom": "pydicom",
            "pylibjpeg": "pylibjpeg",
            "openjpeg": "pylibjpeg-openjpeg",
            "libjpeg": "pylibjpeg-libjpeg",
            "rle": "pylibjpeg-rle",
            "nibabel": "nibabel",
        },
        note="also without a suffix, by its magic or first elements",
    ),
    Format("nifti", "NIfTI", (".nii", ".nii.gz", ".nii.bz2", ".hdr", ".hdr.gz"), {"nibabel": "nibabel"}),
    Format("mgh", "MGH", (".mgz", ".mgh")),
    Format("metaimage", "MHA, NRRD", (".mha", ".mhd", ".nrrd", ".nhdr"), {"SimpleITK": "SimpleITK"}),
    Format("picture", "picture", _PICTURES, {"PIL.Image": "pillow"}, plain=_PICTURES),
    Format("array", "NumPy", (".npy", ".npz"), plain=(".npy",)),
    Format(
        "video",
        "video",
        (".mp4", ".avi", ".mov", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg"),
        {"cv2": "opencv-python-headless"},
    ),
)


def of(name: str) -> Format:
    """The format called ``name``. KeyError: there is none."""
    return _BY_NAME[name]


def suffix_of(path: bytes | str | os.PathLike[str]) -> str:
    """The longest suffix in the table with which a file name ends; "" if there is none."""
    name = os.path.basename(os.fsdecode(path)).lower()
    return next((suffix for suffix in _longest_first() if name.endswith(suffix)), "")


def format_of(path: bytes | str | os.PathLike[str]) -> Format | None:
    """The format of a file by its suffix; None if it is unknown."""
    return _BY_SUFFIX.get(suffix_of(path))


def is_plain(path: bytes | str | os.PathLike[str]) -> bool:
    """Whether a plain folder may hold a file with this name as one image."""
    suffix = suffix_of(path)
    return bool(suffix) and suffix in _BY_SUFFIX[suffix].plain


_BY_NAME = {format.name: format for format in FORMATS}
_BY_SUFFIX = {suffix: format for format in FORMATS for suffix in format.suffixes}


@functools.cache
def _longest_first() -> tuple[str, ...]:
    return tuple(sorted(_BY_SUFFIX, key=len, reverse=True))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # Of the parent package
        return False
