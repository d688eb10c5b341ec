"""What a table, or a split file, states about each file of a source.

A row names a file, or a folder and thereby all files below it. Paths are relative to the source's root, or absolute.
Everything is checked before anything is read or written.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import remote, table
from .ids import Names
from .remote import is_url
from .sources import Source
from .table import Row, lines


class Stated(NamedTuple):
    """What is stated about a file; "" for what is not."""

    modality: str = ""
    patient: str = ""
    split: str = ""


class Listed(NamedTuple):
    """A file that a table names. path: below the root, or absolute if it is not below it."""

    path: str
    status: os.stat_result
    stated: Stated
    line: int


def files_of(file: Path, root: Path, rows: Sequence[Row]) -> list[Listed]:
    """The files that the rows of a table name. Raises ValueError, with the lines, for a path that does not exist, is
    not a file or comes twice."""
    listed: list[Listed] = []
    missing, links = [], []
    for row in rows:
        path = _below(root, row.path)
        try:
            status = os.lstat(os.path.join(root, path))
        except (OSError, ValueError):
            missing.append(row.line)
            continue
        stated = Stated(row.modality, row.patient, row.split)
        if stat.S_ISDIR(status.st_mode):
            listed += [Listed(below, status, stated, row.line) for below, status in _files_below(root, path)]
        elif stat.S_ISREG(status.st_mode):
            listed.append(Listed(path, status, stated, row.line))
        else:
            links.append(row.line)
    if missing:
        raise ValueError(
            f"{file.name}: {lines(missing)}: path: expected a file or a folder, got nothing there. Paths are relative "
            "to the table's folder, or to --root DIR"
        )
    if links:
        raise ValueError(f"{file.name}: {lines(links)}: path: expected a file, got a symbolic link or a device")
    first: dict[str, int] = {}
    twice: set[int] = set()
    for named in listed:
        if named.path in first:
            twice |= {first[named.path], named.line}
        first.setdefault(named.path, named.line)
    if twice:
        again = len(listed) - len(first)
        raise ValueError(f"{file.name}: {lines(sorted(twice))}: path: expected each file once, got {again:,} again")
    return listed


class Sides:
    """The sides of paths and patients in a split file.

    Raises ValueError, with the lines, if a path or a patient has both sides.
    """

    def __init__(self, file: Path, root: Path):
        self._file, self._root = file, root
        self._rows = table.read_split(file)
        self._paths: dict[str, Row] = {}
        self._names: dict[str, Row] = {}
        self._seen: set[int] = set()
        both = []
        for row in self._rows:
            for named, known in ((row.path or row.name, self._paths), (row.patient or row.name, self._names)):
                name = _below(root, named) if known is self._paths else " ".join(named.split())
                if named and known.setdefault(name, row).split != row.split:
                    both += [known[name].line, row.line]
        if both:
            raise ValueError(f"{file.name}: {lines(sorted(set(both)))}: expected each on one side, got both")

    def of(self, path: str, patient: str) -> str:
        """The side of a file, or "". patient: by its path or a table, or ""."""
        parts = path.split("/")
        above = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
        rows = [self._paths[name] for name in above if name in self._paths]
        rows += [self._names[name] for name in {*parts[:-1], " ".join(patient.split())} if name in self._names]
        self._seen.update(row.line for row in rows)
        if len({row.split for row in rows}) > 1:
            both = lines(sorted({row.line for row in rows}))
            raise ValueError(f"{self._file.name}: {both}: expected each file on one side, got both")
        return rows[0].split if rows else ""

    def left(self, headers: bool) -> dict[str, str]:
        """Patients that no path names -> side. headers: whether files have headers that may name them; without such
        headers, a ValueError is raised for the lines that name nobody."""
        left = [row for row in self._rows if row.line not in self._seen]
        unknown = [row.line for row in left if row.path or not headers]
        if unknown:
            raise ValueError(
                f"{self._file.name}: {lines(unknown)}: expected paths or patients of the source, got others"
            )
        return {" ".join((row.patient or row.name).split()): row.split for row in left}


class Statements:
    """What is stated about the files of one source before any is read. listed: files of the table, in the order of its
    rows; columns: the table's unused columns."""

    def __init__(self, source: Source, root: Path):
        self._in_path = Names(source, b"").in_path
        self._sides = Sides(Path(source.split_file), root) if source.split_file else None
        self._patients: defaultdict[str, set[str]] = defaultdict(set)
        self.listed: dict[str, Listed] = {}
        self.columns: list[str] = []
        if source.table:
            file = root / os.path.basename(source.table) if is_url(source.table) else Path(source.table)
            rows, self.columns = _read(source, file)
            self.listed = {named.path: named for named in files_of(file, root, rows)}
        self._drawn = self._sides is None and not any(named.stated.split for named in self.listed.values())

    def of(self, path: str) -> Stated:
        """What is stated about the file at a path below the root."""
        stated = self.listed[path].stated if path in self.listed else Stated()
        patient = stated.patient or self._in_path(path) or ""
        if self._sides is not None:
            side = self._sides.of(path, patient)
            if side and stated.split and side != stated.split:
                raise ValueError("split: expected each file on one side, got one in the table and another in --split")
            stated = stated._replace(split=side or stated.split)
        if patient and stated.split:
            self._patients[patient].add(stated.split)
        return stated

    def rest(self, headers: bool) -> Rest:
        """The sides of all other files; call it after ``of`` for every file. headers: whether files have headers that
        name patients. Raises ValueError for a patient on both sides, and for an unknown name."""
        both = sum(len(sides) > 1 for sides in self._patients.values())
        if both:
            raise ValueError(
                f"split: expected each patient on one side, got {both:,} of {len(self._patients):,} on both"
            )
        return Rest(self._sides.left(headers) if self._sides else {}, "" if self._drawn else "train")


