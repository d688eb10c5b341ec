"""Small files that ask for much memory or time, in every format. Built from bytes, since no library would write them.

`files(full)` gives name -> (bytes, outcomes that are right): reasons of refusal, and "images" where it may be read. Of
a format that keeps its data in a file of their own it gives the bytes of both; BESIDE says what the other is called.
"""

import bz2
import functools
import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

MIB = 2**20
READ = ("images",)
BROKEN = ("unreadable", "inconsistent")
LARGE = ("too large",)
One = tuple[str, bytes | tuple[bytes, bytes], tuple[str, ...]]
BESIDE = {".mhd": "x.raw", ".nhdr": "x.raw", ".hdr": "x.img", ".hdr.gz": "x.img.gz"}


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


# DICOM, explicit little endian

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


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">HH", 0xFF00 | marker, 2 + len(data)) + data


def frame_of(marker: int, height: int, width: int) -> bytes:
    return segment(marker, struct.pack(">BHHBBBB", 8, height, width, 1, 1, 0x11, 0))


def jpeg_ls(height: int, width: int, scan: bytes = b"") -> bytes:
    return b"\xff\xd8" + frame_of(0xF7, height, width) + segment(0xDA, b"\1\1\0\0\0\0") + scan + b"\xff\xd9"


def jpeg(height: int, width: int, **options) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (width, height), 90).save(stream, "JPEG", **options)
    return stream.getvalue()


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


# Volumes


def nifti(shape: tuple[int, ...], dtype: type) -> bytes:
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header.binaryblock + bytes(4)


def niftis(full: bool) -> Iterator[One]:
    small = nifti((64, 64, 4), np.int16) + np.arange(2 * 64 * 64 * 4, dtype=np.uint16).tobytes()[: 2 * 64 * 64 * 4]
    yield "declares 1.2 GB", zeros(nifti((1024, 1024, 600), np.int16), 1, 31), LARGE
    yield "declares 400 MB", zeros(nifti((1024, 1024, 200), np.int16), 1, 31), BROKEN
    yield "400 MB of zeros", zeros(nifti((1024, 1024, 200), np.int16), 400, 31), ("constant", "images")
    yield "a frame of 1 GB", zeros(nifti((32767, 32767, 1), np.uint8), 1, 31), LARGE
    yield "1,500 members", gzip.compress(nifti((1024, 1024, 600), np.int16)) + zeros(b"", 1, 31) * 1500, LARGE
    empty = gzip.compress(b"", mtime=0)
    yield (
        "empty members first",
        empty * (3_000_000 if full else 150_000) + gzip.compress(small),
        (*READ, *LARGE, *BROKEN),
    )
    yield (
        "empty members within",
        gzip.compress(small[:1000]) + empty * (3_000_000 if full else 150_000) + gzip.compress(small[1000:]),
        (*READ, *LARGE, *BROKEN),
    )
    yield "zeros behind", gzip.compress(small) + bytes((400 if full else 8) * MIB), (*READ, *BROKEN)
    yield "more behind", zeros(small, 1500, 31), READ
    name = gzip.compress(small)
    name = name[:3] + b"\x08" + name[4:10] + b"n" * ((100 if full else 4) * MIB) + b"\0" + name[10:]
    yield "a name of many MB", name, (*READ, *LARGE, *BROKEN)


def unpacked_niftis(full: bool) -> Iterator[One]:
    yield "declares 4 TB", nifti((32767, 32767, 4096), np.uint8) + bytes(100), LARGE
    yield "lacking", nifti((1024, 1024, 600), np.int16) + bytes(100), (*LARGE, *BROKEN)
    offset = bytearray(nifti((64, 64, 4), np.int16) + bytes(2**15))
    offset[108:112] = struct.pack("<f", 1e30)
    yield "offset of 1e30", bytes(offset), BROKEN


def mha(sizes: str, data: bytes, packed: bool = False, lines: str = "") -> bytes:
    text = f"ObjectType = Image\nNDims = {len(sizes.split())}\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
    text += f"CompressedData = True\nCompressedDataSize = {len(data)}\n" if packed else ""
    return f"{text}{lines}DimSize = {sizes}\nElementType = MET_USHORT\nElementDataFile = LOCAL\n".encode() + data


