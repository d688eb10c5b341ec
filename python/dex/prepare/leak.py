"""Images that two data sets have in common: what must not stand in training and test at once.

Every image is decoded as a batch would get it (uint8 RGB of the set's size) and hashed anew, so that shard sets and
folders, PNG and JPEG, 8 and 16 bits can be compared: equal pixels are exact duplicates, alike ones near duplicates
(`duplicates`). An image that was turned, mirrored or cropped is not recognised.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dex.data import Dataset, SampleError, open_dataset

from . import duplicates
from .normalise import difference_hash

logger = logging.getLogger("dex.data")

EXAMPLES = 20  # pairs, and ids of unreadable images, that a report names

_CHUNK = 256
_CHUNKS_PER_WORKER = 8  # fewer do not pay for starting a process
_NOTE = 50_000
_dataset: Dataset | None = None  # of a worker process


@dataclass(frozen=True)
class Side:
    """One of the two sets. found: of its images, how many occur in the other one, {"exact": n, "near": n}."""

    name: str
    images: int
    unreadable: int
    unreadable_ids: tuple[str, ...]
    found: dict[str, int]


@dataclass(frozen=True)
class Leak:
    """What `leak` found. The tables count images of b by the image of a that each repeats; only what is not 0.

    by_modality: {"modality", "images", "exact", "near"}, all modalities of b. by_source: {"source", "of", "exact",
    "near"}: sources of b and of a, which are the ids' parts before the first "/". pairs: {"kind", "b", "a"}: ids of
    the first `EXAMPLES` of b.
    """

    a: Side
    b: Side
    by_modality: tuple[dict, ...]
    by_source: tuple[dict, ...]
    pairs: tuple[dict, ...]

    @property
    def overlap(self) -> bool:
        return any(self.b.found.values())

    def to_json(self) -> dict:
        """The same as plain dicts, lists, strings and numbers."""
        return {
            "overlap": self.overlap,
            **{
                name: {
                    "name": side.name,
                    "images": side.images,
                    "unreadable": side.unreadable,
                    "unreadable_ids": list(side.unreadable_ids),
                    "found": side.found,
                }
                for name, side in (("a", self.a), ("b", self.b))
            },
            "by_modality": list(self.by_modality),
            "by_source": list(self.by_source),
            "pairs": list(self.pairs),
        }

    def to_text(self) -> str:
        lines = []
        for side, other in ((self.b, self.a), (self.a, self.b)):
            found = sum(side.found.values())
            lines.append(
                f"{side.name}: {found:,} of {side.images:,} images occur in {other.name} "
                f"({side.found['exact']:,} exact, {side.found['near']:,} near)"
            )
            if side.unreadable:
                lines.append(f"  not compared, unreadable: {side.unreadable:,} ({', '.join(side.unreadable_ids)})")
        if not self.overlap:
            return "\n".join([*lines, "no overlap found"])
        lines += ["", f"{self.b.name} by modality", *_columns(self.by_modality)]
        lines += ["", f"by source: of {self.b.name}, and of {self.a.name}", *_columns(self.by_source)]
        lines += ["", f"the first {len(self.pairs):,} images of {self.b.name}, and what they repeat"]
        return "\n".join([*lines, *_columns(self.pairs)])


def leak(a: str | Path | None, b: str | Path | None, workers: int = 1) -> Leak:
    """Compare two data sets, each a shard set, a folder of images or None (the embedded set); see `open_dataset`.

    workers: processes that decode; the report does not depend on it. Images that cannot be read are counted, named
    and left out. Memory: some 500 bytes an image. `dex data leak A B` exits with 0 when the report has no overlap
    and with 1 when it has.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    set_a, set_b = open_dataset(a), open_dataset(b)
    places_a, pixels_a, hashes_a, lost_a = _hashes(a, set_a, workers)
    places_b, pixels_b, hashes_b, lost_b = _hashes(b, set_b, workers)
    kind, of = duplicates.between(hashes_a, pixels_a, hashes_b, pixels_b)
    kind_a, _ = duplicates.between(hashes_b, pixels_b, hashes_a, pixels_a)

    modality = set_b.modality_index()
    counts: Counter = Counter()
    sources: Counter = Counter()
    pairs = []
    for i in np.flatnonzero(kind).tolist():
        name = "exact" if kind[i] == duplicates.EXACT else "near"
        place = int(places_b[i])
        ids = set_b.sample_id(place), set_a.sample_id(int(places_a[of[i]]))
        counts[int(modality[place]), name] += 1
        sources[_source(ids[0]), _source(ids[1]), name] += 1
        if len(pairs) < EXAMPLES:
            pairs.append({"kind": name, "b": ids[0], "a": ids[1]})
    return Leak(
        a=_side(set_a, lost_a, kind_a),
        b=_side(set_b, lost_b, kind),
        by_modality=tuple(
            {"modality": name, "images": images, "exact": counts[m, "exact"], "near": counts[m, "near"]}
            for m, (name, images) in enumerate(set_b.modality_counts().items())
        ),
        by_source=tuple(
            {"source": b, "of": a, "exact": sources[b, a, "exact"], "near": sources[b, a, "near"]}
            for b, a in sorted({key[:2] for key in sources})
        ),
        pairs=tuple(pairs),
    )


