"""The images of a shard set, a folder or a file, in a fixed order and with anonymous names.

A collection is a list of items, the unit of reading: several samples of a shard set, several pictures, or one volume,
video or DICOM series. Parts, the unit of writing and resuming, consist of items. Both depend only on the input.
``dex.inference.reading`` reads them. Shape letters: n images, C channels, S side of a stored image.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from PIL import Image

from dex.common import faults
from dex.common.folders import INPUT, require
from dex.data import SampleError, ShardDataset
from dex.data.folder import kind_of
from dex.data.shard_format import MANIFEST, read_index
from dex.inference import preprocess
from dex.inference.preprocess import StackImages, Unit
from dex.prepare import chunks, discover, readers, scan, sources
from dex.prepare.discover import Listing, parted
from dex.prepare.ids import Names, shared_salt
from dex.prepare.modalities import AUTO

SAMPLES = 16
"""Images per item, for a shard set and for files with one image each. One by one, sending them between processes would
take longer than reading them."""
SINGLE = ("picture", "array")
"""Formats whose files are grouped into items."""
PART_ITEMS, PART_BYTES = 128, 2**30
"""Maximum number of items in a part, and of bytes in their files."""


class Row(NamedTuple):
    """One image."""

    id: str
    group: str
    """The images that a split must keep together: a patient, a series, a folder."""
    modality: str
    """"" for a picture that was taken as it is."""
    label: str
    """The image's place in its file: ``axial-012``; "" in a shard set, whose ids contain it."""
    dropped: str
    """Why ``dex prepare`` would leave the image out of a corpus; "" if it would not."""


class Note(NamedTuple):
    """A line for the private folder: the file of an id, or why a file gave nothing."""

    id: str
    path: str
    label: str
    refused: str
    patient: bool = False
    """Whether the group of the image is the patient named in a header."""
    file: str = ""
    """Path of the file, or of the first of several, if ``path`` is the folder of a series."""


class Decoded(NamedTuple):
    """The images of an item, or of one of its units."""

    images: list[np.ndarray]
    """uint8 ``[n, C, S, S]``, C = 1 for grey images, else 3; the n of all arrays add up to the number of ``rows``."""
    rows: list[Row]
    notes: list[Note]


class Reader(Protocol):
    """Reads the units of a collection, in any process: it can be pickled. A unit is one sample, file or series."""

    has_paths: ClassVar[bool]
    """Whether names are paths below the input; otherwise they are ids of a shard set."""

    def names(self, unit: Any) -> list[str]:
        """The path or id of a unit, and the paths of its files."""

    def read(self, unit: Any, beat: Callable[[], None]) -> Decoded:
        """The images of a unit; one that cannot be read leaves a note and raises nothing. ``beat`` is called now and
        then."""

    def refused(self, unit: Any, reason: str) -> Decoded:
        """A note on a unit that gives nothing."""

    def weight(self, unit: Any) -> float:
        """The time limit of a unit, as a multiple of a small file's."""

    def preload(self) -> None:
        """Import the libraries that reading needs."""


class Collection(NamedTuple):
    """A shard set, a folder or a file."""

    fingerprint: str
    """Changes with the input."""
    parts: list[range]
    """For each part, the numbers of its items."""
    units: Callable[[int], list[Any]]
    """Item number -> units."""
    reader: Reader
    reading: dict[str, Any] = {}  # noqa: RUF012
    """Settings of reading that influence images and ids."""

    @property
    def items(self) -> int:
        return self.parts[-1].stop if self.parts else 0

    def read(self, item: int) -> Decoded:
        """Read an item in this process."""
        return joined([self.reader.read(unit, lambda: None) for unit in self.units(item)])


def joined(parts: Sequence[Decoded]) -> Decoded:
    """The parts concatenated."""
    return Decoded(*(list(itertools.chain(*lists)) for lists in zip(*parts, strict=True))) if parts else _nothing([])


