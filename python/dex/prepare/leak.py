"""Images that two data sets share, and that must not be in both training and test data.

Every image is decoded as for a batch (uint8 RGB of the set's size) and hashed again, so that shard sets and folders,
PNG and JPEG, 8 and 16 bits can be compared. An image of b is

    exact       equal in every pixel
    near        a copy in another encoding, size, brightness or contrast: similar hashes (``duplicates``), or the same
                fine detail once the two are aligned (``candidates``, ``alignment``)
    moved       such a copy, but shifted, cropped, mirrored or rotated by quarter turns
    neighbour   the same anatomy in the same place with different detail: the next slice of the same volume
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from dex.common import atomic
from dex.common.csv_lines import csv_lines
from dex.data import Dataset, SampleError, open_dataset

from . import alignment, duplicates
from .candidates import Candidates, candidates, turned, view
from .normalise import difference_hash, grey

logger: logging.Logger = logging.getLogger("dex.data")

KINDS = ("exact", "near", "moved", "neighbour")
EXAMPLES = 20  # Pairs, and ids of unreadable images, that a report prints

_CHUNK = 256
_CHUNKS_PER_WORKER = 8  # Fewer chunks are not worth starting a process
_NOTE = 50_000  # Images between progress messages
_AT_ONCE = 256  # Images of b whose candidates are decoded together
_PAIRS = 64  # Pairs that are aligned together
_STILL = 0.006, 0.01  # Largest shift (in sides) and change of scale of a copy that counts as not moved
_NAMES = {name: number for number, name in enumerate(KINDS, 1)}
_TURNS = (
    *("", "mirrored left to right", "mirrored top to bottom", "turned by a half"),
    *("transposed", "turned by a quarter", "turned by a quarter", "transposed along the other diagonal"),
)
_dataset: Dataset | None = None  # In a worker process


class Pair(NamedTuple):
    """kind: one of KINDS. b, a: ids. how: the transformation of b, "" if none or unknown."""

    kind: str
    b: str
    a: str
    how: str = ""


@dataclass(frozen=True)
class Side:
    """One of the two sets. found: the number of its images that occur in the other set, for each of KINDS."""

    name: str
    images: int
    unreadable: int
    unreadable_ids: tuple[str, ...]
    found: dict[str, int]


@dataclass(frozen=True)
class Leak:
    """The result of ``leak``. The tables count the images of b that repeat an image of a.

    by_modality: a row {"modality", "images"} with each of KINDS for every modality of b. by_source: a row
    {"source", "of"} with each of KINDS for every pair of sources of b and a with shared images; a source is the part of
    an id before the first "/". pairs: every image of b that occurs in a, in order, with the most similar image of a.
    """

    a: Side
    b: Side
    by_modality: tuple[dict[str, Any], ...]
    by_source: tuple[dict[str, Any], ...]
    pairs: tuple[Pair, ...]

    @property
    def overlap(self) -> bool:
        return any(self.b.found.values())

    def to_json(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
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
            "pairs": [pair._asdict() for pair in self.pairs],
        }

    def write(self, path: Path) -> None:
        """Write all pairs as a table if the name ends in .csv, else the whole report as JSON."""
        if path.suffix.lower() != ".csv":
            return atomic.write(path, json.dumps(self.to_json(), indent=1) + "\n")
        return atomic.write(path, csv_lines([Pair._fields, *self.pairs]))

    def to_text(self) -> str:
        lines = []
        for side, other in ((self.b, self.a), (self.a, self.b)):
            shared = sum(side.found.values())
            lines.append(
                f"{side.name}: {shared:,} of {side.images:,} images occur in {other.name} "
                f"({', '.join(f'{side.found[kind]:,} {kind}' for kind in KINDS)})"
            )
            if side.unreadable:
                lines.append(f"  not compared, unreadable: {side.unreadable:,} ({', '.join(side.unreadable_ids)})")
        if not self.overlap:
            return "\n".join([*lines, "no overlap found"])
        lines += ["", f"{self.b.name} by modality", *_columns(self.by_modality)]
        lines += ["", f"by source: of {self.b.name}, and of {self.a.name}", *_columns(self.by_source)]
        shown = self.pairs[:EXAMPLES]
        lines += ["", f"the first {len(shown):,} images of {self.b.name}, and what they repeat"]
        return "\n".join([*lines, *_columns(tuple(pair._asdict() for pair in shown))])


def leak(a: str | Path | None, b: str | Path | None, workers: int = 1) -> Leak:
    """Compare two data sets, each a shard set, a folder of images or None (the embedded set); see ``open_dataset``.

    workers: number of decoding processes; it does not change the report. Unreadable images are counted, named and left
    out. Memory: about 1,500 bytes per image. ``dex data leak A B`` exits with 0 if nothing overlaps, else with 1.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    set_a, set_b = open_dataset(a), open_dataset(b)
    prints_a, prints_b = _prints(a, set_a, workers), _prints(b, set_b, workers)
    kind, of = duplicates.between(prints_a.hashes, prints_a.pixels, prints_b.hashes, prints_b.pixels)
    kind_a, _ = duplicates.between(prints_b.hashes, prints_b.pixels, prints_a.hashes, prints_a.pixels)
    how = _look_closer(_Sets(set_a, set_b, prints_a, prints_b), kind, of, kind_a)

    modality = set_b.modality_index()
    counts: Counter = Counter()
    sources: Counter = Counter()
    pairs = []
    for i in np.flatnonzero(kind).tolist():
        name = KINDS[kind[i] - 1]
        place = int(prints_b.places[i])
        ids = set_b.sample_id(place), set_a.sample_id(int(prints_a.places[of[i]]))
        counts[int(modality[place]), name] += 1
        sources[_source(ids[0]), _source(ids[1]), name] += 1
        pairs.append(Pair(name, *ids, how.get(i, "")))
    return Leak(
        a=_side(set_a, prints_a.lost, kind_a),
        b=_side(set_b, prints_b.lost, kind),
        by_modality=tuple(
            {"modality": name, "images": images} | {kind: counts[m, kind] for kind in KINDS}
            for m, (name, images) in enumerate(set_b.modality_counts().items())
        ),
        by_source=tuple(
            {"source": b, "of": a} | {kind: sources[b, a, kind] for kind in KINDS}
            for b, a in sorted({key[:2] for key in sources})
        ),
        pairs=tuple(pairs),
    )


