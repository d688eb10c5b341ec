"""Arrays and videos that ask for much."""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from costly_parts import BROKEN, LARGE, MIB, One, jpeg, zeros


def npy(shape: tuple[int, ...], kind: str = "<f4") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def npys(full: bool) -> Iterator[One]:
    yield "declares 149 GiB", npy((200000, 200000)) + bytes(16), BROKEN
    yield "30 axes", npy((1,) * 30) + bytes(4), ("unsupported",)
    text = b"(" * 100_000
    yield "header of brackets", b"\x93NUMPY\2\0" + struct.pack("<L", len(text)) + text, BROKEN
    yield "header of 2 GB", b"\x93NUMPY\2\0" + struct.pack("<L", 2**31) + b"{" * 1000, BROKEN
    yield "a long number", b"\x93NUMPY\2\0" + struct.pack("<L", 9000) + b"{'shape': (" + b"9" * 8989, BROKEN


def archive(members: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for name, data in members:
            file.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def forged(count: int, head: bytes, size: int) -> bytes:
    """`count` members of the same bytes, packed: `head` and `size` MiB of zeros."""
    packed = zeros(head, size, -15)
    checksum = zlib.crc32(head)
    for _ in range(size):
        checksum = zlib.crc32(bytes(MIB), checksum)
    out, directory = io.BytesIO(), b""
    for number in range(count):
        name, at = b"%05d.npy" % number, out.tell()
        common = struct.pack(
            "<HHHHHLLLHH", 20, 0, 8, 0, 0x21, checksum, len(packed), len(head) + size * MIB, len(name), 0
        )
        out.write(b"PK\3\4" + common + name + packed)
        directory += b"PK\1\2\x14\0" + common + struct.pack("<HHHLL", 0, 0, 0, 0, at) + name
    end = struct.pack("<HHHHLLH", 0, 0, count, count, len(directory), out.tell(), 0)
    return out.getvalue() + directory + b"PK\5\6" + end


def npzs(full: bool) -> Iterator[One]:
    yield "declares 1 GB", forged(1, npy((1000, 1024, 256)), 1000), LARGE
    yield "a member of 1 GB", forged(1, npy((64, 64)), 1000), (*BROKEN, *LARGE)
    yield "70,000 members", archive([(f"{i}.npy", b"") for i in range(70_000 if full else 7000)]), (*BROKEN, *LARGE)
    yield "a thousand members", archive([(f"{i}.npy", npy((64, 64), "|u1") + bytes(4096)) for i in range(1000)]), (
        "images", "constant"
    )  # fmt: skip
    yield (
        "members of 100 MB",
        forged(150 if full else 20, npy((100, 1024, 1024), "|u1"), 100),
        (*LARGE, "constant", "images"),
    )


def avi(sides: tuple[int, int], declared: int, frames: list[bytes], codec: bytes = b"MJPG") -> bytes:
    def part(kind: bytes, data: bytes) -> bytes:
        return kind + struct.pack("<L", len(data)) + data + b"\0" * (len(data) % 2)

    height, width = sides
    head = struct.pack("<14L", 40000, 0, 0, 16, declared, 0, 1, 0, width, height, 0, 0, 0, 0)
    stream = b"vids" + codec + struct.pack("<LHHLLLLLLLLHHHH", 0, 0, 0, 0, 1, 25, 0, declared, 0, 0, 0, 0, 0, 0, 0)
    form = struct.pack("<LllHH4sLllLL", 40, width, height, 1, 24, codec, 0, 0, 0, 0, 0)
    lists = part(b"LIST", b"strl" + part(b"strh", stream) + part(b"strf", form))
    movie = part(b"LIST", b"movi" + b"".join(part(b"00dc", frame) for frame in frames))
    return part(b"RIFF", b"AVI " + part(b"LIST", b"hdrl" + part(b"avih", head) + lists) + movie)


def avis(full: bool) -> Iterator[One]:
    small = jpeg(64, 64)
    yield "900 million pixels", avi((30000, 30000), 10, [small] * 10), LARGE
    yield "frames larger than said", avi((64, 64), 4, [jpeg(16000, 16000)] * 4), (*BROKEN, *LARGE)
    yield "frames that grow", avi((64, 64), 4, [small] * 40 + [jpeg(16000, 16000)] * 4), (*BROKEN, *LARGE, "images")
    yield "2 billion frames", avi((64, 64), 2**31 - 1, [small] * 2), (*BROKEN, "images", "constant")
    yield "frames of nothing", avi((64, 64), 10**6, [small] + [b""] * (10**6 if full else 10**5)), (
        *BROKEN, "images", "constant"
    )  # fmt: skip
    yield "large blank frames", avi((6000, 6000), 900, [jpeg(6000, 6000)] * (90 if full else 6)), (
        *BROKEN, *LARGE, "images", "timeout"
    )  # fmt: skip
    yield "raw pixels lacking", avi((6000, 6000), 10**6, [b""] * 10, b"\0\0\0\0"), (*BROKEN, *LARGE)


def mp4s(full: bool) -> Iterator[One]:
    import seeds

    (sound,) = seeds.seeds()[".mp4"]

    def declares(sides: tuple[int, int]) -> bytes:
        at = sound.index(b"tkhd") - 4
        end = at + int.from_bytes(sound[at : at + 4], "big")
        return sound[: end - 8] + struct.pack(">HHHH", sides[1], 0, sides[0], 0) + sound[end:]

    yield "3 billion pixels", declares((60000, 60000)), LARGE
    for table, kind in ((b"stsz", 8), (b"stts", 4), (b"stsc", 4), (b"stco", 4)):
        at = sound.index(table) + 4 + kind
        yield (
            f"{table.decode()} of 4 billion",
            sound[:at] + b"\x7f\xff\xff\xff" + sound[at + 4 :],
            (*BROKEN, "images", *LARGE),
        )
    at = sound.index(b"stts") + 8
    many = struct.pack(">LLL", 1, 2**31 - 1, 1)
    yield "2 billion frames", sound[:at] + many + sound[at + 12 :], (*BROKEN, "images", *LARGE)
    yield "boxes", b"\0\0\0\x08free" * (500_000 if full else 50_000) + sound, (*BROKEN, *LARGE)
