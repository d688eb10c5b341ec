"""From finished chunks to a shard set with its card: the first pass decides, the second writes.

The decisions depend only on the content and order of the chunks, so the set has the same bytes whichever process made
them. Memory: about 110 bytes per image for the table of hashes, plus that of ``duplicates.find`` and ``ShardWriter``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dex.common import atomic
from dex.data import ShardWriter

from . import card, duplicates, filters, modalities, normalise, splits, thumbnails, trace
from .chunk_files import paths
from .chunks import HISTOGRAM, HISTOGRAM_BYTES, Counts, Settings
from .page import count as _count
from .sources import PACKAGES, Source
from .thumbnails import LeftOut, Thumbnail

EXAMPLES = 12
"""Number of images of each modality on the card."""
_TAIL = 2**16
_MANY = 1_000  # Above this number of thumbnails, those that will not be shown are discarded


class ChunkFault(RuntimeError):
    """A finished chunk is damaged; it was removed, so that the next start makes it again."""


class NothingKept(ValueError):
    """There is no image to write; the message counts the reasons."""


class Part(NamedTuple):
    """The chunks of one source, in order. sides: the user's side of each patient, by group; default: the side of all
    others, "" if it is drawn. sure: whether folders can stand for patients (``folders.Level``)."""

    source: Source
    chunks: Sequence[str]
    sides: Mapping[str, str] = {}
    default: str = ""
    sure: bool = True


class _Row(NamedTuple):
    """Images of one modality of one source. name: the source's, with the modality if it has several. part: the
    source's number."""

    name: str
    part: int
    source: Source
    counts: Counts


@dataclass
class _Table:
    """Columns over every image of every chunk, in order."""

    pixels: np.ndarray  # uint8 [n, 32]
    hashes: np.ndarray  # uint8 [n, 32]
    stack: np.ndarray  # int64 [n], numbered over the whole run
    volume: np.ndarray  # bool [n]
    text: np.ndarray  # bool [n]
    row: np.ndarray  # int64 [n]
    rows: list[_Row]
    counts: list[Counts]  # Of each source
    stacks: splits.Columns


def join(
    parts: Sequence[Part],
    private: Path,
    settings: Settings,
    say: Callable[[str], None] = lambda text: None,
    refused: LeftOut = LeftOut(Counter(), ()),  # noqa: B008
    documents: Mapping[str, bytes] = {},
) -> tuple[Path, dict[str, Any], LeftOut]:
    """Write the shard set of all chunks to ``private/set``. Returns that folder, the card's facts and what was left
    out: ``refused``, and the dropped slices.

    documents: further files of the set by name, for example from ``licences.texts``. Of equal or similar images, the
    first is kept; ``splits`` decides what is held out. Raises NothingKept, ChunkFault and splits.BothSides.
    """
    table = _read(parts, private)
    say(f"looking for duplicates among {len(table.stack):,} images")
    kind, of = duplicates.find(table.pixels, table.hashes, table.stack, table.volume)
    keep = kind == duplicates.KEEP
    images = np.bincount(table.stack[keep], minlength=len(table.stacks.part))
    split = splits.draw(table.stacks, images, [part.source for part in parts])
    for row, part in zip(split.rows, parts, strict=True):
        row["sure"] = part.sure
    facts = _facts(parts, settings, table, split, kind, of)
    if not keep.any():
        small = sum(counts.dropped["too small"] for counts in table.counts)
        hint = "; for thick slices, --planes stored takes the acquired plane" if small else ""
        if any(counts.refused["another modality"] for counts in table.counts):
            hint += "; without --modality each DICOM file gets the modality of its header"
        raise NothingKept(f"no image was kept: {_where_they_went(table.counts)}{hint}")

    out = private / "set"
    shutil.rmtree(out, ignore_errors=True)
    names = [entry["name"] for entry in facts["modalities"]]
    withdrawals = [record.public() for record in trace.withdrawn(private)]
    say(f"writing {int(keep.sum()):,} images")
    with (
        atomic.writing(private / trace.DUPLICATES, mode=0o600, locked=True) as repeated,
        ShardWriter(
            out, name=facts["name"], modalities=names, image_size=settings.size, withdrawals=withdrawals
        ) as writer,
    ):
        second = _SecondPass(table, split, kind, of, names)
        number = 0
        for part in parts:
            for name in part.chunks:
                with open(paths(private, name)[0], "rb") as file:
                    for line in _lines(private, name):
                        if "dropped" in line:
                            second.dropped(part.source, line)
                            continue
                        image = _image(private, name, file, line) if second.needs(number) else None
                        second.image(number, line, image, writer, repeated)
                        number += 1
        for entry in facts["modalities"]:
            entry["histogram"] = second.histograms[entry["name"]].tolist()
        if withdrawals:
            facts["withdrawn"] = [{key: record[key] for key in ("date", "images")} for record in withdrawals]
        left = LeftOut(refused.counts + _slices_left_out(facts), thumbnails.choose([*refused.shown, *second.left()]))
        public = LeftOut(left.counts, [thumbnail.for_card() for thumbnail in left.shown if thumbnail.public])
        page, numbers = card.build(facts, second.examples(), public.shown)
        writer.add_document("card.html", page)
        writer.add_document("card.json", numbers)
        for name, data in documents.items():
            writer.add_document(name, data)
        if public.shown:
            writer.add_document(card.LEFT_OUT, public.to_json())
    return out, facts, left


