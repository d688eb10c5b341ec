"""What headers say of units, and what becomes of a few whose pixels are read: the workers' part of an inventory.

Both go the way of a real run, `chunks.UnitWork`; nothing is written.
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
"""The sample is a function of it and of the units' names."""
SAMPLED = 12
"""Units of one kind whose pixels may be read."""
SAMPLE_SECONDS = 1.0
"""Of a processor, after which no further unit of a kind is read."""
SAMPLE_FILES = 16
"""Of a DICOM folder, evenly spread."""


class Kind(NamedTuple):
    """What is sampled together. modality: "" where nothing says it. named: called like a label map, of a format whose
    headers do not say what they are."""

    format: str
    modality: str
    named: bool


class Leaf(NamedTuple):
    """Images that look alike. plane: one of `readers.PLANES`, "" of pictures; height, width: in pixels."""

    kind: Kind
    plane: str
    height: int
    width: int


@dataclass
class Alike:
    """stacks: series, volumes or pictures; slices: images of them; small: how many of these are too small. spacing,
    apart: least and greatest mm between pixels and between the frames of volumes, where known."""

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
    """What headers say of some units. leaves: of what may be kept. refused: (modality or "", reason, detail) -> how
    often. groups: what says that it is one patient's ("patient", or "folder" or "file" where nothing does), and its
    hash. candidates: for the sample, (draw, unit) of each kind. seconds: of a processor; idle: those of units that gave
    no stack. given_up: large units whose worker died or hung. lengthless: stacks whose header does not say how many
    frames they have."""

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
        """Of one kind, those apart that are too small."""
        return sum(alike.slices - alike.small for leaf, alike in self.leaves.items() if leaf.kind == kind)


@dataclass
class Measured:
    """What became of the sampled units of one kind. expected: slices by their headers, those apart that are too small;
    bytes: of the kept images' files; seconds: of a processor."""

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
    """Where another process would go on."""

    next: int
    result: Any


def look(task: Task, report: Report) -> Survey:
    """Read the headers of a chunk's units."""
    job: Job = task.job
    state = task.state or _State(0, Survey())
    units = read_units(job.listing, job.chunk)
    for number in range(state.next, len(units)):
        began = time.process_time()
        one = _Look(job, number, units[number], report)
        survey = Survey()
        if number in task.refused:
            one.refuse(task.refused[number], GIVEN_UP[task.refused[number]])
            survey.given_up = int(len(units[number].files) > LARGE)
        else:
            one.begin()
            try:
                one.run()
            except Changed:
                one.refuse("unreadable", "the file changed after it was listed")
        one.into(survey)
        survey.seconds = time.process_time() - began
        survey.idle = 0.0 if survey.leaves else survey.seconds
        state.result.add(survey)
        state = _State(number + 1, state.result)
        report.save(state)
    return state.result


def measure(task: Task, report: Report) -> dict[Kind, Measured]:
    """Read units to the last pixel, as a real run does, until enough is known of their kinds."""
    job: Job = task.job
    state = task.state or _State(0, {})
    units = read_units(job.listing, job.chunk)
    for number in range(state.next, len(units)):
        if number in task.refused or sum(one.seconds for one in state.result.values()) >= SAMPLE_SECONDS:
            continue
        expected, files = Survey(), _Nowhere(job.source)
        one = _Look(job, number, units[number], report)
        whole = UnitWork(job, number, units[number], Counts(), files, report)
        one.begin()
        try:
            one.run()
            one.into(expected)
            began = time.process_time()
            whole.run()
        except Changed:
            continue
        counts, seconds = whole.finish(), time.process_time() - began
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
        """Add what was seen, and what was refused, which is known when the unit has been worked on."""
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
        for planned in stack.planned(source.planes, 1 if stack.volume else source.frame_stride):
            height, width = planned.shape
            tiles = sum(sum(1 for _ in places(tile, height, width)) for tile in source.tiles)
            small = planned.count if source.whole and min(planned.shape) < MIN_SIDE else 0
            one = Alike(int(not counted), planned.count * (source.whole + tiles), small)
            if stack.geometry is not None or planned.spacing != (1.0, 1.0):
                one.spacing = (min(planned.spacing), max(planned.spacing))
            if stack.geometry is not None and stack.volume:
                one.apart = (stack.geometry.spacing[2],) * 2
            leaf = Leaf(kind, "" if stack.geometry is None else planned.plane, height, width)
            self._survey.leaves.setdefault(leaf, Alike()).add(one)
            counted = True
        if stack.length is None:
            self._survey.lengthless += 1
            self._survey.leaves.setdefault(Leaf(kind, "", *stack.shape), Alike()).add(Alike(1))
        patient = self._kept_together(stack)
        self._survey.groups.add((patient["by"], patient["group"]))

    def _may_be_labels(self, source: Source) -> bool:
        reader = readers.reader_of(self._unit.format)
        return not source.trusted and not reader.decides and reader.frame_stride == 1  # films hold no labels


class _Nowhere:
    """In the place of a chunk's files: nothing is written. bytes: of the images, by modality."""

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
    """Which part of a unit's slices is of each kind."""
    counts = Counter({leaf.kind: 0 for leaf in survey.leaves})
    for leaf, alike in survey.leaves.items():
        counts[leaf.kind] += alike.slices
    total = counts.total()
    return {kind: count / total if total else 1 / len(counts) for kind, count in counts.items()}


def _fewer(unit: Unit) -> Unit:
    """The unit, with some of its files where they are many."""
    if not readers.reader_of(unit.format).whole_folders or len(unit.files) <= SAMPLE_FILES:
        return unit
    return unit._replace(files=unit.files[:: -(-len(unit.files) // SAMPLE_FILES)])


def _draw(drawn: tuple[str, Unit]) -> tuple[str, str]:
    return drawn[0], drawn[1].key


def _within(one: tuple[float, float] | None, other: tuple[float, float] | None) -> tuple[float, float] | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one[0], other[0]), max(one[1], other[1])
