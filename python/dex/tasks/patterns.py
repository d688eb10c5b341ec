"""Finds the files of a folder that belong together, by patterns such as ``{split}/Original/{case}.png``.

A placeholder in braces matches text without "/", and the same text wherever it recurs; ``*`` matches any text within a
name, ``**`` any folders. A pattern may begin anywhere below the folder, since archives unpack at different depths.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dex.prepare import readers
from dex.tasks.task import SPLITS, Layout, Rule

MAX_FILES = 5_000_000
_TOKEN = re.compile(r"\{(\w+)\}|(\*\*/)|(\*)")
_SKIPPED = ("__MACOSX",)
_TEXT = (".txt", ".csv", ".json", ".md", ".xml", ".yaml", ".yml", ".xls", ".xlsx", ".pdf", ".zip", ".gz", ".html")
"""Suffixes of files that are not opened."""


class Match(NamedTuple):
    """An image that matches a rule."""

    image: str
    """Path below the folder."""
    names: dict[str, str]
    """Placeholder -> text."""
    rule: Rule
    prefix: str
    """Folders above the beginning of the pattern, "" or with "/" at the end."""

    def text(self, template: str) -> str:
        """``template`` with its placeholders filled in."""
        return _TOKEN.sub(lambda token: self.names[token[1]] if token[1] else token[0], template)


class Files(NamedTuple):
    """The paths of the files below a folder, with "/", without hidden files and links."""

    root: Path
    files: frozenset[str]
    folders: frozenset[str]

    def within(self, folder: str) -> list[str]:
        """The files directly in a folder, sorted."""
        start = f"{folder}/" if folder else ""
        return [path for path in _sorted(self.files) if path.startswith(start) and "/" not in path[len(start) :]]


def listed(root: Path) -> Files:
    """The files below ``root``. FileNotFoundError, NotADirectoryError; ValueError for more than ``MAX_FILES``."""
    if not root.exists():
        raise FileNotFoundError(f"data: expected a folder; nothing at {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"data: expected a folder, got the file {root}")
    files: set[str] = set()
    folders: set[str] = set()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in _SKIPPED)
        below = Path(folder).relative_to(root).as_posix()
        start = "" if below == "." else f"{below}/"
        folders |= {f"{start}{name}" for name in subfolders}
        for name in names:
            if not name.startswith(".") and not os.path.islink(os.path.join(folder, name)):
                files.add(f"{start}{name}")
        if len(files) > MAX_FILES:
            raise ValueError(f"data: expected at most {MAX_FILES:,} files, got more below {root}")
    return Files(root, frozenset(files), frozenset(folders))


@functools.lru_cache(maxsize=8)
def _sorted(files: frozenset[str]) -> list[str]:
    return sorted(files)


def expression(pattern: str, texts: Mapping[str, Sequence[str]], anywhere: bool = True) -> re.Pattern[str]:
    """A regular expression for paths, with a group per placeholder and ``_prefix`` for the folders above.

    texts: the texts allowed for some placeholders. anywhere: allow folders above.
    """
    parts, seen, place = [], set(), 0
    for token in _TOKEN.finditer(pattern):
        parts.append(re.escape(pattern[place : token.start()]))
        place = token.end()
        name = token[1]
        if name in seen:
            parts.append(f"(?P={name})")
        elif name:
            seen.add(name)
            allowed = "|".join(map(re.escape, texts[name])) if texts.get(name) else "[^/]+?"
            parts.append(f"(?P<{name}>{allowed})")
        else:
            parts.append("(?:[^/]+/)*" if token[2] else "[^/]*")
    parts.append(re.escape(pattern[place:]))
    above = "(?:[^/]+/)*?" if anywhere else ""
    return re.compile(f"(?P<_prefix>{above}){''.join(parts)}")


def matches(layout: Layout, files: Files, classes: Sequence[str] = ()) -> list[Match]:
    """The images that the rules match, sorted by path, each by its first matching rule, without masks of other images.

    Patterns of the user's own folder begin there, others anywhere below it. classes: the texts of ``{class}``.
    ValueError if the patterns match in several places, since it is unclear which copy is meant.
    """
    splits = tuple(text for text, _ in layout.splits) or SPLITS
    texts = {"split": splits, "class": [*classes, *(text for text, _ in layout.labels)]}
    by_path: dict[str, Match] = {}
    candidates = [*_sorted(files.files), *sorted(_series_folders(files))]
    for rule in layout.rules:
        fullmatch = expression(rule.image, texts, layout.state != "own").fullmatch
        for path in candidates:
            if path in by_path or not (match := fullmatch(path)):
                continue
            names = {name: text for name, text in match.groupdict().items() if name != "_prefix"}
            by_path[path] = Match(path, names, rule, match["_prefix"])
    masks = {path for match in by_path.values() for path in targets(match, files) if path != match.image}
    images = [by_path[path] for path in sorted(by_path) if path not in masks and _is_image(path, files)]
    prefixes = sorted({match.prefix for match in images})
    if len(prefixes) > 1:
        raise ValueError(
            f"data: expected one copy of the data, got files of the same layout in {len(prefixes)} places: "
            f"{', '.join(repr(str(files.root / prefix)) for prefix in prefixes[:3])}; name one of them"
        )
    return images


def targets(match: Match, files: Files) -> list[str]:
    """The paths of an image's existing masks and polygons."""
    rule = match.rule
    patterns = [rule.mask, rule.polygons, *(pattern for _, pattern in rule.masks)]
    return [path for pattern in patterns if pattern for path in beside(match, pattern, files)]


