"""The workers' part of an inventory: the headers of all units, and the pixels of a sample.

Both use the code of a real run, ``chunks.UnitWork``, but write nothing.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import label_maps, normalise, readers
from .chunks import GIVEN_UP, Changed, Counts, Job, UnitWork
from .discover import LARGE, Unit, read_units
from .readers.stack import Refused, Stack
from .slices import MIN_SIDE, places
from .sources import Source
from .workers import Report, Task

SEED = "dex inventory"
"""The sample is a function of this seed and the units' names."""
SAMPLED = 12
"""Largest number of sampled units per kind."""
SAMPLE_SECONDS = 1.0
"""Processor time after which no further unit of a kind is read."""
SAMPLE_FILES = 16
"""Largest number of files read of a DICOM folder, evenly spaced."""


class Kind(NamedTuple):
    """Units that are sampled together. modality: "" if unknown. named: named like a label map, in a format whose
    headers do not declare one."""

    format: str
    modality: str
    named: bool


class Leaf(NamedTuple):
    """Images of the same kind, plane and size. plane: one of ``readers.PLANES``, "" for pictures; height, width: in
    pixels, of the picture in its file, even if its images show it smaller or in pieces."""

    kind: Kind
    plane: str
    height: int
    width: int


@dataclass
class Alike:
    """Counts of alike images. stacks: series, volumes or pictures; slices: their images; small: slices that are too
    small. spacing, apart: least and greatest mm between pixels and between the frames of volumes, if known."""

    stacks: int = 0
    slices: int = 0
    small: int = 0
    spacing: tuple[float, float] | None = None
    apart: tuple[float, float] | None = None

    def add(self, other: Alike) -> None:
        self.stacks, self.slices = self.stacks + other.stacks, self.slices + other.slices
        self.small += other.small
        self.spacing, self.apart = _within(self.spacing, other.spacing), _within(self.apart, other.apart)


@dataclass
class Survey:
    """The headers of some units. leaves: counts of what may be kept. refused: (modality or "", reason, detail) ->
    count. groups: what identifies a patient ("patient", or else "folder" or "file"), with its hash. candidates: for the
    sample, (draw, unit) of each kind. seconds: processor time; idle: that of units without a stack. given_up: large
    units whose worker died or hung. lengthless: stacks whose header does not give the number of frames."""

    leaves: dict[Leaf, Alike] = field(default_factory=dict)
    refused: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    groups: set[tuple[str, str]] = field(default_factory=set)
    candidates: dict[Kind, list[tuple[str, Unit]]] = field(default_factory=dict)
    seconds: float = 0.0
    idle: float = 0.0
    given_up: int = 0
    lengthless: int = 0

    def add(self, other: Survey) -> None:
        for leaf, alike in other.leaves.items():
            self.leaves.setdefault(leaf, Alike()).add(alike)
        self.refused += other.refused
        self.groups |= other.groups
        for kind, drawn in other.candidates.items():
            self.candidates[kind] = sorted([*self.candidates.get(kind, []), *drawn], key=_draw)[:SAMPLED]
        self.seconds, self.idle = self.seconds + other.seconds, self.idle + other.idle
        self.given_up += other.given_up
        self.lengthless += other.lengthless

    @property
    def patients(self) -> int:
        return sum(by == "patient" for by, _ in self.groups)

    def slices(self, kind: Kind) -> int:
        """The number of slices of one kind, without those that are too small."""
        return sum(alike.slices - alike.small for leaf, alike in self.leaves.items() if leaf.kind == kind)


@dataclass
class Measured:
    """The results of the sampled units of one kind. expected: slices by their headers, without those that are too
    small; bytes: of the kept images' files; seconds: processor time."""

    units: int = 0
    expected: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    seconds: float = 0.0

    def add(self, other: Measured) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class _State(NamedTuple):
    """Where another process can resume."""

    next: int
    result: Any


def look(task: Task, report: Report) -> Survey:
    """Read the headers of a chunk's units."""
    job: Job = task.job
    state = task.state or _State(0, Survey())
    units = read_units(job.listing, job.chunk)
    for number in range(state.next, len(units)):
        began = time.process_time()
        unit_work = _Look(job, number, units[number], report)
        survey = Survey()
        if number in task.refused:
            unit_work.refuse(task.refused[number], GIVEN_UP[task.refused[number]])
            survey.given_up = int(len(units[number].files) > LARGE)
        else:
            unit_work.begin()
            try:
                unit_work.run()
            except Changed:
                unit_work.refuse("unreadable", "the file changed after it was listed")
        unit_work.into(survey)
        survey.seconds = time.process_time() - began
        survey.idle = 0.0 if survey.leaves else survey.seconds
        state.result.add(survey)
        state = _State(number + 1, state.result)
        report.save(state)
    return state.result


