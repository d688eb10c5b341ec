"""Reads the items of a collection in processes with limits: a file that crashes, hangs or eats memory costs itself.

The processes and their limits are those of `dex prepare` (`dex.prepare.workers`, `dex.prepare.readers.Limits`).
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
"""Beside `LIMITS`, for the images of one unit, held up to three times: 5,000 grey ones or 1,700 in colour."""
_AHEAD = 4
"""Items for each process that may be read before the one that is waited for."""
_WORTH = 4
"""Items that are worth starting another process for."""


class _Job(NamedTuple):
    place: int
    """In the order of items."""
    units: list[Any]


class _State(NamedTuple):
    next: int
    """The unit that comes next."""
    read: Decoded
    """What the one before it gave."""


def decoded(
    collection: Collection,
    order: Sequence[int],
    processes: int,
    check: Callable[[], None] = lambda: None,
    limits: readers.Limits = LIMITS,
) -> Iterator[Decoded]:
    """The items ``order``, in this order, read by up to ``processes``, which go on while the caller works.

    processes: 0 reads here, without a limit. limits: of each unit; `OUTPUT_MB` come on top. check: called now and
    then; what it raises ends the processes.
    Raises: OSError, `dex.prepare.workers.WorkerFault` for what is no file's fault.
    """
    if processes == 0 or not order:
        for item in order:
            check()
            yield collection.read(item)
        return
    processes = min(processes, -(-len(order) // _WORTH))
    parts: dict[int, list[Decoded]] = {}
    whole: dict[int, Decoded] = {}
    given = 0

    def jobs() -> Iterator[_Job | None]:
        for place, item in enumerate(order):
            parts[place] = []
            while place >= given + _AHEAD * processes:  # one item that takes long must not fill the memory with others
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
            whole[job.place] = joined(parts.pop(job.place))
            while given in whole:
                yield whole.pop(given)
                given += 1


def _work(reader: Reader, limits: readers.Limits, task: workers.Task, report: workers.Report) -> None:
    """Read one item, from `task.state` on; each unit is sent as it comes."""
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
                raise  # what other units left behind may be to blame: once more, in a fresh process
            reason = f"too large: needs more than {limits.memory_mb + OUTPUT_MB} MB of memory"
            report.save(_State(number + 1, reader.refused(unit, reason)))
        except OSError:
            raise  # of the connection: a reader's own are notes
        except Exception as error:
            reason = f"unreadable: {faults.sentence(error)} ({workers.where(error)})"
            report.save(_State(number + 1, reader.refused(unit, reason)))
