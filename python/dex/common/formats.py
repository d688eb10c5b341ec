"""The file formats of images: their suffixes, the libraries that read them, and which of them a plain folder may hold.

One table, for `dex prepare` (whose readers take their suffixes and libraries from it), for plain folders
(`dex.data.folder`), `dex doctor` and the documentation. A file is known by its suffix, in any case.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

EXTRA = "pip install -e '.[data]'"
"""What brings every library of the table, in the clone."""


@dataclass(frozen=True)
class Format:
    """name: of its reader in `dex.prepare.readers`. title: as people call it. suffixes: in lower case. needs: modules
    -> the distributions that they come with. plain: the suffixes of files that a plain folder may hold, each one
    image. note: how files are known that have none of the suffixes, and what else there is to say."""

    name: str
    title: str
    suffixes: tuple[str, ...]
    needs: Mapping[str, str] = field(default_factory=dict)
    plain: tuple[str, ...] = ()
    note: str = ""

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
    """The format of that name. KeyError where there is none."""
    return _BY_NAME[name]


def suffix_of(path: bytes | str | os.PathLike[str]) -> str:
    """The table's longest suffix that a file's name ends with; "" where none does."""
    name = os.path.basename(os.fsdecode(path)).lower()
    return next((suffix for suffix in _longest_first() if name.endswith(suffix)), "")


def format_of(path: bytes | str | os.PathLike[str]) -> Format | None:
    """The format that a file's suffix names."""
    return _BY_SUFFIX.get(suffix_of(path))


def is_plain(path: bytes | str | os.PathLike[str]) -> bool:
    """Whether a plain folder may hold a file of this name, as one image."""
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
    except ModuleNotFoundError:  # the package around it
        return False