def collection(
    path: Path,
    private: Path,
    *,
    modality: str | None = None,
    planes: Sequence[str] = ("auto",),
    public: bool = False,
    processes: int = 1,
    **overrides: Any,
) -> Collection:
    """The images at ``path``: a shard set, a folder of files that ``dex prepare`` reads, or one such file.

    private: the folder of the salt with which ids are hashed, created if missing; do not share it with the features.
    modality, planes, overrides: as for ``dex.inference.preprocess.preprocess``; modality may be ``from-folders``.
    public: readable ids. processes: number that read the headers of very large DICOM folders.
    Raises: FileNotFoundError; ValueError naming the argument.
    """
    require(path, INPUT)
    if (path / MANIFEST).is_file():
        given = {"modality": modality} if modality is not None else overrides
        for name, value in given.items():
            raise ValueError(f"{name}: expected none for a shard set, whose images are already prepared, got {value!r}")
        return _of_shards(ShardDataset(path))
    root = path if path.is_dir() else path.parent
    source = preprocess.source_of(root, modality, planes, **overrides)
    if not path.is_dir():
        source = dataclasses.replace(source, files=(_quoted(path.name),))
    as_it_is = source.modality == AUTO and not overrides
    images = _of_files(root, dataclasses.replace(source, public=public), private, as_it_is, processes)
    return images._replace(reading={"modality": modality, "planes": list(planes), "public": public, **overrides})


