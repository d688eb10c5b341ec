"""Which files a source has, and how they are cut into chunks of work: a function of the listing alone.

A unit is what is decoded together: all DICOM files of one folder, or one file of another format. Units are in the order
of their keys' bytes, whatever the locale. A listing is kept as JSON lines, one a unit:

    {"key": "patient-3/ct", "format": "dicom", "files": [["patient-3/ct/0001.dcm", size, mtime_ns], ...]}

with paths below the root; bytes that are no UTF-8 are kept as lone surrogates.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from . import readers
from .sources import Source

CHUNK_UNITS = 64
CHUNK_BYTES = 256 * 2**20


class File(NamedTuple):
    """`path` below the root; `mtime_ns` is 0 where the content is known by a hash (packages)."""

    path: str
    size: int
    mtime_ns: int


class Unit(NamedTuple):
    key: str
    format: str
    files: tuple[File, ...]


class Chunk(NamedTuple):
    """`units` consecutive units whose lines are the `length` bytes at `offset` of the listing."""

    offset: int
    length: int
    units: int


class Listing(NamedTuple):
    """lines: one a unit, in order; ignored: what was passed over, by reason; common: the number of folders that all
    paths begin with."""

    lines: list[bytes]
    files: int
    bytes: int
    chunks: list[Chunk]
    formats: list[str]
    common: int
    ignored: dict[str, int]

    @property
    def digest(self) -> str:
        """sha256 (hex) of paths, sizes and times: another one means that the input has changed."""
        digest = hashlib.sha256()
        for line in self.lines:
            digest.update(line)
        return digest.hexdigest()


def discover(source: Source, root: Path) -> Listing:
    """The units of `source` below `root`. Links are never followed.

    ValueError, without the name of any file: no folder at `root`, one below it that cannot be listed, no file found.
    """
    ignored: Counter[str] = Counter()
    folders: dict[str, list[File]] = {}
    single: list[Unit] = []
    common: list[str] | None = None
    for file in _walk(source, root, ignored):
        parts = file.path.split("/")[:-1]
        if common is None:
            common = parts
        while common != parts[: len(common)]:
            common.pop()
        format = _format(source, root, file.path)
        if format is None:
            ignored["of no known format"] += 1
        elif format == "dicom":
            folders.setdefault("/".join(parts), []).append(file)
        else:
            single.append(Unit(file.path, format, (file,)))
    units = single + [Unit(key, "dicom", tuple(sorted(files, key=_path))) for key, files in folders.items()]
    if not units:
        seen = ", ".join(f"{count} {reason}" for reason, count in sorted(ignored.items())) or "no file at all"
        raise ValueError(f"{source.name}: expected files that its patterns name below its root; found {seen}")
    units.sort(key=lambda unit: os.fsencode(unit.key))
    lines = [json.dumps(unit, separators=(",", ":")).encode() + b"\n" for unit in map(Unit._asdict, units)]
    sizes = [sum(file.size for file in unit.files) for unit in units]
    return Listing(
        lines,
        sum(len(unit.files) for unit in units),
        sum(sizes),
        cut(zip(map(len, lines), sizes, strict=True)),
        sorted({unit.format for unit in units}),
        len(common or ()),
        dict(sorted(ignored.items())),
    )


def cut(sizes: Iterable[tuple[int, int]]) -> list[Chunk]:
    """Chunks of consecutive units: at most CHUNK_UNITS of them and CHUNK_BYTES of files, at least one unit.

    sizes: of each unit, the bytes of its line in the listing and those of its files.
    """
    chunks: list[Chunk] = []
    offset = start = units = total = 0
    for line, size in sizes:
        if units and (units == CHUNK_UNITS or total + size > CHUNK_BYTES):
            chunks.append(Chunk(start, offset - start, units))
            start, units, total = offset, 0, 0
        offset, units, total = offset + line, units + 1, total + size
    if units:
        chunks.append(Chunk(start, offset - start, units))
    return chunks


def read_units(listing: Path, chunk: Chunk) -> list[Unit]:
    """The units of one chunk."""
    with open(listing, "rb") as file:
        file.seek(chunk.offset)
        lines = file.read(chunk.length).splitlines()
    rows = map(json.loads, lines)
    return [Unit(row["key"], row["format"], tuple(File(*file) for file in row["files"])) for row in rows]


def is_unchanged(root: Path, file: File) -> bool:
    """Whether the file is still what the listing says, by size and time."""
    try:
        status = os.lstat(os.path.join(root, file.path))
    except OSError:
        return False
    return status.st_size == file.size and file.mtime_ns in (0, status.st_mtime_ns)


def _walk(source: Source, root: Path, ignored: Counter[str]) -> Iterator[File]:
    """The files that the source's patterns name, in no order."""
    if not root.is_dir():
        raise ValueError(f"{source.name}: expected its root to be a folder; there is none")
    timed = source.package is None
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_symlink():
                        ignored["symbolic links"] += 1
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(path)
                    elif not source.matches(path):
                        ignored["not named by the patterns"] += 1
                    elif entry.name.upper() == "DICOMDIR":
                        ignored["directories of DICOM files"] += 1
                    elif not entry.is_file(follow_symlinks=False):
                        ignored["no regular files"] += 1
                    else:
                        status = entry.stat(follow_symlinks=False)
                        yield File(path, status.st_size, status.st_mtime_ns if timed else 0)
        except OSError as error:
            raise ValueError(f"{source.name}: a folder below its root cannot be listed ({error.strerror})") from None


def _format(source: Source, root: Path, path: str) -> str | None:
    if source.format != "auto":
        return source.format
    format = readers.format_of(path)
    if format is None and readers.is_dicom(root / path):  # DICOM files are often called after their UID
        return "dicom"
    return format


def _path(file: File) -> bytes:
    return os.fsencode(file.path)
