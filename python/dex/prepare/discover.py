"""The files of a source and their division into chunks of work: a function of the listing alone.

A unit is decoded as a whole: all DICOM files of one folder, or one file of another format, followed by the separate
file with its data if there is one (``readers`` says which formats are read by folder). Units are sorted by the bytes of
their keys, whatever the locale. A folder with very many files is ``large``: ``parted`` replaces it by its series, which
only the headers tell. A listing is stored as JSON lines, one per unit:

    {"key": "patient-3/ct", "format": "dicom", "files": [["patient-3/ct/0001.dcm", size, mtime_ns], ...]}

with paths below the root; bytes that are not UTF-8 are stored as lone surrogates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import readers
from .folders import Level, Place, level_of
from .label_maps import suspicious
from .modalities import Modality, known
from .packages import compile_globs
from .sources import AUTO, BY_FOLDER, FROM_FOLDERS, Source
from .stated import Rest, Stated, Statements
from .trace import json_line

CHUNK_UNITS = 64
CHUNK_BYTES = 256 * 2**20
LARGE = 2000
"""A folder with more files than this that are read together is divided into its series before it is cut into chunks."""
UNKNOWN = "of no known format"
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
_NO_SUFFIX = "without suffix"
_SUFFIX = re.compile(r"\.(?:[a-z][a-z0-9]{0,7}|[A-Z][A-Z0-9]{0,3})")
"""A suffix that may be shown; others may be parts of names."""


class File(NamedTuple):
    """``path`` below the root; ``mtime_ns`` is 0 if a hash identifies the content (packages)."""

    path: str
    size: int
    mtime_ns: int


class Unit(NamedTuple):
    key: str
    format: str
    files: tuple[File, ...]
    stated: Stated = Stated()

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(file.size for file in self.files)


class Chunk(NamedTuple):
    """``units`` consecutive units whose lines are the ``length`` bytes at ``offset`` of the listing."""

    offset: int
    length: int
    units: int


class Listing(NamedTuple):
    """lines: one per unit, in order; sizes: total bytes of each unit's files; digest: SHA-256 (hex) of paths, sizes and
    times, which changes with the input; large: the numbers of the units that ``parted`` divides; common: the number of
    leading folders that all paths share; ignored: counts of skipped files, by reason; passed_over: path -> reason of
    each skipped file; level: the folder that tells patients apart; rest: the sides of files that the units do not
    give."""

    lines: list[bytes]
    sizes: list[int]
    digest: str
    large: list[int]
    files: int
    formats: list[str]
    common: int
    ignored: dict[str, int]
    passed_over: dict[str, str]
    level: Level
    rest: Rest

    @property
    def chunks(self) -> list[Chunk]:
        return cut(zip(map(len, self.lines), self.sizes, strict=True))

    def unit(self, number: int) -> Unit:
        return _unit(self.lines[number])


class Undetermined(ValueError):
    """Files whose modality neither a header nor the description names. suffixes: theirs; by_folders: whether their
    folders are named after their modalities; patterns: by suffix and depth, match these files and none whose modality a
    folder names; unnamed: suffixes for which there are no such patterns."""

    def __init__(
        self,
        source: str,
        suffixes: Counter[str],
        by_folders: bool,
        patterns: Sequence[str] = (),
        unnamed: Sequence[str] = (),
    ):
        listed = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(suffixes.items()))
        super().__init__(f"{source}: expected files whose modality a header or the command names, got {listed} of none")
        self.suffixes: list[str] = sorted(suffixes)
        self.by_folders: bool = by_folders
        self.patterns: list[str] = list(patterns)
        self.unnamed: list[str] = list(unnamed)


def discover(source: Source, root: Path) -> Listing:
    """The units of ``source`` below ``root``. Links are never followed.

    Raises ValueError, without the name of any file, if ``root`` is not a folder, if a folder below it cannot be listed,
    and if there is no file.
    """
    passed_over: dict[str, str] = {}  # Path -> reason
    folders: dict[tuple[str, str], dict[Stated, list[File]]] = {}  # (path, format)
    statements = Statements(source, root)
    single: list[Unit] = []
    data: set[str] = set()
    common: list[str] | None = None
    for file in _walk(source, root, passed_over) if source.table is None else _listed(source, statements):
        parts = file.path.split("/")[:-1]
        if common is None:
            common = parts
        while common != parts[: len(common)]:
            common.pop()
        format = _format(source, root, file.path)
        if format is None:
            archive = file.path.lower().endswith(_ARCHIVES)
            passed_over[file.path] = "archives, to be unpacked first" if archive else UNKNOWN
        elif readers.reader_of(format).whole_folders:
            folders.setdefault(("/".join(parts), format), {}).setdefault(statements.of(file.path), []).append(file)
        else:
            others = _beside(source, root, file.path, format)
            single.append(Unit(file.path, format, (file, *others), statements.of(file.path)))
            data.update(other.path for other in others)
    for path in data:
        passed_over.pop(path, None)
    ignored = Counter(passed_over.values())
    if statements.columns:
        ignored[f"columns ({', '.join(statements.columns)})"] = len(statements.columns)
    # If the description gives one format for all files, a data file was also listed as a unit of its own.
    single = [unit for unit in single if unit.key not in data or readers.format_of(unit.key) is not None]
    units = single
    units += [unit for (key, format), by_stated in folders.items() for unit in _of_folder(key, format, by_stated)]
    if not units:
        seen = ", ".join(f"{count} {reason}" for reason, count in sorted(ignored.items())) or "no file at all"
        raise ValueError(f"{source.name}: expected files that match its patterns below its root, got {seen}")
    units.sort(key=lambda unit: (os.fsencode(unit.key), unit.format))
    lines = [_line(unit) for unit in units]
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line)
    rest = statements.rest(any(readers.reader_of(unit.format).decides for unit in units))
    if rest.sides:
        digest.update(json.dumps(rest).encode())
    return Listing(
        lines,
        [unit.size for unit in units],
        digest.hexdigest(),
        [number for number, unit in enumerate(units) if _is_large(unit)],
        sum(len(unit.files) for unit in units),
        sorted({unit.format for unit in units}),
        len(common or ()),
        dict(sorted(ignored.items())),
        passed_over,
        _level(source, units, len(common or ())),
        rest,
    )


def passed_over_counts(listing: Listing) -> dict[str, int]:
    """The number of files outside all units, by reason; those of unknown format by suffix."""
    counts: Counter[str] = Counter()
    for path, reason in listing.passed_over.items():
        counts[_shown_suffix(path) if reason == UNKNOWN else reason] += 1
    return dict(sorted(counts.items()))


def _shown_suffix(path: str) -> str:
    suffix = os.path.splitext(path)[1]
    if _SUFFIX.fullmatch(suffix):
        return suffix.lower()
    return "other suffixes" if any(map(str.isalpha, suffix)) else "without a suffix"


def check_modalities(source: Source, listing: Listing) -> None:
    """Raise Undetermined if neither the header nor the description can give a file its modality. Files named like label
    maps may have none: their values decide later."""
    if not source.routed:
        return
    by_folders, by_routes = (dataclasses.replace(source, modality=name) for name in (FROM_FOLDERS, AUTO))
    unknown, others = [], []
    for unit in map(listing.unit, range(len(listing.lines))):
        path = unit.files[0].path
        if readers.reader_of(unit.format).decides:
            continue
        if modality_of(source, unit) is None:
            unknown += [] if suspicious(unit.key) else [path]
        elif not unit.stated.modality and by_routes.modality_of(path) is None:
            others.append(path)
    if unknown:
        patterns, unnamed = _patterns(unknown, others)
        raise Undetermined(
            source.name,
            Counter(map(_suffix, unknown)),
            all(by_folders.modality_of(path) for path in unknown),
            patterns,
            unnamed,
        )


def _patterns(unknown: Sequence[str], others: Sequence[str]) -> tuple[list[str], list[str]]:
    """Patterns that match ``unknown`` by suffix, or by suffix and depth, and none of ``others``; and the suffixes
    without such a pattern. A pattern overrides a folder's name, so one that is too wide would change modalities; a
    folder's name is in none, as it may be a patient's."""
    patterns, unnamed = [], []
    for suffix in sorted(set(map(_suffix, unknown))):  # "." is before "w": the widest pattern comes last
        end = "" if suffix == _NO_SUFFIX else suffix
        depths = sorted({path.count("/") for path in unknown if _suffix(path) == suffix})
        for tried in ([f"**/*{end}"], [f"{'*/' * depth}*{end}" for depth in depths]):
            matcher = compile_globs(tried)
            if not any(matcher.match(path) for path in others):
                patterns += tried
                break
        else:
            unnamed.append(suffix)
    return patterns, unnamed


def modality_of(source: Source, unit: Unit) -> Modality | None:
    """The modality that a table or the description gives a unit, whatever its header says; None if neither does."""
    return known(unit.stated.modality) if unit.stated.modality else source.modality_of(unit.files[0].path)


def parted(listing: Listing, series: Sequence[Sequence[str]]) -> Listing:
    """The listing with each large unit replaced by one unit per series, named by its first file.

    series: for each large unit, in order, the name of each file's series.
    """
    lines, sizes, start = [], [], 0
    for number, names in zip(listing.large, series, strict=True):
        lines += listing.lines[start:number]
        sizes += listing.sizes[start:number]
        whole = listing.unit(number)
        by_series: dict[str, list[File]] = {}
        for file, name in zip(whole.files, names, strict=True):
            by_series.setdefault(name, []).append(file)
        for files in by_series.values():  # In the order of their first files
            unit = Unit(files[0].path, whole.format, tuple(files), whole.stated)
            lines.append(_line(unit))
            sizes.append(unit.size)
        start = number + 1
    return listing._replace(lines=lines + listing.lines[start:], sizes=sizes + listing.sizes[start:], large=[])


def cut(sizes: Iterable[tuple[int, int]]) -> list[Chunk]:
    """Chunks of consecutive units: at least one, at most CHUNK_UNITS units and CHUNK_BYTES bytes of files.

    sizes: for each unit, the bytes of its line in the listing and those of its files.
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
        return [_unit(line) for line in file.read(chunk.length).splitlines()]


