"""Pictures whose few bytes would make a decoder work long: known before any pixel is decoded."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MAX_SCANS = 100  # of a JPEG: no encoder writes more
MAX_STRIPS = 2**16  # of a TIFF, or tiles
MAX_RUNS = 2**22  # bytes of a BMP with run lengths, or of numbers written as text: Pillow goes through them in Python
SCANS = f"more than {MAX_SCANS} scans in one JPEG, which no camera or program writes; leave it out"
_STRIPS, _TILE_WIDTH, _TILE_LENGTH, _TILES = 273, 322, 323, 324
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")  # within a scan's data: what is no stuffing and no restart


def has_too_many_scans(data: bytes) -> bool:
    """Whether a JPEG has more scans than any encoder writes: of a few bytes each, through the whole image."""
    place, scans = 2, 0
    while match := _MARKER.search(data, place):
        marker, place = data[match.end() - 1], match.end()
        if 0xC0 <= marker <= 0xFE and marker not in (0xD8, 0xD9):
            place += int.from_bytes(data[place : place + 2], "big")
        scans += marker == 0xDA
        if scans > MAX_SCANS:
            return True
    return False


def too_much(image: Image.Image, size: int, read: Callable[[], bytes]) -> str:
    """Why an opened picture is not decoded; "" where it may be. size: its file's bytes; read: gives them all."""
    packing = image.tile[0][0] if image.tile else "raw"
    if image.format == "BMP" and packing == "bmp_rle" and size > MAX_RUNS:
        return f"{size:,} bytes of run lengths, at most {MAX_RUNS:,}; save it as PNG"
    if image.format == "PPM" and packing != "raw" and size > MAX_RUNS:
        return f"{size:,} bytes of numbers that are not stored as they are, at most {MAX_RUNS:,}; save it as PNG"
    if image.format in ("JPEG", "MPO") and has_too_many_scans(read()):
        return SCANS
    return ""


def too_much_of_tiff(image: Image.Image, pixels: int) -> str:
    """The same of a TIFF's current page, whose tiles may have `pixels` at most."""
    width, length = (int(image.tag_v2.get(tag, 0)) for tag in (_TILE_WIDTH, _TILE_LENGTH))
    if width * length > pixels:
        return f"tiles of {width} x {length} pixels, at most {pixels:,}; save it with smaller ones"
    if any(len(image.tag_v2.get(tag, ())) > MAX_STRIPS for tag in (_STRIPS, _TILES)):
        return f"more than {MAX_STRIPS:,} strips or tiles; save it with fewer"
    return ""