class _SecondPass:
    """The second pass over all images of the chunks."""

    def __init__(self, table: _Table, split: splits.Split, kind: np.ndarray, of: np.ndarray, names: Sequence[str]):
        self._table, self._split, self._kind, self._of = table, split, kind, of
        keep = kind == duplicates.KEEP
        self._keys = np.cumsum(keep) - 1  # The number of a kept image among all kept ones
        self._chosen = _choose(table, keep)
        self._examples: dict[int, card.Example] = {}
        self._pairs = _pairs_to_show(kind)
        self._members = {number: b"" for pair in self._pairs for number in (pair, int(of[pair]))}
        self._lines: dict[int, dict[str, Any]] = {}
        self._dropped: list[Thumbnail] = []
        self.histograms = {name: np.zeros(256, np.int64) for name in names}

    def dropped(self, source: Source, line: dict[str, Any]) -> None:
        """line: of a dropped slice."""
        thumbnail = Thumbnail(
            reason=line["dropped"],
            source=source.name,
            name=line["path"],
            path=line["path"],
            detail=line["label"],
            groups=(line["group"],),
            ids=(),
            pictures=(base64.b64decode(line["thumbnail"]),),
            public=source.public,
        )
        self._dropped.append(thumbnail)
        if len(self._dropped) > _MANY:
            self._dropped = thumbnails.choose(self._dropped)

    def needs(self, number: int) -> bool:
        """Whether the bytes of an image are needed."""
        return bool(self._kind[number] == duplicates.KEEP) or number in self._members

    def image(
        self,
        number: int,
        line: dict[str, Any],
        image: tuple[bytes, np.ndarray] | None,
        writer: ShardWriter,
        repeated: Any,
    ) -> None:
        """Write image ``number`` to the set, or record that it repeats another one. image: its bytes and histogram."""
        data, histogram = image or (b"", None)
        if number in self._members:
            self._members[number], self._lines[number] = thumbnails.of_file(data), line
        if self._kind[number] != duplicates.KEEP:
            near = bool(self._kind[number] == duplicates.NEAR)
            key = int(self._keys[self._of[number]])
            repeated.write(trace.duplicate(line["id"], line["group"], key, near))
            return
        row, stack = self._table.rows[self._table.row[number]], self._table.stack[number]
        self.histograms[row.source.modality] += histogram
        writer.add(
            line["id"],
            data,
            kind=line["kind"],
            modality=row.source.modality,
            split="val" if self._split.val[stack] else "train",
            group=splits.name_of(line, int(self._split.level[stack])),
            meta=_meta(row.source, line),
            checked=True,
        )
        if number in self._chosen:
            self._examples[number] = card.Example(row.source.modality, row.name, line["id"], data, line["kind"])

    def examples(self) -> list[card.Example]:
        return [self._examples[number] for number in sorted(self._examples)]

    def left(self) -> list[Thumbnail]:
        """Thumbnails of dropped slices, and of duplicates beside the kept images."""
        pairs = []
        for number in self._pairs:
            both = (number, int(self._of[number]))
            lines = [self._lines[member] for member in both]
            sources = [self._table.rows[self._table.row[member]].source for member in both]
            pairs.append(
                Thumbnail(
                    reason="near duplicate" if self._kind[number] == duplicates.NEAR else "exact duplicate",
                    source=sources[0].name,
                    name=lines[0]["id"],
                    path="",
                    detail=f"left; {lines[1]['id']}, right, was kept",
                    groups=tuple(line["group"] for line in lines),
                    ids=tuple(line["id"] for line in lines),
                    pictures=tuple(self._members[member] for member in both),
                    public=all(source.public for source in sources),
                )
            )
        return [*self._dropped, *pairs]


