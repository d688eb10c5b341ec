"""The header of a compressed frame, read before decoding: decoders allocate by the sizes in the codestream."""

from __future__ import annotations

import struct

from ..stack import Refused


def jpeg_size(data: bytes) -> tuple[int, int, int]:
    """(rows, columns, components) of the first frame header of a JPEG or JPEG-LS stream."""
    place = 2
    while place + 4 <= len(data):
        if data[place] != 0xFF:
            break
        marker = data[place + 1]
        if marker == 0xFF:
            place += 1
            continue
        if marker in (0x01, *range(0xD0, 0xD9)):
            place += 2
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            if place + 10 <= len(data):
                return (
                    int.from_bytes(data[place + 5 : place + 7], "big"),
                    int.from_bytes(data[place + 7 : place + 9], "big"),
                    data[place + 9],
                )
            break
        place += 2 + length
    raise Refused("unreadable", "no frame header in the compressed data: damaged; copy it again")


def jpeg_colour(data: bytes) -> str:
    """ "RGB" or "YBR_FULL", as declared by a lossy JPEG stream of three components; "" if it declares neither.

    An Adobe marker decides. Otherwise JFIF means YCbCr, as do components named 1, 2, 3, which is the convention of
    decoders; components named "R", "G", "B" are RGB.
    """
    place, jfif = 2, False
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : place + 2 + length]
        if marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            return "YBR_FULL" if body[11] == 1 else "RGB"
        jfif = jfif or (marker == 0xE0 and body[:5] == b"JFIF\0")
        if marker in (0xC0, 0xC1, 0xC2):
            names = bytes(body[6 + 3 * number] for number in range(3)) if len(body) >= 15 and body[5] == 3 else b""
            return "YBR_FULL" if jfif or names == b"\1\2\3" else "RGB" if names == b"RGB" else ""
        if marker == 0xDA:
            return ""
        place += 2 + length
    return ""


def whole_spectrum(data: bytes) -> bytes:
    """The stream, with a sequential JPEG's scans declared to hold all coefficients. A widely used 12-bit encoder wrote
    "0 to 0", which the decoder refuses, although other readers ignore it."""
    place, sequential = 2, False
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (0xC0, 0xC1):
            sequential = True
        elif marker == 0xDA:
            end = place + 2 + length
            if sequential and data[end - 3 : end - 1] == b"\0\0":
                return data[: end - 2] + b"\x3f" + data[end - 1 :]
            return data
        place += 2 + length
    return data


def j2k_size(data: bytes) -> tuple[int, int, int]:
    """(rows, columns, components) of a JPEG 2000 codestream, bare or within a JP2."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or start + 42 > len(data):
        raise Refused("unreadable", "no size in the compressed data: damaged; copy it again")
    width, height, left, top = struct.unpack(">4L", data[start + 8 : start + 24])
    return height - top, width - left, struct.unpack(">H", data[start + 40 : start + 42])[0]


def rle_segments(data: bytes) -> int:
    """The number of segments of an RLE frame. The decoder stops when each segment has filled its plane."""
    count = int.from_bytes(data[:4], "little")
    if len(data) < 64 or not 1 <= count <= 15:
        raise Refused("unreadable", "an RLE frame without a header: damaged; copy it again")
    return count
