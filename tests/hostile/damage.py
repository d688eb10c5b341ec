"""Ways to damage a file, each a function of (bytes, another file's bytes, random numbers) to bytes: sixteen that know
nothing of its format (KINDS), and for each format some that change what its parts say of each other (STRUCTURED)."""

import gzip
import io
import random
import re
import struct
import warnings
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


# What follows leaves the data as they are given where the file has no such part: another draw finds one.

_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE = b"\xfe\xff\x00\xe0", b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0"
_LONG = re.compile(rb"(?:OB|OW|SQ|UN|UT)\0\0(....)", re.DOTALL)
_SHORT = re.compile(rb"(?:US|UI|IS|DS|CS|LO|PN|SH|UL|DA|TM)(..)[\0-9A-Z ]", re.DOTALL)
_SYNTAX = re.compile(rb"\x02\0\x10\0UI(..)(1\.2\.840\.10008\.1\.2[0-9.]*\0?)", re.DOTALL)
_SYNTAXES = (
    ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"]
    + [f"1.2.840.10008.1.2.4.{end}" for end in (50, 51, 57, 70, 80, 81, 90, 91, 100, 201)]
    + ["", "1.2", "1.2.840.10008.1.2.4.9999"]
)
_SIZES = (0, 1, 2, 7, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)


def length_of_an_element(data: bytes, other: bytes, draw: random.Random) -> bytes:
    found = list((_LONG if draw.random() < 0.6 else _SHORT).finditer(data))
    if not found:
        return data
    start, end = draw.choice(found).span(1)
    return data[:start] + (draw.choice(_SIZES) % 256 ** (end - start)).to_bytes(end - start, "little") + data[end:]


def length_of_an_item(data: bytes, other: bytes, draw: random.Random) -> bytes:
    return _near(data, _ITEM, 4, struct.pack("<L", draw.choice(_SIZES)), draw)


