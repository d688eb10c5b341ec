"""DICOM: all files of one folder are read together, since only their headers say which of them are one series.

`series` puts the files in order, `file` reads the header and decodes the frames of one of them (`codestream`: the sizes
that compressed ones declare), `mosaic` takes Siemens mosaics apart, `suv` has the uptake of PET.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..files import Limits, has_magic
from ..reader import Beat, Decide, Reader
from ..stack import Stack


def load() -> None:
    from . import series  # noqa: F401


def read(files: Sequence[Path], limits: Limits, beat: Beat, decide: Decide | None) -> Iterator[Stack]:
    from . import series

    return series.read(files, limits, beat, decide)


def series_of(path: Path, limits: Limits) -> tuple[str, ...]:
    from . import series

    return series.series_of(path, limits)


READER = Reader(
    suffixes=(".dcm", ".dicom", ".ima", ".dcm.gz"),
    read=read,
    needs={
        "pydicom": "pydicom",
        "pylibjpeg": "pylibjpeg",
        "openjpeg": "pylibjpeg-openjpeg",
        "libjpeg": "pylibjpeg-libjpeg",
        "rle": "pylibjpeg-rle",
        "nibabel": "nibabel",
    },
    load=load,
    recognises=has_magic,  # files are often called after their UID
    whole_folders=True,
    series_of=series_of,
    choices=("decide",),
    passed_over={"DICOMDIR": "directories of DICOM files"},
)