def mhas(full: bool) -> Iterator[One]:
    small = np.arange(64 * 64 * 4, dtype=np.uint16).tobytes()
    yield "a frame of 1 GB", mha("30000 30000 1", bytes(100)), LARGE
    yield "declares 1.2 GB", mha("1024 1024 600", bytes(100)), LARGE
    yield "declares more than 64 bits", mha("4294967296 4294967296 64", bytes(100)), (*LARGE, *BROKEN, "unsupported")
    yield "lacking", mha("1024 1024 100", bytes(100)), BROKEN
    yield "packed, lacking", mha("1024 1024 100", zeros(b"", 1), True), BROKEN
    yield "packed, a frame of 1 GB", mha("30000 30000 1", zeros(b"", 900), True), LARGE
    yield "packed, 200 MB of zeros", mha("1024 1024 100", zeros(b"", 200), True), ("constant", "images", *LARGE)
    yield "packed, too much", mha("64 64 4", zeros(small, 1500), True), (*READ, *BROKEN, *LARGE)
    lies = mha("64 64 4", zeros(small, 0), True)
    size = lies[lies.index(b"DataSize = ") + 11 :].split(b"\n")[0]
    for number in (10**12, 2**63 - 1, -1):
        other = lies.replace(b"DataSize = " + size, b"DataSize = %d" % number)
        yield f"packed size {number:.0e}", other, (*READ, *BROKEN, *LARGE)
    yield "64 axes", mha("2 " * 64, bytes(100)), (*BROKEN, "unsupported")
    yield "a billion axes", mha("64 64 4", small).replace(b"NDims = 3", b"NDims = 1000000000"), (*BROKEN, "unsupported")
    yield "channels", mha("64 64 4", small, lines="ElementNumberOfChannels = 1000000000\n"), (
        *BROKEN, *LARGE, "unsupported"
    )  # fmt: skip
    text = mha("1024 1024 100", b"1 " * 1000).replace(b"BinaryData = True", b"BinaryData = False")
    yield "written as text", text, ("unsupported",)
    half = mha("64 64 4", zeros(small[:9000], 0), True)
    yield "packed, half lacking", half, BROKEN
    yield "header size", mha("64 64 4", small, lines="HeaderSize = 9000000000000000000\n"), (*BROKEN, "unsupported")


def nrrd(sizes: str, encoding: str, data: bytes, lines: str = "") -> bytes:
    text = f"NRRD0004\ntype: unsigned short\ndimension: {len(sizes.split())}\nsizes: {sizes}\nendian: little\n"
    return f"{text}{lines}encoding: {encoding}\n\n".encode() + data