def delimiter(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """One of an item, its end or a sequence's end becomes another, is lost or comes twice."""
    marks = (_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE)
    found = [match.start() for mark in marks for match in re.finditer(re.escape(mark), data)]
    if not found:
        return data
    at, how = draw.choice(found), draw.randrange(3)
    if how == 0:
        return data[:at] + draw.choice(marks) + data[at + 4 :]
    return data[:at] + data[at : at + 8] * (0 if how == 1 else draw.choice((2, 50))) + data[at + 8 :]


def offsets_of_fragments(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """The table at the beginning of compressed pixels: any numbers, of any count, of any length said."""
    at = data.find(b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff" + _ITEM)
    if at < 0:
        return data
    at += 16
    table = b"".join(struct.pack("<L", draw.choice((*_SIZES, 8, 100))) for _ in range(draw.choice((0, 1, 2, 3, 100))))
    said = len(table) if draw.random() < 0.7 else draw.choice(_SIZES)
    return data[:at] + struct.pack("<L", said) + table + data[at + 4 + struct.unpack("<L", data[at : at + 4])[0] :]


def fragments(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """One is lost, comes twice, is torn or is another file's bytes."""
    at = data.find(b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff" + _ITEM)
    found = [match.start() for match in re.finditer(re.escape(_ITEM), data) if match.start() > at + 12]
    if at < 0 or not found:
        return data
    at = draw.choice(found)
    size = struct.unpack("<L", data[at + 4 : at + 8])[0]
    whole, end = data[at : at + 8 + size], at + 8 + size
    torn = draw.randrange(0, max(2, size), 2)

    def item(part: bytes) -> bytes:
        return _ITEM + struct.pack("<L", len(part)) + part

    parts = (b"", whole * 2, item(whole[8 : 8 + torn]) + item(whole[8 + torn :]), item(other[: len(other) // 2 * 2]))
    return data[:at] + draw.choice(parts) + data[end:]


def nested(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """A sequence before the first element, as deep, as long and as wrongly closed as may be."""
    found = _SYNTAX.search(data)
    if not found:
        return data
    at = data.find(b"\x08\0", found.end())
    tag = draw.choice((b"\x08\0\x40\x11", b"\0\x52\x30\x92", b"\0\x52\x29\x92", b"\x28\0\x00\x30"))
    depth, unknown = draw.choice((1, 3, 900, 5000)), draw.random() < 0.5
    begin = tag + b"SQ\0\0" + (b"\xff" * 4 if unknown else struct.pack("<L", draw.choice(_SIZES)))
    begin += _ITEM + (b"\xff" * 4 if draw.random() < 0.5 else struct.pack("<L", draw.choice(_SIZES)))
    end = (_END_OF_ITEM + bytes(4) + _END_OF_SEQUENCE + bytes(4)) * draw.choice((0, 1, depth))
    return data[:at] + begin * depth + end + data[at:]


def another_syntax(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """The data are packed in another way than the header says."""
    found = _SYNTAX.search(data)
    if not found:
        return data
    uid = draw.choice(_SYNTAXES).encode()
    uid += b"\0" * (len(uid) % 2)
    return data[: found.start(1)] + struct.pack("<H", len(uid)) + uid + data[found.end() :]


def sides_of_nifti(data: bytes, other: bytes, draw: random.Random) -> bytes:
    two = data[:4] == b"\x1c\x02\0\0"
    at = (16 if two else 40) + draw.randrange(8) * (8 if two else 2)
    number = draw.choice((0, 1, 2, 3, 5, 7, 8, 255, 1000, 32767, -1, -32768))
    return _put(data, at, struct.pack("<q" if two else "<h", number))


def type_of_nifti(data: bytes, other: bytes, draw: random.Random) -> bytes:
    two = data[:4] == b"\x1c\x02\0\0"
    at = (12 if two else 70) + draw.choice((0, 0, 2))
    return _put(
        data, at, struct.pack("<h", draw.choice((0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1536, 2304, -1)))
    )


def place_of_nifti(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Where the numbers begin, what they are multiplied with, and where the axes point."""
    two = data[:4] == b"\x1c\x02\0\0"
    if draw.random() < 0.5:
        number = draw.choice((0, 1, 347, 351, 353, 540, 1000, 2**26, 2**30, -16))
        return _put(data, 168, struct.pack("<q", number)) if two else _put(data, 108, struct.pack("<f", number))
    form, at = (
        ("<d", draw.randrange(104, 168, 8)) if two else ("<f", draw.choice((76, 80, 112, 116, 256, 280, 296, 312)))
    )
    return _put(data, at, struct.pack(form, draw.choice((0, -1, 1e-30, 1e30, float("nan"), float("inf")))))


def packing(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Packed where it should not be, packed twice, not packed, or several members in one."""
    plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    at = draw.randrange(len(plain))
    members = gzip.compress(plain[:at], mtime=0) + gzip.compress(plain[at:], mtime=0)
    once = gzip.compress(plain, mtime=0)
    return draw.choice(
        (plain, once, gzip.compress(once), zlib.compress(plain), members, members[:-9], once + plain[:50])
    )


_FIELDS = {
    b"CompressedData": (b"True", b"False", b""),
    b"CompressedDataSize": (b"0", b"-1", b"1", b"99999999999"),
    b"BinaryData": (b"True", b"False"),
    b"BinaryDataByteOrderMSB": (b"True", b"False"),
    b"ElementType": (b"MET_UCHAR", b"MET_DOUBLE", b"MET_LONG_LONG", b"MET_USHORT_ARRAY", b"MET_NONE"),
    b"NDims": (b"0", b"1", b"2", b"4", b"10", b"11", b"-3"),
    b"DimSize": (b"48 48", b"48 48 4 4", b"0 48 4", b"48 -48 4", b"99999 99999 9", b"48"),
    b"ElementNumberOfChannels": (b"0", b"3", b"-1", b"999"),
    b"ElementDataFile": (b"LIST", b"LOCAL ", b"local", b"../x.raw", b"/dev/zero", b"x%03d.raw 1 9 1"),
    b"ElementByteOrderMSB": (b"True", b"False", b"maybe"),
    b"HeaderSize": (b"0", b"-1", b"100", b"999999"),
    b"encoding": (b"raw", b"gzip", b"bzip2", b"ascii", b"hex", b"zrl", b"none"),
    b"type": (b"uchar", b"double", b"block", b"int64", b"float"),
    b"sizes": (b"48 48", b"48 48 4 4", b"0 48 4", b"48 -48 4", b"99999 99999 9"),
    b"dimension": (b"0", b"1", b"2", b"4", b"16", b"17", b"-3"),
    b"endian": (b"big", b"little", b"middle"),
    b"kinds": (b"vector domain domain", b"domain domain", b"RGB-color domain domain"),
    b"data file": (b"/dev/zero", b"../x.raw", b"LIST", b"x%03d.raw 1 9 1"),
    b"byte skip": (b"-1", b"99999999", b"3"),
    b"line skip": (b"-1", b"99999999", b"3"),
}
_NRRD_ONLY = tuple(name for name in _FIELDS if name[:1].islower())


def field_of_a_volume(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """A line of an MHA's or NRRD's header says another thing, or one more line does."""
    nrrd = data[:4] == b"NRRD"
    name = draw.choice([name for name in _FIELDS if (name in _NRRD_ONLY) == nrrd])
    line = name + (b": " if nrrd else b" = ") + draw.choice(_FIELDS[name]) + b"\n"
    found = re.search(rb"(?m)^" + name + rb" ?[:=].*\n", data[:4096])
    if found and draw.random() < 0.8:
        return data[: found.start()] + line + data[found.end() :]
    at = data.index(b"\n") + 1
    return data[:at] + line + data[at:]


def data_of_a_volume(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Packed data where the header says plain, and the reverse."""
    end = re.search(rb"\n\n|LOCAL\n", data)
    if not end:
        return data
    head, body = data[: end.end()], data[end.end() :]
    for unpack in (gzip.decompress, zlib.decompress):
        try:
            body = unpack(body)
            break
        except (OSError, EOFError, zlib.error):
            pass
    more = draw.choice((body, body[: len(body) // 2], body * 3))
    return head + draw.choice((more, gzip.compress(more), zlib.compress(more), zlib.compress(more)[:-5]))


def member_of_an_archive(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Names that lead elsewhere, links, twins, folders, and what the two headers of a member say of each other."""
    names = ("../a.npy", "/tmp/a.npy", "a/../../a.npy", "C:\\a.npy", "a\nb.npy", "a" * 5000 + ".npy", ".npy", "a.npy/")
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            info = zipfile.ZipInfo(draw.choice((name, *names)))
            info.external_attr = draw.choice((0, 0o120777, 0o020666, 0o040755)) << 16
            info.compress_type = draw.choice(
                (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for _ in range(draw.choice((1, 1, 2))):
                    new.writestr(info, draw.choice((old.read(name), b"/etc/passwd", old.read(name)[:-3])))
    data = stream.getvalue()
    if draw.random() < 0.5:
        return data
    place = draw.choice([match.start() for match in re.finditer(rb"PK(?:\x01\x02|\x03\x04|\x05\x06)", data)])
    return _put(
        data, place + draw.randrange(4, 22, 2), struct.pack("<H", draw.choice((0, 1, 8, 9, 99, 2**15, 2**16 - 1)))
    )


def tag_of_a_tiff(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Kind, count or value of one entry of the first directory, or where the next one is."""
    order = "<" if data[:2] == b"II" else ">"
    at = struct.unpack(order + "L", data[4:8])[0]
    if at + 2 > len(data):
        return data
    count = struct.unpack(order + "H", data[at : at + 2])[0]
    if draw.random() < 0.2:
        return _put(
            data, at + 2 + 12 * count, struct.pack(order + "L", draw.choice((8, at, at + 12, len(data), 2**31)))
        )
    at += 2 + 12 * draw.randrange(max(1, count)) + draw.choice((0, 2, 4, 8))
    return _put(data, at, struct.pack(order + "L", draw.choice((*_SIZES, 3, 8, 254, 256, 273, 4 << 16, 1 << 16))))


def chunks_of_a_png(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Chunks in another order, twice, lost, or under another name; their checksums fit."""
    parts, at = [], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        parts.append(data[at : at + 12 + length])
        at += 12 + length
    one, how = draw.randrange(len(parts)), draw.randrange(4)
    if how == 0:
        draw.shuffle(parts)
    elif how == 1:
        parts.insert(draw.randrange(len(parts)), parts[one] * draw.choice((1, 100)))
    elif how == 2:
        del parts[one]
    else:
        kind = draw.choice(
            (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"eXIf", b"zTXt", b"acTL", b"fdAT", b"gAMA")
        )
        parts[one] = parts[one][:4] + kind + parts[one][8:]
    return _checked_again(data[:8] + b"".join(parts))


_DICOM = (
    length_of_an_element,
    length_of_an_item,
    delimiter,
    offsets_of_fragments,
    fragments,
    nested,
    another_syntax,
)
_NIFTI = (sides_of_nifti, type_of_nifti, place_of_nifti)
STRUCTURED = {
    ".dcm": _DICOM,
    ".nii": (*_NIFTI, packing),
    ".nii.gz": (*_NIFTI, packing),
    ".hdr": _NIFTI,
    ".mhd": (field_of_a_volume,),
    ".nhdr": (field_of_a_volume,),
    ".mha": (field_of_a_volume, data_of_a_volume),
    ".nrrd": (field_of_a_volume, data_of_a_volume),
    ".npz": (member_of_an_archive,),
    ".tif": (tag_of_a_tiff,),
    ".png": (chunks_of_a_png,),
}
"""Suffix -> what is known of its parts. `packing` and what is done to an archive are for the file, all else within."""
WHOLE = (packing, member_of_an_archive, data_of_a_volume, chunks_of_a_png)


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


def _put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _near(data: bytes, mark: bytes, after: int, new: bytes, draw: random.Random) -> bytes:
    """`new`, `after` bytes behind one of the places where `mark` is."""
    found = [match.start() for match in re.finditer(re.escape(mark), data)]
    return _put(data, draw.choice(found) + after, new) if found else data


def _fill(data: bytes, byte: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    length = min(draw.choice((1, 4, 64, 4096)), len(data) - at)
    return data[:at] + byte * length + data[at + length :]
