"""Which files of a folder belong together, by patterns: ``{split}/Original/{case}.png`` and what goes with each.

A name in braces stands for text without "/", the same wherever it recurs; ``*`` for any text within a name, ``**`` for
any folders. A pattern may begin anywhere below the folder, as archives are unpacked in one place or another.
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
"""Suffixes of files that are not looked into."""


class Match(NamedTuple):
    """An image that a rule found."""

    image: str
    """Path below the folder."""
    names: dict[str, str]
    """What the names of the pattern stand for."""
    rule: Rule
    prefix: str
    """Folders above the place where the pattern begins, "" or with "/" at the end."""

    def text(self, template: str) -> str:
        """A template with its names filled in."""
        return _TOKEN.sub(lambda token: self.names[token[1]] if token[1] else token[0], template)


class Files(NamedTuple):
    """The files below a folder, hidden ones and links left out, by their paths with "/"."""

    root: Path
    files: frozenset[str]
    folders: frozenset[str]

    def within(self, folder: str) -> list[str]:
        """The files that lie in a folder, sorted."""
        start = f"{folder}/" if folder else ""
        return [path for path in _sorted(self.files) if path.startswith(start) and "/" not in path[len(start) :]]


def listed(root: Path) -> Files:
    """What is below ``root``. FileNotFoundError, NotADirectoryError; ValueError for more than `MAX_FILES`."""
    if not root.exists():
        raise FileNotFoundError(f"data: expected a folder; nothing at {root}")
    if not root.is_dir():
        raise NotADirectoryError(f"data: expected a folder; got the file {root}")
    files: set[str] = set()
    folders: set[str] = set()
    for place, inside, names in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith(".") and name not in _SKIPPED)
        below = Path(place).relative_to(root).as_posix()
        start = "" if below == "." else f"{below}/"
        folders |= {f"{start}{name}" for name in inside}
        for name in names:
            if not name.startswith(".") and not os.path.islink(os.path.join(place, name)):
                files.add(f"{start}{name}")
        if len(files) > MAX_FILES:
            raise ValueError(f"data: expected at most {MAX_FILES:,} files; got more below {root}")
    return Files(root, frozenset(files), frozenset(folders))


@functools.lru_cache(maxsize=8)
def _sorted(files: frozenset[str]) -> list[str]:
    return sorted(files)


def expression(pattern: str, texts: Mapping[str, Sequence[str]], anywhere: bool = True) -> re.Pattern[str]:
    """Fits paths; groups are the names, and ``_prefix`` the folders above. texts: what some names stand for alone.
    anywhere: there may be such folders."""
    parts, seen, place = [], set(), 0
    for token in _TOKEN.finditer(pattern):
        parts.append(re.escape(pattern[place : token.start()]))
        place = token.end()
        name = token[1]
        if name in seen:
            parts.append(f"(?P={name})")
        elif name:
            seen.add(name)
            inside = "|".join(map(re.escape, texts[name])) if texts.get(name) else "[^/]+?"
            parts.append(f"(?P<{name}>{inside})")
        else:
            parts.append("(?:[^/]+/)*" if token[2] else "[^/]*")
    parts.append(re.escape(pattern[place:]))
    above = "(?:[^/]+/)*?" if anywhere else ""
    return re.compile(f"(?P<_prefix>{above}){''.join(parts)}")


def matches(layout: Layout, files: Files, classes: Sequence[str] = ()) -> list[Match]:
    """The images that the rules find, sorted by path, each by the first rule that fits; what belongs to one of them as
    its mask is none. Patterns of the user's own folder begin there, others anywhere below it. classes: the texts of
    ``{class}``. ValueError where they fit in several places, so that nobody knows which copy is meant."""
    splits = tuple(text for text, _ in layout.splits) or SPLITS
    texts = {"split": splits, "class": [*classes, *(text for text, _ in layout.labels)]}
    found: dict[str, Match] = {}
    candidates = [*_sorted(files.files), *sorted(_series_folders(files))]
    for rule in layout.rules:
        fits = expression(rule.image, texts, layout.state != "own").fullmatch
        for path in candidates:
            if path in found or not (match := fits(path)):
                continue
            names = {name: text for name, text in match.groupdict().items() if name != "_prefix"}
            found[path] = Match(path, names, rule, match["_prefix"])
    belonging = {path for match in found.values() for path in targets(match, files) if path != match.image}
    kept = [found[path] for path in sorted(found) if path not in belonging and _is_image(path, files)]
    prefixes = sorted({match.prefix for match in kept})
    if len(prefixes) > 1:
        raise ValueError(
            f"data: expected one copy of the data; got files of the same layout in {len(prefixes)} places: "
            f"{', '.join(repr(str(files.root / prefix)) for prefix in prefixes[:3])}; name one of them"
        )
    return kept


def targets(match: Match, files: Files) -> list[str]:
    """The paths of the masks and polygons that are there for an image."""
    rule = match.rule
    patterns = [rule.mask, rule.polygons, *(pattern for _, pattern in rule.masks)]
    return [path for pattern in patterns if pattern for path in beside(match, pattern, files)]


def beside(match: Match, pattern: str, files: Files) -> list[str]:
    """The files, or folders of a series, that a pattern of a rule means for an image: several where it has ``*``."""
    wanted = match.prefix + match.text(pattern)
    if "*" not in wanted:
        return [wanted] if wanted in files.files or wanted in files.folders else []
    places = [""]
    for part in wanted.split("/"):
        places = [path for place in places for path in _fitting(place, part, files)]
    return [path for path in places if path != match.image]


def _fitting(folder: str, part: str, files: Files) -> list[str]:
    """What directly in a folder has a name that ``part``, perhaps with ``*``, fits."""
    start = f"{folder}/" if folder else ""
    if "*" not in part:
        path = start + part
        return [path] if path in files.files or path in files.folders else []
    inside = _children(files).get(folder, [])
    literal = start + part.partition("*")[0]
    fits = re.compile(re.escape(start + part).replace(r"\*", "[^/]*")).fullmatch
    begun = itertools.takewhile(
        lambda path: path.startswith(literal), (inside[i] for i in range(bisect_left(inside, literal), len(inside)))
    )
    return [path for path in begun if fits(path)]


@functools.lru_cache(maxsize=8)
def _children(files: Files) -> Mapping[str, list[str]]:
    children: dict[str, list[str]] = {}
    for path in sorted(files.files | files.folders):
        children.setdefault(path.rpartition("/")[0], []).append(path)
    return children


@functools.lru_cache(maxsize=8)
def _series_folders(files: Files) -> frozenset[str]:
    """Folders that directly hold DICOM files: by their suffix, or by the first bytes of the first file without one."""
    found, asked = set(), set()
    for path in _sorted(files.files):
        folder, name = path.rpartition("/")[::2]
        if not folder or folder in found:
            continue
        if readers.format_of(path) == "dicom":
            found.add(folder)
        elif folder not in asked and readers.format_of(path) is None and Path(name).suffix.lower() not in _TEXT:
            asked.add(folder)
            if readers.recognised(files.root / path) == "dicom":
                found.add(folder)
    return frozenset(found)


def _is_image(path: str, files: Files) -> bool:
    """Whether a reader takes it, by its suffix; folders of a series are."""
    return path in files.folders or readers.format_of(path) is not None


def expected(layout: Layout, files: Files) -> str:
    """What the rules look for, and the first folder on the way that is not there, for a message."""
    lines = []
    for rule in layout.rules:
        shown = _TOKEN.sub(lambda token: f"<{token[1]}>" if token[1] else token[0], rule.image)
        lines.append(f"{shown}{_missing(rule.image, files)}")
    return "; or ".join(lines)


def _missing(pattern: str, files: Files) -> str:
    """The first folder of a pattern that nothing below the data is called."""
    for folder in pattern.split("/")[:-1]:
        if _TOKEN.search(folder) is None and all(path.rpartition("/")[2] != folder for path in files.folders):
            return f" (there is no folder {folder!r})"
    return ""
