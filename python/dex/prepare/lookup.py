"""Find images of a prepared set by id, by patient or by file, with what the private folder knows of them.

A text is looked up as the id of an image (its last part is enough), of a unit or of a patient group; as a patient the
way the hospital calls it: a header's PatientID, or what the source's pattern or folders name; and as the path of a file
or folder. What is found in several of these ways is joined.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dex.data import shard_rewrite
from dex.data.shard_format import read_manifest

from . import readers, trace
from .ids import SALT, Names
from .sources import Source

_HASH = re.compile(r"[0-9a-f]{32}")
_NAME_AND_BIRTH = re.compile(r"(.*\S)[\s,/]+(\d{8})")
_SUGGESTED = 3
_SHORTEST = 6  # characters of an id that are enough to suggest the rest


class NoPrivateFolder(ValueError):
    """A set without the folder that knows its files."""


class Place(NamedTuple):
    """A row of the private table. id: of an image, or of a unit where `refused` is its reason; source: its name; unit:
    the unit's key; file: below the source's root; files: all of them, of an image that is cut across several."""

    id: str
    source: str
    root: str
    unit: str
    file: str
    files: tuple[str, ...] = ()
    label: str = ""
    frame: int | None = None
    volume: int | None = None
    exact: bool = True
    """False where the table, of an earlier version, only knows the unit and that has several files."""
    refused: str = ""
    detail: str = ""


class _Listed(NamedTuple):
    """A source of the plan. prefix: the folders that all its paths begin with, `common` of them."""

    name: str
    root: str
    source: Source
    salt: bytes | None
    common: int
    prefix: str
    level: int
    by_series: frozenset[str]
    """Keys of units that are called by their first file: a series of a large folder."""
    folders: frozenset[str]
    """Keys of units that are folders of several files."""

    @property
    def by_folder(self) -> str:
        return f"the folder in {self.name}"

    def folders_called(self, text: str) -> set[str]:
        """Folders that stand for the patient `text`: a name, or a path as far as it."""
        above = [*self.prefix.split("/")[: self.common], *["-"] * (self.level - self.common)] if self.prefix else []
        above += ["-"] * (self.level - len(above))
        paths = {"/".join([*above, text])} if "/" not in text else set()
        paths |= {path for path in _below(text, self.root) if path.count("/") == self.level}
        return paths if self.level >= 0 else set()

    def is_of(self, text: str, file: str) -> bool:
        """Whether a file lies in the folder of the patient `text`."""
        folders = file.split("/")[:-1]
        return 0 <= self.level < len(folders) and folders[self.level] == text

    def naming(self, patient: str) -> Names | None:
        """Its names, if its paths named patients by this pattern; None without the salt."""
        if self.salt is None and not self.source.public:
            return None
        return Names(replace(self.source, patient=patient), self.salt or b"", self.common, self.level)


class Private:
    """The private folder of a set, for reading. NoPrivateFolder where there is none; ValueError for one that is none of
    dex's."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            plan = json.loads((folder / trace.PLAN).read_bytes())
            salt = (folder / SALT).read_bytes() if (folder / SALT).exists() else None
            entries = plan["sources"]
            self.sources: list[_Listed] = [self._listed(number, entry, salt) for number, entry in enumerate(entries)]
        except FileNotFoundError:
            raise NoPrivateFolder(
                f"DIR: expected its private folder beside it, which alone knows files and patients; {folder} is not "
                "there: ask whoever prepared the set, or bring the two together"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / trace.PLAN}: expected what dex prepare wrote; got {error}") from None
        self._names = {listed.name: listed.naming(listed.source.patient) for listed in self.sources}
        self.withdrawn: list[trace.Withdrawn] = trace.withdrawn(folder)

    def _listed(self, number: int, entry: dict[str, Any], salt: bytes | None) -> _Listed:
        said = yaml.safe_load(entry["description"])
        needed = ("name", "modality", "normalisation", "patient", "public", "table")
        known = {name: said[name] for name in needed if name in said}
        source, common = Source(**known), entry["common"]
        series, folders, prefix = set(), set(), ""
        for unit in self._units(number):
            first = unit["files"][0][0]
            prefix = prefix or "/".join(first.split("/")[:common])
            if readers.reader_of(unit["format"]).whole_folders:
                series.update([unit["key"]] if unit["key"] == first else ())
                folders.update([unit["key"]] if len(unit["files"]) > 1 else ())
        where = (source.name, entry.get("root", ""))
        level = entry.get("level", [common])[0]
        return _Listed(*where, source, salt, common, prefix, level, frozenset(series), frozenset(folders))

    def _units(self, number: int) -> Iterator[dict[str, Any]]:
        yield from _rows(self.folder / trace.UNITS / f"{number:03d}.jsonl")

    def places(self) -> Iterator[Place]:
        """All rows, those of kept images and of refusals."""
        for path in sorted((self.folder / trace.IDS).glob("*.jsonl")):
            listed = self.sources[int(path.name[:3])]
            stacks: dict[tuple[str, int], tuple[str, ...]] = {}
            for row in _rows(path):
                key = row["path"]
                folder = os.path.dirname(key) if key in listed.by_series else key
                if "id" not in row:
                    stacks = {(key, row["stack"]): tuple(_join(folder, name) for name in row["files"])}
                    continue
                file = _join(folder, row["file"]) if "file" in row else key
                exact = "refused" in row or not {"file", "stack"}.isdisjoint(row) or key not in listed.folders
                yield Place(
                    id=row["id"],
                    source=listed.name,
                    root=listed.root,
                    unit=key,
                    file=file,
                    files=tuple(_join(folder, name) for name in row.get("files", ()))
                    or stacks.get((key, row.get("stack", -1)), ()),
                    label=row.get("label", ""),
                    frame=row.get("frame"),
                    volume=row.get("volume"),
                    exact=exact,
                    refused=row.get("refused", ""),
                    detail=row.get("detail", ""),
                )

    def passed_over(self) -> Iterator[Place]:
        """Files that were no unit's, the reason in `refused`."""
        for number, listed in enumerate(self.sources):
            for row in _rows(self.folder / trace.UNITS / f"{number:03d}{trace.PASSED_OVER}"):
                for name in row["names"]:
                    file = _join(row["folder"], name)
                    yield Place("", listed.name, listed.root, file, file, refused=row["reason"])

    def duplicates(self) -> Iterator[dict[str, Any]]:
        """Images that were left out for one that was kept; nothing where an earlier version made the set."""
        yield from _rows(self.folder / trace.DUPLICATES)

    @property
    def knows_duplicates(self) -> bool:
        return (self.folder / trace.DUPLICATES).exists()

    def groups_called(self, text: str) -> dict[str, str]:
        """Groups that a patient called `text` would have -> as what."""
        called: dict[str, str] = {}
        for listed in self.sources:
            if (names := listed.naming("")) is None:
                continue
            if (group := names.group("", text)) != names.group("", ""):
                called[group] = "the PatientID in the headers"
            if match := _NAME_AND_BIRTH.fullmatch(text):
                called[names.group("", "\0".join(match.groups()))] = "name and birth date in the headers"
            for path in listed.folders_called(text):
                called.setdefault(names.group(f"{path}/file", ""), listed.by_folder)
            if listed.source.patient:
                called.setdefault(listed.naming("^(.*)$").group(text, ""), f"the paths of {listed.name}")
        return called

    def unit_id(self, place: Place) -> str:
        names = self._names[place.source]
        return names.unit(place.unit) if names is not None else ""


