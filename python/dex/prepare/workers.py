"""Processes that work on untrusted files: one that crashes, hangs or eats memory costs one unit, not the run.

`run` gives each job to one of N processes. A job is a row of units; the function that works on it says which unit it
begins and when it is done with one, and may be asked to go on from there in another process. A process that dies, or
says nothing for its time, is replaced; its unit is tried once more, in a process that has done nothing else, and is
given up when that fails too. So a process that was killed for another's sake loses nothing.

Workers start by "spawn", hold no file of their parent's, write nothing to its stdout and stderr (a library's message
may hold what a header says), ignore the terminal's signals and die with their parent.
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
_NEEDS_FRESH = 77  # exit code: out of memory in a process that has done other units before
_PR_SET_PDEATHSIG = 1


class WorkerFault(RuntimeError):
    """What failed in a worker is no file's fault; names the error's type and lines of code, no value."""


class Report:
    """How the work on a job tells its parent where it is. begun: the number of units this process has begun."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._said = 0.0
        self._done = 0
        self.begun: int = 0

    def begin(self, unit: int, silence: float, total: float) -> None:
        """Unit number `unit` of the job comes next. It hangs if nothing is heard of it for `silence` seconds, or if it
        takes more than `total`."""
        self.begun += 1
        self._done = 0
        self._say("begin", unit, silence, total)

    def beat(self, done: int | None = None) -> None:
        """Something was done: `done` pieces of the unit, where that is known. Cheap: may be called for every slice."""
        if done is not None:
            self._done = done
        if time.monotonic() - self._said >= _BEAT_EVERY:
            self._say("beat", self._done)

    def save(self, state: Any) -> None:
        """A unit is done: another process could go on from `state`."""
        self._say("save", state)

    def _say(self, *message: Any) -> None:
        self._said = time.monotonic()
        self._connection.send(message)


class Task(NamedTuple):
    """state: None, or the newest that was saved; refused: reason by number, of units that were given up."""

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
    """Yield (job, result) as they come, where result = work(Task(job, ...), report), a function at module level.

    jobs: None among them says that no job is to be begun before another one is done; at least one is at work then.
    memory_mb: a worker may allocate so much (address space, MiB) above what it has after `preload()`. on_save(job,
    state) is called in this process for every state that is saved, on_beat(job, done) now and then within a unit.
    Raises OSError when a worker cannot write (a full disk) and WorkerFault for a fault of our own. When the iterator is
    closed, or anything is raised, the workers are killed.
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
            lost = time.monotonic() - began - 1.0  # this process was stopped, perhaps all of them
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
    """A process, its job, and what is known about the two. `_unit`: the one it is at, None between units."""

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
        """Take in what the process said, replace it when it died or hangs; whether the job is done."""
        alive = self._process.is_alive()  # asked first: what it said before it died is still read
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
        except (EOFError, OSError):  # it is dead, or as good as
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
                raise WorkerFault(f"three workers in a row ended before they began a unit ({reason})")
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
        except OSError:  # it died while idle; `listen` will see
            pass

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, os.getpid(), *self._arguments), daemon=True)
        with _environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1"):
            self._process.start()
        theirs.close()


class _environment:
    """Variables for what is started within the block: one process a core, threads would only fight."""

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
    _die_with(parent)
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
    except (EOFError, BrokenPipeError, ConnectionError):  # the parent has gone
        os._exit(0)
    except OSError as error:
        connection.send(("cannot write", error.errno or errno.EIO))
    except BaseException as error:
        connection.send(("fault", where(error)))


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
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
