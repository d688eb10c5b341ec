"""Reads the cases of a task in processes with limits: a file that crashes, hangs or eats memory is named and ends only
its process.

The processes and their limits are those of ``dex.inference.reading``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dex.common import faults
from dex.inference.reading import LIMITS, OUTPUT_MB
from dex.prepare import chunks, readers, workers
from dex.tasks.frames import Frames, read
from dex.tasks.task import Case, Task

_AHEAD = 2
"""Cases per process that may be read ahead of the next one to return; volumes are large."""


class _Job(NamedTuple):
    place: int
    case: Case


class _Failed(NamedTuple):
    reason: str


def frames_of(
    cases: Sequence[Case],
    task: Task,
    processes: int,
    check: Callable[[], None] = lambda: None,
    limits: readers.Limits = LIMITS,
) -> Iterator[Frames]:
    """The frames of each case, in order, read by up to ``processes`` processes while the caller works.

    processes: 0 reads in this process, without limits. check: called now and then; an exception from it ends the
    processes. Raises: ValueError naming the file of the first case in order that cannot be used; OSError,
    ``dex.prepare.workers.WorkerFault`` for failures that no file caused.
    """
    if processes == 0 or not cases:
        for case in cases:
            check()
            yield read(case, task)
        return
    complete: dict[int, Frames | _Failed] = {}
    returned = 0

    def jobs() -> Iterator[_Job | None]:
        for place, case in enumerate(cases):
            while place >= returned + _AHEAD * processes:
                yield None
            yield _Job(place, case)

    results = workers.run(
        functools.partial(_work, task, limits),
        jobs(),
        processes=min(processes, len(cases)),
        memory_mb=limits.memory_mb + OUTPUT_MB,
        preload=functools.partial(_preload, sorted(_formats(cases))),
        on_beat=lambda job, done: check(),
    )
    with contextlib.closing(results):
        for job, result in results:
            check()
            complete[job.place] = result
            while returned in complete:
                frames = complete.pop(returned)
                if isinstance(frames, _Failed):
                    raise ValueError(frames.reason)
                yield frames
                returned += 1


def _formats(cases: Sequence[Case]) -> set[str]:
    formats = {readers.format_of(case.image) or "dicom" for case in cases}
    masks = {readers.format_of(case.target) for case in cases if isinstance(case.target, Path)}
    return formats | {format for format in masks if format is not None}


def _preload(formats: Sequence[str]) -> None:
    """Import the libraries that reading needs, before limits apply."""
    for format in formats:
        with contextlib.suppress(readers.Refused):  # Reading will report a library that is not installed
            readers.load(format)


def _work(task: Task, limits: readers.Limits, job: workers.Task, report: workers.Report) -> Frames | _Failed:
    case = job.job.case
    if 0 in job.refused:
        return _Failed(f"file: expected a readable image and mask; {case.image}: {chunks.GIVEN_UP[job.refused[0]]}")
    report.begin(0, limits.seconds, limits.seconds * _weight(case.image))
    try:
        return read(case, task, report.beat)
    except MemoryError:
        if report.begun > 1:
            raise  # Earlier cases may be to blame: try once more in a fresh process
        return _Failed(
            f"file: expected an image and mask that fit into {limits.memory_mb + OUTPUT_MB} MB of memory, got "
            f"{case.image}"
        )
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error.__context__, MemoryError) and report.begun > 1:
            raise MemoryError from None
        return _Failed(str(error))
    except OSError:
        raise  # From the connection
    except Exception as error:
        return _Failed(
            f"file: expected a readable image and mask; {case.image}: {faults.sentence(error)} ({workers.where(error)})"
        )


def _weight(image: Path) -> float:
    """The time limit of an image, as a multiple of a small file's."""
    files = list(image.iterdir()) if image.is_dir() else [image]
    return 1 + len(files) + sum(file.stat().st_size for file in files if file.exists()) / 2**20
