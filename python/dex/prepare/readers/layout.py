"""Where the values of a NIfTI, MHA, MHD, NRRD or NHDR are: in the file itself or in a separate one.

A separate file must be given by its plain name: no folder, no list of files, no pattern.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from .files import OTHER, BoundedFile
from .stack import Refused

HEADER_BYTES = 2**16
MAX_AXES = 10  # The limit of MetaIO
_LINE = re.compile(rb"[ \t]*([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*([^\r\n]*)\r?")
_NAME = re.compile(rb"(?:\./)?([^/\\%:\x00-\x1f\x7f]{1,255})")
_ENCODINGS = {b"raw": "", b"gz": "gzip", b"gzip": "gzip", b"bz2": "bzip2", b"bzip2": "bzip2"}
_ALONG = (b"", b"domain", b"space", b"time", b"none", b"???")  # Kinds of axes other than components of a pixel


class Layout(NamedTuple):
    """kind: SimpleITK's name of the format. name: of the separate file with the values, "" if they follow the header.
    start: their first byte there, None if they are the last bytes of the file. packing: "", "zlib", "gzip" or "bzip2".
    order: of bytes, "<" or ">". interleaved: whether the components of a pixel are adjacent."""

    kind: str
    name: str
    start: int | None
    packing: str
    order: str
    interleaved: bool


def images_of(name: str) -> list[str]:
    """Possible names of the image file for a header with this name; [] if the header's file holds the image."""
    match = re.fullmatch(r"(?i)(.*\.)hdr(\.gz)?", name, re.DOTALL)
    if not match:
        return []
    return [match.group(1) + end for end in ("img", "img.gz", "IMG", "IMG.GZ")]


def layout(file: BoundedFile) -> Layout:
    """The layout in the header of an MHA or NRRD file. Raises Refused for any other format, and for a layout that is
    not supported."""
    head = file.read(HEADER_BYTES)
    return _nrrd(head, file.size) if head[:7] == b"NRRD000" else _metaimage(head)


def _metaimage(head: bytes) -> Layout:
    place, fields = 0, {}
    while True:
        line = _LINE.match(head, place)
        if line is None or head[line.end() : line.end() + 1] not in (b"\n", b""):
            raise Refused("unreadable", f"not the header of an MHA or NRRD file: {OTHER}")
        place = line.end() + 1
        name, value = line.group(1).lower(), line.group(2).strip()
        if name == b"ndims" and not (value.isdigit() and len(value) < 3 and int(value) <= MAX_AXES):
            raise Refused("unsupported", f"not between 1 and {MAX_AXES} axes; save a volume")
        if name == b"binarydata" and value[:1] not in (b"T", b"t", b"1"):
            raise Refused("unsupported", "its data are written as text; save them in binary form")
        fields[name] = value
        if name == b"elementdatafile":
            if line.group(1) != b"ElementDataFile":
                raise Refused("unsupported", "its data are in another file, oddly named; save both as one")
            break
        if b"elementdatafile" in value.lower() or place >= len(head):
            raise Refused("unreadable", f"not the header of an MHA or NRRD file: {OTHER}")
    local = value == b"LOCAL"
    packed = fields.get(b"compresseddata", b"")[:1] in (b"T", b"t", b"1")
    big = fields.get(b"binarydatabyteordermsb", fields.get(b"elementbyteordermsb", b""))[:1] in (b"T", b"t", b"1")
    skipped = fields.get(b"headersize", b"0")
    if not re.fullmatch(rb"-1|\d{1,18}", skipped) or (skipped not in (b"0", b"-1") and (local or packed)):
        raise Refused("unsupported", "its data do not follow the header; save it again as one file")
    start: int | None = place if local else int(skipped)
    if skipped == b"-1" and not packed:
        start = None
    elif skipped == b"-1":
        start = place if local else 0
    return Layout(
        "MetaImageIO", "" if local else _plain(value), start, "zlib" if packed else "", ">" if big else "<", True
    )


def _nrrd(head: bytes, size: int) -> Layout:
    end = re.search(rb"\r?\n\r?\n", head)
    lines = head[: end.start() if end else len(head)].splitlines()
    squeezed = [re.sub(rb"[ \t]", b"", line).lower() for line in lines]
    fields = dict(line.split(b":", 1) for line in squeezed if b":" in line and line[:1] != b"#")
    elsewhere = [number for number, line in enumerate(squeezed) if b"datafile" in line]
    if elsewhere and (len(elsewhere) > 1 or not squeezed[elsewhere[0]].startswith(b"datafile:")):
        raise Refused("unsupported", "its data are in another file, oddly named; save both as one")
    if end is None and (not elsewhere or size > len(head)):
        raise Refused("unreadable", "no end of the header: it is damaged or truncated; copy it again")
    if fields.get(b"encoding") not in _ENCODINGS:  # The parser of text values reads beyond its memory
        raise Refused("unsupported", "its data are written as text; save them in binary form")
    packing = _ENCODINGS[fields[b"encoding"]]
    skipped = fields.get(b"byteskip", b"0")
    if fields.get(b"lineskip", b"0") != b"0" or not re.fullmatch(rb"-1|\d{1,18}", skipped):
        raise Refused("unsupported", "its data do not follow the header; save it again as one file")
    if skipped != b"0" and (packing or not elsewhere):
        raise Refused("unsupported", "its data do not follow the header; save it again as one file")
    start = None if skipped == b"-1" else int(skipped)
    name = ""
    if elsewhere:
        name = _plain(lines[elsewhere[0]].split(b":", 1)[1].strip())
    else:
        start = end.end()
    kinds = re.search(rb"(?im)^kinds:[ \t]*([^ \t\r\n]+)", head[: end.start() if end else len(head)])
    first = kinds.group(1).lower() if kinds else b""
    order = ">" if fields.get(b"endian") == b"big" else "<"
    return Layout("NrrdImageIO", name, start, packing, order, first not in _ALONG)


def _plain(name: bytes) -> str:
    """The plain name of a file in the same folder."""
    match = _NAME.fullmatch(name)
    if match is None or match.group(1) in (b".", b"..") or name[:4].upper() == b"LIST" or name.upper() == b"LOCAL":
        raise Refused("unsupported", "its data are in another folder or in several files; save them as one file")
    return match.group(1).decode("utf-8", "surrogateescape")
