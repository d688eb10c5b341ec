"""Find images of a prepared set by id, patient or file, using the private folder.

A text is looked up as the id of an image (its last part is enough), a unit or a patient group; as the hospital's name
of a patient: a header's PatientID, or a name from the source's pattern or folders; and as the path of a file or folder.
Matches of several of these kinds are joined.
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
_SHORTEST = 6  # Least characters of an id for which complete ids are suggested


class NoPrivateFolder(ValueError):
    """The set's private folder is missing."""


class Place(NamedTuple):
    """A row of the private table. id: of an image, or of a unit if ``refused`` holds a reason; source: its name; unit:
    the unit's key; file: path below the source's root; files: all of them, for an image cut across several."""

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
    """False if an earlier version wrote the table, so that only the unit is known, and it has several files."""
    refused: str = ""
    detail: str = ""


class _Listed(NamedTuple):
    """A source of the plan. prefix: the leading folders that all its paths share, ``common`` of them."""

    name: str
    root: str
    source: Source
    salt: bytes | None
    common: int
    prefix: str
    level: int
    by_series: frozenset[str]
    """Keys of units named by their first file: series of a large folder."""
    folders: frozenset[str]
    """Keys of units that are folders with several files."""

    @property
    def by_folder(self) -> str:
        return f"the folder in {self.name}"

    def folders_called(self, text: str) -> set[str]:
        """Folders that stand for the patient ``text``, which is a folder's name or its path."""
        above = [*self.prefix.split("/")[: self.common], *["-"] * (self.level - self.common)] if self.prefix else []
        above += ["-"] * (self.level - len(above))
        paths = {"/".join([*above, text])} if "/" not in text else set()
        paths |= {path for path in _below(text, self.root) if path.count("/") == self.level}
        return paths if self.level >= 0 else set()

    def is_of(self, text: str, file: str) -> bool:
        """Whether a file is in the folder of the patient ``text``."""
        folders = file.split("/")[:-1]
        return 0 <= self.level < len(folders) and folders[self.level] == text

    def naming(self, patient: str) -> Names | None:
        """The source's names, if this pattern named its patients; None without the salt."""
        if self.salt is None and not self.source.public:
            return None
        return Names(replace(self.source, patient=patient), self.salt or b"", self.common, self.level)


