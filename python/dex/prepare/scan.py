"""Which series the files of large folders belong to, known from their headers alone.

Headers are read by the workers, in blocks of files. A block's result is kept, so that a killed run does not read its
headers again, and machines that see one folder share the work: each begins at a block of its own and passes over what
another has done.
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
_EVERY = 5.0  # seconds between lines


@dataclass(frozen=True)
class Block:
    """Files of one folder. target: where the result is kept."""

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
    """The name of each file's series, for each large unit of `listing`; "" for a file whose header cannot be read.

    folder: where results are kept. part: (i, n), of n machines this is number i. say: called now and then with a
    line on the headers that have been read.
    """
    units = [listing.unit(number) for number in listing.large]
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [list(_blocks(unit, root, folder, limits)) for unit in units]
    every = [block for row in blocks for block in row]
    first = len(every) * part[0] // part[1]
    total, known, said = sum(len(block.files) for block in every), 0, time.monotonic()
    going: dict[Path, int] = {}

    def note(job: Block, names: Sequence[str]) -> None:
        nonlocal said
        going[job.target] = len(names)
        if time.monotonic() - said >= _EVERY:
            said = time.monotonic()
            say(f"headers {known + sum(going.values()):,}/{total:,}")

    def missing() -> Iterator[Block]:
        nonlocal known
        for block in every[first:] + every[:first]:
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
            # Another machine may write the same, and a killed run is not to read the headers again.
            atomic.write(block.target, json.dumps(names), sync=True, mode=0o600)
    return [[name for block in row for name in _read(block) or ()] for row in blocks]


def work(task: workers.Task, report: workers.Report) -> list[str]:
    """Read the headers of one block, from `task.state`, the names known so far, on."""
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
        name = hashlib.sha256(json.dumps(part).encode()).hexdigest()  # the root may differ from machine to machine
        yield Block(root, unit.format, part, folder / f"{name}.json", limits)


def _read(block: Block) -> list[str] | None:
    """What is kept of a block; None where that is nothing, or not what was written."""
    try:
        names: Any = json.loads(block.target.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return names if isinstance(names, list) and len(names) == len(block.files) else None
