"""DICOM: all files of one folder are read together, because only their headers say which of them form a series.

``series`` puts the files in order; ``file`` reads the header and decodes the frames of one file (``codestream``: the
sizes that compressed frames declare); ``mosaic`` divides Siemens mosaics; ``suv`` computes the uptake of PET.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from dex.common import formats

from ..files import BoundedFile, Limits, has_magic
from ..reader import Beat, Decide, Reader
from ..stack import Stack

_FIRST_GROUPS = (0x0002, 0x0008)
_REPRESENTATIONS = (b"AE", b"CS", b"DA", b"LO", b"SH", b"TM", b"UI", b"UL")
_LONGEST = 256  # Bytes of one of the first elements


def recognises(file: BoundedFile) -> bool:
    """By the magic of DICOM or, without a preamble, by two elements in order at the start of the file."""
    if has_magic(file):
        return True
    file.seek(0)
    data = file.read(2 * (8 + _LONGEST))
    return any(_begins(data, order, explicit) for order in "<>" for explicit in (True, False))


def _begins(data: bytes, order: str, explicit: bool) -> bool:
    place, before = 0, (0, 0)
    for number in range(2):
        if len(data) < place + 8:
            return False
        tag = struct.unpack_from(f"{order}HH", data, place)
        head = 8
        if explicit and data[place + 4 : place + 8] == b"OB\0\0" and len(data) >= place + 12:
            head, sound = 12, True
            length = struct.unpack_from(f"{order}L", data, place + 8)[0]
        elif explicit:
            length = struct.unpack_from(f"{order}H", data, place + 6)[0]
            sound = data[place + 4 : place + 6] in _REPRESENTATIONS
        else:
            length = struct.unpack_from(f"{order}L", data, place + 4)[0]
            sound = order == "<"
        if (
            not sound
            or length > _LONGEST
            or length % 2
            or tag <= before
            or (tag[0] not in _FIRST_GROUPS and not number)
        ):
            return False
        place, before = place + head + length, tag
    return before[0] <= 0x0010


def load() -> None:
    from . import series  # noqa: F401


def read(files: Sequence[Path], limits: Limits, beat: Beat, decide: Decide | None) -> Iterator[Stack]:
    from . import series

    return series.read(files, limits, beat, decide)


def series_of(path: Path, limits: Limits) -> tuple[str, ...]:
    from . import series

    return series.series_of(path, limits)


READER = Reader(
    suffixes=formats.of("dicom").suffixes,
    read=read,
    needs=formats.of("dicom").needs,
    load=load,
    recognises=recognises,  # Files are often named after their UID
    whole_folders=True,
    series_of=series_of,
    choices=("decide",),
    passed_over={"DICOMDIR": "DICOMDIR files"},
)
