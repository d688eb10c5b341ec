"""One chunk of a source: from files to encoded, normalised images, each with what the join needs to know of it.

A chunk's result is the three files of `chunk_files`.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dex.common import faults

from . import filters, normalise, readers, thumbnails, trace
from .chunk_files import Busy, CannotWrite, ChunkFiles
from .discover import Chunk, Unit, is_unchanged, read_units
from .ids import Names
from .no_images import not_an_image
from .readers.stack import Refused
from .reading import Reading
from .slices import Slice, slices
from .sources import Source
from .workers import Report, Task

HISTOGRAM = np.dtype("<u4")
HISTOGRAM_BYTES = 256 * HISTOGRAM.itemsize
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Settings:
    """What, beside the source, decides about an image. size: S in pixels; encoding: "jpg" or "png"."""

    size: int = 256
    bits: int = 8
    encoding: str = "jpg"
    allow_burned_in: bool = False


@dataclass(frozen=True)
class Job:
    """A chunk to be done. name: of its files; private: the private folder; listing: the source's units; common, level:
    as in `discover.Listing`."""

    name: str
    private: Path = field(repr=False)
    listing: Path = field(repr=False)
    chunk: Chunk
    source: Source
    root: Path = field(repr=False)
    salt: bytes = field(repr=False)
    common: int
    level: int
    settings: Settings
    limits: readers.Limits
    withdrawn: frozenset[str] = field(default=frozenset(), repr=False)
    """Ids of images and groups that are not to be kept."""


class Refusal(NamedTuple):
    """A unit, or a part of it, that gave nothing. id: of the unit; reason: one of `readers.REASONS`."""

    id: str
    reason: str
    detail: str


@dataclass
class Counts:
    """units, unreadable (units with a reason in UNREADABLE) and refused are about files; seen and what follows are
    about slices: seen = kept + sum(dropped). masked: stacks with NaN as background. assumed: units with images whose
    modality neither header, table nor folder says, but the description alone. parts: the same by modality, ""
    where none is known, of a source whose files have modalities of their own."""

    units: int = 0
    unreadable: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    burned_in: int = 0
    seen: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    text: int = 0
    masked: int = 0
    assumed: int = 0
    parts: dict[str, Counts] = field(default_factory=dict)

    def part(self, modality: str) -> Counts:
        return self.parts.setdefault(modality, Counts())

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            if name != "parts":
                setattr(self, name, getattr(self, name) + value)
        for modality, part in other.parts.items():
            self.part(modality).add(part)

    def since(self, before: Counts) -> Counts:
        """What was counted after `before`, its parts aside."""
        values = ((name, value) for name, value in vars(self).items() if name != "parts")
        return Counts(**{name: value - getattr(before, name) for name, value in values})

    def to_dict(self) -> dict[str, Any]:
        values = {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}
        return values | {"parts": {modality: part.to_dict() for modality, part in self.parts.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Counts:
        parts = {modality: cls.from_dict(part) for modality, part in values.get("parts", {}).items()}
        counted = {name: Counter(value) if isinstance(value, dict) else value for name, value in values.items()}
        return cls(**{**counted, "parts": parts})


UNREADABLE = ("unreadable", "timeout", "crash")
"""Reasons that say that a file is broken rather than unsuitable: too many of them stop a run."""
GIVEN_UP = {
    "timeout": "its reader took too long, twice; it may be damaged: copy the file anew, or leave it out",
    "crash": "its reader died of it, twice; it may be damaged: copy the file anew, or leave it out",
}


class Result(NamedTuple):
    counts: Counts
    refusals: list[Refusal]


class Changed(Exception):
    """A file is not what it was when the sources were listed."""


class _State(NamedTuple):
    """Where another process would go on: the next unit, the files' sizes, and what is known so far."""

    next: int
    sizes: tuple[int, int, int]
    result: Result

    def kept(self) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """The sizes, and the rest as JSON holds it."""
        counts, refusals = self.result
        return self.sizes, {"next": self.next, "counts": counts.to_dict(), "refusals": refusals}

    @classmethod
    def of(cls, left: tuple[tuple[int, int, int], dict[str, Any]] | None) -> _State | None:
        """From what `kept` gave."""
        if left is None:
            return None
        sizes, kept = left
        refusals = [Refusal(*refusal) for refusal in kept["refusals"]]
        return cls(kept["next"], sizes, Result(Counts.from_dict(kept["counts"]), refusals))