def copied(source: Source, cache: Path, say: Callable[[str], None]) -> Path:
    """The folder with copies of a source's remote files (``remote``), including its table."""
    url, wanted = source.root or "", source.matches
    if source.table:
        name = os.path.basename(source.table)
        own = is_url(source.table)  # Then it is at the root
        file = remote.fetch(url, lambda path: path == name, cache, say) / name if own else Path(source.table)
        paths = {os.path.normpath(row.path) for row in _read(source, file).rows}

        def wanted(path: str) -> bool:
            parts = path.split("/")
            return own and path == name or any("/".join(parts[:k]) in paths for k in range(1, len(parts) + 1))

    return remote.fetch(url, wanted, cache, say)


class Rest(NamedTuple):
    """sides: of patients that only headers name; default: side of everything else without one, "" if it is drawn."""

    sides: dict[str, str]
    default: str


def _read(source: Source, file: Path) -> table.Table:
    rows, columns = table.read(file, source.patient_column)
    if source.root is not None and is_url(source.root):
        rows = [row._replace(path=row.path.removeprefix(source.root.rstrip("/") + "/")) for row in rows]
    other = [row.line for row in rows if row.modality and not source.routed and row.modality != source.modality]
    if other:
        raise ValueError(
            f"{file.name}: {lines(other)}: modality: expected {source.modality}, as in --modality, got another"
        )
    return table.Table(rows, columns)


def _below(root: Path, path: str) -> str:
    """The path below the root, or an absolute path if it is not below it."""
    whole = os.path.normpath(os.path.join(root, os.path.expanduser(path)))
    top = os.path.normpath(root)
    return os.path.relpath(whole, top) if whole.startswith(top.rstrip("/") + "/") else whole


def _files_below(root: Path, folder: str) -> Iterator[tuple[str, os.stat_result]]:
    for above, folders, names in os.walk(os.path.join(root, folder)):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(above, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and not name.startswith("."):
                yield _below(root, path), status
