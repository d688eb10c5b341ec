"""One chunk of a source: from files to normalised, encoded images, each with the facts that the join needs.

The result is the three files of ``chunk_files``.
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
    """Settings of every image, beside its source. size: S in pixels; encoding: "jpg" or "png"."""

    size: int = 256
    bits: int = 8
    encoding: str = "jpg"
    allow_burned_in: bool = False


@dataclass(frozen=True)
class Job:
    """A chunk to prepare. name: common name of its files; private: the private folder; listing: file of the source's
    units; common, level: see ``discover.Listing``."""

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
    """Ids of images and groups to leave out."""


class Refusal(NamedTuple):
    """A refused unit, or a refused part of one. id: of the unit; reason: one of ``readers.REASONS``."""

    id: str
    reason: str
    detail: str


@dataclass
class Counts:
    """units, unreadable (units with a reason in UNREADABLE) and refused count units and their parts; seen, dropped,
    kept and text count slices: seen = kept + sum(dropped). masked: stacks with a NaN background. assumed: units with
    images whose modality only the description names, and neither header, table nor folder. parts: the same counts by
    modality ("" where unknown), for a source whose files each have their own modality."""

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
        """The counts added since ``before``, without parts."""
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
"""Reasons of broken files, in contrast to unsuitable ones: too many of them stop a run."""
GIVEN_UP = {
    "timeout": "its reader took too long, twice; it may be damaged: copy the file again, or leave it out",
    "crash": "its reader crashed on it, twice; it may be damaged: copy the file again, or leave it out",
}


class Result(NamedTuple):
    counts: Counts
    refusals: list[Refusal]


class Changed(Exception):
    """A file has changed since the sources were listed."""


class _State(NamedTuple):
    """Where another process can resume: the next unit, the sizes of the chunk's files, and the result so far."""

    next: int
    sizes: tuple[int, int, int]
    result: Result

    def kept(self) -> tuple[tuple[int, int, int], dict[str, Any]]:
        """The sizes, and the rest as JSON values."""
        counts, refusals = self.result
        return self.sizes, {"next": self.next, "counts": counts.to_dict(), "refusals": refusals}

    @classmethod
    def of(cls, left: tuple[tuple[int, int, int], dict[str, Any]] | None) -> _State | None:
        """The inverse of ``kept``."""
        if left is None:
            return None
        sizes, kept = left
        refusals = [Refusal(*refusal) for refusal in kept["refusals"]]
        return cls(kept["next"], sizes, Result(Counts.from_dict(kept["counts"]), refusals))


def _files(job: Job) -> ChunkFiles:
    withdrawn = hashlib.sha256("\0".join(sorted(job.withdrawn)).encode("utf-8", "surrogatepass")).hexdigest()
    return ChunkFiles(job.private, job.name, f"{job.chunk} {withdrawn}", HISTOGRAM_BYTES)


def preload(formats: Iterable[str]) -> None:
    """Import what the readers need, so that a worker's memory limit covers only the files."""
    for format in formats:
        with contextlib.suppress(Refused):  # Not installed: each file of the format is refused for that reason
            readers.load(format)
    Image.init()


def work(task: Task, report: Report) -> Result | str:
    """Do one chunk, starting from ``task.state`` or from where an earlier run was killed. Returns "changed" or "busy"
    if it could not be done."""
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
    """A refused part of a unit. files: their names, () for the whole unit; modality: "" where unknown."""

    refusal: Refusal
    files: tuple[str, ...]
    modality: str


