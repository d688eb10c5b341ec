"""Worker processes for untrusted files: a crash, a hang or too much memory costs one unit, not the run.

``run`` passes each job to one of N processes. A job is a sequence of units; its function reports when a unit begins and
ends, and another process can resume after any unit. A process that dies, or is silent for too long, is replaced. Its
unit is tried once more in a fresh process, and given up if that fails too. So a process that was killed because of
another unit loses nothing.

Workers start by "spawn", inherit no open files, write nothing to their parent's stdout and stderr (a library's message
may contain values of a header), ignore the terminal's signals and die with their parent.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from dex.common import exits
from dex.common.faults import where

ATTEMPTS = 2
START_SECONDS = 120.0
_BEAT_EVERY = 0.2
_NEEDS_FRESH = 77  # Exit code: out of memory in a process that had done other units before
_PR_SET_PDEATHSIG = 1


class WorkerFault(RuntimeError):
    """A worker failed for a reason that is not a file's. Names the error's type and lines of code, but no value."""


class Report:
    """How a worker reports its progress on a job to its parent. begun: the number of units this process has begun."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._sent = 0.0
        self._done = 0
        self.begun: int = 0

    def begin(self, unit: int, silence: float, total: float) -> None:
        """Unit number ``unit`` of the job begins. It counts as hanging after ``silence`` seconds without a report, or
        ``total`` seconds in all."""
        self.begun += 1
        self._done = 0
        self._send("begin", unit, silence, total)

    def beat(self, done: int | None = None) -> None:
        """A sign of life, with the number of finished pieces of the unit if known. Cheap enough for every slice."""
        if done is not None:
            self._done = done
        if time.monotonic() - self._sent >= _BEAT_EVERY:
            self._send("beat", self._done)

    def save(self, state: Any) -> None:
        """A unit is done: another process can resume from ``state``."""
        self._send("save", state)

    def _send(self, *message: Any) -> None:
        self._sent = time.monotonic()
        self._connection.send(message)


class Task(NamedTuple):
    """state: the last saved state, or None; refused: number of a unit that was given up -> reason."""

    job: Any
    state: Any
    refused: dict[int, str]


def run(
    work: Callable[[Task, Report], Any],
    jobs: Iterable[Any | None],
    *,
    processes: int,
    memory_mb: int,
    preload: Callable[[], None] | None = None,
    on_save: Callable[[Any, Any], None] = lambda job, state: None,
    on_beat: Callable[[Any, int], None] = lambda job, done: None,
) -> Iterator[tuple[Any, Any]]:
    """Yield (job, result) in the order of completion, where result = work(Task(job, ...), report). ``work`` is a
    function at module level.

    jobs: None means that the next job must wait until another one is done; at least one must be in progress then.
    memory_mb: the address space, in MiB, that a worker may allocate on top of what it has after ``preload()``.
    on_save(job, state) is called in this process for every saved state, on_beat(job, done) from time to time within a
    unit. Raises OSError if a worker cannot write (a full disk) and WorkerFault for a fault of our own. The workers are
    killed when the iterator is closed or raises.
    """
    pending, busy, idle = iter(jobs), [], []
    try:
        while True:
            while len(busy) < processes and (job := next(pending, None)) is not None:
                worker = idle.pop() if idle else _Worker(work, memory_mb, preload, on_save, on_beat)
                busy.append(worker)
                worker.give(Task(job, None, {}))
            if not busy:
                return
            began = time.monotonic()
            wait([handle for worker in busy for handle in worker.handles()], timeout=0.25)
            lost = time.monotonic() - began - 1.0  # This process was suspended, and perhaps the workers too
            for worker in list(busy):
                if lost > 0:
                    worker.heard += lost
                if worker.listen():
                    busy.remove(worker)
                    idle.append(worker)
                    yield worker.task.job, worker.result
    finally:
        for worker in busy + idle:
            worker.kill()


