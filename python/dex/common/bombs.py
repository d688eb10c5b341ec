"""Detection of small pictures that would take a decoder very long, before any pixel is decoded."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MAX_SCANS = 100  # In a JPEG; no encoder writes more
MAX_STRIPS = 2**16  # Strips or tiles in a TIFF
MAX_RUNS = 2**22  # Bytes of a BMP with run lengths or of a PPM that is not raw, which Pillow decodes in Python
SCANS = f"more than {MAX_SCANS} scans in one JPEG, which no camera or program writes; leave it out"
_STRIPS, _TILE_WIDTH, _TILE_LENGTH, _TILES = 273, 322, 323, 324
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")  # In scan data: neither byte stuffing nor a restart marker


def has_too_many_scans(data: bytes) -> bool:
    """Whether a JPEG has more scans than any encoder writes. A scan of a few bytes costs a pass over the whole
    image."""
    position, scans = 2, 0
    while match := _MARKER.search(data, position):
        marker, position = data[match.end() - 1], match.end()
        if 0xC0 <= marker <= 0xFE and marker not in (0xD8, 0xD9):
            position += int.from_bytes(data[position : position + 2], "big")
        scans += marker == 0xDA
        if scans > MAX_SCANS:
            return True
    return False


def too_much(image: Image.Image, size: int, read: Callable[[], bytes]) -> str:
    """Why an opened picture must not be decoded; "" if it may be. size: bytes of its file; read: returns them."""
    packing = image.tile[0][0] if image.tile else "raw"
    if image.format == "BMP" and packing == "bmp_rle" and size > MAX_RUNS:
        return f"{size:,} bytes of run lengths, at most {MAX_RUNS:,}; save it as PNG"
    if image.format == "PPM" and packing != "raw" and size > MAX_RUNS:
        return f"{size:,} bytes of numbers that Pillow decodes in Python, at most {MAX_RUNS:,}; save it as PNG"
    if image.format in ("JPEG", "MPO") and has_too_many_scans(read()):
        return SCANS
    return ""


def too_much_of_tiff(image: Image.Image, pixels: int) -> str:
    """The same for the current page of a TIFF, whose tiles may have at most ``pixels``."""
    width, length = (int(image.tag_v2.get(tag, 0)) for tag in (_TILE_WIDTH, _TILE_LENGTH))
    if width * length > pixels:
        return f"tiles of {width} x {length} pixels, at most {pixels:,}; save it with smaller ones"
    if any(len(image.tag_v2.get(tag, ())) > MAX_STRIPS for tag in (_STRIPS, _TILES)):
        return f"more than {MAX_STRIPS:,} strips or tiles; save it with fewer"
    return ""
