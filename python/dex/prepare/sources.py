"""Source descriptions: a small YAML file says what a data set is, how its files are read and how they are processed.

    resolve("packages")                        # every shipped source whose files come with a public package
    resolve("embedded")                        # a shipped set: some of these, changed; see ``read_sources``
    resolve("scans.yaml", planes=("axial",))   # your own description, with one field changed
    resolve("scans/")                          # a folder; the headers name the modality: see ``routing``
    resolve("scans/", modality="CT")           # a folder of one modality; like every folder, nameless and private
    resolve("scans.csv")                       # a table that describes each file: see ``table``

A description is data: nothing in it is executed. A new source is a new file, without code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from . import modalities, readers, yaml_records
from .modalities import AUTO, FROM_FOLDERS, MIN_FOREGROUND, Modality, of_folder, surely_of_folders
from .packages import Package, compile_globs
from .readers import PLANES, VOLUMES
from .remote import is_url, place_of
from .table import is_table

CATALOGUE = Path(__file__).parent / "catalogue"
SETS = CATALOGUE / "sets"
PACKAGES = "packages"
"""The name of the group of all sources that come with a package."""
FOLDER = "folder"
"""The name of a source given as a folder: the folder's own name may be a patient's."""
TABLE = "table"
"""The name of a source given as a table."""
BY_FOLDER = "folder"
"""The value of ``patient`` for a folder that names the patient, whatever the headers say."""


@dataclass(frozen=True)
class Tile:
    """Square cut-outs of ``size`` pixels, ``stride`` pixels apart, within ``box`` (left, top, right, bottom; None:
    everywhere)."""

    size: int
    stride: int
    box: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        _require(self.size >= 1, "tiles.size", "at least 1", self.size)
        _require(self.stride >= 1, "tiles.stride", "at least 1", self.stride)
        if self.box is not None:
            left, top, right, bottom = self.box
            _require(
                0 <= left and 0 <= top and left + self.size <= right and top + self.size <= bottom,
                "tiles.box",
                f"left, top, right, bottom with room for {self.size} x {self.size} pixels",
                self.box,
            )


@dataclass(frozen=True)
class Route:
    """The modality of files, given by patterns of paths below the root."""

    modality: str
    files: tuple[str, ...]

    def __post_init__(self) -> None:
        name = _named({"modality": self.modality})["modality"]
        _require(name in modalities.NAMES, "routes.modality", f"one of {', '.join(modalities.NAMES)}", self.modality)
        object.__setattr__(self, "modality", name)
        _check_patterns("routes.files", self.files)


@dataclass(frozen=True)
class Source:
    """One data set. Raises ValueError, naming the field, for an invalid value.

    modality: a name of the catalogue in any letter case, an alias, or your own name. "auto": the modality in each
        file's header. "from-folders": for files without such a header, the one that a folder above them is named after.
    normalisation: "auto" if the modality is "auto" or "from-folders".
    routes: the modality of files for which ``modality`` gives none.
    trusted: the description is right whatever a header says, and no file is a label map. Otherwise label maps, and
        files whose header declares no image or another modality, are left out and named.
    name: letters, digits, ".", "_", "-"; it appears in shards and cards, so it must not identify a person.
    format: "auto": by each file's suffix, or DICOM by its magic number.
    files, exclude: patterns of paths below ``root`` (or of a package's members), "/" between folders: "*", "?", "[a-z]"
        within one name, "**" for any folders. Letter case does not matter; hidden names only match patterns with their
        dot. Without ``files``, the user has yet to name them.
    root: a folder, or a URL (``remote``). In YAML relative to that file; here absolute.
    planes: of volumes, any of "axial", "coronal", "sagittal", "stored" (as acquired), "auto": axial, unless the slices
        are not axial and lie more than twice as far apart as their pixels; then as stored, or the acquired plane if the
        volume was rotated later.
    frame_stride: N takes every N-th frame of stacks that are not volumes (videos, multi-frame files). 0: as for the
        corpus, one in 30 of a video file and every frame of other formats (``readers``); ``for_format`` resolves it.
    slice_stride: N takes every N-th slice of each plane of a volume, from the first.
    volumes: for files with several volumes (time series, echoes): "first", "all" (one stack each), their "mean", or a
        number N as text: every N-th.
    slope, intercept: value = slope * stored + intercept, for formats other than DICOM, whose headers have their own.
        With them, pictures hold measured values, for instance HU, without a window.
    min_foreground: the least foreground share of a kept slice.
    fit: "pad" (the whole picture, surrounded by its own background level), "crop" (the centre square), "": "crop" for
        fundus, pathology, endoscopy and clinical photography, else "pad".
    tiles: square cut-outs of large pictures.
    whole: False if only the tiles are images and the whole picture is not (text around an ultrasound sector).
    patient: a regular expression searched in the relative path, whose group 1 is the patient; "folder": the first
        folder that the paths do not share. "": the header's patient, else a folder (``folders``), else the file.
        With a table, also the name of its patient column.
    split: "train" or "val" for the whole source. "": ``val_share`` of the images are "val", by whole patients (see
        ``splits``).
    images: the number of images according to the catalogue, None if unknown.
    public: ids are readable; those of private sources are salted hashes.
    table: a file that lists the files below ``root``, with modality, patient and side of each (``table``).
    split_file: a file with the sides of files or patients. Both are absolute here; in YAML, relative to that file.
    notice: text that must accompany the images, in addition to the package's licence.
    collection: the name of the set that contains this source; ``read_sources`` fills it in.
    package: the public package that contains the files; ``files`` are then its members.
    """

    name: str
    modality: str
    normalisation: str
    format: str = AUTO
    files: tuple[str, ...] = field(default=(), repr=False)
    exclude: tuple[str, ...] = field(default=(), repr=False)
    root: str | None = field(default=None, repr=False)
    anatomy: str = ""
    planes: tuple[str, ...] = ("axial",)
    frame_stride: int = 1
    slice_stride: int = 1
    volumes: str = "first"
    slope: float = 1.0
    intercept: float = 0.0
    min_foreground: float = MIN_FOREGROUND
    fit: str = ""
    tiles: tuple[Tile, ...] = ()
    whole: bool = True
    patient: str = field(default="", repr=False)
    split: str = ""
    val_share: float = 0.05
    licence: str = ""
    citation: str = ""
    images: int | None = None
    public: bool = False
    simulated: bool = False
    routes: tuple[Route, ...] = ()
    trusted: bool = False
    table: str | None = field(default=None, repr=False)
    split_file: str | None = field(default=None, repr=False)
    notice: str = ""
    collection: str = ""
    package: Package | None = None

    def __post_init__(self) -> None:
        for name, value in (("name", self.name), ("collection", self.collection or "none")):
            good = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value) is not None
            _require(good, name, 'up to 64 letters, digits, ".", "_", "-"', value)
        self._check_modality()
        for name, allowed in (
            ("format", (AUTO, *readers.formats())),
            ("fit", ("", "pad", "crop")),
            ("split", ("", "train", "val")),
        ):
            value = getattr(self, name)
            _require(value in allowed, name, f"one of {', '.join(map(repr, allowed))}", value)
        _require(
            len(self.planes) > 0 and len(set(self.planes)) == len(self.planes) and set(self.planes) <= set(PLANES),
            "planes",
            f"some of {', '.join(PLANES)}, each once",
            self.planes,
        )
        _require(self.frame_stride >= 0, "frame_stride", "at least 0", self.frame_stride)
        _require(self.slice_stride >= 1, "slice_stride", "at least 1", self.slice_stride)
        _require(
            self.volumes in VOLUMES or (self.volumes.isdecimal() and int(self.volumes) > 0),
            "volumes",
            f"one of {', '.join(VOLUMES)}, or a number",
            self.volumes,
        )
        _require(math.isfinite(self.slope) and self.slope != 0, "slope", "a number other than 0", self.slope)
        _require(math.isfinite(self.intercept), "intercept", "a number", self.intercept)
        _require(0 <= self.min_foreground <= 1, "min_foreground", "a share, 0 to 1", self.min_foreground)
        _require(0 <= self.val_share <= 1, "val_share", "a share, 0 to 1", self.val_share)
        _require(self.images is None or self.images >= 0, "images", "a count", self.images)
        _require(self.whole or len(self.tiles) > 0, "whole", "tiles, where the whole picture is left out", self.whole)
        for name in ("files", "exclude"):
            _check_patterns(name, getattr(self, name))
        if self.patient and self.patient != BY_FOLDER and not self.patient_column:
            try:
                groups = re.compile(self.patient).groups
            except re.error as error:
                raise ValueError(f"patient: expected a regular expression; {error}") from None
            _require(groups >= 1, "patient", "'folder', or a regular expression with a group", self.patient)
        _require(not (self.split and self.split_file), "split_file", "none beside split", "split_file")

    def _check_modality(self) -> None:
        if self.routed:
            _require(self.normalisation == AUTO, "normalisation", f"{AUTO!r}, like the modality", self.normalisation)
            _require(not self.trusted, "trusted", f"a modality other than {self.modality!r}", self.trusted)
            return
        _require(not self.routes, "routes", f"none unless the modality is {AUTO!r} or {FROM_FOLDERS!r}", "routes")
        _require(
            modalities.resolve(self.modality, self.normalisation).name == self.modality,
            "modality",
            f"one of {', '.join(modalities.NAMES)}, or a name of your own",
            self.modality,
        )

    @property
    def patient_column(self) -> str:
        """The table's patient column, if ``patient`` names one."""
        if self.table is None or self.patient == BY_FOLDER:
            return ""
        try:
            return "" if re.compile(self.patient).groups else self.patient
        except re.error:
            return self.patient

    @property
    def patient_pattern(self) -> str:
        """The regular expression that finds the patient in a path, or ""."""
        return "" if self.patient == BY_FOLDER or self.patient_column else self.patient

    @property
    def routed(self) -> bool:
        """Whether each file has its own modality."""
        return self.modality in (AUTO, FROM_FOLDERS)

    def modality_of(self, path: str) -> Modality | None:
        """The modality that the description gives a file, whatever its header says; None if it gives none, or if the
        folders above the file are named after several."""
        if not self.routed:
            return modalities.resolve(self.modality, self.normalisation)
        for route in self.routes:
            if _matcher(route.files).match(path) is not None:
                return modalities.known(route.modality)
        if self.modality == AUTO:
            return None
        names = {of_folder(part) for part in path.split("/")[:-1]} - {None}
        return modalities.known(names.pop()) if len(names) == 1 else None

    def is_assumed(self, path: str) -> bool:
        """Whether all files get the same modality, and no folder above this one confirms it."""
        if self.routed or self.trusted or self.package is not None:
            return False
        return self.modality not in {of_folder(part) for part in path.split("/")[:-1]}

    def contradicted(self, path: str) -> str | None:
        """The modalities that the folders above a file clearly name, if the one of the description is not among
        them."""
        if self.routed or self.trusted or self.package is not None or self.modality not in modalities.NAMES:
            return None
        names = surely_of_folders(path.split("/")[:-1])
        return " and ".join(sorted(names)) if names and self.modality not in names else None

    def for_modality(self, modality: str, normalisation: str, planes: tuple[str, ...] = (AUTO,)) -> Source:
        """The source for files of one modality. planes: replace "auto"."""
        if not self.routed:
            return self
        of_catalogue = modalities.known(modality)
        least = self.min_foreground
        if of_catalogue is not None and least == MIN_FOREGROUND:
            least = of_catalogue.min_foreground
        return dataclasses.replace(
            self,
            modality=modality,
            normalisation=normalisation,
            routes=(),
            min_foreground=least,
            planes=planes if self.planes == (AUTO,) else self.planes,
        )

    def matches(self, path: str) -> bool:
        """Whether a path relative to the root, with "/" between folders, is one of the source's files."""
        return _matcher(self.files).match(path) is not None and _matcher(self.exclude).match(path) is None

    def for_format(self, format: str) -> Source:
        """The source for files of one format: ``frame_stride`` is at least 1."""
        if self.frame_stride:
            return self
        return dataclasses.replace(self, frame_stride=readers.reader_of(format).frame_stride)

    @property
    def crop(self) -> bool:
        """Whether pictures are cropped to the centre square rather than padded."""
        modality = modalities.known(self.modality)
        return self.fit == "crop" or (not self.fit and modality is not None and modality.crop)


_matcher = functools.lru_cache(compile_globs)


def read_source(path: str | Path) -> Source:
    """The source that a YAML file describes. Raises ValueError, naming the file and the key, for an unknown key, a
    value of the wrong type or an invalid one."""
    path = Path(path)
    with _named_errors(path):
        return _from_file(yaml_records.read(path), path)


def read_sources(path: str | Path) -> list[Source]:
    """The sources of a YAML file: one description, or a set with its ``name`` and a list of ``sources``. Each of these
    is a complete description, or has a ``base``, the name of a shipped source, and the fields that differ from it.
    Raises ValueError as ``read_source`` does."""
    path = Path(path)
    with _named_errors(path):
        values = yaml_records.read(path)
        if not isinstance(values, Mapping) or "sources" not in values:
            return [_from_file(values, path)]
        listed = values["sources"]
        _require(set(values) == {"name", "sources"}, "set", "name and sources alone", ", ".join(values))
        _require(isinstance(values["name"], str), "name", "a name", values["name"])
        _require(isinstance(listed, list) and len(listed) > 0, "sources", "a list of descriptions", listed)
        return [_of_set(entry, f"sources[{number}]", values["name"], path) for number, entry in enumerate(listed)]


def _of_set(entry: Any, place: str, name: str, path: Path) -> Source:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{place}: expected keys and values, got {type(entry).__name__}")
    try:
        values = {key: value for key, value in entry.items() if key != "base"}
        if "base" in entry:
            known = shipped()
            base = entry["base"]
            _require(isinstance(base, str) and base in known, "base", "the name of a shipped source", base)
            values = _fields(read_source(known[base])) | values
            if "root" in entry:  # The user's own files
                values |= {"package": None, "public": False}
        return _from_file(values | {"collection": name}, path)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _from_file(values: Any, path: Path) -> Source:
    source = yaml_records.build(Source, _named(values), "")
    given = {name: value for name in ("root", "table", "split_file") if (value := getattr(source, name)) is not None}
    return dataclasses.replace(source, **{name: _absolute(value, path.parent) for name, value in given.items()})


def _fields(source: Source) -> dict[str, Any]:
    return {entry.name: getattr(source, entry.name) for entry in dataclasses.fields(source)}


def shipped() -> dict[str, Path]:
    """The sources that come with this package: name -> YAML file, sorted by name."""
    return {path.stem: path for path in sorted(CATALOGUE.glob("*.yaml"))}


def shipped_sets() -> dict[str, Path]:
    """The sets of sources that come with this package: name -> YAML file, sorted by name."""
    return {path.stem: path for path in sorted(SETS.glob("*.yaml"))}


def resolve(argument: str | Path, **overrides: Any) -> list[Source]:
    """The sources that a command-line argument names, ready to be prepared.

    argument: a YAML file, the name of a shipped source (in any letter case), "packages" (all sources that come with a
        package), the name of a shipped set, a table, a URL, or a folder. Without modality=, the headers of a folder's
        files name their modality.
    overrides: fields of ``Source`` to change; None leaves a field unchanged. root: relative to the current folder. The
        files below a given root are the user's own, so the source becomes private.

    Raises ValueError for an unknown name, a field that cannot be changed, and a source without files or root. No
    message shows a path, because folders may be named after patients.
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    for name in overrides:
        _require(
            name in yaml_records.annotations(Source) and name not in ("package", "public"),
            "override",
            "a field that may change",
            name,
        )
    argument = os.fspath(argument)
    names = {name.lower(): path for name, path in shipped().items()}
    if argument == PACKAGES:
        sources = [read_source(path) for path in shipped().values()]
        return _all_changed(argument, [source for source in sources if source.package is not None], overrides)
    argument = place_of(argument)
    path = Path(argument).expanduser()
    if overrides.get("split_file"):
        overrides["split_file"] = _absolute(overrides["split_file"], Path.cwd())
    if argument and path.is_dir():
        return [_folder(path, overrides)]
    if argument.lower() in shipped_sets():
        return _all_changed(argument, read_sources(shipped_sets()[argument.lower()]), overrides)
    if is_table(argument):
        _require("files" not in overrides, "files", "none beside a table, which names them", overrides.get("files"))
        if is_url(argument):
            _require("root" not in overrides, "root", "none beside a table at a URL", "root")
            return [_folder(path, {"name": TABLE, "root": argument.rpartition("/")[0], "table": argument} | overrides)]
        given = {"name": TABLE, "root": path.parent, "table": _absolute(path, Path.cwd())}
        return [_folder(path, given | overrides)]
    if is_url(argument):
        return [_folder(path, {"root": argument} | overrides)]
    if path.suffix.lower() in (".yaml", ".yml"):
        source, *more = sources = read_sources(path)
        if more or source.collection:
            for source in sources:
                _check_ready(source)
            return _all_changed("a set", sources, overrides)
    elif argument.lower() in names:
        source = read_source(names[argument.lower()])
    else:
        raise ValueError(
            f"SOURCE: expected a folder, a table, a YAML file, a shipped source or {' or '.join(map(repr, groups()))}; "
            + (f"got {argument!r}" if re.fullmatch(r"[\w.-]*", argument) else "got a path to nothing")
        )
    given = _named(overrides).get("modality", source.modality)
    if given != source.modality and not (source.routed and given in (AUTO, FROM_FOLDERS)):
        raise ValueError(
            f"modality: the source {source.name!r} is {source.modality}, got {given!r}; "
            "if that is wrong, copy its description and edit the copy"
        )
    source = _changed(source, {**overrides, "modality": given})
    _check_ready(source)
    return [source]


def to_yaml(source: Source) -> str:
    """A description that ``read_source`` turns into the same source: the fields that differ from their defaults, and
    ``files``."""
    values = {}
    for entry in dataclasses.fields(source):
        value = getattr(source, entry.name)
        if entry.default is dataclasses.MISSING or entry.name == "files" or value != entry.default:
            values[entry.name] = yaml_records.plain(value)
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=110)


def _folder(path: Path, overrides: dict[str, Any]) -> Source:
    given = _named(overrides)
    name = given.setdefault("modality", AUTO)
    if name in (AUTO, FROM_FOLDERS):
        modality = Modality(name, AUTO)
    else:
        modality = modalities.resolve(name, given.get("normalisation"))
    values = {
        "name": FOLDER,
        "normalisation": modality.normalisation,
        "files": ("**/*",),
        "root": path,
        "planes": (AUTO,),
        "frame_stride": 0,
        "min_foreground": modality.min_foreground,
    } | given
    return yaml_records.build(Source, {**values, "root": _absolute(values["root"], Path.cwd())}, "")


def _named(values: Any) -> Any:
    """The values with the catalogue's name of the modality instead of another spelling or an alias."""
    if not isinstance(values, Mapping) or not isinstance(values.get("modality"), str):
        return values
    name = values["modality"]
    word = next((word for word in (AUTO, FROM_FOLDERS) if modalities.key(word) == modalities.key(name)), None)
    modality = modalities.known(name)
    return {**values, "modality": word or (modality.name if modality else " ".join(name.split()))}


def groups() -> list[str]:
    """The names of groups of shipped sources."""
    return [PACKAGES, *shipped_sets()]


def _all_changed(name: str, sources: Sequence[Source], overrides: dict[str, Any]) -> list[Source]:
    """Change all sources of a group. Raises ValueError for a field that cannot be changed in several at once."""
    _require(
        set(overrides) <= {"planes", "frame_stride", "slice_stride"},
        name,
        "changes of planes, frame_stride or slice_stride only, as for every group of sources",
        ", ".join(overrides),
    )
    return [_changed(source, overrides) for source in sources]


def _changed(source: Source, overrides: dict[str, Any]) -> Source:
    values = _fields(source) | overrides
    if "root" in overrides:
        values |= {"root": _absolute(overrides["root"], Path.cwd()), "package": None, "public": False}
    return yaml_records.build(Source, values, "")


def _check_ready(source: Source) -> None:
    missing = [name for name in ("root", "files") if not getattr(source, name)]
    if source.package is not None:
        missing = [name for name in missing if name != "root"]
    if missing:
        count = "" if source.images is None else f" (the catalogue counts {source.images:,} images)"
        raise ValueError(
            f"{source.name}: the description has no {' and no '.join(missing)}{count}. Say where your copy of its "
            "files is: give --root FOLDER --files 'PATTERN' (for instance '**/*.nii.gz'), or copy the description, "
            "fill in root and files, and prepare the copy. "
            f"It is {CATALOGUE.name}/{source.name}.yaml in the package dex.prepare"
        )


def is_place(argument: str) -> bool:
    """Whether a command-line argument is a folder or a table, local or remote."""
    place = place_of(argument)
    return Path(place).expanduser().is_dir() or is_table(place) or is_url(place)


def _absolute(root: str | os.PathLike[str], base: Path) -> str:
    if is_url(root):
        return os.fspath(root)
    # Links stay: the code that opens files decides whether to follow them.
    return os.path.abspath(base / Path(root).expanduser())


def _check_patterns(name: str, patterns: Sequence[str]) -> None:
    compile_globs(patterns)
    for pattern in patterns:
        _require(
            not pattern.startswith("/") and "" not in pattern.split("/") and ".." not in pattern.split("/"),
            name,
            'patterns relative to the root, without ".."',
            pattern,
        )


def _require(good: bool, name: str, expected: str, value: Any) -> None:
    if not good:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
