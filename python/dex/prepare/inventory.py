"""What a source holds and what ``dex prepare`` would make of it, from headers and a small sample of pixels.

The code of a real run (``discover``, ``chunks.UnitWork``, the readers, ``routing``) lists and judges the files, but
reads only their headers. These numbers are therefore exact, if the pixels of the files can be read:

    modality, size, planes and spacing of every image, patients, what is left out by headers and why, skipped files,
    slices that are too small, files of unknown modality

These are estimates, from units drawn by a seed and read completely, as in a real run:

    slices kept or dropped because of their pixels, label maps recognised by their values, damaged pixel data, the
    set's bytes, the time

An inventory contains no date, name, path or series description. Patients are counted by salted hashes, and the salt is
discarded.
"""

from __future__ import annotations

import functools
import json
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import chunks, label_maps, readers, run, workers
from .chunks import Job, Settings
from .discover import Chunk, Listing, Undetermined, check_modalities, cut, discover, passed_over_counts
from .ids import SALT_BYTES
from .sources import Source
from .survey import Kind, Measured, Survey, look, measure

SAMPLE_BYTES = 64 * 2**20
"""Larger units are sampled only if there are no others."""
_EVERY = 5.0  # Seconds between lines


@dataclass(frozen=True)
class Inventory:
    """The inventory of one source. passed_over: reason, or suffix of an unknown format -> number of files.
    undetermined: why a real run would not start; None if it would. workers: for the estimate of the time."""

    source: str
    files: int
    bytes: int
    survey: Survey
    sample: dict[Kind, Measured]
    passed_over: dict[str, int]
    undetermined: Undetermined | None
    workers: int

    @property
    def kinds(self) -> list[Kind]:
        return sorted({leaf.kind for leaf in self.survey.leaves})

    @property
    def estimate(self) -> Estimate:
        return _estimate(self)


class Estimate(NamedTuple):
    """slices, small: exact, by headers. kept, bytes, seconds (of one processor), label_maps (stacks): estimates.
    unmeasured: slices of kinds without a sampled unit; the estimates do not include them."""

    slices: int
    small: int
    kept: int
    bytes: int
    seconds: float
    label_maps: int
    unmeasured: int
    sampled: int


def take(
    sources: Sequence[Source],
    settings: Settings,
    *,
    processes: int,
    cache: Path = run.CACHE,
    limits: readers.Limits = readers.Limits(),  # noqa: B008
    say: Callable[[str], None] = lambda text: None,
) -> list[Inventory]:
    """The inventory of each source, sorted by name. Only packages and remote files are written, into ``cache``.

    Raises ValueError for a source without files, as a real run does, and ``run.Failed`` for a fault of our own.
    """
    try:
        taken = []
        for source in sorted(sources, key=lambda source: source.name):
            root = run.root_of(source, cache.expanduser(), say)
            with tempfile.TemporaryDirectory(prefix="dex-") as scratch:
                salt = secrets.token_bytes(SALT_BYTES)
                work = _Worked(source, root, settings, limits, Path(scratch), salt, processes, say)
                taken.append(work.inventory())
        return taken
    except workers.WorkerFault as fault:
        raise run.Failed(f"a fault in dex: {fault}") from None


