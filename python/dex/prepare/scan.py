"""Find the series of the files in large folders from their headers.

Workers read the headers in blocks of files. The result of each block is stored, so that no header is read again after a
kill, and machines with a common folder share the work: each starts at a different block and skips finished ones.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dex.common import atomic

from . import chunks, readers, workers
from .discover import File, Listing, Unit

BLOCK = 256
_EVERY = 5.0  # Seconds between lines


@dataclass(frozen=True)
class Block:
    """Some files of one folder. target: file for the result."""

    root: Path = field(repr=False)
    format: str
    files: tuple[File, ...] = field(repr=False)
    target: Path = field(repr=False)
    limits: readers.Limits


def scan(
    listing: Listing,
    root: Path,
    folder: Path,
    *,
    limits: readers.Limits,
    processes: int,
    part: tuple[int, int],
    say: Callable[[str], None],
) -> list[list[str]]:
    """The name of each file's series, for each large unit of ``listing``; "" for a file whose header cannot be read.

    folder: for the results. part: (i, n): this machine is number i of n. say: called every few seconds with the number
    of headers read so far.
    """
    units = [listing.unit(number) for number in listing.large]
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [list(_blocks(unit, root, folder, limits)) for unit in units]
    all_blocks = [block for row in blocks for block in row]
    first = len(all_blocks) * part[0] // part[1]
    total, known, reported = sum(len(block.files) for block in all_blocks), 0, time.monotonic()
    read: dict[Path, int] = {}

    def note(job: Block, names: Sequence[str]) -> None:
        nonlocal reported
        read[job.target] = len(names)
        if time.monotonic() - reported >= _EVERY:
            reported = time.monotonic()
            say(f"headers {known + sum(read.values()):,}/{total:,}")

    def missing() -> Iterator[Block]:
        nonlocal known
        for block in all_blocks[first:] + all_blocks[:first]:
            if _read(block) is None:
                yield block
            else:
                known += len(block.files)

    results = workers.run(
        work,
        missing(),
        processes=processes,
        memory_mb=limits.memory_mb,
        preload=functools.partial(chunks.preload, sorted({unit.format for unit in units})),
        on_save=note,
    )
    with contextlib.closing(results):
        for block, names in results:
            note(block, names)
            # Without a lock, since another machine may write the same file; synced, so that no header is read again.
            atomic.write(block.target, json.dumps(names), sync=True, mode=0o600)
    return [[name for block in row for name in _read(block) or ()] for row in blocks]


def work(task: workers.Task, report: workers.Report) -> list[str]:
    """Read the headers of one block. ``task.state`` holds the names that are already known."""
    block: Block = task.job
    names: list[str] = list(task.state or ())
    for number in range(len(names), len(block.files)):
        name = ""
        if number not in task.refused:
            file, silence = block.files[number], block.limits.seconds
            report.begin(number, silence, silence * (1 + file.size / 2**20))
            name = readers.series_of(block.root / file.path, block.format, block.limits)
        names.append(name)
        report.save(names)
    return names


def _blocks(unit: Unit, root: Path, folder: Path, limits: readers.Limits) -> Iterator[Block]:
    for start in range(0, len(unit.files), BLOCK):
        part = unit.files[start : start + BLOCK]
        name = hashlib.sha256(json.dumps(part).encode()).hexdigest()  # The root may differ from machine to machine
        yield Block(root, unit.format, part, folder / f"{name}.json", limits)


def _read(block: Block) -> list[str] | None:
    """The stored result of a block; None if it is missing or damaged."""
    try:
        names: Any = json.loads(block.target.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return names if isinstance(names, list) and len(names) == len(block.files) else None