def _of_shards(dataset: ShardDataset) -> Collection:
    groups = [line["group"] for entry in dataset.manifest["shards"] for line in read_index(dataset.root, entry)]

    def units(item: int) -> list[_Sample]:
        numbers = range(item * SAMPLES, min((item + 1) * SAMPLES, len(dataset)))
        return [_Sample(number, groups[number]) for number in numbers]

    parts = cut([0] * -(-len(dataset) // SAMPLES), PART_ITEMS, PART_BYTES)
    return Collection(dataset.fingerprint, parts, units, _Samples(dataset))


class _Sample(NamedTuple):
    number: int
    group: str


class _Samples:
    """The ``Reader`` of a shard set."""

    has_paths = False

    def __init__(self, dataset: ShardDataset):
        self._dataset = dataset

    def names(self, unit: _Sample) -> list[str]:
        return [self._dataset.sample_id(unit.number)]

    def read(self, unit: _Sample, beat: Callable[[], None]) -> Decoded:
        dataset = self._dataset
        image = np.empty((3, dataset.image_size, dataset.image_size), np.uint8)
        try:
            modality, name = dataset.read(unit.number, image)
        except SampleError as error:
            return self.refused(unit, error.reason)
        return Decoded([_narrow(image[None])], [Row(name, unit.group, dataset.modalities[modality], "", "")], [])

    def refused(self, unit: _Sample, reason: str) -> Decoded:
        return _nothing([Note(self.names(unit)[0], "", "", reason)])

    def weight(self, unit: _Sample) -> float:
        return 1.0

    def preload(self) -> None:
        Image.init()


def _of_files(root: Path, source: sources.Source, private: Path, as_it_is: bool, processes: int) -> Collection:
    listing = _listed(source, root)
    if listing.large:
        limits, folder = readers.Limits(), private / "headers"
        series = scan.scan(
            listing, root, folder, limits=limits, processes=max(1, processes), part=(0, 1), say=lambda text: None
        )
        listing = parted(listing, series)
    groups = _grouped(listing, source.modality == AUTO, as_it_is)
    names = Names(source, shared_salt(private), listing.common, listing.level.number)
    sizes = [sum(listing.sizes[number] for number in group) for group in groups]
    return Collection(
        listing.digest,
        cut(sizes, PART_ITEMS, PART_BYTES),
        lambda item: [listing.unit(number) for number in groups[item]],
        _Files(root, source, names, as_it_is, listing.formats),
    )


def _listed(source: sources.Source, root: Path) -> Listing:
    try:
        return discover.discover(source, root)
    except ValueError as error:
        reason = str(error).rpartition("; ")[2]
        raise ValueError(
            f"input: expected a regular file of the formats {', '.join(readers.formats())}, or a folder of such files; "
            f"links are not followed; {reason}"
        ) from None


@dataclasses.dataclass(frozen=True)
class _Files:
    """The ``Reader`` of the files of a folder."""

    has_paths: ClassVar[bool] = True
    root: Path
    source: sources.Source
    ids: Names
    as_it_is: bool
    """Take pictures as a plain folder of images gives them, since no other setting is given."""
    formats: list[str]

    def names(self, unit: discover.Unit) -> list[str]:
        return list(dict.fromkeys([unit.key, *(file.path for file in unit.files)]))

    def read(self, unit: discover.Unit, beat: Callable[[], None]) -> Decoded:
        to_read = Unit(tuple(self.root / file.path for file in unit.files), unit.format)
        kind = preprocess.picture_kind(to_read) if self.as_it_is else None
        parts: list[Decoded] = []
        refused: list[str] = []
        try:
            if kind is not None:
                image = preprocess.picture_planes(to_read.files[0], kind)[None]
                parts.append(self._named(unit, StackImages(image, ("image",), None, (None,), "", ("",), ())))
            else:
                for stack in preprocess.read_stacks(to_read, self.source, unit.files[0].path, beat):
                    parts.append(self._named(unit, stack))
                    refused += map(str, stack.refused)
        except (ValueError, OSError) as error:  # Refused is a ValueError
            if isinstance(error.__context__, MemoryError):
                raise MemoryError from None
            expected = isinstance(error, readers.Refused)
            refused.append(str(error) if expected else f"unreadable: {faults.sentence(error)}")
        return joined([*parts, *(self.refused(unit, reason) for reason in refused)])

    def refused(self, unit: discover.Unit, reason: str) -> Decoded:
        return _nothing([Note(self.ids.unit(unit.key), unit.key, "", reason)])

    def weight(self, unit: discover.Unit) -> float:
        return len(unit.files) + sum(file.size for file in unit.files) / 2**20

    def preload(self) -> None:
        chunks.preload(self.formats)

    def _named(self, unit: discover.Unit, stack: StackImages) -> Decoded:
        alone = not readers.reader_of(unit.format).whole_folders
        group = self.ids.group(unit.files[0].path, stack.patient, alone)
        has_patient = group != self.ids.group(unit.files[0].path, "", alone)
        rows, notes = [], []
        for label, dropped, file in zip(stack.labels, stack.dropped, stack.files, strict=True):
            row = Row(self.ids.sample(unit.key, label), group, stack.modality or "", label, dropped or "")
            rows.append(row)
            notes.append(Note(row.id, unit.key, label, "", has_patient, _within(unit, file)))
        return Decoded([_narrow(stack.images)], rows, notes)


def _within(unit: discover.Unit, name: str) -> str:
    """The path of the unit's file ``name``, or of its first file; "" for a unit of one file."""
    if not readers.reader_of(unit.format).whole_folders:
        return ""
    return next((file.path for file in unit.files if file.path.rpartition("/")[2] == name), unit.files[0].path)


def cut(sizes: Iterable[int], items: int, total: int) -> list[range]:
    """Consecutive items, of ``sizes`` bytes, as parts of at most ``items`` items and ``total`` bytes, but at least one
    item each."""
    parts, start, size, number = [], 0, 0, 0
    for number, more in enumerate(sizes, 1):
        if number - 1 > start and (number - 1 - start == items or size + more > total):
            parts.append(range(start, number - 1))
            start, size = number - 1, 0
        size += more
    if number > start:
        parts.append(range(start, number))
    return parts


def _grouped(listing: Listing, no_modality: bool, as_it_is: bool) -> list[list[int]]:
    """The units as items: lists of the numbers of units that are read together. no_modality: none was given; ValueError
    if a file needs one, as all do except DICOM and pictures that are taken as they are."""
    groups: list[list[int]] = []
    undecided, single_before = set(), False
    for number in range(len(listing.lines)):
        unit = listing.unit(number)
        as_picture = as_it_is and kind_of(unit.key) is not None
        if not readers.reader_of(unit.format).decides and not as_picture:
            undecided.add(unit.format)
        single = unit.format in SINGLE
        if single and single_before and len(groups[-1]) < SAMPLES:
            groups[-1].append(number)
        else:
            groups.append([number])
        single_before = single
    if undecided and no_modality:
        raise ValueError(
            f"modality: expected one, since files of the formats {', '.join(sorted(undecided))} do not state theirs, "
            "got none"
        )
    return groups


def _nothing(notes: list[Note]) -> Decoded:
    return Decoded([], [], notes)


def _narrow(images: np.ndarray) -> np.ndarray:
    """Grey images ``[n, 3, S, S]`` as ``[n, 1, S, S]``, a third of the bytes to transfer; other images unchanged."""
    grey = images.shape[1] == 3 and (images == images[:, :1]).all()
    return images[:, :1] if grey else images


def _quoted(name: str) -> str:
    """A pattern that matches only this name."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