@dataclass(frozen=True)
class _Worked:
    """One source, and how its units are passed to workers."""

    source: Source
    root: Path
    settings: Settings
    limits: readers.Limits
    scratch: Path
    salt: bytes
    processes: int
    say: Callable[[str], None]

    def inventory(self) -> Inventory:
        listing = discover(self.source, self.root)
        undetermined = None
        try:
            check_modalities(self.source, listing)
        except Undetermined as error:
            undetermined = error
        survey = self.survey(listing)
        if survey.given_up:  # One file of a large folder may be to blame: divide it into series, as a real run does
            options = run.Options(out=self.scratch / "out", workers=self.processes, limits=self.limits)
            survey = self.survey(
                run.parted_by_headers(self.source, self.root, listing, options, self.scratch, self.say)
            )
        return Inventory(
            source=self.source.name,
            files=listing.files,
            bytes=sum(listing.sizes),
            survey=survey,
            sample=self.sample(listing, survey),
            passed_over=passed_over_counts(listing),
            undetermined=undetermined,
            workers=self.processes,
        )

    def survey(self, listing: Listing) -> Survey:
        path = self.scratch / "units.jsonl"
        path.write_bytes(b"".join(listing.lines))
        total, known, reported = len(listing.lines), 0, time.monotonic()
        jobs = [self._job(path, chunk, listing) for chunk in listing.chunks]
        result = Survey()
        for job, survey in self._run(look, jobs, listing.formats):
            known += job.chunk.units
            if time.monotonic() - reported >= _EVERY:
                reported = time.monotonic()
                self.say(f"{self.source.name}: headers of {known:,}/{total:,} units")
            result.add(survey)
        return result

    def sample(self, listing: Listing, survey: Survey) -> dict[Kind, Measured]:
        kinds = sorted(kind for kind in survey.candidates if kind.modality)
        jobs = []
        for number, kind in enumerate(kinds):
            drawn = [unit for _, unit in survey.candidates[kind]]
            drawn = [unit for unit in drawn if unit.size <= SAMPLE_BYTES] or [min(drawn, key=lambda unit: unit.size)]
            path = self.scratch / f"sample-{number}.jsonl"
            lines = [json.dumps(unit._asdict()).encode() + b"\n" for unit in drawn]
            path.write_bytes(b"".join(lines))
            whole = cut([(sum(map(len, lines)), 0)])[0]._replace(units=len(drawn))
            jobs.append(self._job(path, whole, listing))
        measured: dict[Kind, Measured] = {}
        for _, by_kind in self._run(measure, jobs, sorted({kind.format for kind in kinds})):
            for kind, results in by_kind.items():
                measured.setdefault(kind, Measured()).add(results)
        return measured

    def _job(self, path: Path, chunk: Chunk, listing: Listing) -> Job:
        return Job(
            name=path.stem,
            private=self.scratch,
            listing=path,
            chunk=chunk,
            source=self.source,
            root=self.root,
            salt=self.salt,
            common=listing.common,
            level=listing.level.number,
            settings=self.settings,
            limits=self.limits,
        )

    def _run(self, work: Callable, jobs: Sequence[Job], formats: Sequence[str]) -> Iterator[tuple[Job, Any]]:
        return workers.run(
            work,
            jobs,
            processes=max(1, min(self.processes, len(jobs))),
            memory_mb=self.limits.memory_mb,
            preload=functools.partial(chunks.preload, sorted(formats)),
        )


def _estimate(inventory: Inventory) -> Estimate:
    survey, sample = inventory.survey, inventory.sample
    total = sum(alike.slices for alike in survey.leaves.values())
    kept = size = labels = seconds = 0.0
    unmeasured = 0
    for kind in inventory.kinds:
        count, part = survey.slices(kind), _nearest(kind, sample)
        if part is None:
            unmeasured += count
            continue
        factor = count / part.expected
        kept, size, seconds = kept + part.kept * factor, size + part.bytes * factor, seconds + part.seconds * factor
        stacks = sum(alike.stacks for leaf, alike in survey.leaves.items() if leaf.kind == kind)
        left_out = part.refused[label_maps.LABEL_MAP] + part.refused[label_maps.PROBABILITY_MAP]
        labels += stacks * min(1.0, left_out / part.units)
    return Estimate(
        slices=total,
        small=sum(alike.small for alike in survey.leaves.values()),
        kept=round(kept),
        bytes=round(size),
        seconds=seconds + survey.idle,
        label_maps=round(labels),
        unmeasured=unmeasured,
        sampled=sum(part.expected for part in sample.values()),
    )


def _nearest(kind: Kind, sample: dict[Kind, Measured]) -> Measured | None:
    """The measurements of a kind, or else of all kinds of its format."""
    if kind in sample and sample[kind].expected:
        return sample[kind]
    total = Measured()
    for other, part in sample.items():
        if other.format == kind.format and other.named == kind.named:
            total.add(part)
    return total if total.expected else None
