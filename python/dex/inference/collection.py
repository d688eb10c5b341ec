"""The images of a shard set, a folder or a file, in a fixed order, with names that tell nobody's identity.

A collection is a list of items, the unit of reading: some samples of a shard set, or one file or DICOM series. Items
make parts, the unit of writing and of resuming. Both are functions of the input alone.
Shape letters: n images of an item, S side of a stored image.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dex.data import SampleError, ShardDataset
from dex.data.folder import KINDS
from dex.data.shard_format import MANIFEST, read_index
from dex.inference import preprocess
from dex.inference.preprocess import Unit
from dex.prepare import readers, scan
from dex.prepare.discover import Listing, discover, parted
from dex.prepare.ids import Names, read_salt

SAMPLES = 16
"""Of a shard set, per item."""
PART_ITEMS, PART_BYTES = 2048, 2**30
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
    path: Path, private: Path, *, modality: str | None = None, planes: Sequence[str] = ("axial",), public: bool = False
) -> Collection:
    """The images at ``path``: a shard set, a folder of files that `dex prepare` reads, or one such file.

    private: the folder with the salt of the ids of files, which is made when it is missing; never to be given away
    with the features. modality, planes: as of `dex.inference.preprocess.preprocess`. public: readable ids.
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
    return Collection(dataset.fingerprint, items, cut([0] * items, PART_ITEMS // 8, PART_BYTES), read)


def _of_files(path: Path, private: Path, modality: str | None, planes: tuple[str, ...], public: bool) -> Collection:
    root = path if path.is_dir() else path.parent
    # Without a modality each file is taken by what it says itself; the listing asks for none.
    source = preprocess.source_of(root, modality or "X-ray", planes)
    if not path.is_dir():
        source = dataclasses.replace(source, files=(_quoted(path.name),))
    listing = discover(source, root)
    if listing.large:
        limits, folder = readers.Limits(), private / "headers"
        series = scan.scan(listing, root, folder, limits=limits, processes=1, part=(0, 1), say=lambda text: None)
        listing = parted(listing, series)
    _check_formats(listing, modality)
    salt = _salt(private)
    names = Names(dataclasses.replace(source, public=public), salt, listing.common)

    def read(item: int) -> Decoded:
        listed = listing.unit(item)
        unit = Unit(tuple(root / file.path for file in listed.files), listed.format)
        kind = KINDS.get(unit.files[0].suffix.lower()) if modality is None else None
        images, rows, notes = [], [], []

        def add(part: preprocess.Preprocessed, patient: str) -> None:
            alone = not readers.reader_of(unit.format).whole_folders
            group = names.group(listed.files[0].path, patient, alone)
            known = group != names.group(listed.files[0].path, "", alone)
            images.append(part.images)
            for label, dropped in zip(part.labels, part.dropped, strict=True):
                row = Row(names.sample(listed.key, label), group, part.modality or "", label, dropped or "")
                rows.append(row)
                notes.append(Note(row.id, listed.key, label, "", known))

        try:
            if kind is not None and unit.format != "dicom":
                add(preprocess.picture(unit.files[0], kind), "")
            else:
                by = source if modality else preprocess.source_of(root, preprocess.modality_of(unit, None), planes)
                for stack in preprocess.read_stacks(unit, by):
                    add(stack.images, stack.patient)
                    notes.extend(Note(names.unit(listed.key), listed.key, "", str(part)) for part in stack.refused)
        except (ValueError, OSError) as error:  # Refused is a ValueError
            notes.append(Note(names.unit(listed.key), listed.key, "", _reason(error)))
        return Decoded(torch.cat(images) if images else _stacked([], preprocess.IMAGE_SIZE), rows, notes)

    return Collection(listing.digest, len(listing.lines), cut(listing.sizes, PART_ITEMS, PART_BYTES), read)


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


def _check_formats(listing: Listing, modality: str | None) -> None:
    """ValueError where files need a modality that nobody gave."""
    if modality is not None:
        return
    others = set()
    for number in range(len(listing.lines)):
        unit = listing.unit(number)
        if unit.format != "dicom" and os.path.splitext(unit.key)[1].lower() not in KINDS:
            others.add(unit.format)
    if others:
        raise ValueError(
            f"modality: expected one, since files of the formats {', '.join(sorted(others))} do not say what they "
            "hold; got none"
        )


def _stacked(images: Sequence[Tensor], size: int) -> Tensor:
    return torch.stack(list(images)) if images else torch.zeros(0, 3, size, size, dtype=torch.uint8)


def _quoted(name: str) -> str:
    """A pattern that this name alone fits."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, readers.Refused) else type(error).__name__
