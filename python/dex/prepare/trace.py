"""From an image, or from what was refused, back to its file: the private table, `DIR.private/ids`.

A row is a JSON object on a line of its own. `path` is the unit's key, below the source's root:

    {"id": image, "path": key, "label": label, "file": name, "frame": n, "volume": n, "stack": n}
    {"path": key, "stack": n, "files": [name, ...]}
    {"id": unit, "path": key, "refused": reason, "detail": text, "file": name or "files": [name, ...]}

A kept image has `file` where its unit has several, the number of the stored frame in the file (from 0) where it shows
one, that of the volume where others than the first were asked for, and `stack` where it is cut across the frames of
several files, which stand once, in a row of their own before it. Sets made before rows said this have `id`, `path` and
`label` alone.

    duplicates.jsonl    {"id": image, "group": patient, "key": of the image that was kept, "near": true}
    withdrawn.jsonl     {"time", "ids": images, "groups": patients, "images": n, "before": fingerprint, "after": ...}
    units/NNN-passed-over.jsonl    {"reason", "folder", "names": [...]}: files that are no unit's
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
    """The rows of one stack's images. unit: the unit's key; number: of the stack in it; volume: of the stack in its
    file, None where that is the only one that was asked for."""

    def __init__(self, stack: readers.Stack, unit: str, number: int, volume: int | None):
        self._origins, self._unit, self._number, self._volume = stack.origins, unit, number, volume
        self._single = stack.length == 1
        self._files = files_of(stack)
        self._listed = False

    def rows(self, sample: str, label: str, number: int | None) -> Iterator[dict[str, Any]]:
        """Of one image, and before it of the stack's files where it is the first that needs them. number: of the
        stored frame, None where it is cut across several."""
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


def files_of(stack: readers.Stack) -> tuple[str, ...]:
    """The names of its files, where the unit has others too."""
    return tuple(sorted({name for name, _ in stack.origins if name}))


def refusal(unit: str, reason: str, detail: str, key: str, files: tuple[str, ...]) -> dict[str, Any]:
    """The row of a unit that was refused, or of some of its files."""
    row: dict[str, Any] = {"id": unit, "path": key, "refused": reason} | ({"detail": detail} if detail else {})
    return row | ({"file": files[0]} if len(files) == 1 else {"files": files} if files else {})


def duplicate(sample: str, group: str, of: int, near: bool) -> bytes:
    """The line of an image that was left out as a duplicate. of: the number of the kept one among all that are."""
    return _json({"id": sample, "group": group, "key": f"{of:08d}", "near": near})


class Withdrawn(NamedTuple):
    """One withdrawal. time: UTC; images: how many the set lost; ids, groups: of images and patients, as hashed as they
    are; before, after: the set's fingerprints."""

    time: str
    images: int
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    before: str
    after: str

    def to_line(self) -> bytes:
        return _json(self._asdict())

    def public(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"date": self.time, "images": self.images, "before": self.before}


def withdrawn(private: Path) -> list[Withdrawn]:
    """What was taken out of the set, in order."""
    try:
        rows = map(json.loads, (private / WITHDRAWN).read_bytes().splitlines())
    except FileNotFoundError:
        return []
    return [Withdrawn(**row | {"ids": tuple(row["ids"]), "groups": tuple(row["groups"])}) for row in rows]


def write_withdrawn(private: Path, records: Iterable[Withdrawn]) -> None:
    data = b"".join(record.to_line() for record in records)
    atomic.write(private / WITHDRAWN, data, sync=True, mode=0o600, locked=True)


def remove(table: Path, ids: frozenset[str]) -> bool:
    """Take the rows of these images out of a table, with their stacks' files; whether there were any."""
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
    """passed_over: path below the root -> reason. Nothing is written where there is none."""
    rows: dict[tuple[str, str], list[str]] = {}
    for file, reason in passed_over.items():
        folder, _, name = file.rpartition("/")
        rows.setdefault((reason, folder), []).append(name)
    if rows:
        listed = ({"reason": key[0], "folder": key[1], "names": sorted(names)} for key, names in sorted(rows.items()))
        atomic.write(path, b"".join(map(_json, listed)), mode=0o600, locked=True)


def _json(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"
