"""The private table ``DIR.private/ids``: from an image, or from a refusal, back to its file.

Each row is a JSON object on its own line. ``path`` is the unit's key, below the source's root:

    {"id": image, "path": key, "label": label, "file": name, "frame": n, "volume": n, "stack": n}
    {"path": key, "stack": n, "files": [name, ...]}
    {"id": unit, "path": key, "refused": reason, "detail": text, "file": name or "files": [name, ...]}

A file whose images were all dropped is listed as refused, with the reason of the first; not if one is withdrawn.
A kept image has ``file`` if its unit has several files; ``frame``, the number of the stored frame in the file (from 0),
if it shows one; ``volume`` if more than the first volume was requested; and ``stack`` if it is cut across the frames of
several files, which an earlier row lists once. Older sets have only ``id``, ``path`` and ``label``.

    duplicates.jsonl    {"id": image, "group": patient, "key": of the image that was kept, "near": true}
    withdrawn.jsonl     {"time", "ids": images, "groups": patients, "images": n, "before": fingerprint, "after": ...}
    units/NNN-passed-over.jsonl    {"reason", "folder", "names": [...]}: files that belong to no unit
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dex.common import atomic

from . import readers

DUPLICATES, WITHDRAWN, PASSED_OVER = "duplicates.jsonl", "withdrawn.jsonl", "-passed-over.jsonl"
PLAN, LOG, UNITS, IDS, LEFT_OUT = "plan.json", "log.jsonl", "units", "ids", "left_out.html"


class Origins:
    """The rows of one stack's images. unit: the unit's key; number: of the stack in the unit; volume: its number in
    the file, None if only one was requested."""

    def __init__(self, stack: readers.Stack, unit: str, number: int, volume: int | None):
        self._origins, self._unit, self._number, self._volume = stack.origins, unit, number, volume
        self._single = stack.length == 1
        self._files = files_of(stack)
        self._listed = False

    def rows(self, sample: str, label: str, number: int | None) -> Iterator[dict[str, Any]]:
        """The row of one image, preceded by the row of the stack's files if it is the first image to need it. number:
        of the stored frame, None if the image is cut across several."""
        row: dict[str, Any] = {"id": sample, "path": self._unit, "label": label}
        if number is None and self._files:
            if len(self._files) == 1:
                row["file"] = self._files[0]
            else:
                row["stack"] = self._number
                if not self._listed:
                    self._listed = True
                    yield {"path": self._unit, "stack": self._number, "files": self._files}
        elif number is not None:
            name, frame = self._origins[number] if self._origins else ("", number)
            row |= {"file": name} if name else {}
            if not self._single or frame:
                row["frame"] = frame
        if self._volume is not None:
            row["volume"] = self._volume
        yield row


class Emptied:
    """The files of one unit whose images were all dropped."""

    def __init__(self) -> None:
        self._kept: set[str] = set()
        self._dropped: dict[str, str] = {}  # File -> reason of its first dropped image

    def add(self, stack: readers.Stack, number: int | None, dropped: str | None) -> None:
        """Add an image. number: of the stored frame, None if it is cut across several. dropped: why; None if it is kept
        or withdrawn."""
        if number is not None and stack.origins:
            names: tuple[str, ...] = (stack.origins[number][0],)
        else:
            names = files_of(stack) or ("",)
        if dropped is None:
            self._kept.update(names)
        else:
            for name in names:
                self._dropped.setdefault(name, dropped)

    def by_reason(self) -> dict[str, tuple[str, ...]]:
        """The reasons and their files: the names below the unit, () if the unit has only one file."""
        files: dict[str, list[str]] = {}
        for name, reason in self._dropped.items():
            if name not in self._kept:
                files.setdefault(reason, []).append(name)
        return {reason: tuple(sorted(filter(None, names))) for reason, names in files.items()}


def files_of(stack: readers.Stack) -> tuple[str, ...]:
    """The names of the stack's files; () if its unit has only one file."""
    return tuple(sorted({name for name, _ in stack.origins if name}))


def refusal(unit: str, reason: str, detail: str, key: str, files: tuple[str, ...]) -> dict[str, Any]:
    """The row of a refused unit, or of some refused files of it."""
    row: dict[str, Any] = {"id": unit, "path": key, "refused": reason} | ({"detail": detail} if detail else {})
    return row | ({"file": files[0]} if len(files) == 1 else {"files": files} if files else {})


def duplicate(sample: str, group: str, of: int, near: bool) -> bytes:
    """The line of an image left out as a duplicate. of: the number of its original among all kept images."""
    return json_line({"id": sample, "group": group, "key": f"{of:08d}", "near": near})


class Withdrawn(NamedTuple):
    """One withdrawal. time: UTC; images: number of images removed from the set; ids, groups: hashed ids of images and
    patients; before, after: the set's fingerprints."""

    time: str
    images: int
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    before: str
    after: str

    def to_line(self) -> bytes:
        return json_line(self._asdict())

    def public(self) -> dict[str, Any]:
        """The manifest's entry for it."""
        return {"date": self.time, "images": self.images, "before": self.before}


def withdrawn(private: Path) -> list[Withdrawn]:
    """The withdrawals from the set, in order."""
    try:
        rows = map(json.loads, (private / WITHDRAWN).read_bytes().splitlines())
    except FileNotFoundError:
        return []
    return [Withdrawn(**row | {"ids": tuple(row["ids"]), "groups": tuple(row["groups"])}) for row in rows]


def write_withdrawn(private: Path, records: Iterable[Withdrawn]) -> None:
    data = b"".join(record.to_line() for record in records)
    atomic.write(private / WITHDRAWN, data, sync=True, mode=0o600, locked=True)


def remove(table: Path, ids: frozenset[str]) -> bool:
    """Remove the rows of these images and of their stacks' files from a table. Returns whether there were any."""
    with open(table, "rb") as old:
        if not any(json.loads(line).get("id") in ids for line in old):
            return False
    files = b""
    with open(table, "rb") as old, atomic.writing(table, sync=True, mode=0o600, locked=True) as new:
        for line in old:
            row = json.loads(line)
            if "id" not in row:
                files = line
            elif row["id"] not in ids:
                new.write((files if "stack" in row else b"") + line)
                files = b"" if "stack" in row else files
    return True


def log(private: Path, event: str, **details: Any) -> None:
    """Append a line to the private log."""
    time_now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    line = json.dumps({"time": time_now, "event": event, **details}) + "\n"
    descriptor = os.open(private / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def write_passed_over(path: Path, passed_over: Mapping[str, str]) -> None:
    """passed_over: path below the root -> reason. If it is empty, no file is written."""
    rows: dict[tuple[str, str], list[str]] = {}
    for file, reason in passed_over.items():
        folder, _, name = file.rpartition("/")
        rows.setdefault((reason, folder), []).append(name)
    if rows:
        listed = ({"reason": key[0], "folder": key[1], "names": sorted(names)} for key, names in sorted(rows.items()))
        atomic.write(path, b"".join(map(json_line, listed)), mode=0o600, locked=True)


def json_line(row: Mapping[str, Any]) -> bytes:
    """A row of a table: compact JSON and a line feed."""
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"
