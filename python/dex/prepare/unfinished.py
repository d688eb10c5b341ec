"""The progress within an unfinished chunk, so that a killed run can resume there.

It is a file beside those of the chunk, replaced at most once every ``EVERY`` seconds. It is used only if the chunk's
files agree with it: after a power failure, the disk may have it but not them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dex.common import atomic

EVERY = 1.0
"""Seconds of work that a kill may cost, in addition to the current unit."""


class Unfinished:
    """path: of the file; files: the chunk's three unfinished files: images, their lines, ids. identity: names
    everything else that determines the chunk; with another identity it starts over. tail: number of bytes that follow
    each image."""

    def __init__(self, path: Path, files: Sequence[Path], identity: str, tail: int):
        self._path, self._files, self._identity, self._tail = path, files, identity, tail
        self._kept = time.monotonic()

    def keep(self, sizes: Sequence[int], state: dict[str, Any]) -> None:
        """Record that the files' first ``sizes`` bytes belong to ``state``, unless the last record is very recent."""
        if time.monotonic() - self._kept < EVERY:
            return
        row = {"identity": self._identity, "sizes": list(sizes), "sha256": self._digests(sizes), "state": state}
        atomic.write(self._path, json.dumps(row), mode=0o600, locked=True)
        self._kept = time.monotonic()

    def left(self) -> tuple[tuple[int, int, int], dict[str, Any]] | None:
        """The sizes and the state of the last ``keep``; None if there was none, or if the files have changed since."""
        try:
            row = json.loads(self._path.read_bytes())
            sizes = tuple(row["sizes"])
            if row["identity"] != self._identity or row["sha256"] != self._digests(sizes) or not self._fit(sizes):
                return None
            return sizes, row["state"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)

    def _digests(self, sizes: Sequence[int]) -> list[str]:
        """SHA-256 of the lines and of the ids."""
        return [
            hashlib.sha256(_start(path, size)).hexdigest()
            for path, size in zip(self._files[1:], sizes[1:], strict=True)
        ]

    def _fit(self, sizes: Sequence[int]) -> bool:
        """Whether every line's image is intact. Hashing all images at every ``keep`` would take too long."""
        end = 0
        with open(self._files[0], "rb") as images:
            for line in map(json.loads, _start(self._files[1], sizes[1]).splitlines()):
                if "size" not in line:  # A dropped slice has no image
                    continue
                images.seek(line["offset"])
                data = images.read(line["size"] + self._tail)
                if hashlib.sha256(data).hexdigest() != line["sha256"]:
                    return False
                end = images.tell()
        return end == sizes[0]


def _start(path: Path, size: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(size)
