"""Sixteen ways to damage a file, each a function of (bytes, another file's bytes, random numbers) to bytes."""

import gzip
import io
import random
import re
import struct
import zipfile
import zlib

HEAD = 512


def cut(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def empty(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return data[: draw.choice((0, 0, 1, 2, 4, 8, 128, 132, 348, 352))]


def flip_a_bit_of_the_head(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return _edit(data, draw.randrange(min(len(data), HEAD)), lambda byte: byte ^ (1 << draw.randrange(8)))


def flip_bits_anywhere(data: bytes, other: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice((1, 4, 32, 256))):
        data = _edit(data, draw.randrange(len(data)), lambda byte: byte ^ (1 << draw.randrange(8)))
    return data


def zeros(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return _fill(data, b"\0", draw)


def ones(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return _fill(data, b"\xff", draw)


def insert(data: bytes, other: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + draw.randbytes(draw.choice((1, 2, 7, 300))) + data[at:]


def remove(data: bytes, other: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + data[at + draw.choice((1, 2, 7, 300)) :]


def swap_blocks(data: bytes, other: bytes, draw: random.Random) -> bytes:
    a, b, c = sorted(draw.randrange(len(data)) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def repeat_a_block(data: bytes, other: bytes, draw: random.Random) -> bytes:
    a, b = sorted(draw.randrange(len(data)) for _ in range(2))
    return data[:b] + data[a:b] * draw.choice((1, 3)) + data[b:]


def append(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return data + draw.choice((draw.randbytes(1000), data, b"\0" * 5000, other))


def extreme_number(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """A size, count or offset of the head becomes as large, or as negative, as it can be."""
    form = draw.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
    bits = 8 * struct.calcsize(form)
    number = draw.choice((2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, 2 ** (bits - 2), 0, 1))
    at = draw.randrange(0, min(len(data), HEAD), 2)
    return data[:at] + struct.pack(form, number) + data[at + bits // 8 :]


def not_a_number(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """A real number of the head becomes NaN, infinite, very large or very small."""
    form = draw.choice(("<f", ">f", "<d"))
    number = draw.choice((float("nan"), float("inf"), float("-inf"), -0.0, 1e30, 1e-38))
    at = draw.randrange(0, min(len(data), HEAD), 4)
    return data[:at] + struct.pack(form, number) + data[at + struct.calcsize(form) :]


def digits(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """A number that is written as text becomes another one."""
    found = list(re.finditer(rb"\d+", data[: 4 * HEAD]))
    if not found:
        return flip_bits_anywhere(data, other, draw)
    one = draw.choice(found)
    return data[: one.start()] + draw.choice((b"9" * 19, b"0", b"-7", b"1e9", b"1.5", b"")) + data[one.end() :]


def another_tail(data: bytes, other: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(min(len(data), len(other)))
    return data[:at] + other[at:]


def noise_behind_the_magic(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return data[: draw.choice((4, 8, 132, 352))] + draw.randbytes(draw.choice((10, 1000, 20000)))


KINDS = (
    cut,
    empty,
    flip_a_bit_of_the_head,
    flip_bits_anywhere,
    zeros,
    ones,
    insert,
    remove,
    swap_blocks,
    repeat_a_block,
    append,
    extreme_number,
    not_a_number,
    digits,
    another_tail,
    noise_behind_the_magic,
)


def inside(suffix: str, data: bytes, change) -> bytes:
    """`change` made within the packing of .nii.gz, .npz and .png, so that no checksum gives it away."""
    if suffix == ".nii.gz":
        return gzip.compress(change(gzip.decompress(data)), mtime=0)
    if suffix == ".npz":
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(zipfile.ZipInfo(name), change(old.read(name)), zipfile.ZIP_DEFLATED)
        return stream.getvalue()
    if suffix == ".png":
        return _checked_again(change(data))
    return change(data)


def _checked_again(data: bytes) -> bytes:
    """A PNG whose chunks, as far as they can be followed, have the checksums of what they hold."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        length = int.from_bytes(out[at : at + 4], "big")
        if at + 12 + length > len(out):
            break
        out[at + 8 + length : at + 12 + length] = zlib.crc32(out[at + 4 : at + 8 + length]).to_bytes(4, "big")
        at += 12 + length
    return bytes(out)


def _edit(data: bytes, at: int, change) -> bytes:
    return data[:at] + bytes([change(data[at])]) + data[at + 1 :]


def _fill(data: bytes, byte: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    length = min(draw.choice((1, 4, 64, 4096)), len(data) - at)
    return data[:at] + byte * length + data[at + length :]