def beside(match: Match, pattern: str, files: Files) -> list[str]:
    """The files, or folders of a series, that match a rule's pattern for an image; it may contain ``*``."""
    wanted = match.prefix + match.text(pattern)
    if "*" not in wanted:
        return [wanted] if wanted in files.files or wanted in files.folders else []
    places = [""]
    for part in wanted.split("/"):
        places = [path for place in places for path in _fitting(place, part, files)]
    return [path for path in places if path != match.image]


def _fitting(folder: str, part: str, files: Files) -> list[str]:
    """The paths directly in a folder whose names match ``part``, which may contain ``*``."""
    start = f"{folder}/" if folder else ""
    if "*" not in part:
        path = start + part
        return [path] if path in files.files or path in files.folders else []
    children = _children(files).get(folder, [])
    literal = start + part.partition("*")[0]
    fullmatch = re.compile(re.escape(start + part).replace(r"\*", "[^/]*")).fullmatch
    following = (children[i] for i in range(bisect_left(children, literal), len(children)))
    candidates = itertools.takewhile(lambda path: path.startswith(literal), following)
    return [path for path in candidates if fullmatch(path)]


@functools.lru_cache(maxsize=8)
def _children(files: Files) -> Mapping[str, list[str]]:
    children: dict[str, list[str]] = {}
    for path in sorted(files.files | files.folders):
        children.setdefault(path.rpartition("/")[0], []).append(path)
    return children


@functools.lru_cache(maxsize=8)
def _series_folders(files: Files) -> frozenset[str]:
    """Folders with DICOM files directly in them, by suffix or by the first bytes of the first file without one."""
    series, tested = set(), set()
    for path in _sorted(files.files):
        folder, name = path.rpartition("/")[::2]
        if not folder or folder in series:
            continue
        if readers.format_of(path) == "dicom":
            series.add(folder)
        elif folder not in tested and readers.format_of(path) is None and Path(name).suffix.lower() not in _TEXT:
            tested.add(folder)
            if readers.recognised(files.root / path) == "dicom":
                series.add(folder)
    return frozenset(series)


def is_dicom(path: Path) -> bool:
    """Whether the path is a DICOM file, by its suffix or first bytes."""
    return path.is_file() and (readers.format_of(path) or readers.recognised(path)) == "dicom"


def _is_image(path: str, files: Files) -> bool:
    """Whether the path is the folder of a series or has the suffix of a readable format."""
    return path in files.folders or readers.format_of(path) is not None


def expected(layout: Layout, files: Files) -> str:
    """The images' patterns, with the first missing folder of each, for a message."""
    lines = []
    for rule in layout.rules:
        shown = _TOKEN.sub(lambda token: f"<{token[1]}>" if token[1] else token[0], rule.image)
        lines.append(f"{shown}{_missing(rule.image, files)}")
    return "; or ".join(lines)


def _missing(pattern: str, files: Files) -> str:
    """A note on the first folder of a pattern that does not exist below the data."""
    for folder in pattern.split("/")[:-1]:
        if _TOKEN.search(folder) is None and all(path.rpartition("/")[2] != folder for path in files.folders):
            return f" (there is no folder {folder!r})"
    return ""