def nrrds(full: bool) -> Iterator[One]:
    small = np.arange(64 * 64 * 4, dtype=np.uint16).tobytes()
    yield "a frame of 1 GB", nrrd("30000 30000 1", "raw", bytes(100)), LARGE
    yield "declares 1.2 GB", nrrd("1024 1024 600", "raw", bytes(100)), LARGE
    yield "declares more than 64 bits", nrrd("4294967296 4294967296 64", "raw", bytes(100)), (*LARGE, *BROKEN)
    yield "lacking", nrrd("1024 1024 100", "raw", bytes(100)), BROKEN
    yield "packed, lacking", nrrd("1024 1024 100", "gzip", zeros(b"", 1, 31)), BROKEN
    yield "packed, 200 MB of zeros", nrrd("1024 1024 100", "gzip", zeros(b"", 200, 31)), ("constant", "images", *LARGE)
    yield "packed, too much", nrrd("64 64 4", "gzip", zeros(small, 1500, 31)), (*READ, *BROKEN, *LARGE)
    yield "packed, skips", nrrd("64 64 4", "gzip", zeros(small, 1500, 31), "byte skip: 1500000000\n"), (
        "unsupported",
    )  # fmt: skip
    yield "skips from the end", nrrd("64 64 4", "raw", small, "byte skip: -1000000\n"), ("unsupported",)
    yield "skips lines", nrrd("64 64 4", "raw", b"\n" * MIB + small, "line skip: 2000000000\n"), ("unsupported",)
    yield "written as text", nrrd("1024 1024 100", "ascii", b"1 " * 1000), ("unsupported",)
    yield "written in hex", nrrd("1024 1024 100", "hex", b"01 " * 1000), ("unsupported",)
    yield "bzip2, damaged", nrrd("1024 1024 30", "bz2", b"BZh91AY&SY" + bytes(1000)), BROKEN
    yield "bzip2, 200 MB of zeros", nrrd("1024 1024 100", "bz2", bzip2_of_zeros(200)), LARGE
    yield "bzip2, 64 MB of zeros", nrrd("1024 1024 32", "bz2", bzip2_of_zeros(64)), ("constant", "images")
    yield "bzip2, too much", nrrd("64 64 4", "bz2", bz2.compress(small) + bzip2_of_zeros(300)), (
        *READ, *BROKEN, *LARGE
    )  # fmt: skip
    noise = np.random.default_rng(0).integers(0, 256, (64 if full else 4) * MIB, dtype=np.uint8).tobytes()
    yield "bzip2, noise", nrrd(f"1024 1024 {len(noise) // (2 * MIB)}", "bz2", bz2.compress(noise)), READ


