"""Passes the samples of candidates that took turns to pytest-benchmark, for its table, JSON, comparison and histogram.

pytest-benchmark runs one function per test, one after the other, but on a shared machine only candidates that take
turns can be compared. So the samples are taken here, and its fixture gets a clock that replays them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Samples:
    """``add(samples)`` for every set of candidates that took turns, then ``say(**facts)`` for derived facts.

    benchmark: the fixture of pytest-benchmark, or None if it is not installed, and then nothing is passed on.
    """

    def __init__(self, benchmark: Any | None):
        self._unused = benchmark
        # A fixture can be used once, so the other candidates use copies of the unused one.
        self._template = copy.copy(benchmark)
        self._added: list[Any] = []

    def add(self, samples: Mapping[str, Sequence[float]], case: str = "") -> None:
        """Add one entry per candidate, in one group. Samples are seconds."""
        if self._template is None:
            return
        self._added = []
        group = " ".join(filter(None, (self._template.name, case)))
        for candidate, seconds in samples.items():
            entry, self._unused = self._unused or copy.copy(self._template), None
            entry.group, entry.extra_info = group, {"candidate": candidate}
            entry.name, entry.fullname = f"{group} {candidate}", f"{self._template.fullname} {case} {candidate}"
            entry._timer = _repeating(seconds)
            entry.pedantic(_nothing, rounds=len(seconds))
            self._added.append(entry)

    def say(self, **facts: Any) -> None:
        """Add facts to ``extra_info`` of every entry of the last group."""
        for entry in self._added:
            entry.extra_info.update(facts)


def _repeating(seconds: Sequence[float]) -> Callable[[], float]:
    """A clock whose pairs of readings differ by the samples, in order."""
    readings = iter([reading for s in seconds for reading in (0.0, s)])

    def repeated() -> float:
        return next(readings)

    return repeated


def _nothing() -> None:
    pass
