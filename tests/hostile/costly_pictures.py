"""Pictures that ask for much."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from costly_parts import BROKEN, LARGE, MIB, READ, One, j2k, jpeg, segment, zeros
from PIL import Image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def png(*chunks: bytes) -> bytes:
    """A sound PNG with these chunks before its pixels."""
    stream = io.BytesIO()
    Image.fromarray(np.arange(64 * 64).reshape(64, 64).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()[:33] + b"".join(chunks) + stream.getvalue()[33:]


def pngs(full: bool) -> Iterator[One]:
    stream, text = io.BytesIO(), zeros(b"", 1000)
    Image.new("1", (16000, 16000)).save(stream, "PNG")
    yield "256 million pixels", stream.getvalue(), ("images",)

    def empty(color: int, interlaced: int, data: bytes) -> bytes:
        head = chunk(b"IHDR", struct.pack(">LLBBBBB", 6300, 6300, 8, color, 0, 0, interlaced))
        return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    yield "lacking", empty(6, 0, zeros(b"", 1)), (*BROKEN, *LARGE)
    yield "40 million pixels", empty(6, 0, zeros(b"", 160)), ("images", *LARGE)
    yield "40 million pixels, interlaced", empty(6, 1, zeros(b"", 160)), ("images", *LARGE)
    yield "too much data", png(chunk(b"IDAT", text)), (*BROKEN, "images")
    yield "zTXt", png(chunk(b"zTXt", b"Comment\0\0" + text)), (*BROKEN, "images")
    yield "iTXt", png(chunk(b"iTXt", b"Comment\0\1\0\0\0" + text)), (*BROKEN, "images")
    yield "iCCP", png(chunk(b"iCCP", b"icc\0\0" + text)), (*BROKEN, "images")
    part = zlib.compress(bytes(MIB - 100))
    yield "zTXt, many", png(*[chunk(b"zTXt", b"Comment\0\0" + part)] * 300), (*BROKEN, "images")
    yield "tEXt, many", png(*[chunk(b"tEXt", b"a\0" + b"b" * 40)] * (200_000 if full else 20_000)), (*BROKEN, "images")
    yield "IDAT, many", png(*[chunk(b"IDAT", b"")] * (400_000 if full else 40_000)), (*BROKEN, "images")
    yield "eXIf", png(chunk(b"eXIf", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\1\4\0\xff\xff\xff\xff" * 2000)), READ
    yield "a chunk of 2 GB", png(struct.pack(">L4s", 2**31 - 1, b"tEXt")), BROKEN


def jpgs(full: bool) -> Iterator[One]:
    scans = jpeg(5000, 5000, progressive=True)
    last, frame = scans.rindex(b"\xff\xda"), scans.index(b"\xff\xc2") + 5
    yield "scans", scans[:-2] + scans[last:-2] * (3000 if full else 300) + b"\xff\xd9", (*BROKEN, *LARGE, "images")
    yield "4 billion pixels", scans[:frame] + struct.pack(">HH", 65000, 65000) + scans[frame + 4 :], LARGE
    yield "40 million pixels, no data", jpeg(8, 8).replace(struct.pack(">HH", 8, 8), struct.pack(">HH", 6300, 6300)), (
        *BROKEN, "images", "constant"
    )  # fmt: skip
    small = jpeg(64, 64)
    many = (200_000 if full else 20_000) * segment(0xE5, b"x" * 40)
    yield "segments", small[:2] + many + small[2:], (*BROKEN, "images")
    profile = b"".join(segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65000)) for _ in range(300))
    yield "profile", small[:2] + profile + small[2:], (*BROKEN, "images", *LARGE)
    entries = b"MPF\0II*\0\x08\0\0\0\3\0" + b"".join(
        struct.pack("<HHLL", *one)
        for one in ((0xB000, 7, 4, 0x30303130), (0xB001, 4, 1, 2**31), (0xB002, 7, 2**31, 50))
    )
    yield "a billion pictures", small[:2] + segment(0xE2, entries + bytes(100)) + small[2:], (*BROKEN, "images")


def page(following: int, offset: int = 8, width: int = 64, rows: int = 64, strips: int = 1, strip: int = 4096,
         kind: int = 1, bits: int = 8, each: int = 0) -> bytes:  # fmt: skip
    """One directory of a TIFF: grey, its pixels at `offset`."""
    entries = [(256, 4, 1, width), (257, 4, 1, rows), (258, 3, 1, bits), (259, 3, 1, kind), (262, 3, 1, 1)]
    entries += [(273, 4, strips, offset), (277, 3, 1, 1), (278, 4, 1, each or rows), (279, 4, strips, strip)]
    return struct.pack("<H", 9) + b"".join(struct.pack("<HHLL", *one) for one in entries) + struct.pack("<L", following)


def tiff(count: int, data: bytes, **page_options) -> bytes:
    """`count` pages with the same pixels."""
    start, length = 8 + len(data), len(page(0))
    pages = [page(start + (i + 1) * length, **page_options) for i in range(count - 1)] + [page(0, **page_options)]
    return b"II*\0" + struct.pack("<L", start) + data + b"".join(pages)


def tifs(full: bool) -> Iterator[One]:
    stream, small = io.BytesIO(), bytes(range(64)) * 64
    Image.new("1", (16000, 16000)).save(stream, "TIFF", compression="group4")
    yield "256 million pixels", stream.getvalue(), ("images",)
    yield "pages", tiff(200_000 if full else 10_500, small), LARGE
    yield "pages in a ring", b"II*\0" + struct.pack("<L", 4104) + small + page(4104 + 114) + page(4104), (
        *BROKEN, "images", *LARGE
    )  # fmt: skip
    group4 = io.BytesIO()
    Image.new("1", (6000, 6000)).save(group4, "TIFF", compression="group4", tiffinfo={278: 6000})
    with Image.open(io.BytesIO(group4.getvalue())) as image:
        (at,), (size,) = image.tag_v2[273], image.tag_v2[279]
    shared = group4.getvalue()[at : at + size]
    options = {"width": 6000, "rows": 6000, "strip": size, "kind": 4, "bits": 1}
    yield "large pages", tiff(9000 if full else 900, shared, **options), LARGE
    yield "a billion strips", tiff(1, small, strips=10**9), (*BROKEN, *LARGE)
    yield "a strip of 2 GB", tiff(1, small, rows=600_000, strip=2**31), (*BROKEN, *LARGE)
    count = 1_000_000 if full else 200_000
    lists = struct.pack("<L", 8) * count
    yield (
        "strips of a row",
        tiff(1, lists, width=20, rows=count, strips=count, each=1, strip=8),
        (*BROKEN, *LARGE, "images"),
    )
    yield "packed strip", tiff(1, zeros(b"", 1000), kind=8, strip=10**6), (*BROKEN, "images", "constant")
    yield (
        "packed pixels lacking",
        tiff(1, zeros(b"", 1), kind=8, strip=1000, width=6000, rows=6000),
        (*BROKEN, "constant"),
    )
    entries = b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHLL", 0x8000, 7, 2**31, 8) * 65535 + bytes(4)
    yield "65,535 tags", entries, BROKEN


def bmp(side: int, bits: int, kind: int, data: bytes) -> bytes:
    colours = 256 if bits == 8 else 0
    info = struct.pack("<LllHHLLllLL", 40, side, side, 1, bits, kind, len(data), 0, 0, colours, 0)
    table = b"".join(bytes((i, i, i, 0)) for i in range(colours))
    start = 14 + len(info) + len(table)
    return b"BM" + struct.pack("<LHHL", start + len(data), 0, 0, start) + info + table + data


def bmps(full: bool) -> Iterator[One]:
    yield "1 GB", bmp(20000, 24, 0, bytes(100)), LARGE
    yield "lacking", bmp(6000, 24, 0, bytes(100)), BROKEN
    yield "2 billion a side", bmp(2**31 - 1, 24, 0, bytes(100)), LARGE
    yield "runs", bmp(6000, 8, 1, b"\xff\x07" * 160_000 + b"\0\1"), (*BROKEN, "images", "constant")
    yield "skips", bmp(6000, 8, 1, b"\0\2\xff\xff" * 200_000 + b"\0\1"), (*BROKEN, "images", "constant")
    yield "runs of one", bmp(6000, 8, 1, b"\1\7" * (36_000_000 if full else 2_500_000) + b"\0\1"), (
        *BROKEN, *LARGE, "images", "constant"
    )  # fmt: skip
    yield "runs of none", bmp(6000, 8, 1, b"\0\0" * (30_000_000 if full else 2_500_000) + b"\0\1"), LARGE
    if full:
        yield "runs, the most", bmp(6000, 8, 1, b"\1\7" * 2_090_000 + b"\0\1"), (*BROKEN, "images", "constant")


def others(full: bool) -> Iterator[One]:
    """Formats that are not read, and pictures under a suffix that is not theirs."""
    stream = io.BytesIO()
    blank = [Image.new("P", (4000, 4000), i % 2) for i in range(4)]
    blank[0].save(stream, "GIF", save_all=True, append_images=blank[1:])
    yield "GIF", stream.getvalue(), ("images", *BROKEN)
    yield "JPEG 2000", j2k(30000, 30000, 30000), (*BROKEN, "too large")
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n" + b"showpage\n" * 1000, BROKEN
    yield "Photoshop", b"8BPS\0\1" + bytes(6) + struct.pack(">HLLHH", 3, 30000, 30000, 8, 3) + bytes(100), BROKEN