def bzip2_of_zeros(count: int) -> bytes:
    """So many MiB, as streams one after the other."""
    return bz2.compress(bytes(4 * MIB)) * (count // 4)


# In two files


def mhds(full: bool) -> Iterator[One]:
    small = np.arange(64 * 64 * 4, dtype=np.uint16).tobytes()

    def head(sizes: str, lines: str = "", name: str = "x.raw") -> bytes:
        return mha(sizes, b"", lines=lines).replace(b"LOCAL", name.encode())

    packed = "CompressedData = True\n"
    yield "declares 1.2 GB", (head("1024 1024 600"), bytes(100)), LARGE
    yield "lacking", (head("1024 1024 100"), bytes(100)), BROKEN
    yield "packed, lacking", (head("1024 1024 100", packed), zeros(b"", 1)), BROKEN
    yield "packed, 200 MB of zeros", (head("1024 1024 100", packed), zeros(b"", 200)), ("constant", "images", *LARGE)
    yield "packed, too much", (head("64 64 4", packed), zeros(small, 1500)), (*READ, *BROKEN, *LARGE)
    empty = gzip.compress(b"", mtime=0) * (3_000_000 if full else 150_000)
    yield "packed, empty members", (head("64 64 4", packed), empty + gzip.compress(small)), (*READ, *LARGE, *BROKEN)
    yield "skips", (head("64 64 4", "HeaderSize = 900000000000000000\n"), small), BROKEN
    yield "is its own data", (head("64 64 4", name="x.mhd"), small), BROKEN
    yield "without end", (head("64 64 4", name="/dev/zero"), small), ("unsupported",)
    yield "many lines", (b"Comment = x\n" * 6000 + head("64 64 4"), small), (*BROKEN, "unsupported")


def nhdrs(full: bool) -> Iterator[One]:
    small = np.arange(64 * 64 * 4, dtype=np.uint16).tobytes()

    def head(sizes: str, encoding: str, lines: str = "", name: str = "x.raw") -> bytes:
        return nrrd(sizes, encoding, b"", f"data file: {name}\n{lines}")

    yield "declares 1.2 GB", (head("1024 1024 600", "raw"), bytes(100)), LARGE
    yield "lacking", (head("1024 1024 100", "raw"), bytes(100)), BROKEN
    yield "packed, 200 MB of zeros", (head("1024 1024 100", "gzip"), zeros(b"", 200, 31)), ("constant", *READ, *LARGE)
    yield "packed, too much", (head("64 64 4", "gzip"), zeros(small, 1500, 31)), (*READ, *BROKEN, *LARGE)
    yield "bzip2, 400 MB", (head("1024 1024 200", "bz2"), bzip2_of_zeros(400)), LARGE
    yield "skips", (head("64 64 4", "raw", "byte skip: 900000000000000000\n"), small), BROKEN
    yield "without end", (head("64 64 4", "raw", name="/dev/zero"), small), ("unsupported",)


def pairs(full: bool) -> Iterator[One]:
    small = np.arange(64 * 64 * 4, dtype=np.uint16).tobytes()

    def head(shape: tuple[int, ...], dtype: type = np.uint16, offset: float = 0) -> bytes:
        data = bytearray(nifti(shape, dtype)[:348])
        data[108:112], data[344:348] = struct.pack("<f", offset), b"ni1\0"
        return bytes(data)

    yield "declares 4 TB", (head((32767, 32767, 4096)), small), LARGE
    yield "lacking", (head((1024, 1024, 100)), small), BROKEN
    yield "offset of 1e30", (head((64, 64, 4), offset=1e30), small), BROKEN
    yield "offset behind", (head((64, 64, 4), offset=9000), small), BROKEN
    yield "planes, lacking", (head((1024, 1024, 150, 1, 3), np.uint8), small), (*LARGE, *BROKEN)
    yield "planes of 300 MB", (head((1024, 1024, 100, 1, 3), np.uint8), bytes(300 * MIB if full else 100)), (
        *LARGE, *BROKEN
    )  # fmt: skip


def packed_pairs(full: bool) -> Iterator[One]:
    for name, data, outcomes in pairs(full):
        yield name, tuple(gzip.compress(part, 1) for part in data), outcomes
    head = next(iter(pairs(full)))[1][0]
    head = (
        head[:40]
        + struct.pack("<8h", 5, 512, 512, 200, 1, 3, 1, 1)
        + head[56:70]
        + struct.pack("<2h", 2, 8)
        + head[74:]
    )
    yield "planes of 150 MB", (gzip.compress(head), zeros(b"", 150, 31)), ("constant", *READ)


# Pictures


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
    yield "256 million pixels", stream.getvalue(), LARGE

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
    yield "256 million pixels", stream.getvalue(), LARGE
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
    """Formats that are not read, called pictures."""
    stream = io.BytesIO()
    blank = [Image.new("P", (4000, 4000), i % 2) for i in range(4)]
    blank[0].save(stream, "GIF", save_all=True, append_images=blank[1:])
    yield "GIF", stream.getvalue(), BROKEN
    yield "JPEG 2000", j2k(30000, 30000, 30000), BROKEN
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n" + b"showpage\n" * 1000, BROKEN
    yield "Photoshop", b"8BPS\0\1" + bytes(6) + struct.pack(">HLLHH", 3, 30000, 30000, 8, 3) + bytes(100), BROKEN


# Arrays


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


# Video


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


MAKERS = {
    ".dcm": ("pydicom", dicoms),
    ".nii.gz": ("nibabel", niftis),
    ".nii": ("nibabel", unpacked_niftis),
    ".mha": ("SimpleITK", mhas),
    ".nrrd": ("SimpleITK", nrrds),
    ".mhd": ("SimpleITK", mhds),
    ".nhdr": ("SimpleITK", nhdrs),
    ".hdr": ("nibabel", pairs),
    ".hdr.gz": ("nibabel", packed_pairs),
    ".png": ("PIL", pngs),
    ".jpg": ("PIL", jpgs),
    ".tif": ("PIL", tifs),
    ".bmp": ("PIL", bmps),
    ".jpeg": ("PIL", others),
    ".npy": ("numpy", npys),
    ".npz": ("numpy", npzs),
    ".avi": ("cv2", avis),
    ".mp4": ("cv2", mp4s),
}


@functools.cache
def files(full: bool) -> dict[tuple[str, str], tuple[bytes | tuple[bytes, bytes], tuple[str, ...]]]:
    """(suffix, name) -> bytes and right outcomes, of the formats whose libraries are installed."""
    found = {}
    for suffix, (module, make) in MAKERS.items():
        try:
            __import__(module)
        except ImportError:
            continue
        found |= {(suffix, name): (data, outcomes) for name, data, outcomes in make(full)}
    return found