def _files(job: Job) -> ChunkFiles:
    withdrawn = hashlib.sha256("\0".join(sorted(job.withdrawn)).encode("utf-8", "surrogatepass")).hexdigest()
    return ChunkFiles(job.private, job.name, f"{job.chunk} {withdrawn}", HISTOGRAM_BYTES)


def preload(formats: Iterable[str]) -> None:
    """Import what the readers need, so that a worker's memory limit is about files."""
    for format in formats:
        with contextlib.suppress(Refused):  # not installed: each file of the format is refused and says so
            readers.load(format)
    Image.init()


def work(task: Task, report: Report) -> Result | str:
    """Do one chunk, from `task.state` on, or from where an earlier run was killed. A string, "changed" or "busy", says
    why it was not done."""
    job: Job = task.job
    units = read_units(job.listing, job.chunk)
    try:
        with _files(job) as files:
            left = task.state or _State.of(files.left())
            state: _State = left or _State(0, (0, 0, 0), Result(Counts(), []))
            files.cut(state.sizes)
            for number in range(state.next, len(units)):
                done = UnitWork(job, number, units[number], copy.deepcopy(state.result.counts), files, report)
                if number in task.refused:
                    done.refuse(task.refused[number], GIVEN_UP[task.refused[number]])
                else:
                    done.begin()
                    done.run()
                result = Result(done.finish(), state.result.refusals + done.refusals)
                state = _State(number + 1, files.flush(), result)
                files.keep(*state.kept())
                report.save(state)
            files.finish(state.result.counts.to_dict())
    except CannotWrite as error:
        raise error.error from None
    except (Changed, Busy) as error:
        return type(error).__name__.lower()
    return state.result


class _Part(NamedTuple):
    """One thing that was refused. files: their names, () where it is the whole unit; modality: "" where it is not
    known."""

    refusal: Refusal
    files: tuple[str, ...]
    modality: str