@dataclass
class Found:
    """What a text leads to. images: id -> of the set, and those that were left out as duplicates; ways: as what it was
    found; groups: patients of whom it names all images; withdrawn: what was taken out under this name before; alike:
    ids that begin as it does; called: group -> as what, that a patient of this name would have."""

    text: str
    images: dict[str, Image] = field(default_factory=dict)
    refused: list[Place] = field(default_factory=list)
    ways: list[str] = field(default_factory=list)
    groups: set[str] = field(default_factory=set)
    withdrawn: list[trace.Withdrawn] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)
    called: dict[str, str] = field(default_factory=dict, repr=False)

    def __bool__(self) -> bool:
        return bool(self.images or self.refused or self.withdrawn)

    def add(self, sample: str, way: str) -> Image:
        if way not in self.ways:
            self.ways.append(way)
        return self.images.setdefault(sample, Image(sample))


@dataclass
class Image:
    """shard, line: of the set, None where it is not in it. duplicate: the row of one that was left out for another;
    copy_of: the id of that."""

    id: str
    shard: dict[str, Any] | None = None
    line: dict[str, Any] | None = None
    place: Place | None = None
    duplicate: dict[str, Any] | None = None
    copy_of: str = ""


def find(root: Path, private: Private | None, texts: Sequence[str]) -> list[Found]:
    """What each of `texts` leads to. private: None: ids of images and groups alone. ValueError for a set that does not
    fit its hashes, and for an empty text."""
    manifest, _ = read_manifest(root)
    found = [Found(text.strip()) for text in texts]
    groups: dict[str, list[tuple[Found, str]]] = defaultdict(list)
    for one in found:
        if not one.text or set(one.text) <= set("./"):
            raise ValueError(f"ID: expected an id, a patient or a path; got {one.text!r}")
        one.called = {one.text: "the id of a patient group"} | (private.groups_called(one.text) if private else {})
        for group, way in one.called.items():
            groups[group].append((one, way))
        for record in private.withdrawn if private else ():
            if not one.called.keys().isdisjoint(record.groups) or _ends(record.ids, one.text):
                one.withdrawn.append(record)
    _in_index(root, manifest, found, groups)
    if private:
        _in_private(private, found, groups)
        _complete(root, manifest, [image for one in found for image in one.images.values() if image.line is None])
    return found