def is_unchanged(root: Path, file: File) -> bool:
    """Whether the file still has the size and time of the listing."""
    try:
        status = os.lstat(os.path.join(root, file.path))
    except OSError:
        return False
    return status.st_size == file.size and file.mtime_ns in (0, status.st_mtime_ns)


def _listed(source: Source, statements: Statements) -> Iterator[File]:
    """The files that a table names."""
    for file in statements.listed.values():
        yield _file(source, file.path, file.status)


def _of_folder(key: str, format: str, by_stated: dict[Stated, list[File]]) -> Iterator[Unit]:
    """The units of one folder: its files, grouped by what the user states about them."""
    for stated, files in by_stated.items():
        files.sort(key=_path)
        yield Unit(key if len(by_stated) == 1 else files[0].path, format, tuple(files), stated)


def _level(source: Source, units: Iterable[Unit], common: int) -> Level:
    if source.patient == BY_FOLDER:
        return Level(common)
    places = (Place(tuple(unit.files[0].path.split("/")[:-1]), unit.format == "picture") for unit in units)
    return level_of(places, common, source.val_share)


def _walk(source: Source, root: Path, passed_over: dict[str, str]) -> Iterator[File]:
    """The files that match the source's patterns, in any order."""
    if not root.is_dir():
        raise ValueError(f"{source.name}: expected its root to be a folder; there is none")
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_symlink():
                        passed_over[path] = "symbolic links"
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(path)
                    elif not source.matches(path):
                        hidden = any(part.startswith(".") for part in path.split("/"))
                        passed_over[path] = "hidden files" if hidden else "not named by the patterns"
                    elif reason := readers.passed_over(entry.name):
                        passed_over[path] = reason
                    elif not entry.is_file(follow_symlinks=False):
                        passed_over[path] = "pipes, sockets and devices"
                    else:
                        yield _file(source, path, entry.stat(follow_symlinks=False))
        except OSError as error:
            raise ValueError(f"{source.name}: a folder below its root cannot be listed ({error.strerror})") from None


