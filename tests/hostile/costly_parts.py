"""What files that ask for much are made of: zeros that pack well, frames that declare more than they hold."""

import functools
import io
import struct
import zlib

from PIL import Image

MIB = 2**20


READ = ("images",)


BROKEN = ("unreadable", "inconsistent")


LARGE = ("too large",)


One = tuple[str, bytes | tuple[bytes, bytes], tuple[str, ...]]


def zeros(head: bytes, count: int, bits: int = 15, tail: bytes = b"") -> bytes:
    """zlib (15), bare deflate (-15) or gzip (31) of `head`, `count` MiB of zeros and `tail`."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    data = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH) + _packed_block() * count
    data += packer.compress(tail) + packer.flush()
    if bits == -15:
        return data
    check, value = (zlib.crc32, 0) if bits == 31 else (zlib.adler32, 1)
    value = check(head, value)
    for _ in range(count):
        value = check(bytes(MIB), value)
    value = check(tail, value)
    if bits == 15:
        return b"\x78\x01" + data + struct.pack(">L", value)
    size = (len(head) + count * MIB + len(tail)) % 2**32
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + data + struct.pack("<LL", value, size)


@functools.cache
def _packed_block() -> bytes:
    """A MiB of zeros, deflated so that copies can follow each other."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)


def j2k_head(height: int, width: int, tile: int) -> bytes:
    return b"\xff\x4f\xff\x51" + struct.pack(
        ">HHLLLLLLLLHBBB", 41, 0, width, height, 0, 0, tile, tile, 0, 0, 1, 7, 1, 1
    )


def j2k(height: int, width: int, tile: int, layers: int = 1) -> bytes:
    """A JPEG 2000 stream of one tile without data."""
    code = b"\xff\x52" + struct.pack(">HBBHBBBBBB", 12, 0, 0, layers, 0, 5, 4, 4, 0, 1)
    quantisation = b"\xff\x5c" + struct.pack(">HB", 19, 0x40) + b"\x40" * 16
    first = b"\xff\x90" + struct.pack(">HHLBB", 10, 0, 14, 0, 1) + b"\xff\x93"
    return j2k_head(height, width, tile) + code + quantisation + first + b"\xff\xd9"


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">HH", 0xFF00 | marker, 2 + len(data)) + data


def frame_of(marker: int, height: int, width: int) -> bytes:
    return segment(marker, struct.pack(">BHHBBBB", 8, height, width, 1, 1, 0x11, 0))


def jpeg(height: int, width: int, **options) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (width, height), 90).save(stream, "JPEG", **options)
    return stream.getvalue()