class _Worker:
    """A process and its job. ``_unit``: the current unit, None between units."""

    def __init__(self, work: Callable, memory_mb: int, preload: Callable | None, on_save: Callable, on_beat: Callable):
        self._arguments, self._on_save, self._on_beat = (work, memory_mb, preload), on_save, on_beat
        self._process: Any = None
        self._failed_starts = 0
        self.task: Task
        self.result: Any = None
        self.heard = 0.0

    def give(self, task: Task) -> None:
        self.task = task
        self._failures: Counter[int] = Counter()
        self._send()

    def handles(self) -> list[Any]:
        return [self._connection, self._process.sentinel]

    def listen(self) -> bool:
        """Read the process's messages and replace it if it died or hangs. Returns whether the job is done."""
        alive = self._process.is_alive()  # Asked first, so that messages sent before its death are still read
        while (message := self._receive()) is not None:
            if self._hear(*message):
                return True
        if not alive:
            self._process.join(5)
            self._replace("crash", blame=self._process.exitcode != _NEEDS_FRESH)
        elif time.monotonic() - self.heard > self._silence or time.monotonic() > self._end:
            self._replace("timeout")
        return False

    def kill(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.join(5)
        self._connection.close()
        self._process = None

    def _receive(self) -> tuple | None:
        try:
            return self._connection.recv() if self._connection.poll() else None
        except (EOFError, OSError):  # Dead, or about to be
            self._process.kill()
            return None

    def _hear(self, kind: str, *content: Any) -> bool:
        self.heard = time.monotonic()
        if kind == "begin":
            self._unit, self._silence, total = content
            self._end = self.heard + total
            self._failed_starts = 0
        elif kind == "beat":
            self._on_beat(self.task.job, content[0])
        elif kind == "save":
            self._unit, self._silence, self._end = None, START_SECONDS, math.inf
            self.task = self.task._replace(state=content[0])
            self._on_save(self.task.job, content[0])
        elif kind == "done":
            self._unit, self.result = None, content[0]
            return True
        elif kind == "cannot write":
            raise OSError(content[0], os.strerror(content[0]))
        elif kind == "fault":
            raise WorkerFault(content[0])
        return False

    def _replace(self, reason: str, blame: bool = True) -> None:
        if self._unit is None:
            self._failed_starts += 1
            if self._failed_starts >= 3:
                raise WorkerFault(f"three workers in a row ended before beginning a unit ({reason})")
        elif blame:
            self._failures[self._unit] += 1
            if self._failures[self._unit] >= ATTEMPTS:
                self.task = self.task._replace(refused={**self.task.refused, self._unit: reason})
        self.kill()
        self._send()

    def _send(self) -> None:
        if self._process is None:
            self._start()
        self._unit, self._silence, self._end, self.heard = None, START_SECONDS, math.inf, time.monotonic()
        try:
            self._connection.send(self.task)
        except OSError:  # It died while idle; `listen` will notice
            pass

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child_end = context.Pipe()
        self._process = context.Process(target=_main, args=(child_end, os.getpid(), *self._arguments), daemon=True)
        with _environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1"):
            self._process.start()
        child_end.close()


class _environment:
    """Variables for processes started within the block: with one process per core, threads would only compete."""

    def __init__(self, **variables: str):
        self._variables = variables

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._variables}
        os.environ.update(self._variables)

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _main(connection: Connection, parent: int, work: Callable, memory_mb: int, preload: Callable | None) -> None:
    exits.ignore_stop_signals()
    die_with(parent)
    _be_silent()
    try:
        if preload is not None:
            preload()
        _limit_memory(memory_mb)
        report = Report(connection)
        connection.send(("ready",))
        while True:
            task = connection.recv()
            connection.send(("done", work(task, report)))
    except MemoryError:
        os._exit(_NEEDS_FRESH)
    except (EOFError, BrokenPipeError, ConnectionError):  # The parent has ended
        os._exit(0)
    except OSError as error:
        connection.send(("cannot write", error.errno or errno.EIO))
    except BaseException as error:
        connection.send(("fault", where(error)))


def die_with(parent: int) -> None:
    """Let Linux kill this process when ``parent``, which started it, ends in any way."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # It died before the call
        os._exit(0)


def _be_silent() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def _limit_memory(megabytes: int) -> None:
    if sys.platform != "linux":
        return
    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
