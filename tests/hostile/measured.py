"""`dex.prepare.chunks.work`, measured: what each unit costs the worker that reads it.

A line of JSON for each unit goes to the file that DEX_MEASURED names: number, seconds, those of them on the processor,
peak memory above what the process had when the unit began, and how many slices were looked at. Started as a program it
is `dex` with such workers, which are killed after SECONDS instead of ten: on a busy machine ten seconds of work last
longer, and what is judged is the processor's time.
"""

import dataclasses
import json
import os
import sys
import time

from dex.prepare import chunks, readers
from dex.prepare import run as prepare

SECONDS = 120.0
OPTIONS = prepare.Options


def status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


class Measured:
    """A `Report` that writes down what comes between `begin` and `save`."""

    def __init__(self, job, state, report):
        self._job, self._report, self._at = job, report, None
        self._seen = state.result.counts.seen if state else 0

    @property
    def begun(self):
        return self._report.begun

    def begin(self, unit, seconds, *rest):
        self._at = unit
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        self._memory, self._began, self._worked = status("VmRSS"), time.monotonic(), time.process_time()
        self._report.begin(unit, seconds, *rest)

    def beat(self, done=None):
        self._report.beat(done)

    def save(self, state):
        if self._at is not None:
            row = {
                "chunk": self._job.name,
                "unit": self._at,
                "seconds": time.monotonic() - self._began,
                "worked": time.process_time() - self._worked,
                "bytes": status("VmHWM") - self._memory,
                "looked_at": state.result.counts.seen - self._seen,
            }
            with open(os.environ["DEX_MEASURED"], "a") as file:
                file.write(json.dumps(row) + "\n")
            self._at = None
        self._seen = state.result.counts.seen
        self._report.save(state)


def patient(limits=readers.Limits(), **options):  # noqa: B008
    """`prepare.Options` with SECONDS of silence."""
    return OPTIONS(limits=dataclasses.replace(limits, seconds=SECONDS), **options)


def work(task, report):
    return chunks.work(task, Measured(task.job, task.state, report))


if __name__ == "__main__":
    import measured

    from dex import cli

    chunks.work = measured.work  # by a name that other processes know
    prepare.Options = measured.patient
    sys.exit(cli.main(sys.argv[1:]))
