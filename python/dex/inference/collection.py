"""The images of a shard set, a folder or a file, in a fixed order, with names that tell nobody's identity.

A collection is a list of items, the unit of reading: some samples of a shard set, some pictures, or one volume, video
or DICOM series. Items make parts, the unit of writing and of resuming. Both are functions of the input alone.
Shape letters: n images of an item, S side of a stored image.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dex.data import SampleError, ShardDataset
from dex.data.folder import kind_of
from dex.data.shard_format import MANIFEST, read_index
from dex.inference import preprocess
from dex.inference.preprocess import Unit
from dex.prepare import discover, readers, scan, sources
from dex.prepare.discover import Listing, parted
from dex.prepare.ids import Names, read_salt

SAMPLES = 16
"""Images of an item, of a shard set or of files with one image each: one by one they would cost more on their way from
the process that reads them than in it."""
SINGLE = ("picture", "array")
"""Formats whose files are read together."""
PART_ITEMS, PART_BYTES = 128, 2**30
"""Items of a part at most, and bytes of their files."""


class Row(NamedTuple):
    """One image."""

    id: str
    group: str
    """What a split must keep together: a patient, a series, a folder."""
    modality: str
    """"" where a picture was taken as it is."""
    label: str
    """Which image of its file: ``axial-012``; "" in a shard set, where the id says it."""
    dropped: str
    """Why `dex prepare` would leave it out of a corpus; "" if it would not."""


class Note(NamedTuple):
    """For the private folder: which file an id belongs to, or why a file gave nothing."""

    id: str
    path: str
    label: str
    refused: str
    patient: bool = False
    """Whether the group of the image is the patient that a header names."""


class Decoded(NamedTuple):
    """What one item gives."""

    images: Tensor
    """uint8 ``[n, 3, S, S]``."""
    rows: list[Row]
    notes: list[Note]


class Collection(NamedTuple):
    """A shard set, a folder or a file."""

    fingerprint: str
    """Another one means that the input has changed."""
    items: int
    parts: list[range]
    """Numbers of items."""
    read: Callable[[int], Decoded]
    """An item by its number. Nothing raises for a file that cannot be read: it stands in the notes."""


def collection(
    path: Path, private: Path, *, modality: str | None = None, planes: Sequence[str] = ("auto",), public: bool = False
) -> Collection:
    """The images at ``path``: a shard set, a folder of files that `dex prepare` reads, or one such file.

    private: the folder with the salt of the ids of files, which is made when it is missing; never to be given away
    with the features. modality, planes: as of `dex.inference.preprocess.preprocess`, and ``from-folders``. public:
    readable ids.
    Raises: FileNotFoundError; ValueError naming the argument.
    """
    if not path.exists():
        raise FileNotFoundError(f"input: expected a shard set, a folder or a file; nothing at {path}")
    if (path / MANIFEST).is_file():
        if modality is not None:
            raise ValueError(f"modality: expected none for a shard set, which names its own; got {modality!r}")
        return _of_shards(ShardDataset(path))
    return _of_files(path, private, modality, tuple(planes), public)


def _of_shards(dataset: ShardDataset) -> Collection:
    groups = [line["group"] for entry in dataset.manifest["shards"] for line in read_index(dataset.root, entry)]

    def read(item: int) -> Decoded:
        images, rows, notes = [], [], []
        for index in range(item * SAMPLES, min((item + 1) * SAMPLES, len(dataset))):
            try:
                sample = dataset[index]
            except SampleError as error:
                notes.append(Note(error.sample_id, "", "", error.reason))
                continue
            images.append(sample.image)
            rows.append(Row(sample.id, groups[index], dataset.modalities[sample.modality], "", ""))
        return Decoded(_stacked(images, dataset.image_size), rows, notes)

    items = -(-len(dataset) // SAMPLES)
    return Collection(dataset.fingerprint, items, cut([0] * items, PART_ITEMS, PART_BYTES), read)


def _of_files(path: Path, private: Path, modality: str | None, planes: tuple[str, ...], public: bool) -> Collection:
    root = path if path.is_dir() else path.parent
    source = preprocess.source_of(root, modality, planes)
    if not path.is_dir():
        source = dataclasses.replace(source, files=(_quoted(path.name),))
    listing = discover.discover(source, root)
    if listing.large:
        limits, folder = readers.Limits(), private / "headers"
        series = scan.scan(listing, root, folder, limits=limits, processes=1, part=(0, 1), say=lambda text: None)
        listing = parted(listing, series)
    groups = _grouped(listing, modality)
    names = Names(dataclasses.replace(source, public=public), _salt(private), listing.common)
    files = _Files(root, source, listing, names)

    def read(item: int) -> Decoded:
        images, rows, notes = [], [], []
        for number in groups[item]:
            for part in files.read(number, modality is None):
                images += [part.images] if part.rows else []
                rows += part.rows
                notes += part.notes
        return Decoded(torch.cat(images) if images else _stacked([], preprocess.IMAGE_SIZE), rows, notes)

    sizes = [sum(listing.sizes[number] for number in group) for group in groups]
    return Collection(listing.digest, len(groups), cut(sizes, PART_ITEMS, PART_BYTES), read)


class _Files(NamedTuple):
    """The files of a folder, one unit at a time."""

    root: Path
    source: sources.Source
    listing: Listing
    names: Names

    def read(self, number: int, as_they_say: bool) -> Iterator[Decoded]:
        """What a unit gives, and one more for why a part of it, or all, gave nothing. ``as_they_say``: nobody has
        given a modality."""
        listed = self.listing.unit(number)
        unit = Unit(tuple(self.root / file.path for file in listed.files), listed.format)
        kind = preprocess.picture_kind(unit) if as_they_say else None
        refused: list[str] = []
        try:
            if kind is not None:
                yield self._named(listed, preprocess.picture(unit.files[0], kind), "")
            else:
                for stack in preprocess.read_stacks(unit, self.source, listed.files[0].path):
                    yield self._named(listed, stack.images, stack.patient)
                    refused += map(str, stack.refused)
        except (ValueError, OSError) as error:  # Refused is a ValueError
            refused.append(str(error) if isinstance(error, readers.Refused) else type(error).__name__)
        notes = [Note(self.names.unit(listed.key), listed.key, "", reason) for reason in refused]
        yield Decoded(_stacked([], preprocess.IMAGE_SIZE), [], notes)

    def _named(self, listed: discover.Unit, part: preprocess.Preprocessed, patient: str) -> Decoded:
        alone = not readers.reader_of(listed.format).whole_folders
        group = self.names.group(listed.files[0].path, patient, alone)
        known = group != self.names.group(listed.files[0].path, "", alone)
        rows, notes = [], []
        for label, dropped in zip(part.labels, part.dropped, strict=True):
            row = Row(self.names.sample(listed.key, label), group, part.modality or "", label, dropped or "")
            rows.append(row)
            notes.append(Note(row.id, listed.key, label, "", known))
        return Decoded(part.images, rows, notes)


def _salt(private: Path) -> bytes:
    """The salt in the folder, made by the first of several processes."""
    private.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(private, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return read_salt(private)
    finally:
        os.close(descriptor)


def cut(sizes: Iterable[int], items: int, total: int) -> list[range]:
    """Consecutive items of the given bytes as parts of at most ``items`` items and ``total`` bytes, at least one item
    each."""
    parts, start, size, number = [], 0, 0, 0
    for number, more in enumerate(sizes, 1):
        if number - 1 > start and (number - 1 - start == items or size + more > total):
            parts.append(range(start, number - 1))
            start, size = number - 1, 0
        size += more
    if number > start:
        parts.append(range(start, number))
    return parts


def _grouped(listing: Listing, modality: str | None) -> list[list[int]]:
    """Numbers of the units that are read together. ValueError where files need a modality that nobody gave."""
    groups: list[list[int]] = []
    silent, single_before = set(), False
    for number in range(len(listing.lines)):
        unit = listing.unit(number)
        says = readers.reader_of(unit.format).decides or kind_of(unit.key) is not None
        if not says:
            silent.add(unit.format)
        single = unit.format in SINGLE
        if single and single_before and len(groups[-1]) < SAMPLES:
            groups[-1].append(number)
        else:
            groups.append([number])
        single_before = single
    if silent and modality is None:
        raise ValueError(
            f"modality: expected one, since files of the formats {', '.join(sorted(silent))} do not say what they "
            "hold; got none"
        )
    return groups


def _stacked(images: Sequence[Tensor], size: int) -> Tensor:
    return torch.stack(list(images)) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8)


def _quoted(name: str) -> str:
    """A pattern that this name alone fits."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
