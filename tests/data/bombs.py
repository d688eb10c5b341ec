"""Small files that ask for much, of every format: name -> (bytes, reasons with which they may be refused)."""

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

MIB = 2**20


def deflated(head: bytes, count: int, bits: int = 15) -> bytes:
    """`head` and `count` MiB of zeros, compressed piece by piece; 31 bits: gzip, -15: bare."""
    compress = zlib.compressobj(1, zlib.DEFLATED, bits)
    block = bytes(MIB)
    return compress.compress(head) + b"".join(compress.compress(block) for _ in range(count)) + compress.flush()


# DICOM


def element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
    value += b"\0" * (len(value) % 2)
    if kind in (b"OB", b"SQ", b"UT"):
        return struct.pack("<HH2sHL", group, number, kind, 0, len(value)) + value
    return struct.pack("<HH2sH", group, number, kind, len(value)) + value


def dicom(syntax: str, rows: int, columns: int, frames: int, pixels: bytes, bits: int = 8, more: bytes = b"") -> bytes:
    """Explicit little endian; `pixels`: everything after the header's last element, the tag of the pixels included."""
    meta = element(2, 0x10, b"UI", syntax.encode())
    meta = b"\0" * 128 + b"DICM" + element(2, 0, b"UL", struct.pack("<L", len(meta))) + meta
    body = element(8, 0x16, b"UI", b"1.2.840.10008.5.1.4.1.1.7") + more + element(0x28, 2, b"US", struct.pack("<H", 1))
    body += element(0x28, 4, b"CS", b"MONOCHROME2") + element(0x28, 8, b"IS", str(frames).encode())
    for number, value in ((0x10, rows), (0x11, columns), (0x100, bits), (0x101, bits), (0x102, bits - 1), (0x103, 0)):
        body += element(0x28, number, b"US", struct.pack("<H", value))
    return meta + body + pixels


def native(size: int) -> bytes:
    return struct.pack("<HH2sHL", 0x7FE0, 0x10, b"OB", 0, size)


