"""`DIR.private/left_out.html`: what was refused or left out, by reason, with a few thumbnails of each.

It is for whoever prepared the set, and never part of it: screens and pages show names in their pixels, and so may what
looks like a mask, since a scanned page has two values too. So the public card has the counts, and this page the
pictures, with the paths of their files.

Thumbnails are chosen by a hash of the file's id and read in processes of their own, like everything else. What holds no
image, or cannot be read, has none.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dex.common import atomic

from . import chunks, page, readers, trace, workers

PAGE = trace.LEFT_OUT
SHOWN = 6
"""Thumbnails of each reason."""
SIDE = 128  # pixels of a thumbnail
_SEED = b"dex left out\0"


class _Row(NamedTuple):
    """One refusal. order: draws those that are shown; source: the number of its source."""

    order: str
    reason: str
    detail: str
    path: str
    file: str
    source: int


class _Job(NamedTuple):
    """A file to be looked at."""

    row: _Row
    files: tuple[Path, ...]
    limits: readers.Limits


def write(private: Path, roots: Sequence[Path], limits: readers.Limits, processes: int) -> None:
    """Write the page of a run whose chunks are all done; where nothing was left out, remove that of an earlier run.
    roots: of the sources, in their order."""
    counts: Counter[str] = Counter()
    chosen: dict[str, list[_Row]] = {}
    for row in _rows(private):
        counts[row.reason] += 1
        chosen[row.reason] = sorted([*chosen.get(row.reason, []), row])[:SHOWN]
    if not counts:
        (private / PAGE).unlink(missing_ok=True)
        return
    jobs = [job for rows in chosen.values() for row in rows if (job := _job(row, roots, limits)) is not None]
    thumbnails = dict(_looked(jobs, limits, processes)) if jobs else {}
    html = _page(counts, chosen, thumbnails)
    atomic.write(private / PAGE, html, mode=0o600, locked=True)


def _looked(jobs: Sequence[_Job], limits: readers.Limits, processes: int) -> Iterator[tuple[_Row, bytes]]:
    formats = {format for job in jobs if (format := _format(job.files[0])) is not None}
    results = workers.run(
        look,
        jobs,
        processes=max(1, min(processes, len(jobs))),
        memory_mb=limits.memory_mb,
        preload=functools.partial(chunks.preload, sorted(formats)),
    )
    yield from ((job.row, picture) for job, picture in results)


def look(task: workers.Task, report: workers.Report) -> bytes:
    """A thumbnail of the middle frame of a file, as PNG; b"" where there is none."""
    job: _Job = task.job
    if task.refused or task.state is not None:
        return b""
    report.begin(0, job.limits.seconds, 2 * job.limits.seconds)
    try:
        stack = next(readers.read(job.files, _format(job.files[0]) or "", limits=job.limits, beat=report.beat))
        frame = next(stack.sample(frozenset([(stack.length or 1) // 2])))
        return thumbnail(frame)
    except Exception:  # whatever is wrong with it is why it was left out
        return b""
    finally:
        report.save(True)


def thumbnail(frame: np.ndarray) -> bytes:
    """PNG of numbers [H, W] or uint8 [H, W, 3], from the least to the greatest, SIDE pixels at most."""
    if frame.dtype != np.uint8:
        values = np.nan_to_num(frame.astype(np.float32), posinf=0, neginf=0)
        low, high = float(values.min()), float(values.max())
        frame = np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    elif frame.ndim == 2 and 0 < frame.max() < 64:  # labels, which would all look black
        frame = (frame.astype(np.uint16) * 255 // frame.max()).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(frame))
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _rows(private: Path) -> Iterator[_Row]:
    for path in sorted((private / trace.IDS).glob("*.jsonl")):
        with open(path, encoding="ascii") as lines:
            for number, text in enumerate(lines):
                row: dict[str, Any] = json.loads(text)
                if "refused" not in row:
                    continue
                for file in row.get("files") or [row.get("file", "")]:
                    order = hashlib.sha256(_SEED + f"{path.stem} {number} {file}".encode("utf-8", "surrogatepass"))
                    source = int(path.stem.split("-")[0])
                    yield _Row(order.hexdigest(), row["refused"], row.get("detail", ""), row["path"], file, source)


def _job(row: _Row, roots: Sequence[Path], limits: readers.Limits) -> _Job | None:
    root, folder = roots[row.source], os.path.dirname(row.path)
    tried = [root / row.path / row.file, root / folder / row.file] if row.file else [root / row.path]
    path = next((path for path in tried if path.is_file() and not path.is_symlink()), None)
    if path is None or (format := _format(path)) is None:
        return None
    beside = (path.with_name(name) for name in readers.beside(path, format))
    return _Job(row, (path, *(other for other in beside if other.is_file())), limits)


def _format(path: Path) -> str | None:
    return readers.format_of(path) or readers.recognised(path)


def _page(counts: Counter[str], chosen: Mapping[str, Sequence[_Row]], thumbnails: Mapping[_Row, bytes]) -> str:
    sections = []
    for number, (reason, count) in enumerate(sorted(counts.items())):
        figures = "".join(_figure(row, thumbnails.get(row)) for row in chosen[reason])
        html = f'<p>{page.count(count, "file")} or parts of files.</p><div class="grid">{figures}</div>'
        sections.append(page.Section(f"reason-{number}", escape(reason), html))
    total = page.count(counts.total(), "file")
    header = (
        '<header><p class="kicker">Private</p><h1>Left out</h1><p class="notice">This page names files and shows '
        "pixels that may hold names. It belongs to whoever prepared the set, and is not to be given away with it.</p>"
        f"<p>{total} or parts of files gave no image. <code>dex data refused</code> lists them all.</p></header>"
    )
    return page.document("Left out", header, sections)


def _figure(row: _Row, picture: bytes | None) -> str:
    path = f"{row.path}/{row.file}" if row.file else row.path
    name = escape(path.encode("utf-8", "backslashreplace").decode())
    image = '<p class="quiet">no image</p>'
    if picture:
        data = base64.b64encode(picture).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{name}" width="{SIDE}" height="{SIDE}">'
    return f"<figure>{image}<figcaption><b>{name}</b> <span>{escape(row.detail)}</span></figcaption></figure>"