def _hashes(
    path: str | Path | None, dataset: Dataset, workers: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """Places int64 [n] of the readable images, sha256 of their pixels and difference hashes uint8 [n, 32] each, and
    the places of the others."""
    pixels = np.zeros((len(dataset), 32), np.uint8)
    hashes = np.zeros((len(dataset), 32), np.uint8)
    good = np.zeros(len(dataset), bool)
    done = 0
    for start, part in _parts(path, dataset, workers):
        for i, pair in enumerate(part, start):
            if pair:
                pixels[i], hashes[i], good[i] = np.frombuffer(pair[0], np.uint8), np.frombuffer(pair[1], np.uint8), True
        if (done + len(part)) // _NOTE > done // _NOTE:
            logger.info("%s: %d of %d images hashed", dataset.name, done + len(part), len(dataset))
        done += len(part)
    places = np.flatnonzero(good)
    lost = np.flatnonzero(~good).tolist()
    return (places, pixels[places], hashes[places], lost) if lost else (places, pixels, hashes, lost)


def _parts(path: str | Path | None, dataset: Dataset, workers: int) -> Iterator[tuple[int, list]]:
    ranges = [(start, min(start + _CHUNK, len(dataset))) for start in range(0, len(dataset), _CHUNK)]
    workers = min(workers, len(ranges) // _CHUNKS_PER_WORKER)
    if workers < 2:
        for start, stop in ranges:
            yield start, _hash_part(dataset, start, stop)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _open, (path,)) as pool:
        try:
            for (start, _), part in zip(ranges, pool.map(_hash_here, ranges), strict=True):
                yield start, part
        except BrokenProcessPool as error:
            raise OSError(f"{dataset.name}: a process that decodes images was killed") from error


def _open(path: str | Path | None) -> None:
    global _dataset
    _dataset = open_dataset(path)


def _hash_here(places: tuple[int, int]) -> list:
    return _hash_part(_dataset, *places)


def _hash_part(dataset: Dataset, start: int, stop: int) -> list[tuple[bytes, bytes] | None]:
    part = []
    for i in range(start, stop):
        try:
            image = np.ascontiguousarray(dataset[i].image.numpy().transpose(1, 2, 0))
        except SampleError:
            part.append(None)
            continue
        part.append((hashlib.sha256(image).digest(), difference_hash(image).to_bytes(32, "big")))
    return part


def _side(dataset: Dataset, lost: list[int], kind: np.ndarray) -> Side:
    return Side(
        name=dataset.name,
        images=len(dataset),
        unreadable=len(lost),
        unreadable_ids=tuple(dataset.sample_id(i) for i in lost[:EXAMPLES]),
        found={"exact": int((kind == duplicates.EXACT).sum()), "near": int((kind == duplicates.NEAR).sum())},
    )


def _source(sample_id: str) -> str:
    first, separator, _ = sample_id.partition("/")
    return first if separator else ""


def _columns(rows: tuple[dict, ...]) -> list[str]:
    """A table: numbers to the right, with thousands separators."""
    cells = [list(rows[0])] + [[f"{v:,}" if isinstance(v, int) else v for v in row.values()] for row in rows]
    right = [isinstance(value, int) for value in rows[0].values()]
    widths = [max(len(row[c]) for row in cells) for c in range(len(right))]
    return [
        "  "
        + "  ".join(f"{cell:{'>' if r else '<'}{w}}" for cell, r, w in zip(row, right, widths, strict=True)).rstrip()
        for row in cells
    ]