class _Prints(NamedTuple):
    """For the n readable images: places int64 [n] in the data set, pixels (their SHA-256) and hashes (difference
    hashes) uint8 [n, 32] each, and views uint8 [n, 32, 32]. lost: the places of the unreadable images."""

    places: np.ndarray
    pixels: np.ndarray
    hashes: np.ndarray
    views: np.ndarray
    lost: list[int]


class _Sets(NamedTuple):
    a: Dataset
    b: Dataset
    prints_a: _Prints
    prints_b: _Prints


def _prints(path: str | Path | None, dataset: Dataset, workers: int) -> _Prints:
    pixels = np.zeros((len(dataset), 32), np.uint8)
    hashes = np.zeros((len(dataset), 32), np.uint8)
    views = np.zeros((len(dataset), 32, 32), np.uint8)
    good = np.zeros(len(dataset), bool)
    done = 0
    for start, part in _parts(path, dataset, workers):
        for i, prints in enumerate(part, start):
            if prints:
                pixels[i], hashes[i] = (np.frombuffer(digest, np.uint8) for digest in prints[:2])
                views[i], good[i] = prints[2], True
        if (done + len(part)) // _NOTE > done // _NOTE:
            logger.info("%s: %d of %d images hashed", dataset.name, done + len(part), len(dataset))
        done += len(part)
    places, lost = np.flatnonzero(good), np.flatnonzero(~good).tolist()
    if lost:
        pixels, hashes, views = pixels[places], hashes[places], views[places]
    return _Prints(places, pixels, hashes, views, lost)


def _look_closer(sets: _Sets, kind: np.ndarray, of: np.ndarray, kind_a: np.ndarray) -> dict[int, str]:
    """Align the images of b that are not exact copies with their candidates in a, and write the results into ``kind``,
    ``of`` and ``kind_a``. Returns the transformation of each image of b, in words."""
    how: dict[int, str] = {}
    rows = np.flatnonzero(kind != _NAMES["exact"])
    if not len(rows) or not len(kind_a):
        return how
    likely = candidates(sets.prints_a.views, sets.prints_b.views[rows])
    of_a: dict[int, int] = {}
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        pairs = _pairs(part, Candidates(*(table[start : start + _AT_ONCE] for table in likely)), kind, of)
        best: dict[int, tuple[float, int, int, str]] = {}
        for pair, fine, code, done in _aligned(sets, pairs):
            of_a[pair.a] = min(code, of_a.get(pair.a, code))
            if fine > best.get(pair.b, (-1.0,))[0]:
                best[pair.b] = fine, code, pair.a, done
        for row, (_, code, a, done) in best.items():
            kind[row], of[row] = code, a
            how[row] = done
    for a, code in of_a.items():
        if kind_a[a] != _NAMES["exact"]:
            kind_a[a] = code
    return how


class _Candidate(NamedTuple):
    """Rows of b and a, how to turn b, and where the alignment starts."""

    b: int
    a: int
    turn: int
    start: tuple[float, float, float]


