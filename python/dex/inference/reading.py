"""Reads the items of a collection in processes with limits: a file that crashes, hangs or eats memory fails alone.

The processes and their limits are those of ``dex prepare`` (``dex.prepare.workers``, ``dex.prepare.readers.Limits``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from dex.common import faults
from dex.inference.collection import Collection, Decoded, Reader, joined
from dex.prepare import chunks, readers, workers

LIMITS = readers.Limits()
OUTPUT_MB = 1024
"""Added to ``LIMITS`` for the images of one unit, held up to three times: 5,000 grey or 1,700 colour images."""
_AHEAD = 4
"""Items per process that may be read ahead of the next one to return."""
_WORTH = 4
"""Items that justify another process."""


class _Job(NamedTuple):
    place: int
    """Index in the order of items."""
    units: list[Any]


class _State(NamedTuple):
    next: int
    """Number of the next unit."""
    read: Decoded
    """The images of the previous unit."""


def decoded(
    collection: Collection,
    order: Sequence[int],
    processes: int,
    check: Callable[[], None] = lambda: None,
    limits: readers.Limits = LIMITS,
) -> Iterator[Decoded]:
    """The items numbered ``order``, in this order, read by up to ``processes`` processes while the caller works.

    processes: 0 reads in this process, without limits. limits: of each unit; ``OUTPUT_MB`` is added. check: called now
    and then; an exception from it ends the processes.
    Raises: OSError, ``dex.prepare.workers.WorkerFault`` for failures that no file caused.
    """
    if processes == 0 or not order:
        for item in order:
            check()
            yield collection.read(item)
        return
    processes = min(processes, -(-len(order) // _WORTH))
    parts: dict[int, list[Decoded]] = {}
    complete: dict[int, Decoded] = {}
    returned = 0

    def jobs() -> Iterator[_Job | None]:
        for place, item in enumerate(order):
            parts[place] = []
            while place >= returned + _AHEAD * processes:  # Others must not fill the memory behind a slow item
                yield None
            yield _Job(place, collection.units(item))

    def keep(job: _Job, state: _State) -> None:
        check()
        parts[job.place].append(state.read)

    results = workers.run(
        functools.partial(_work, collection.reader, limits),
        jobs(),
        processes=processes,
        memory_mb=limits.memory_mb + OUTPUT_MB,
        preload=collection.reader.preload,
        on_save=keep,
        on_beat=lambda job, done: check(),
    )
    with contextlib.closing(results):
        for job, _ in results:
            complete[job.place] = joined(parts.pop(job.place))
            while returned in complete:
                yield complete.pop(returned)
                returned += 1


def _work(reader: Reader, limits: readers.Limits, task: workers.Task, report: workers.Report) -> None:
    """Read one item, starting at ``task.state``, and send each unit when it is read."""
    units = task.job.units
    for number in range(task.state.next if task.state else 0, len(units)):
        unit = units[number]
        if number in task.refused:
            reason = task.refused[number]
            report.save(_State(number + 1, reader.refused(unit, f"{reason}: {chunks.GIVEN_UP[reason]}")))
            continue
        report.begin(number, limits.seconds, limits.seconds * reader.weight(unit))
        try:
            report.save(_State(number + 1, reader.read(unit, report.beat)))
        except MemoryError:
            if report.begun > 1:
                raise  # Earlier units may be to blame: try once more in a fresh process
            reason = f"too large: needs more than {limits.memory_mb + OUTPUT_MB} MB of memory"
            report.save(_State(number + 1, reader.refused(unit, reason)))
        except OSError:
            raise  # From the connection: readers turn their own into notes
        except Exception as error:
            reason = f"unreadable: {faults.sentence(error)} ({workers.where(error)})"
            report.save(_State(number + 1, reader.refused(unit, reason)))