def measure(task: Task, report: Report) -> dict[Kind, Measured]:
    """Read whole units, as a real run does, until their kinds are measured."""
    job: Job = task.job
    state = task.state or _State(0, {})
    units = read_units(job.listing, job.chunk)
    for number in range(state.next, len(units)):
        if number in task.refused or sum(part.seconds for part in state.result.values()) >= SAMPLE_SECONDS:
            continue
        expected, files = Survey(), _Nowhere(job.source)
        headers = _Look(job, number, units[number], report)
        pixels = UnitWork(job, number, units[number], Counts(), files, report)
        headers.begin()
        try:
            headers.run()
            headers.into(expected)
            began = time.process_time()
            pixels.run()
        except Changed:
            continue
        counts, seconds = pixels.finish(), time.process_time() - began
        for kind, share in _shares(expected).items():
            part = counts.parts.get(kind.modality, Counts()) if job.source.routed else counts
            state.result.setdefault(kind, Measured()).add(
                Measured(
                    units=1,
                    expected=expected.slices(kind),
                    kept=part.kept,
                    dropped=+(part.dropped - Counter({"too small": part.dropped["too small"]})),
                    refused=part.refused,
                    bytes=files.bytes[kind.modality],
                    seconds=seconds * share,
                )
            )
        state = _State(number + 1, state.result)
        report.save(state)
    return state.result


class _Look(UnitWork):
    """The work on one unit without its pixels."""

    headers = True

    def __init__(self, job: Job, number: int, unit: Unit, report: Report):
        super().__init__(job, number, unit, Counts(), _Nowhere(job.source), report)
        self._survey = Survey()

    def into(self, survey: Survey) -> None:
        """Add what was seen and what was refused; call it when the unit is done."""
        for part in self._refused:
            self._survey.refused[part.modality, part.refusal.reason, part.refusal.detail] += 1
        unit = _fewer(self._unit)
        drawn = hashlib.sha256(f"{SEED}\0".encode() + os.fsencode(unit.key)).hexdigest()
        for leaf in self._survey.leaves:
            self._survey.candidates[leaf.kind] = [(drawn, unit)]
        survey.add(self._survey)

    def _check_numbers(self, stack: Stack, source: Source) -> None:
        if self._may_be_labels(source) and stack.declared:
            raise Refused(stack.declared, "its header declares it")

    def _stack(self, stack: Stack, number: int, order: int) -> None:
        source = self._admitted(stack)
        if source.normalisation in ("ct", "suv"):
            normalise.normaliser(source.normalisation, stack)
        modality = "" if source.routed else source.modality
        kind = Kind(
            self._unit.format,
            modality,
            self._may_be_labels(source) and label_maps.suspicious(self._path),
        )
        counted = False
        for planned in stack.planned(source.planes, source.slice_stride if stack.volume else source.frame_stride):
            height, width = planned.shape
            tiles = sum(sum(1 for _ in places(tile, height, width)) for tile in source.tiles)
            small = planned.count if source.whole and min(planned.shape) < MIN_SIDE else 0
            alike = Alike(int(not counted), planned.count * (source.whole + tiles), small)
            if stack.geometry is not None or planned.spacing != (1.0, 1.0):
                alike.spacing = (min(planned.spacing), max(planned.spacing))
            if stack.geometry is not None and stack.volume:
                alike.apart = (stack.geometry.spacing[2],) * 2
            leaf = Leaf(kind, "" if stack.geometry is None else planned.plane, *(stack.sides or planned.shape))
            self._survey.leaves.setdefault(leaf, Alike()).add(alike)
            counted = True
        if stack.length is None:
            self._survey.lengthless += 1
            self._survey.leaves.setdefault(Leaf(kind, "", *stack.shape), Alike()).add(Alike(1))
        patient = self._kept_together(stack)
        self._survey.groups.add((patient["by"], patient["group"]))

    def _may_be_labels(self, source: Source) -> bool:
        reader = readers.reader_of(self._unit.format)
        return not source.trusted and not reader.decides and reader.frame_stride == 1  # Films hold no labels


class _Nowhere:
    """A stand-in for a chunk's files that writes nothing. bytes: of the images, by modality."""

    def __init__(self, source: Source):
        self._source = source
        self.bytes: Counter[str] = Counter()

    def sizes(self) -> tuple[int, int, int]:
        return (0, 0, 0)

    def cut(self, sizes: tuple[int, int, int]) -> None:
        pass

    def add(self, line: dict[str, Any], data: bytes) -> None:
        self.bytes[line.get("modality", self._source.modality)] += line["size"]

    def note(self, row: dict[str, Any]) -> None:
        pass

    def show(self, row: dict[str, Any]) -> None:
        pass


def _shares(survey: Survey) -> dict[Kind, float]:
    """The share of a unit's slices that is of each kind."""
    counts = Counter({leaf.kind: 0 for leaf in survey.leaves})
    for leaf, alike in survey.leaves.items():
        counts[leaf.kind] += alike.slices
    total = counts.total()
    return {kind: count / total if total else 1 / len(counts) for kind, count in counts.items()}


def _fewer(unit: Unit) -> Unit:
    """The unit, with only some of its files if it has many."""
    if not readers.reader_of(unit.format).whole_folders or len(unit.files) <= SAMPLE_FILES:
        return unit
    return unit._replace(files=unit.files[:: -(-len(unit.files) // SAMPLE_FILES)])


def _draw(drawn: tuple[str, Unit]) -> tuple[str, str]:
    return drawn[0], drawn[1].key


def _within(first: tuple[float, float] | None, second: tuple[float, float] | None) -> tuple[float, float] | None:
    if first is None or second is None:
        return second if first is None else first
    return min(first[0], second[0]), max(first[1], second[1])
