"""Hands what candidates took in turns to pytest-benchmark, for its table, JSON, comparison and histogram.

pytest-benchmark runs one function per test, one after the other, but on a shared machine only candidates that take
turns can be compared. So the samples are taken here, and its fixture gets a clock that repeats them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Samples:
    """``add(samples)`` for every set of candidates that took turns, then ``say(**facts)`` for what follows from it.

    benchmark: the fixture of pytest-benchmark, or None where it is not installed: nothing is handed on then.
    """

    def __init__(self, benchmark: Any | None):
        self._unused = benchmark
        # A fixture serves once. Copies of an unused one serve the other candidates.
        self._template = copy.copy(benchmark)
        self._added: list[Any] = []

    def add(self, samples: Mapping[str, Sequence[float]], case: str = "") -> None:
        """One entry a candidate, in one group. Samples are seconds."""
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
    """A clock whose every second reading is later than the one before by the next sample."""
    readings = iter([reading for s in seconds for reading in (0.0, s)])

    def repeated() -> float:
        return next(readings)

    return repeated


def _nothing() -> None:
    pass