def _complete(root: Path, manifest: dict, images: Sequence[Image]) -> None:
    """Where in the set are images that were found by their files, and those that others are copies of?"""
    by_id, by_key = defaultdict(list), defaultdict(list)
    for image in images:
        by_id[image.id].append(image)
        if image.duplicate:
            by_key[image.duplicate["key"]].append(image)
    for entry, line in shard_rewrite.lines(root, manifest) if images else ():
        for image in by_id.get(line["id"], ()):
            image.shard, image.line = entry, line
        for image in by_key.get(line["key"], ()):
            image.copy_of = line["id"]


def _in_index(root: Path, manifest: dict, found: Sequence[Found], groups: dict[str, list[tuple[Found, str]]]) -> None:
    for entry, line in shard_rewrite.lines(root, manifest):
        last = line["id"].rpartition("/")[2]
        hits = [*groups.get(line["group"], ())]
        for one in found:
            if one.text == line["id"] or (one.text == last and _HASH.fullmatch(last)):
                hits.append((one, "the id of an image"))
            elif len(one.text) >= _SHORTEST and len(one.alike) < _SUGGESTED and last.startswith(one.text):
                one.alike.append(line["id"])
        for one, way in hits:
            image = one.add(line["id"], way)
            image.shard, image.line = entry, line
            if way != "the id of an image":
                one.groups.add(line["group"])


def _in_private(private: Private, found: Sequence[Found], groups: dict[str, list[tuple[Found, str]]]) -> None:
    left_out = {}
    for row in private.duplicates():
        for one, way in groups.get(row["group"], ()):
            one.add(row["id"], way)
            one.groups.add(row["group"])
        left_out[row["id"]] = row
    listed_as = {listed.name: listed for listed in private.sources}
    paths = {listed.name: [_below(one.text, listed.root) for one in found] for listed in private.sources}
    unit, name = None, ""
    for place in private.places():
        if (place.source, place.unit) != unit:
            unit, name = (place.source, place.unit), private.unit_id(place)
        for one, below in zip(found, paths[place.source], strict=True):
            way = _way(one, place, name, below, listed_as[place.source])
            if way == listed_as[place.source].by_folder:
                one.groups.update(group for group, called in one.called.items() if called == way)
            if place.refused:
                if way:
                    one.refused.append(place)
                    one.ways += [way] if way not in one.ways else []
            elif way or place.id in one.images:
                image = one.add(place.id, way) if way else one.images[place.id]
                image.place, image.duplicate = place, left_out.get(place.id)


def _way(one: Found, place: Place, unit: str, below: set[str], listed: _Listed) -> str:
    """As what a text names the row of the table; "" where it does not."""
    if one.text in (unit, unit.rpartition("/")[2]) and unit:
        return "the id of a unit"
    if not place.refused and one.text in (place.id, place.id.rpartition("/")[2]):
        return "the id of an image"
    if listed.is_of(one.text, place.file):
        return listed.by_folder
    for path in below:
        if any(file == path or file.startswith(f"{path}/") for file in place.files or (place.file,)):
            return "a path"
    return ""


def _below(text: str, root: str) -> set[str]:
    """What `text`, a path, may be called below `root`."""
    paths = {os.path.normpath(text)} if not os.path.isabs(text) else set()
    if root:
        for whole in {os.path.abspath(text), os.path.realpath(text)}:
            for top in {root, os.path.realpath(root)}:
                below = os.path.relpath(whole, top)
                if below != os.curdir and below.split("/")[0] != os.pardir:
                    paths.add(below)
    return paths


def _ends(ids: Sequence[str], text: str) -> bool:
    return any(text in (name, name.rpartition("/")[2]) for name in ids)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(path, "rb") as file:
            yield from map(json.loads, file)
    except FileNotFoundError:
        return
