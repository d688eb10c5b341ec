"""The images of a shard set, a folder or a file, in a fixed order, with names that tell nobody's identity.

A collection is a list of items, the unit of reading: some samples of a shard set, some pictures, or one volume, video
or DICOM series. Items make parts, the unit of writing and of resuming. Both are functions of the input alone.
`dex.inference.reading` reads them. Shape letters: n images, C channels, S side of a stored image.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from PIL import Image

from dex.common import faults
from dex.data import SampleError, ShardDataset
from dex.data.folder import kind_of
from dex.data.shard_format import MANIFEST, read_index
from dex.inference import preprocess
from dex.inference.preprocess import StackImages, Unit
from dex.prepare import chunks, discover, readers, scan, sources
from dex.prepare.discover import Listing, parted
from dex.prepare.ids import Names, read_salt
from dex.prepare.modalities import AUTO

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
    file: str = ""
    """Path of the file, or of the first of several, where ``path`` is the folder of a series."""


class Decoded(NamedTuple):
    """What an item, or a unit of it, gives."""

    images: list[np.ndarray]
    """uint8 ``[n, C, S, S]``, C = 1 for grey images or 3; all n together are as many as ``rows``."""
    rows: list[Row]
    notes: list[Note]


class Reader(Protocol):
    """Reads the units of a collection, in any process: it is pickled. A unit is one sample, file or series."""

    has_paths: ClassVar[bool]
    """Whether names are paths below the input; else they are the ids of a shard set."""

    def names(self, unit: Any) -> list[str]:
        """The path or id of a unit, and the paths of its files."""

    def read(self, unit: Any, beat: Callable[[], None]) -> Decoded:
        """What a unit gives. Nothing is raised for one that cannot be read: the notes say so. ``beat`` is called now
        and then."""

    def refused(self, unit: Any, reason: str) -> Decoded:
        """A note on a unit that gives nothing."""

    def weight(self, unit: Any) -> float:
        """How much longer than a small file a unit may take to read."""

    def preload(self) -> None:
        """Import what reading takes."""


class Collection(NamedTuple):
    """A shard set, a folder or a file."""

    fingerprint: str
    """Another one means that the input has changed."""
    parts: list[range]
    """Numbers of items."""
    units: Callable[[int], list[Any]]
    """The units of an item, by its number."""
    reader: Reader
    reading: dict[str, Any] = {}  # noqa: RUF012
    """How files are read: what else than the input decides about images and ids."""

    @property
    def items(self) -> int:
        return self.parts[-1].stop if self.parts else 0

    def read(self, item: int) -> Decoded:
        """An item by its number, in this process."""
        return joined([self.reader.read(unit, lambda: None) for unit in self.units(item)])


def joined(parts: Sequence[Decoded]) -> Decoded:
    """One after the other."""
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
    """The images at ``path``: a shard set, a folder of files that `dex prepare` reads, or one such file.

    private: the folder with the salt of the ids of files, which is made when it is missing; never to be given away
    with the features. modality, planes, overrides: as of `dex.inference.preprocess.preprocess`, and ``from-folders``.
    public: readable ids. processes: that read the headers of very large DICOM folders.
    Raises: FileNotFoundError; ValueError naming the argument.
    """
    if not path.exists():
        raise FileNotFoundError(f"input: expected a shard set, a folder or a file; nothing at {path}")
    if (path / MANIFEST).is_file():
        given = {"modality": modality} if modality is not None else overrides
        for name, value in given.items():
            raise ValueError(f"{name}: expected none for a shard set, whose images are prepared; got {value!r}")
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
    """`Reader` of a shard set."""

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
    names = Names(source, _salt(private), listing.common, listing.level.number)
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
        found = str(error).rpartition("; ")[2]
        raise ValueError(
            f"input: expected a regular file of the formats {', '.join(readers.formats())}, or a folder of such files; "
            f"links are not followed; {found}"
        ) from None


@dataclasses.dataclass(frozen=True)
class _Files:
    """`Reader` of the files of a folder."""

    has_paths: ClassVar[bool] = True
    root: Path
    source: sources.Source
    ids: Names
    as_it_is: bool
    """Pictures are taken as a plain folder of images gives them: nobody has said how else."""
    formats: list[str]

    def names(self, unit: discover.Unit) -> list[str]:
        return list(dict.fromkeys([unit.key, *(file.path for file in unit.files)]))

    def read(self, unit: discover.Unit, beat: Callable[[], None]) -> Decoded:
        whole = Unit(tuple(self.root / file.path for file in unit.files), unit.format)
        kind = preprocess.picture_kind(whole) if self.as_it_is else None
        parts: list[Decoded] = []
        refused: list[str] = []
        try:
            if kind is not None:
                image = preprocess.picture_planes(whole.files[0], kind)[None]
                parts.append(self._named(unit, StackImages(image, ("image",), None, (None,), "", ("",), ())))
            else:
                for stack in preprocess.read_stacks(whole, self.source, unit.files[0].path, beat):
                    parts.append(self._named(unit, stack))
                    refused += map(str, stack.refused)
        except (ValueError, OSError) as error:  # Refused is a ValueError
            if isinstance(error.__context__, MemoryError):
                raise MemoryError from None
            known = isinstance(error, readers.Refused)
            refused.append(str(error) if known else f"unreadable: {faults.sentence(error)}")
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
        known = group != self.ids.group(unit.files[0].path, "", alone)
        rows, notes = [], []
        for label, dropped, file in zip(stack.labels, stack.dropped, stack.files, strict=True):
            row = Row(self.ids.sample(unit.key, label), group, stack.modality or "", label, dropped or "")
            rows.append(row)
            notes.append(Note(row.id, unit.key, label, "", known, _within(unit, file)))
        return Decoded([_narrow(stack.images)], rows, notes)


def _within(unit: discover.Unit, name: str) -> str:
    """The path of the unit's file of that name, or of its first; "" for a unit of one file."""
    if not readers.reader_of(unit.format).whole_folders:
        return ""
    return next((file.path for file in unit.files if file.path.rpartition("/")[2] == name), unit.files[0].path)


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


def _grouped(listing: Listing, unsaid: bool, as_it_is: bool) -> list[list[int]]:
    """Numbers of the units that are read together. unsaid: nobody has given a modality; ValueError where files need
    one, as all do that are neither DICOM nor pictures to be taken as they are."""
    groups: list[list[int]] = []
    silent, single_before = set(), False
    for number in range(len(listing.lines)):
        unit = listing.unit(number)
        as_picture = as_it_is and kind_of(unit.key) is not None
        says = readers.reader_of(unit.format).decides or as_picture
        if not says:
            silent.add(unit.format)
        single = unit.format in SINGLE
        if single and single_before and len(groups[-1]) < SAMPLES:
            groups[-1].append(number)
        else:
            groups.append([number])
        single_before = single
    if silent and unsaid:
        raise ValueError(
            f"modality: expected one, since files of the formats {', '.join(sorted(silent))} do not say what they "
            "hold; got none"
        )
    return groups


def _nothing(notes: list[Note]) -> Decoded:
    return Decoded([], [], notes)


def _narrow(images: np.ndarray) -> np.ndarray:
    """``[n, 1, S, S]`` of grey images ``[n, 3, S, S]``: a third of the bytes on their way to the model."""
    grey = images.shape[1] == 3 and (images == images[:, :1]).all()
    return images[:, :1] if grey else images


def _quoted(name: str) -> str:
    """A pattern that this name alone fits."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