def _beside(source: Source, root: Path, path: str, format: str) -> list[File]:
    """The separate file with the data of the one at ``path``, if there is one."""
    folder = path.rpartition("/")[0]
    for name in readers.beside(root / path, format):
        other = f"{folder}/{name}" if folder else name
        try:
            status = os.lstat(root / other)
        except OSError:
            continue
        if stat.S_ISREG(status.st_mode):
            return [_file(source, other, status)]
    return []


def _file(source: Source, path: str, status: os.stat_result) -> File:
    return File(path, status.st_size, status.st_mtime_ns if source.package is None else 0)


def _format(source: Source, root: Path, path: str) -> str | None:
    if source.format != AUTO:
        return source.format
    return readers.format_of(path) or readers.recognised(root / path)


def _is_large(unit: Unit) -> bool:
    return len(unit.files) > LARGE and readers.reader_of(unit.format).series_of is not None


def _suffix(path: str) -> str:
    """The suffix that identifies the format; the rest of a file's name is private."""
    suffixes = readers.reader_of(readers.format_of(path)).suffixes if readers.format_of(path) else ()
    return max((suffix for suffix in suffixes if path.lower().endswith(suffix)), key=len, default=_NO_SUFFIX)


def _path(file: File) -> bytes:
    return os.fsencode(file.path)


def _line(unit: Unit) -> bytes:
    row = unit._asdict()
    if unit.stated == Stated():
        del row["stated"]
    return json_line(row)


def _unit(line: bytes) -> Unit:
    row = json.loads(line)
    files = tuple(File(*file) for file in row["files"])
    return Unit(row["key"], row["format"], files, Stated(*row.get("stated", ())))