class UnitWork:
    """The work on one unit: writes the kept images, counts the others, and removes all traces of a refused stack."""

    headers = False  # Whether to read headers only

    def __init__(self, job: Job, number: int, unit: Unit, counts: Counts, files: ChunkFiles, report: Report):
        self._job, self._number, self._unit, self._files, self._report = job, number, unit, files, report
        self._counts, self._before, self._kept_before = counts, counts.seen, counts.kept
        self._names = Names(job.source, job.salt, job.common, job.level)
        self._source = job.source.for_format(unit.format)
        self._path = unit.files[0].path
        self._reading = Reading(self._source, self._path, unit.stated.modality)
        self._modality = ""  # Of the current stack
        self._first = ""  # Of the first stack
        self._refused: list[_Part] = []
        self._emptied = trace.Emptied()

    @property
    def refusals(self) -> list[Refusal]:
        return [part.refusal for part in self._refused]

    def refuse(self, reason: str, detail: str = "", files: tuple[str, ...] = ()) -> None:
        refusal = Refusal(self._names.unit(self._unit.key), reason, detail)
        self._refused.append(_Part(refusal, files, self._modality))

    def begin(self) -> None:
        """Report that this unit comes next, and how long it may take."""
        # Every decoded frame is a sign of life, so the total time needs its own limit: a few bytes may declare any
        # number of frames.
        sizes, silence = [file.size for file in self._unit.files], self._job.limits.seconds
        self._report.begin(self._number, silence, silence * (len(sizes) + sum(sizes) / 2**20))

    def run(self) -> None:
        for file in self._unit.files:
            if not is_unchanged(self._job.root, file):
                raise Changed
            self._report.beat()
        if (modality := self._contradicted()) is not None:
            detail = f"its path says {modality}, not {self._source.modality}; --trust takes it"
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
        """The counts, including this unit's."""
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
        for reason, files in self._emptied.by_reason().items():
            unit = self._names.unit(self._unit.key)
            self._files.note(trace.refusal(unit, reason, filters.MEANING[reason], self._unit.key, files))
        return self._counts

    def _is_assumed(self) -> bool:
        """Whether only the user's description names the unit's modality."""
        if self._unit.stated.modality or readers.reader_of(self._unit.format).decides:
            return False
        return self._source.is_assumed(self._path)

    def _contradicted(self) -> str | None:
        """The modality that the folders name, if the file names none and the description another."""
        if self._unit.stated.modality or readers.reader_of(self._unit.format).decides:
            return None
        return self._source.contradicted(self._path)

    def _refuse_for(self, error: Exception, stack: readers.Stack | None = None) -> None:
        """stack: the refused stack, if the unit may have others."""
        files = trace.files_of(stack) if stack is not None else ()
        if faults.is_exhausted(error):
            raise error
        if isinstance(error, MemoryError) or isinstance(error.__context__, MemoryError):
            if self._report.begun > 1:
                raise MemoryError  # Leftovers of other units may be to blame: try once more in a fresh process
            self.refuse("too large", f"needs more than {self._job.limits.memory_mb} MB of memory", files)
        elif isinstance(error, Refused):
            for refused in (error, *error.others):
                self.refuse(refused.reason, refused.detail, (refused.file,) if refused.file else refused.files or files)
        else:
            self.refuse("unreadable", faults.described(error))

    def _stack(self, stack: readers.Stack, number: int, order: int) -> None:
        """number: among the unit's used stacks; order: among all stacks that its reader yields."""
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
        outcomes: list[tuple[int | None, str | None]] = []  # Only count if no slice refuses the stack
        for cut in slices(stack, source, settings.size, settings.bits):
            self._counts.seen += 1
            self._report.beat(self._counts.seen - self._before)
            dropped = filters.verdict(cut.image, cut.share, cut.small, source)
            label = f"s{number:02d}-{cut.label}" if number else cut.label
            sample = self._names.sample(self._unit.key, label)
            withdrawn = group in self._job.withdrawn or sample in self._job.withdrawn
            outcomes.append((cut.number, None if withdrawn else dropped))
            if withdrawn:
                dropped = dropped or filters.WITHDRAWN
            elif dropped is not None:
                self._show(cut, dropped, label, common)
            if dropped is not None:
                self._counts.dropped[dropped] += 1
                continue
            line, data = _describe(cut, settings.encoding)
            self._files.add({"id": sample, "label": label, **common, **line}, data)
            for row in origins.rows(sample, label, cut.number):
                self._files.note(row)
            self._counts.kept += 1
            self._counts.text += line["text"]
        if not outcomes and not stack.refused:
            raise Refused("inconsistent", "it has no image: none of the description's tiles fits into it")
        for frame, dropped in outcomes:
            self._emptied.add(stack, frame, dropped)
        self._counts.masked += stack.masked

    def _show(self, dropped_slice: Slice, reason: str, label: str, common: dict[str, Any]) -> None:
        """Keep a thumbnail of the first, second, fourth, eighth, ... slice that this chunk drops for a reason."""
        before = self._counts.dropped[reason]
        if before & (before + 1):
            return
        picture = base64.b64encode(thumbnails.of_slice(dropped_slice.image)).decode()
        where = {"path": self._unit.key, "label": label, "group": common["group"]}
        self._files.show({"dropped": reason, **where, "thumbnail": picture})

    def _admitted(self, stack: readers.Stack) -> Source:
        """The source with the stack's modality. Raises Refused if the stack is not an image or must not be used."""
        source = self._reading.for_stack(stack)
        self._modality = "" if source.routed else source.modality
        self._check_numbers(stack, source)
        if stack.burned_in and not self._job.settings.allow_burned_in:
            raise Refused("burned-in", "the header declares burned-in annotation; --allow-burned-in takes it")
        self._reading.rescale(stack, self._unit.format)
        return source

    def _volume(self, order: int) -> int | None:
        """The number of a stack's volume in its file; None unless the description asks for more than the first."""
        volumes = self._source.volumes
        if volumes in ("first", "mean") or "volumes" not in readers.reader_of(self._unit.format).choices:
            return None
        return order * (int(volumes) if volumes.isdecimal() else 1)

    def _kept_together(self, stack: readers.Stack) -> dict[str, Any]:
        """What ``splits`` needs of a stack: its patient, and its folder, file, study or series if patients are too
        few."""
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
        series = stack.series.partition("\0")[0]  # The stacks of one series show the same anatomy
        line["series"] = names.part("series", *identity, series or self._unit.key)
        return line | ({"study": names.part("study", *identity)} if stack.study else {})

    def _check_numbers(self, stack: readers.Stack, source: Source) -> None:
        """Raise Refused if the stack's numbers or its file's header show that it is not an image, or if its modality
        is unknown."""
        if not source.trusted:
            refused = not_an_image(stack, self._unit.format, self._path, source.modality)
            if refused is not None:
                raise refused
        if source.routed:
            raise Refused("unknown modality", "nothing names its modality; give --modality or --pattern")


def _describe(kept_slice: Slice, encoding: str) -> tuple[dict[str, Any], bytes]:
    """The facts that the join needs of an image, and its bytes: the encoded image, then the histogram."""
    image = np.ascontiguousarray(kept_slice.image)
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
        "share": round(float(kept_slice.share), 4),
        "text": bool(filters.suspect_text(image)),
    }
    return line, data


def encode(image: np.ndarray, encoding: str) -> bytes:
    """Encode uint8 [S, S], uint8 [S, S, 3] or uint16 [S, S] (png only) as the bytes of a file."""
    stream = io.BytesIO()
    if encoding == "jpg":
        # Optimised tables would save 3 to 5 % of the bytes, but take twice as long and fail on images that compress
        # badly.
        Image.fromarray(image).save(stream, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()