def items(*fragments: bytes) -> bytes:
    """Encapsulated pixels: an empty offset table, then an item each."""
    parts = [b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\0\0\0\0"]
    parts += [b"\xfe\xff\x00\xe0" + struct.pack("<L", len(f)) + f for f in fragments]
    return b"".join(parts) + b"\xfe\xff\xdd\xe0\0\0\0\0"


def deflated_dicom(rows: int, columns: int, frames: int) -> bytes:
    size = rows * columns * frames
    whole = dicom("1.2.840.10008.1.2.1.99", rows, columns, frames, native(size))
    start = 132 + 12 + struct.unpack("<L", whole[140:144])[0]
    return whole[:start] + deflated(whole[start:], size // MIB, -15)


def j2k(rows: int, columns: int, tile: int) -> bytes:
    """The head of a JPEG 2000 stream and one empty tile."""
    size = struct.pack(">HLLLLLLLLH", 0, columns, rows, 0, 0, tile, tile, 0, 0, 1) + b"\x07\x01\x01"
    code = b"\xff\x52" + struct.pack(">H", 12) + b"\0\0\0\x01\0\x05\x04\x04\0\x01"
    quantisation = b"\xff\x5c" + struct.pack(">H", 19) + b"\x40" + b"\x40" * 16
    first = b"\xff\x90" + struct.pack(">HHLBB", 10, 0, 14, 0, 1) + b"\xff\x93"
    return b"\xff\x4f\xff\x51" + struct.pack(">H", 2 + len(size)) + size + code + quantisation + first + b"\xff\xd9"


def jpeg_ls(rows: int, columns: int) -> bytes:
    frame = struct.pack(">BHHBBBB", 8, rows, columns, 1, 1, 0x11, 0)
    return (
        b"\xff\xd8\xff\xf7" + struct.pack(">H", 2 + len(frame)) + frame + b"\xff\xda\x00\x08\x01\x01\x00\0\0\0\xff\xd9"
    )


def dicoms() -> Iterator[tuple[str, bytes, str]]:
    explicit, lossless, loco, rle = (f"1.2.840.10008.1.2.{s}" for s in ("1", "4.90", "4.80", "5"))
    yield "deflated-frame", deflated_dicom(16384, 32768, 1), "too large"
    yield "deflated-frames", deflated_dicom(1024, 1024, 512), "too large"
    yield "native-lies", dicom(explicit, 6000, 6000, 1000, native(36) + bytes(36)), "unreadable"
    yield "j2k-empty", dicom(lossless, 6000, 6000, 1, items(j2k(6000, 6000, 6000))), "unreadable, too large"
    yield "j2k-tiles", dicom(lossless, 6000, 6000, 1, items(j2k(6000, 6000, 1))), "unreadable, too large"
    yield "j2k-lies", dicom(lossless, 64, 64, 1, items(j2k(60000, 60000, 60000))), "inconsistent"
    yield "j2k-frames", dicom(lossless, 64, 64, 10**9, items(j2k(64, 64, 64))), "too large"
    yield "j2k-missing", dicom(lossless, 64, 64, 40_000, items(*[b""] * 40_000)), "unreadable"
    yield "jpeg-ls-empty", dicom(loco, 4000, 4000, 1, items(jpeg_ls(4000, 4000))), "unreadable, "
    yield "jpeg-ls-lies", dicom(loco, 64, 64, 1, items(jpeg_ls(60000, 60000))), "inconsistent"
    segments = struct.pack("<16L", 1, 64, *[0] * 14)
    yield "rle-short", dicom(rle, 6000, 6000, 1, items(segments + b"\x81\0" * 40)), "unreadable"
    yield "rle-long", dicom(rle, 64, 64, 1, items(segments + b"\x81\0" * 10**6)), "unreadable, "
    depth = 100_000
    nested = b"\x40\x00\x75\x02SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * depth
    yield "nested", dicom(explicit, 64, 64, 1, native(4096) + bytes(4096), more=nested), "unreadable, too large"
    huge = struct.pack("<HH2sHL", 0x0040, 0x0275, b"OB", 0, 0xFFFFFFF0)
    yield "element", dicom(explicit, 64, 64, 1, native(4096) + bytes(4096), more=huge), "no image"


# Volumes


def nifti(shape: tuple[int, ...], dtype: type) -> bytes:
    import nibabel

    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header["magic"], header["vox_offset"] = b"n+1", 352
    return header.binaryblock + bytes(4)


def niftis() -> Iterator[tuple[str, bytes, str]]:
    yield "declares", deflated(nifti((1024, 1024, 600), np.int16), 1, 31), "too large"
    yield "short", deflated(nifti((1024, 1024, 200), np.int16), 1, 31), "unreadable"
    yield "wide", deflated(nifti((32767, 32767, 1), np.uint8), 1, 31), "too large"
    member = gzip.compress(bytes(MIB), mtime=0)
    yield "members", gzip.compress(nifti((512, 512, 600), np.int16), mtime=0) + member * 700, "too large, "
    yield "endless", deflated(nifti((64, 64, 4), np.int16), 700, 31), ""


def mha(sizes: str, compressed: bool, data: bytes) -> bytes:
    text = f"ObjectType = Image\nNDims = {len(sizes.split())}\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
    if compressed:
        text += f"CompressedData = True\nCompressedDataSize = {len(data)}\n"
    return f"{text}DimSize = {sizes}\nElementType = MET_USHORT\nElementDataFile = LOCAL\n".encode() + data


def nrrd(sizes: str, encoding: str, data: bytes) -> bytes:
    text = f"NRRD0004\ntype: unsigned short\ndimension: {len(sizes.split())}\nsizes: {sizes}\nendian: little\n"
    return f"{text}encoding: {encoding}\n\n".encode() + data


def mhas() -> Iterator[tuple[str, bytes, str]]:
    yield "wide", mha("30000 30000 1", False, b"\0" * 100), "too large"
    yield "declares", mha("1024 1024 600", False, b"\0" * 100), "too large"
    yield "short", mha("1024 1024 100", False, b"\0" * 100), "unreadable"
    yield "short-packed", mha("1024 1024 90", True, deflated(b"", 1)), "unreadable, "
    yield "overfull", mha("1024 1024 4", True, deflated(b"", 700)), "unreadable, "
    yield "axes", mha("2 " * 200, False, b"\0" * 100), "unreadable, unsupported"


def nrrds() -> Iterator[tuple[str, bytes, str]]:
    yield "wide", nrrd("30000 30000 1", "raw", b"\0" * 100), "too large"
    yield "declares", nrrd("1024 1024 600", "raw", b"\0" * 100), "too large"
    yield "short", nrrd("1024 1024 100", "raw", b"\0" * 100), "unreadable"
    yield "short-packed", nrrd("1024 1024 90", "gzip", deflated(b"", 1, 31)), "unreadable, "
    yield "overfull", nrrd("1024 1024 4", "gzip", deflated(b"", 700, 31)), "unreadable, "
    yield "text", nrrd("1024 1024 90", "ascii", b"1 " * 1000), "unreadable, "


# Pictures and arrays


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """A sound PNG with one chunk more, before its pixels."""
    stream = io.BytesIO()
    Image.new("L", (64, 64), 90).save(stream, "PNG")
    return stream.getvalue()[:33] + chunk(kind, data) + stream.getvalue()[33:]


def pngs() -> Iterator[tuple[str, bytes, str]]:
    stream = io.BytesIO()
    Image.new("1", (16000, 16000)).save(stream, "PNG")
    yield "wide", stream.getvalue(), "too large"
    head = chunk(b"IHDR", struct.pack(">LLBBBBB", 6000, 6000, 8, 6, 0, 0, 0))
    start = b"\x89PNG\r\n\x1a\n" + head
    yield "short", start + chunk(b"IDAT", deflated(b"", 1)) + chunk(b"IEND", b""), "unreadable, "
    yield "overfull", with_chunk(b"IDAT", deflated(b"", 700)), "unreadable, "
    text = deflated(b"", 700)
    yield "ztxt", with_chunk(b"zTXt", b"Comment\0\0" + text), "unreadable, "
    yield "itxt", with_chunk(b"iTXt", b"Comment\0\1\0\0\0" + text), "unreadable, "
    yield "iccp", with_chunk(b"iCCP", b"icc\0\0" + text), "unreadable, "
    yield "chunks", with_chunk(b"tEXt", b"a\0b")[:33] + chunk(b"tEXt", b"a\0" + b"b" * 900) * 20_000, "unreadable, "


def jpgs() -> Iterator[tuple[str, bytes, str]]:
    stream = io.BytesIO()
    Image.new("L", (4000, 4000), 90).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last = data.rindex(b"\xff\xda")
    yield "scans", data[:-2] + data[last:-2] * 60 + b"\xff\xd9", ""
    frame = data.index(b"\xff\xc2") + 5
    yield "wide", data[:frame] + struct.pack(">HH", 60000, 60000) + data[frame + 4 :], "too large"


def tifs() -> Iterator[tuple[str, bytes, str]]:
    stream = io.BytesIO()
    Image.new("1", (16000, 16000)).save(stream, "TIFF", compression="group4")
    yield "wide", stream.getvalue(), "too large"

    def tiff(entries: list[tuple[int, int, int, int]], following: int, place: int = 8) -> bytes:
        body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHLL", *e) for e in entries)
        return body + struct.pack("<L", following)

    def page(following: int, rows: int = 64, strips: int = 1, bytes_: int = 4096) -> bytes:
        entries = [(256, 4, 1, 64), (257, 4, 1, rows), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
        entries += [(273, 4, strips, 8), (277, 3, 1, 1), (278, 4, 1, rows), (279, 4, strips, bytes_)]
        return tiff(entries, following)

    head = b"II*\0"
    at = 8 + 4096
    one = len(page(0))
    chain = b"".join(page(at + (i + 1) * one) for i in range(5_000)) + page(0)
    yield "pages", head + struct.pack("<L", at) + bytes(4096) + chain, "too large"
    yield "ring", head + struct.pack("<L", at) + bytes(4096) + page(at + one) + page(at), "too large, unreadable, "
    yield "strips", head + struct.pack("<L", at) + bytes(4096) + page(0, strips=10**9), "unreadable, too large"
    yield (
        "strip",
        head + struct.pack("<L", at) + bytes(4096) + page(0, rows=600_000, bytes_=2**31),
        "unreadable, too large",
    )


def bmps() -> Iterator[tuple[str, bytes, str]]:
    def bmp(side: int, bits: int, compression: int, data: bytes) -> bytes:
        info = struct.pack("<LllHHLLllLL", 40, side, side, 1, bits, compression, 0, 0, 0, 256 if bits == 8 else 0, 0)
        table = b"".join(bytes((i, i, i, 0)) for i in range(256)) if bits == 8 else b""
        start = 14 + len(info) + len(table)
        return b"BM" + struct.pack("<LHHL", start + len(data), 0, 0, start) + info + table + data

    yield "wide", bmp(20000, 24, 0, b"\0" * 100), "too large"
    yield "short", bmp(6000, 24, 0, b"\0" * 100), "unreadable"
    yield "runs", bmp(6000, 8, 1, b"\xff\x07" * 1000), "unreadable, "
    yield "skips", bmp(6000, 8, 1, b"\0\2\0\xff" * 200_000 + b"\0\1"), "unreadable, "


def npy(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def npys() -> Iterator[tuple[str, bytes, str]]:
    yield "declares", npy((200000, 200000)) + bytes(16), "unreadable"
    yield "axes", npy((1,) * 30) + bytes(4), "unsupported, unreadable"
    yield "header", b"\x93NUMPY\x02\x00" + struct.pack("<L", 2**31) + b"{" * 1000, "unreadable, too large"


def npzs() -> Iterator[tuple[str, bytes, str]]:
    def archive(members: list[tuple[str, bytes]]) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as zip:
            for name, data in members:
                zip.writestr(name, data)
        return stream.getvalue()

    yield "declares", archive([("a.npy", npy((1000, 1000, 150)) + bytes(600 * 10**6))]), "too large"
    yield "lies", archive([("a.npy", npy((64, 64)) + bytes(600 * MIB))]), "too large, unreadable"
    yield "members", archive([(f"{i}.npy", b"") for i in range(70_000)]), "too large, unreadable, unsupported"


# Video


def avi(width: int, height: int, frames: int, frame: bytes, real: int) -> bytes:
    """MJPG; `real` frames of the `frames` declared."""

    def part(kind: bytes, data: bytes) -> bytes:
        return kind + struct.pack("<L", len(data)) + data + b"\0" * (len(data) % 2)

    head = struct.pack("<14L", 40000, 0, 0, 16, frames, 0, 1, 0, width, height, 0, 0, 0, 0)
    stream = b"vidsMJPG" + struct.pack("<LHHLLLLLLLLHHHH", 0, 0, 0, 0, 1, 25, 0, frames, 0, 0, 0, 0, 0, 0, 0)
    form = struct.pack("<LllHH4sLllLL", 40, width, height, 1, 24, b"MJPG", 0, 0, 0, 0, 0)
    lists = part(b"LIST", b"strl" + part(b"strh", stream) + part(b"strf", form))
    movie = part(b"LIST", b"movi" + part(b"00dc", frame) * real)
    return part(b"RIFF", b"AVI " + part(b"LIST", b"hdrl" + part(b"avih", head) + lists) + movie)


def avis() -> Iterator[tuple[str, bytes, str]]:
    def jpeg(side: int) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (side, side), (90, 80, 70)).save(stream, "JPEG")
        return stream.getvalue()

    yield "wide", avi(30000, 30000, 10, jpeg(64), 10), "too large"
    yield "lies", avi(64, 64, 10, jpeg(8000), 4), "too large, unreadable, inconsistent"
    yield "declares", avi(64, 64, 2**31 - 1, jpeg(64), 2), "unreadable, "
    yield "nothing", avi(64, 64, 10**6, b"", 10**6), "no image"


MAKERS = {
    ".dcm": dicoms,
    ".nii.gz": niftis,
    ".mha": mhas,
    ".nrrd": nrrds,
    ".png": pngs,
    ".jpg": jpgs,
    ".tif": tifs,
    ".bmp": bmps,
    ".npy": npys,
    ".npz": npzs,
    ".avi": avis,
}
"""Suffix -> its bombs: name, bytes, reasons of refusal, separated by ", "; "" among them: may be read."""