def _pairs_to_show(kind: np.ndarray) -> list[int]:
    """Numbers of some duplicates of each kind, evenly spaced."""
    pairs: list[int] = []
    for code in (duplicates.EXACT, duplicates.NEAR):
        here = np.flatnonzero(kind == code)
        count = min(len(here), thumbnails.SHOWN)
        pairs += [int(here[(2 * i + 1) * len(here) // (2 * count)]) for i in range(count)]
    return pairs


def _slices_left_out(facts: dict[str, Any]) -> Counter[str]:
    return sum((Counter(source["dropped"]) for source in facts["sources"]), Counter())


def read_counts(private: Path, name: str) -> Counts:
    """The counts of a finished chunk, from its last line."""
    path = paths(private, name)[1]
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        last = file.read().splitlines()[-1:]
    try:
        return Counts.from_dict(json.loads(last[0])["end"]["counts"])
    except (IndexError, ValueError, KeyError, TypeError):
        raise _fault(private, name, "its last line is damaged") from None


def _rows(parts: Sequence[Part], counts: Sequence[Counts]) -> list[_Row]:
    rows = []
    for number, (part, total) in enumerate(zip(parts, counts, strict=True)):
        source = part.source
        if not source.routed:
            rows.append(_Row(source.name, number, source, total))
            continue
        for modality in modalities.CATALOGUE:
            if modality.name in total.parts:
                of_modality = source.for_modality(modality.name, modality.normalisation)
                name = f"{source.name} ({modality.name})"
                rows.append(_Row(name, number, of_modality, total.parts[modality.name]))
    return rows


def _read(parts: Sequence[Part], private: Path) -> _Table:
    pixels, hashes, stacks, flags, numbers = (bytearray() for _ in range(5))
    counts = [_total(private, part) for part in parts]
    rows = _rows(parts, counts)
    places = {(row.part, row.source.modality): number for number, row in enumerate(rows)}
    stacked, stack, place = splits.Stacks(), -1, None
    for number, part in enumerate(parts):
        before = len(flags)
        for name in part.chunks:
            for line in _lines(private, name):
                if "dropped" in line:
                    continue
                if place != (name, line["unit"], line["stack"]):
                    place = (name, line["unit"], line["stack"])
                    stack += 1
                    stacked.add(number, splits.side_of(line, part.sides, part.default))
                pixels += bytes.fromhex(line["pixels_sha256"])
                hashes += bytes.fromhex(line["dhash"])
                stacks += stack.to_bytes(8, "little")
                flags.append(line["volume"] << 1 | line["text"] << 2)
                numbers += places[number, line.get("modality", part.source.modality)].to_bytes(4, "little")
        if len(flags) - before != counts[number].kept:
            raise RuntimeError(
                f"expected {counts[number].kept} images in the chunks of a source, got {len(flags) - before}"
            )
    flag = np.frombuffer(flags, np.uint8)
    return _Table(
        pixels=np.frombuffer(pixels, np.uint8).reshape(-1, 32),
        hashes=np.frombuffer(hashes, np.uint8).reshape(-1, 32),
        stack=np.frombuffer(stacks, "<i8"),
        volume=(flag & 2).astype(bool),
        text=(flag & 4).astype(bool),
        row=np.frombuffer(numbers, "<u4").astype(np.int64),
        rows=rows,
        counts=counts,
        stacks=stacked.columns(),
    )


def _total(private: Path, part: Part) -> Counts:
    total = Counts()
    for name in part.chunks:
        total.add(read_counts(private, name))
    return total


def _lines(private: Path, name: str) -> Iterator[dict[str, Any]]:
    """The images of a chunk, and its dropped slices with a thumbnail. Raises ChunkFault if the chunk is damaged."""
    data, lines, _ = paths(private, name)
    end, digest = None, hashlib.sha256()
    try:
        size = data.stat().st_size
        with open(lines, "rb") as file:
            for text in file:
                if end is not None:
                    raise ValueError
                line = json.loads(text)
                end = line.get("end")
                if end is None:
                    digest.update(text)
                    yield line
        if end is None or end["bytes"] != size or end["sha256"] != digest.hexdigest():
            raise ValueError
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        raise _fault(private, name, "its files do not fit each other") from None


def _image(private: Path, name: str, file: Any, line: dict[str, Any]) -> tuple[bytes, np.ndarray]:
    """The encoded image, checked, and its histogram, int64 [256]."""
    file.seek(line["offset"])
    data = file.read(line["size"] + HISTOGRAM_BYTES)
    if hashlib.sha256(data).hexdigest() != line["sha256"]:
        raise _fault(private, name, "an image differs from what was written")
    return data[: line["size"]], np.frombuffer(data[line["size"] :], HISTOGRAM)


def _fault(private: Path, name: str, damage: str) -> ChunkFault:
    paths(private, name)[1].unlink(missing_ok=True)
    atomic.sync_path(private / "chunks")
    return ChunkFault(f"chunk {name} is damaged: {damage}. It was removed: start again to rebuild it")


def _meta(source: Source, line: dict[str, Any]) -> dict[str, Any]:
    meta = {"source": source.name, "label": line["label"], "foreground": line["share"], "text_suspected": line["text"]}
    return meta | ({"simulated": True} if source.simulated else {})


def _choose(table: _Table, keep: np.ndarray) -> set[int]:
    """Places of the examples: EXAMPLES per modality, spread over its sources and over the images of each."""
    chosen: set[int] = set()
    for modality in {row.source.modality for row in table.rows}:
        places = {
            number: np.flatnonzero(keep & (table.row == number))
            for number, row in enumerate(table.rows)
            if row.source.modality == modality
        }
        places = {number: row for number, row in places.items() if len(row)}
        take = dict.fromkeys(places, 0)
        for _ in range(min(EXAMPLES, sum(map(len, places.values())))):
            least = min(
                (number for number in places if take[number] < len(places[number])), key=lambda number: take[number]
            )
            take[least] += 1
        for number, count in take.items():
            row = places[number]
            chosen.update(int(row[(2 * i + 1) * len(row) // (2 * count)]) for i in range(count))
    return chosen


def _facts(
    parts: Sequence[Part], settings: Settings, table: _Table, split: splits.Split, kind: np.ndarray, of: np.ndarray
) -> dict[str, Any]:
    """All facts of the card without the histograms, which the second pass adds."""
    keep = kind == duplicates.KEEP
    held = split.val[table.stack]
    sources = []
    for number, row in enumerate(table.rows):
        of_row, source, counts = table.row == number, row.source, row.counts
        dropped = Counter(counts.dropped)
        for reason, code in (("exact duplicate", duplicates.EXACT), ("near duplicate", duplicates.NEAR)):
            dropped[reason] = int((of_row & (kind == code)).sum())
        kept = of_row & keep
        sources.append(
            {
                "name": row.name,
                "modality": source.modality,
                "anatomy": source.anatomy,
                "normalisation": source.normalisation,
                "licence": source.licence,
                "citation": source.citation,
                "package": f"{source.package.name} {source.package.version}" if source.package else "",
                "public": source.public,
                "simulated": source.simulated,
                "units": counts.units,
                "refused": dict(sorted(counts.refused.items())),
                "seen": counts.seen,
                "dropped": {reason: dropped[reason] for reason in filters.DROPPED if dropped[reason]},
                "kept": int(kept.sum()),
                "train": int((kept & ~held).sum()),
                "val": int((kept & held).sum()),
                "patients": split.patients(table.stacks, np.unique(table.stack[kept])),
                "text_suspected": int((kept & table.text).sum()),
                "burned_in_declared": counts.burned_in,
                **({"nan_as_background": counts.masked} if counts.masked else {}),
                **({"modality_assumed": counts.assumed} if counts.assumed else {}),
            }
        )
    # The package-borne sources stand for the corpus, so its modalities are listed even if they have no image.
    corpus = len(parts) > 1 and all(part.source.package for part in parts)
    collections = {part.source.collection for part in parts}
    named = collections.pop() if len(collections) == 1 else ""
    own = sorted({source["modality"] for source in sources} - set(modalities.NAMES))
    listed = []
    for name in (*modalities.NAMES, *own):
        here = [source for source in sources if source["modality"] == name]
        if here or corpus:
            train, val = sum(source["train"] for source in here), sum(source["val"] for source in here)
            listed.append({"name": name, "train": train, "val": val, "sources": len(here), "empty": train + val == 0})
    return {
        "name": named or (PACKAGES if corpus else _name([part.source.name for part in parts])),
        "image_size": settings.size,
        "bits": settings.bits,
        "encoding": settings.encoding,
        "images": int(keep.sum()),
        "train": int((keep & ~held).sum()),
        "val": int((keep & held).sum()),
        "split": split.rows,
        "modalities": listed,
        "sources": sources,
        "duplicates": _pairs(table, kind, of),
        "rules": _rules(table.rows, settings),
    } | _left_out(parts, table.counts)


def _left_out(parts: Sequence[Part], counts: Sequence[Counts]) -> dict[str, Any]:
    """Units and refusals of unknown modality, of the sources whose files each have their own modality."""
    rows = []
    for part, total in zip(parts, counts, strict=True):
        if (unknown := total.parts.get("")) is not None:
            refused = dict(sorted(unknown.refused.items()))
            rows.append({"source": part.source.name, "units": unknown.units, "refused": refused})
    return {"left_out": rows} if rows else {}


def _pairs(table: _Table, kind: np.ndarray, of: np.ndarray) -> list[dict[str, Any]]:
    dropped = np.flatnonzero(kind != duplicates.KEEP)
    keys = table.row[dropped] * len(table.rows) + table.row[of[dropped]]
    rows = []
    for key in np.unique(keys):
        here = kind[dropped[keys == key]]
        rows.append(
            {
                "source": table.rows[key // len(table.rows)].name,
                "of": table.rows[key % len(table.rows)].name,
                "exact": int((here == duplicates.EXACT).sum()),
                "near": int((here == duplicates.NEAR).sum()),
            }
        )
    return rows


def _rules(listed: Sequence[_Row], settings: Settings) -> dict[str, Any]:
    shares = sorted({(row.source.modality, row.source.min_foreground) for row in listed})
    return {
        "foreground": (
            f"share of pixels that differ by more than {normalise.FOREGROUND_STEP} of full scale from the most common "
            "level of the outermost ring of pixels"
        ),
        "least foreground": ", ".join(f"{modality} {share:g}" for modality, share in shares),
        "near duplicates": (
            f"{duplicates.HASH_BITS}-bit difference hashes that differ in at most {normalise.NEAR_DUPLICATE_BITS} bits "
            f"and in at most one bit per {duplicates.ONES_PER_BIT} bits that are set in either; not within one volume; "
            "the first image is kept"
        ),
        "exact duplicates": "equal normalised pixels",
        "burned-in annotation": "kept although declared" if settings.allow_burned_in else "refused when declared",
        "suspected text": "counted, not dropped",
        "splits": (
            "all images of a patient on one side, by the hash of the patient or as the source says; if there are too "
            "few patients, of a study, a series or a file"
        ),
    }


def _name(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def _where_they_went(counts: Sequence[Counts]) -> str:
    total = Counts()
    for of_source in counts:
        total.add(of_source)
    reasons = {**total.dropped, **total.refused}
    listed = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    seen = f"{_count(total.units, 'unit')}, {_count(total.seen, 'slice')} seen"
    return f"{seen}; {listed or 'nothing was refused'}"