class Private:
    """The private folder of a set, for reading. Raises NoPrivateFolder if it is missing, and ValueError if dex did not
    write it."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            plan = json.loads((folder / trace.PLAN).read_bytes())
            salt = (folder / SALT).read_bytes() if (folder / SALT).exists() else None
            entries = plan["sources"]
            self.sources: list[_Listed] = [self._listed(number, entry, salt) for number, entry in enumerate(entries)]
        except FileNotFoundError:
            raise NoPrivateFolder(
                f"DIR: expected its private folder {folder} beside it, which alone knows files and patients, got none: "
                "ask the person who prepared the set, or put the folder there"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / trace.PLAN}: expected a plan of dex prepare, got {error}") from None
        self._names = {listed.name: listed.naming(listed.source.patient) for listed in self.sources}
        self.withdrawn: list[trace.Withdrawn] = trace.withdrawn(folder)

    def _listed(self, number: int, entry: dict[str, Any], salt: bytes | None) -> _Listed:
        description = yaml.safe_load(entry["description"])
        needed = ("name", "modality", "normalisation", "patient", "public", "table")
        source = Source(**{name: description[name] for name in needed if name in description})
        common = entry["common"]
        series, folders, prefix = set(), set(), ""
        for unit in self._units(number):
            first = unit["files"][0][0]
            prefix = prefix or "/".join(first.split("/")[:common])
            if readers.reader_of(unit["format"]).whole_folders:
                series.update([unit["key"]] if unit["key"] == first else ())
                folders.update([unit["key"]] if len(unit["files"]) > 1 else ())
        root, level = entry.get("root", ""), entry.get("level", [common])[0]
        return _Listed(source.name, root, source, salt, common, prefix, level, frozenset(series), frozenset(folders))

    def _units(self, number: int) -> Iterator[dict[str, Any]]:
        yield from _rows(self.folder / trace.UNITS / f"{number:03d}.jsonl")

    def places(self) -> Iterator[Place]:
        """All rows: of kept images and of refusals."""
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
        """Files outside all units, with the reason in ``refused``."""
        for number, listed in enumerate(self.sources):
            for row in _rows(self.folder / trace.UNITS / f"{number:03d}{trace.PASSED_OVER}"):
                for name in row["names"]:
                    file = _join(row["folder"], name)
                    yield Place("", listed.name, listed.root, file, file, refused=row["reason"])

    def duplicates(self) -> Iterator[dict[str, Any]]:
        """Images that were left out as duplicates; none if an earlier version made the set."""
        yield from _rows(self.folder / trace.DUPLICATES)

    @property
    def knows_duplicates(self) -> bool:
        return (self.folder / trace.DUPLICATES).exists()

    def groups_called(self, text: str) -> dict[str, str]:
        """Possible groups of a patient named ``text`` -> what kind of name that is."""
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
    """The matches of a text. images: id -> image of the set, or one left out as a duplicate; ways: the kinds of names
    that matched; groups: patients of whom the text names all images; withdrawn: earlier withdrawals of this name;
    alike: ids with this prefix; called: possible group of a patient with this name -> the kind of name."""

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
    """An image. shard, line: its place in the set, None if it is not in it. duplicate: the row of an image that was
    left out as a duplicate; copy_of: the id of its original."""

    id: str
    shard: dict[str, Any] | None = None
    line: dict[str, Any] | None = None
    place: Place | None = None
    duplicate: dict[str, Any] | None = None
    copy_of: str = ""


def find(root: Path, private: Private | None, texts: Sequence[str]) -> list[Found]:
    """The matches of each text. private: if None, only ids of images and groups are known. Raises ValueError for a set
    that does not match its hashes, and for an empty text."""
    manifest, _ = read_manifest(root)
    matches = [Found(text.strip()) for text in texts]
    groups: dict[str, list[tuple[Found, str]]] = defaultdict(list)
    for match in matches:
        text = match.text
        if not text or set(text) <= set("./"):
            raise ValueError(f"ID: expected an id, a patient or a path, got {text!r}")
        match.called = {text: "the id of a patient group"} | (private.groups_called(text) if private else {})
        for group, way in match.called.items():
            groups[group].append((match, way))
        for record in private.withdrawn if private else ():
            if not match.called.keys().isdisjoint(record.groups) or _ends(record.ids, text):
                match.withdrawn.append(record)
    _in_index(root, manifest, matches, groups)
    if private:
        _in_private(private, matches, groups)
        _complete(root, manifest, [image for match in matches for image in match.images.values() if not image.line])
    return matches


def _complete(root: Path, manifest: dict, images: Sequence[Image]) -> None:
    """Look up in the set the images that were found by their files, and the originals of duplicates."""
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


def _in_index(root: Path, manifest: dict, matches: Sequence[Found], groups: dict[str, list[tuple[Found, str]]]) -> None:
    for entry, line in shard_rewrite.lines(root, manifest):
        last = line["id"].rpartition("/")[2]
        hits = [*groups.get(line["group"], ())]
        for match in matches:
            if match.text == line["id"] or (match.text == last and _HASH.fullmatch(last)):
                hits.append((match, "the id of an image"))
            elif len(match.text) >= _SHORTEST and len(match.alike) < _SUGGESTED and last.startswith(match.text):
                match.alike.append(line["id"])
        for match, way in hits:
            image = match.add(line["id"], way)
            image.shard, image.line = entry, line
            if way != "the id of an image":
                match.groups.add(line["group"])


def _in_private(private: Private, matches: Sequence[Found], groups: dict[str, list[tuple[Found, str]]]) -> None:
    left_out = {}
    for row in private.duplicates():
        for match, way in groups.get(row["group"], ()):
            match.add(row["id"], way)
            match.groups.add(row["group"])
        left_out[row["id"]] = row
    listed_as = {listed.name: listed for listed in private.sources}
    paths = {listed.name: [_below(match.text, listed.root) for match in matches] for listed in private.sources}
    unit, name = None, ""
    for place in private.places():
        if (place.source, place.unit) != unit:
            unit, name = (place.source, place.unit), private.unit_id(place)
        for match, below in zip(matches, paths[place.source], strict=True):
            way = _way(match, place, name, below, listed_as[place.source])
            if way == listed_as[place.source].by_folder:
                match.groups.update(group for group, called in match.called.items() if called == way)
            if place.refused:
                if way:
                    match.refused.append(place)
                    match.ways += [way] if way not in match.ways else []
            elif way or place.id in match.images:
                image = match.add(place.id, way) if way else match.images[place.id]
                image.place, image.duplicate = place, left_out.get(place.id)


def _way(match: Found, place: Place, unit: str, below: set[str], listed: _Listed) -> str:
    """The kind of name by which a text matches a row of the table, or ""."""
    if match.text in (unit, unit.rpartition("/")[2]) and unit:
        return "the id of a unit"
    if not place.refused and match.text in (place.id, place.id.rpartition("/")[2]):
        return "the id of an image"
    if listed.is_of(match.text, place.file):
        return listed.by_folder
    for path in below:
        if any(file == path or file.startswith(f"{path}/") for file in place.files or (place.file,)):
            return "a path"
    return ""


def _below(text: str, root: str) -> set[str]:
    """The possible paths of the path ``text`` below ``root``."""
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
