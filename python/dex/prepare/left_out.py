"""``DIR.private/left_out.html``: what was refused or dropped, by reason, with a few thumbnails of each.

The page is for the person who prepared the set, and never part of the set: screens and pages show names in their
pixels, and even a supposed mask may be a scanned page, which has two values too. The public card has the counts, and
thumbnails only of public sources. ``left_out.json`` beside the page holds its contents, for a withdrawal.

Worker processes read the thumbnails of files, like all other files. A file without an image, or an unreadable one, has
no thumbnail.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from dex.common import atomic

from . import chunks, filters, page, readers, thumbnails, trace, workers
from .sources import Source
from .thumbnails import LeftOut, Thumbnail

PAGE, RECORD = trace.LEFT_OUT, "left_out.json"
_NEVER_PUBLIC = ("burned-in", *chunks.GIVEN_UP)
"""Reasons without thumbnails on the card: they may show a name, or depend on how busy the machine is."""


class Listed(NamedTuple):
    """A source and the root of its files."""

    source: Source
    root: Path


class _Row(NamedTuple):
    """One refusal. path: of its unit; file: its name, if the unit has several; source: its number."""

    reason: str
    detail: str
    path: str
    file: str
    source: int

    @property
    def name(self) -> str:
        return f"{self.path}/{self.file}" if self.file else self.path


class _Job(NamedTuple):
    """A file that needs a thumbnail. name: its thumbnail, still without a picture."""

    name: Thumbnail
    files: tuple[Path, ...]
    limits: readers.Limits


def look_at(private: Path, listed: Sequence[Listed], limits: readers.Limits, processes: int) -> LeftOut:
    """What a run refused, when all its chunks are done. listed: its sources, in order."""
    counts: Counter[str] = Counter()
    chosen: list[Thumbnail] = []
    rows: dict[Thumbnail, _Row] = {}
    for row in _rows(private):
        counts[row.reason] += 1
        name = _named(row, listed[row.source].source)
        rows[name] = row
        chosen.append(name)
        if len(chosen) > 1_000:
            chosen = thumbnails.choose(chosen)
            rows = {name: rows[name] for name in chosen}
    chosen = thumbnails.choose(chosen)
    jobs = [_job(name, rows[name], listed[rows[name].source].root, limits) for name in chosen]
    jobs = [job for job in jobs if job is not None]
    pictures: dict[Thumbnail, bytes] = {}
    if jobs:
        with contextlib.suppress(workers.WorkerFault):  # The set does not depend on it
            pictures.update(_looked(jobs, limits, processes))
    shown = [name._replace(pictures=(pictures[name],) if pictures.get(name) else ()) for name in chosen]
    return LeftOut(counts, shown)


def write(private: Path, left: LeftOut) -> None:
    """Write the page, or remove that of an earlier run if nothing was left out."""
    if not left.counts:
        for name in (PAGE, RECORD):
            (private / name).unlink(missing_ok=True)
        return
    atomic.write(private / RECORD, left.to_json(), mode=0o600, locked=True)
    atomic.write(private / PAGE, _page(left), mode=0o600, locked=True)


def forget(private: Path, groups: frozenset[str], ids: frozenset[str], paths: frozenset[str]) -> None:
    """Remove these patients, images and units from the page, and all files of unknown patients."""
    try:
        left = LeftOut.from_json((private / RECORD).read_bytes())
    except (OSError, ValueError, KeyError, TypeError):  # Of an earlier version, or damaged: its patients are unknown
        left = LeftOut(Counter(), ())
    write(private, left._replace(shown=thumbnails.without(left.shown, groups, ids, paths)))


def _named(row: _Row, source: Source) -> Thumbnail:
    public = source.public and row.reason not in _NEVER_PUBLIC
    # The patient of a file that was not read to the end is unknown.
    return Thumbnail(row.reason, source.name, row.name, row.path, row.detail, (), (), (), public)


def _looked(jobs: Sequence[_Job], limits: readers.Limits, processes: int) -> Iterator[tuple[Thumbnail, bytes]]:
    formats = {format for job in jobs if (format := _format(job.files[0])) is not None}
    results = workers.run(
        look,
        jobs,
        processes=max(1, min(processes, len(jobs))),
        memory_mb=limits.memory_mb,
        preload=functools.partial(chunks.preload, sorted(formats)),
    )
    yield from ((job.name, picture) for job, picture in results)


def look(task: workers.Task, report: workers.Report) -> bytes:
    """A thumbnail of the middle frame of a file, or b""."""
    job: _Job = task.job
    if task.refused or task.state is not None:
        return b""
    report.begin(0, job.limits.seconds, 2 * job.limits.seconds)
    try:
        stack = next(readers.read(job.files, _format(job.files[0]) or "", limits=job.limits, beat=report.beat))
        frame = next(stack.sample(frozenset([(stack.length or 1) // 2])))
        return thumbnails.thumbnail(frame)
    except Exception:  # The file was left out because of this fault
        return b""
    finally:
        report.save(True)


def _rows(private: Path) -> Iterator[_Row]:
    for path in sorted((private / trace.IDS).glob("*.jsonl")):
        with open(path, encoding="ascii") as lines:
            for text in lines:
                row: dict[str, Any] = json.loads(text)
                if "refused" not in row or row["refused"] in filters.DROPPED:  # Their slices are counted already
                    continue
                for file in row.get("files") or [row.get("file", "")]:
                    source = int(path.stem.split("-")[0])
                    yield _Row(row["refused"], row.get("detail", ""), row["path"], file, source)


def _job(name: Thumbnail, row: _Row, root: Path, limits: readers.Limits) -> _Job | None:
    folder = os.path.dirname(row.path)
    tried = [root / row.path / row.file, root / folder / row.file] if row.file else [root / row.path]
    path = next((path for path in tried if path.is_file() and not path.is_symlink()), None)
    if path is None or (format := _format(path)) is None:
        return None
    beside = (path.with_name(other) for other in readers.beside(path, format))
    return _Job(name, (path, *(other for other in beside if other.is_file())), limits)


def _format(path: Path) -> str | None:
    return readers.format_of(path) or readers.recognised(path)


def _page(left: LeftOut) -> str:
    shown: Mapping[str, list[Thumbnail]] = {
        reason: list(group)
        for reason, group in groupby(thumbnails.choose(left.shown), key=lambda thumbnail: thumbnail.reason)
    }
    sections = []
    for number, reason in enumerate(sorted(left.counts, key=lambda reason: (reason in filters.DROPPED, reason))):
        count = left.counts[reason]
        amount = page.count(count, "slice") if reason in filters.DROPPED else _files(count)
        html = f"<p>{amount}.</p>{thumbnails.figures(shown.get(reason, ()))}"
        sections.append(page.Section(f"reason-{number}", escape(reason), html))
    slices = sum(count for reason, count in left.counts.items() if reason in filters.DROPPED)
    refused = left.counts.total() - slices
    header = (
        '<header><p class="kicker">Private</p><h1>Left out</h1><p class="notice">This page names files, and its '
        "pictures may show names. It is only for the person who prepared the set; do not share it.</p>"
        f"<p>{_files(refused)} {'was' if refused == 1 else 'were'} refused, and "
        f"{page.count(slices, 'slice')} of other files {'was' if slices == 1 else 'were'} dropped. "
        "<code>dex data refused</code> lists all files that gave no image. At most "
        f"{thumbnails.SHOWN} per reason are shown, drawn at random.</p></header>"
    )
    return page.document("Left out", header, sections)


def _files(count: int) -> str:
    return f"{page.count(count, 'file')} or {'part of one' if count == 1 else 'parts of files'}"
