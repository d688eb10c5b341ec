"""NIfTI, MHA and NRRD that ask for much."""

import bz2
import gzip
import struct
from collections.abc import Iterator

import numpy as np
from costly_parts import BROKEN, LARGE, MIB, READ, One, zeros


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
    yield "declares 1.2 GB", mha("1024 1024 600", bytes(100)), BROKEN
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
    yield "declares 1.2 GB", nrrd("1024 1024 600", "raw", bytes(100)), BROKEN
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
    """``count`` MiB, as streams one after the other."""
    return bz2.compress(bytes(4 * MIB)) * (count // 4)


def mhds(full: bool) -> Iterator[One]:
    small = np.arange(64 * 64 * 4, dtype=np.uint16).tobytes()

    def head(sizes: str, lines: str = "", name: str = "x.raw") -> bytes:
        return mha(sizes, b"", lines=lines).replace(b"LOCAL", name.encode())

    packed = "CompressedData = True\n"
    yield "declares 1.2 GB", (head("1024 1024 600"), bytes(100)), BROKEN
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

    yield "declares 1.2 GB", (head("1024 1024 600", "raw"), bytes(100)), BROKEN
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