class UnitWork:
    """The work on one unit: writes what is kept, counts what is not; of a stack that is refused nothing stays."""

    headers = False  # whether no pixel is read

    def __init__(self, job: Job, number: int, unit: Unit, counts: Counts, files: ChunkFiles, report: Report):
        self._job, self._number, self._unit, self._files, self._report = job, number, unit, files, report
        self._counts, self._before, self._kept_before = counts, counts.seen, counts.kept
        self._names = Names(job.source, job.salt, job.common, job.level)
        self._source = job.source.for_format(unit.format)
        self._path = unit.files[0].path
        self._reading = Reading(self._source, self._path, unit.stated.modality)
        self._modality = ""  # of the stack that is being worked on
        self._first = ""  # of the first one
        self._refused: list[_Part] = []

    @property
    def refusals(self) -> list[Refusal]:
        return [part.refusal for part in self._refused]

    def refuse(self, reason: str, detail: str = "", files: tuple[str, ...] = ()) -> None:
        refusal = Refusal(self._names.unit(self._unit.key), reason, detail)
        self._refused.append(_Part(refusal, files, self._modality))

    def begin(self) -> None:
        """Say that this unit comes next, and how long it may take."""
        # Every decoded frame is a sign of life, and a few bytes may declare any number of frames.
        sizes, silence = [file.size for file in self._unit.files], self._job.limits.seconds
        self._report.begin(self._number, silence, silence * (len(sizes) + sum(sizes) / 2**20))

    def run(self) -> None:
        for file in self._unit.files:
            if not is_unchanged(self._job.root, file):
                raise Changed
            self._report.beat()
        if (said := self._contradicted()) is not None:
            detail = f"its folder says {said}, not {self._source.modality}; --trust takes it"
            return self.refuse("another modality", detail)
        paths = [self._job.root / file.path for file in self._unit.files]
        stacks = self._reading.stacks(
            paths,
            self._unit.format,
            size=self._job.settings.size,
            bits=self._job.settings.bits,
            limits=self._job.limits,
            beat=self._report.beat,
            headers=self.headers,
        )
        number = 0
        for order in itertools.count():
            self._modality = ""
            try:
                stack = next(stacks, None)
            except Exception as error:
                return self._refuse_for(error)
            self._report.beat()
            if stack is None:
                return None
            sizes, before = self._files.sizes(), copy.deepcopy(self._counts)
            try:
                self._stack(stack, number, order)
                number += 1
            except CannotWrite:
                raise
            except Exception as error:
                self._files.cut(sizes)
                self._counts = copy.deepcopy(before)
                self._refuse_for(error, stack)
            self._counts.burned_in += bool(stack.burned_in)
            if self._source.routed:
                self._counts.part(self._modality).add(self._counts.since(before))
                self._first = self._first or self._modality
            self._modality = ""
            for part in stack.refused:
                self.refuse(part.reason, part.detail, (part.file,) if part.file else part.files)

    def finish(self) -> Counts:
        """The counts, this unit's included."""
        reasons = [part.refusal.reason for part in self._refused]
        self._counts.units += 1
        self._counts.refused.update(reasons)
        unreadable = any(reason in UNREADABLE for reason in reasons)
        self._counts.unreadable += unreadable
        self._counts.assumed += self._counts.kept > self._kept_before and self._is_assumed()
        if self._source.routed:
            self._counts.part(self._first).units += 1
            self._counts.part(self._first).unreadable += unreadable
            for part in self._refused:
                self._counts.part(part.modality).refused[part.refusal.reason] += 1
        for part in self._refused:
            self._files.note(trace.refusal(*part.refusal, self._unit.key, part.files))
        return self._counts

    def _is_assumed(self) -> bool:
        """Whether nothing but the user's description says of which modality the unit is."""
        if self._unit.stated.modality or readers.reader_of(self._unit.format).decides:
            return False
        return self._source.is_assumed(self._path)

    def _contradicted(self) -> str | None:
        """The modality that folders say of a file that says none itself, where the description says another."""
        if self._unit.stated.modality or readers.reader_of(self._unit.format).decides:
            return None
        return self._source.contradicted(self._path)

    def _refuse_for(self, error: Exception, stack: readers.Stack | None = None) -> None:
        """stack: the one that is refused, where it is one of several in its unit."""
        files = trace.files_of(stack) if stack is not None else ()
        if isinstance(error, MemoryError) or isinstance(error.__context__, MemoryError):
            if self._report.begun > 1:
                raise MemoryError  # what other units left behind may be to blame: once more, in a fresh process
            self.refuse("too large", f"needs more than {self._job.limits.memory_mb} MB of memory", files)
        elif isinstance(error, Refused):
            for one in (error, *error.others):
                self.refuse(one.reason, one.detail, (one.file,) if one.file else one.files or files)
        else:
            self.refuse("unreadable", faults.described(error))

    def _stack(self, stack: readers.Stack, number: int, order: int) -> None:
        """number: among the unit's stacks that are used; order: among all that its reader gives."""
        settings = self._job.settings
        source, kept_together = self._admitted(stack), self._kept_together(stack)
        group = kept_together["group"]
        common = {
            **kept_together,
            "split": source.split or self._unit.stated.split,
            "unit": self._number,
            "stack": number,
            "volume": bool(stack.volume),
        }
        if self._source.routed:
            common["modality"] = source.modality
        origins = trace.Origins(stack, self._unit.key, number, self._volume(order))
        for one in slices(stack, source, settings.size, settings.bits):
            self._counts.seen += 1
            self._report.beat(self._counts.seen - self._before)
            dropped = filters.verdict(one.image, one.share, one.small, source)
            label = f"s{number:02d}-{one.label}" if number else one.label
            sample = self._names.sample(self._unit.key, label)
            if group in self._job.withdrawn or sample in self._job.withdrawn:
                dropped = dropped or filters.WITHDRAWN
            elif dropped is not None:
                self._show(one, dropped, label, common)
            if dropped is not None:
                self._counts.dropped[dropped] += 1
                continue
            line, data = _describe(one, settings.encoding)
            self._files.add({"id": sample, "label": label, **common, **line}, data)
            for row in origins.rows(sample, label, one.number):
                self._files.note(row)
            self._counts.kept += 1
            self._counts.text += line["text"]
        self._counts.masked += stack.masked

    def _show(self, one: Slice, reason: str, label: str, common: dict[str, Any]) -> None:
        """Keep a thumbnail of a dropped slice: of the first of a reason in this chunk, the second, fourth, eighth..."""
        before = self._counts.dropped[reason]
        if before & (before + 1):
            return
        picture = base64.b64encode(thumbnails.of_slice(one.image)).decode()
        where = {"path": self._unit.key, "label": label, "group": common["group"]}
        self._files.show({"dropped": reason, **where, "thumbnail": picture})

    def _admitted(self, stack: readers.Stack) -> Source:
        """The source as it is for the stack. Refused where that is no image, or is not to be used."""
        source = self._reading.for_stack(stack)
        self._modality = "" if source.routed else source.modality
        self._check_numbers(stack, source)
        if stack.burned_in and not self._job.settings.allow_burned_in:
            raise Refused("burned-in", "the header declares burned-in annotation; --allow-burned-in takes it")
        self._reading.rescale(stack, self._unit.format)
        return source

    def _volume(self, order: int) -> int | None:
        """The number of a stack's volume in its file, where the description asks for others than the first."""
        volumes = self._source.volumes
        if volumes in ("first", "mean") or "volumes" not in readers.reader_of(self._unit.format).choices:
            return None
        return order * (int(volumes) if volumes.isdecimal() else 1)

    def _kept_together(self, stack: readers.Stack) -> dict[str, Any]:
        """What `splits` must know of a stack: its patient, and what it is of where patients are too few."""
        names, alone = self._names, not readers.reader_of(self._unit.format).whole_folders
        stated = self._unit.stated.patient
        group = names.identity(self._path, stack.patient, alone, stated)
        line: dict[str, Any] = {"group": group.name, "by": group.by}
        if group == names.identity(self._path, "", alone, stated):
            place = group
        else:
            place = names.folder(self._path, alone)
            line["folder"] = place.name
        if alone:
            return line if place.by == "file" else line | {"file": names.part("file", self._unit.key)}
        identity = stack.patient, stack.study
        series = stack.series.partition("\0")[0]  # its stacks show one anatomy
        line["series"] = names.part("series", *identity, series or self._unit.key)
        return line | ({"study": names.part("study", *identity)} if stack.study else {})

    def _check_numbers(self, stack: readers.Stack, source: Source) -> None:
        """Refused where the stack is no image by its numbers or by what its file declares, or of no known modality."""
        if not source.trusted:
            refused = not_an_image(stack, self._unit.format, self._path, source.modality)
            if refused is not None:
                raise refused
        if source.routed:
            raise Refused("unknown modality", "nothing says of which modality it is; --modality or --pattern would")


