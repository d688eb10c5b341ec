"""DICOM files that ask for much, explicit little endian."""

import io
import struct
from collections.abc import Iterator

from costly_parts import BROKEN, LARGE, MIB, READ, One, frame_of, j2k, j2k_head, jpeg, segment, zeros
from PIL import Image

EXPLICIT, DEFLATED, RLE, LOCO = (
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.1.99",
    *(f"1.2.840.10008.1.2.{end}" for end in ("5", "4.80")),
)


J2K, BASELINE, PROCESS14 = (f"1.2.840.10008.1.2.4.{end}" for end in ("90", "50", "70"))


ITEM, END_OF_ITEMS = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"


UNKNOWN = 0xFFFFFFFF


def element(group: int, number: int, kind: str, value: bytes, length: int | None = None) -> bytes:
    value += b"\0" * (len(value) % 2)
    length = len(value) if length is None else length
    long = kind in ("OB", "OW", "SQ", "UN", "UT", "OV")
    return struct.pack("<HH2s", group, number, kind.encode()) + struct.pack("<HL" if long else "<H", *(
        (0, length) if long else (length,)
    )) + value  # fmt: skip


def dicom(
    syntax: str, sides: tuple[int, int], pixels: bytes, frames: int = 1, more: bytes = b"", bits: int = 8
) -> bytes:
    """`more`: elements between SOPClassUID and the image's; `pixels`: the last element, whole."""
    meta = element(2, 0x10, "UI", syntax.encode())
    body = element(8, 0x16, "UI", b"1.2.840.10008.5.1.4.1.1.7") + more
    body += element(0x28, 2, "US", b"\1\0") + element(0x28, 4, "CS", b"MONOCHROME2")
    body += element(0x28, 8, "IS", str(frames).encode())
    for number, value in (
        (0x10, sides[0]),
        (0x11, sides[1]),
        (0x100, bits),
        (0x101, bits),
        (0x102, bits - 1),
        (0x103, 0),
    ):
        body += element(0x28, number, "US", struct.pack("<H", value))
    if syntax == DEFLATED:
        body, pixels = zeros(body + pixels, sides[0] * sides[1] * frames // MIB, -15), b""
    return b"\0" * 128 + b"DICM" + element(2, 0, "UL", struct.pack("<L", len(meta))) + meta + body + pixels


def native(data: bytes, length: int | None = None) -> bytes:
    return element(0x7FE0, 0x10, "OB", data, length)


def items(*fragments: bytes, table: bytes = b"") -> bytes:
    parts = [ITEM + struct.pack("<L", len(one)) + one for one in (table, *fragments)]
    return element(0x7FE0, 0x10, "OB", b"", UNKNOWN) + b"".join(parts) + END_OF_ITEMS


def jp2(decoy: bytes, stream: bytes) -> bytes:
    """A JP2 file with a box that nobody reads before the stream."""

    def box(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", 8 + len(data)) + kind + data

    height, width = struct.unpack(">LL", stream[12:16] + stream[8:12])
    head = box(b"ihdr", struct.pack(">LLHBBBB", height, width, 1, 7, 7, 0, 0))
    head += box(b"colr", b"\1\0\0" + struct.pack(">L", 17))
    signature = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    return signature + box(b"free", decoy) + box(b"jp2h", head) + box(b"jp2c", stream)


def j2k_of(side: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (side, side)).save(stream, "JPEG2000", no_jp2=True)
    return stream.getvalue()


def jpeg_ls(height: int, width: int, scan: bytes = b"") -> bytes:
    return b"\xff\xd8" + frame_of(0xF7, height, width) + segment(0xDA, b"\1\1\0\0\0\0") + scan + b"\xff\xd9"


def hierarchical(small: bytes, height: int, width: int) -> bytes:
    """Another size in the header of the hierarchy, before the first frame's."""
    return small[:2] + frame_of(0xDE, height, width) + small[2:]


def dicoms(full: bool) -> Iterator[One]:
    small, side = (64, 64), 6000
    sound = native(bytes(range(64)) * 64)
    yield "deflated frame", dicom(DEFLATED, (16384, 32768), native(b"", 2**29)), LARGE
    yield "deflated frames", dicom(DEFLATED, (1024, 1024), native(b"", 2**29), 512), LARGE
    yield "native pixels lacking", dicom(EXPLICIT, (side, side), native(bytes(36)), 1000), BROKEN
    yield "native length lies", dicom(EXPLICIT, small, native(bytes(36), 2**31)), BROKEN
    yield "J2K, no data", dicom(J2K, (side, side), items(j2k(side, side, side))), (*BROKEN, "constant", "images")
    yield "J2K, tiles of a pixel", dicom(J2K, (side, side), items(j2k(side, side, 1))), BROKEN
    yield "J2K, 65,025 tiles", dicom(J2K, (5100, 5100), items(j2k(5100, 5100, 20))), (*BROKEN, "constant", "images")
    yield "J2K, layers", dicom(J2K, (side, side), items(j2k(side, side, side, 65535))), (*BROKEN, "constant", "images")
    yield "J2K, larger than said", dicom(J2K, small, items(j2k(60000, 60000, 60000))), BROKEN
    yield (
        "J2K, behind another size",
        dicom(J2K, small, items(jp2(j2k_head(64, 64, 64), j2k(20000, 20000, 20000)))),
        BROKEN,
    )
    yield "J2K, a billion frames", dicom(J2K, small, items(j2k(64, 64, 64)), 10**9), LARGE
    yield "J2K, frames of nothing", dicom(J2K, small, items(*[b""] * 40_000), 40_000), BROKEN
    count = 40_000 if full else 4000
    yield "J2K, many empty frames", dicom(J2K, (2000, 2000), items(*[j2k_of(2000)] * count), count), LARGE
    yield "offset table of a MiB", dicom(J2K, small, items(j2k(64, 64, 64), table=bytes(MIB)), 50_000), BROKEN
    offsets = element(0x7FE0, 1, "OV", bytes(8 * 50_000)) + element(0x7FE0, 2, "OV", b"\xff" * 8 * 50_000)
    yield "extended offsets", dicom(J2K, small, offsets + items(j2k(64, 64, 64)), 50_000), BROKEN
    yield "JPEG-LS, no data", dicom(LOCO, (side, side), items(jpeg_ls(side, side))), (*BROKEN, "images")
    yield "JPEG-LS, larger than said", dicom(LOCO, small, items(jpeg_ls(60000, 60000))), BROKEN
    yield "JPEG, larger than said", dicom(BASELINE, small, items(jpeg(20000, 2000))), BROKEN
    twice = hierarchical(jpeg(64, 64), 65000, 65000)
    yield "JPEG, hierarchy larger", dicom(BASELINE, small, items(twice)), BROKEN
    again = jpeg(64, 64)
    again = again[:-2] + frame_of(0xC0, 65000, 65000) + again[again.index(b"\xff\xda") :]
    yield "JPEG, two frame headers", dicom(BASELINE, small, items(again)), (*BROKEN, "images")
    scans = jpeg(2000, 2000, progressive=True)
    last = scans.rindex(b"\xff\xda")
    scans = scans[:-2] + scans[last:-2] * (3000 if full else 300) + b"\xff\xd9"
    yield "JPEG, scans", dicom(PROCESS14, (2000, 2000), items(scans)), (*BROKEN, "images", "too large")
    segments = struct.pack("<16L", 1, 64, *[0] * 14)
    yield "RLE, lacking", dicom(RLE, (side, side), items(segments + b"\x81\0" * 40)), BROKEN
    yield "RLE, too much", dicom(RLE, small, items(segments + b"\x81\0" * MIB)), (*BROKEN, "images", "constant")
    yield "RLE, segments", dicom(RLE, small, items(b"\xff" * 64 + b"\x81\0" * 40)), BROKEN
    deep = (element(0x5200, 0x9230, "SQ", b"", UNKNOWN) + ITEM + b"\xff\xff\xff\xff") * (200_000 if full else 20_000)
    yield "nested sequences", dicom(EXPLICIT, small, sound, more=deep), BROKEN
    wide = element(0x5200, 0x9230, "SQ", b"", UNKNOWN) + (ITEM + bytes(4)) * (900_000 if full else 90_000)
    yield "many items", dicom(EXPLICIT, small, sound, more=wide + END_OF_ITEMS), (*BROKEN, *LARGE)
    many = element(9, 1, "UI", b"") * (900_000 if full else 90_000)
    yield "many elements", dicom(EXPLICIT, small, sound, more=many), (*BROKEN, *LARGE, "images")
    yield "length of 4 GB", dicom(EXPLICIT, small, sound, more=element(0x10, 0x20, "UN", b"", 2**32 - 16)), (
        *BROKEN, "no image"
    )  # fmt: skip
    numbers = b"".join(  # far more values than an element has, as far as the reading goes
        struct.pack("<HH2sHL", *tag, b"UN", 0, MIB - 2) + (b"1\\" * (MIB // 2))[: MIB - 3] + b" "
        for tag in ((0x18, 0x81), (0x18, 0x86), (0x18, 0x88), (0x20, 0x32), (0x20, 0x37), (0x28, 0x30), (0x28, 0x1052))
    )
    kind = element(8, 8, "CS", b"ORIGINAL\\MOSAIC") + element(0x19, 0x10, "LO", b"SIEMENS MR HEADER")
    for count, right in ((1, READ), (16, READ), (1024, (*READ, "constant")), (4096, LARGE), (65535, LARGE)):
        more = kind + element(0x19, 0x100A, "US", struct.pack("<H", count))
        yield f"mosaic of {count}", dicom(EXPLICIT, small, sound, more=more), right
    tag = (
        struct.pack("<64si4s3i", b"NumberOfImagesInMosaic", 0, b"US", 6, 1000, 77)
        + struct.pack("<4i", 0, 0, 77, 0) * 1000
    )
    csa = (b"SV10\4\3\2\1" + struct.pack("<2I", 1000, 77) + tag * 65)[: MIB - 10]
    more = kind + element(0x29, 0x10, "LO", b"SIEMENS CSA HEADER") + element(0x29, 0x1010, "OB", csa)
    yield "mosaic, private header of a MiB", dicom(EXPLICIT, small, sound, more=more), ("unsupported",)
    yield "half a million values", dicom(EXPLICIT, small, sound, more=numbers), (*BROKEN, *LARGE, "images")