def _pairs(rows: np.ndarray, likely: Candidates, kind: np.ndarray, of: np.ndarray) -> list[_Candidate]:
    """The candidates of images of b, and the pairs with similar hashes."""
    pairs = []
    for number, row in enumerate(rows.tolist()):
        if kind[row] == _NAMES["near"]:
            pairs.append(_Candidate(row, int(of[row]), 0, (0.0, 0.0, 1.0)))
        for k in np.flatnonzero(likely.of[number] >= 0).tolist():
            start = tuple(likely.start[number, k].tolist())
            pairs.append(_Candidate(row, int(likely.of[number, k]), int(likely.turn[number, k]), start))
    return pairs


def _aligned(sets: _Sets, pairs: list[_Candidate]) -> Iterator[tuple[_Candidate, float, int, str]]:
    """For each pair that shows the same: its fine correlation, the number in KINDS (from 1), and the transformation of
    b in words."""
    images_a = _grey_images(sets.a, sets.prints_a.places, {pair.a for pair in pairs})
    images_b = _grey_images(sets.b, sets.prints_b.places, {pair.b for pair in pairs})
    pairs = [pair for pair in pairs if pair.a in images_a and pair.b in images_b]
    for start in range(0, len(pairs), _PAIRS):
        part = pairs[start : start + _PAIRS]
        result = alignment.align(
            torch.stack([images_a[pair.a] for pair in part]),
            torch.stack([turned(images_b[pair.b], pair.turn) for pair in part]),
            torch.tensor([pair.start for pair in part]),
        )
        for number, pair in enumerate(part):
            fine, shift, scale = float(result.fine[number]), result.shift[number], result.scale[number]
            if fine < alignment.RELATED or float(result.coarse[number]) < alignment.COARSE:
                continue
            done = _how(pair.turn, float(shift.abs().max()), float(scale.log().mean().exp()))
            name = "neighbour" if float(result.finest[number]) < alignment.COPY else "moved" if done else "near"
            yield pair, fine, _NAMES[name], done


def _how(turn: int, shift: float, scale: float) -> str:
    """The transformation in words. shift: in sides; scale: length of b's sides in a, relative to a's."""
    words = [_TURNS[turn]]
    if abs(scale - 1) > _STILL[1]:
        words.append(f"cropped to {scale:.0%}" if scale < 1 else f"uncropped from {1 / scale:.0%}")
    elif shift > _STILL[0]:
        words.append(f"shifted by {shift:.1%}")
    return ", ".join(filter(None, words))


def _grey_images(dataset: Dataset, places: np.ndarray, rows: set[int]) -> dict[int, torch.Tensor]:
    """float32 [SIDE, SIDE] by row, without images that can no longer be read."""
    side = (alignment.SIDE, alignment.SIDE)
    images = {}
    for row in sorted(rows):
        try:
            levels = grey(dataset[int(places[row])].image.numpy().transpose(1, 2, 0))
        except SampleError:
            continue
        small = Image.fromarray(levels).resize(side, Image.Resampling.BOX)
        images[row] = torch.from_numpy(np.asarray(small).astype(np.float32))
    return images


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
            raise OSError(f"{dataset.name}: a decoding process was killed") from error


def _open(path: str | Path | None) -> None:
    global _dataset
    _dataset = open_dataset(path)


def _hash_here(places: tuple[int, int]) -> list:
    return _hash_part(_dataset, *places)


def _hash_part(dataset: Dataset, start: int, stop: int) -> list[tuple[bytes, bytes, np.ndarray] | None]:
    part = []
    for i in range(start, stop):
        try:
            image = np.ascontiguousarray(dataset[i].image.numpy().transpose(1, 2, 0))
        except SampleError:
            part.append(None)
            continue
        part.append((hashlib.sha256(image).digest(), difference_hash(image).to_bytes(32, "big"), view(image)))
    return part


def _side(dataset: Dataset, lost: list[int], kind: np.ndarray) -> Side:
    return Side(
        name=dataset.name,
        images=len(dataset),
        unreadable=len(lost),
        unreadable_ids=tuple(dataset.sample_id(i) for i in lost[:EXAMPLES]),
        found={name: int((kind == number).sum()) for name, number in _NAMES.items()},
    )


def _source(sample_id: str) -> str:
    first, separator, _ = sample_id.partition("/")
    return first if separator else ""


def _columns(rows: tuple[dict, ...]) -> list[str]:
    """A text table: numbers on the right, with thousands separators."""
    cells = [list(rows[0])] + [[f"{v:,}" if isinstance(v, int) else v for v in row.values()] for row in rows]
    sides = [">" if isinstance(value, int) else "<" for value in rows[0].values()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  " + "  ".join(f"{cell:{side}{w}}" for cell, side, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in cells
    ]