def _describe(one: Slice, encoding: str) -> tuple[dict[str, Any], bytes]:
    """What the join needs to know of an image, and its bytes: encoded, then the histogram."""
    image = np.ascontiguousarray(one.image)
    encoded = encode(image, encoding)
    eight = image if image.dtype == np.uint8 else ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    shape = f"{image.dtype.str} {image.shape} ".encode()
    histogram = np.array(Image.fromarray(eight).histogram(), HISTOGRAM).reshape(-1, 256).sum(axis=0, dtype=HISTOGRAM)
    data = encoded + histogram.tobytes()
    pixels = hashlib.sha256(shape)
    pixels.update(np.ascontiguousarray(image, image.dtype.newbyteorder("<")))
    line = {
        "kind": encoding,
        "size": len(encoded),
        "sha256": hashlib.sha256(data).hexdigest(),
        "pixels_sha256": pixels.hexdigest(),
        "dhash": f"{normalise.difference_hash(eight):064x}",
        "share": round(float(one.share), 4),
        "text": bool(filters.suspect_text(image)),
    }
    return line, data


def encode(image: np.ndarray, encoding: str) -> bytes:
    """uint8 [S, S], uint8 [S, S, 3] or uint16 [S, S] (png only) as the bytes of a file."""
    stream = io.BytesIO()
    if encoding == "jpg":
        # optimised tables would save 3 to 5 % of the bytes, take twice as long, and fail on what packs badly
        Image.fromarray(image).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()
