"""Find the folder in the paths of a source that tells patients apart: a function of the paths alone.

It is the first one that the paths do not share, but these levels are skipped:

- all folders are named after modalities or parts of a split (``CT``, ``MRI``, ``train``, ``test``, ``imagesTr``, ...);
- the folders are classes: at most CLASSES of them, with at least CLASS_PICTURES single pictures each on average, unless
  they are numbered (``patient-001``, ``video7``, ``0042``), as classes seldom are;
- the folders are days (``2024-03-01``), and a deeper level has enough folders;
- the folders are too few to hold out a share of them, and a deeper level has enough (``site-a/p001``, ``site-b/p002``).

If all folders name a modality, a split or a class, no folder stands for a patient.
"""

from __future__ import annotations

import datetime
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from .modalities import key, known

NONE = -1
"""The level if no folder tells patients apart."""
CLASSES, CLASS_PICTURES = 30, 100
MOST = 3.0
"""A level has too few folders if each holds more than this many times the wanted share."""

_PARTS = {
    *("train", "training", "val", "valid", "validation", "test", "testing", "dev", "heldout", "holdout"),
    *("imagestr", "imagests", "imagesval", "labelstr", "labelsts", "images", "image", "imgs", "img", "pictures"),
    *("labels", "label", "masks", "mask", "annotations", "data", "raw"),
}
_NO_PATIENTS = {
    *("class", "grade", "stage", "level", "score", "birads", "type", "category", "cat", "label", "kl"),
    *("batch", "part", "fold", "set", "split", "shard", "chunk", "images", "image", "imgs", "img", "group", "cluster"),
    *("site", "centre", "center", "hospital", "scanner", "year"),
}
_DIGITS = re.compile(r"\d+")
_DAY = re.compile(r"(\d{4})[-_.]?(\d{2})[-_.]?(\d{2})|(\d{2})[-_.](\d{2})[-_.](\d{4})")


class Place(NamedTuple):
    """folders: of a file, from the root on; single: whether it is a single picture, not a volume, a film or a folder
    read as a whole."""

    folders: tuple[str, ...]
    single: bool


class _Folders(NamedTuple):
    """The folders of one level: the number of files below each, and the total number of single pictures."""

    files: Counter[str]
    singles: int


class Level(NamedTuple):
    """The number of the folder that tells patients apart, counted from the root; NONE if there is none. sure: False if
    folders above it were skipped only because they are too few."""

    number: int
    sure: bool = True


def level_of(places: Iterable[Place], common: int, share: float) -> Level:
    """The folder that tells patients apart.

    common: the number of leading folders that all paths share. share: of patients to hold out.
    """
    levels: list[_Folders] = []
    for place in places:
        for depth, folder in enumerate(place.folders[common:]):
            if depth == len(levels):
                levels.append(_Folders(Counter(), 0))
            levels[depth].files[folder] += 1
            levels[depth] = levels[depth]._replace(singles=levels[depth].singles + place.single)
    enough = math.ceil(1 / (MOST * share)) if share > 0 else 1
    left = [(common + depth, level) for depth, level in enumerate(levels) if not _is_class(level)]
    if not left:
        return Level(NONE if levels else common)
    many = [(number, level) for number, level in left if len(level.files) >= enough]
    best = next((number for number, level in many if not _are_days(level.files)), (many or left)[0][0])
    above = [level for number, level in left if number < best]
    return Level(best, all(_are_days(level.files) for level in above))


def names_nobody(folder: str) -> bool:
    """Whether a folder is named after a modality or a part of a split."""
    return known(folder) is not None or key(folder) in _PARTS


def _is_class(level: _Folders) -> bool:
    if all(map(names_nobody, level.files)):
        return True
    files = sum(level.files.values())
    return (
        len(level.files) <= CLASSES
        and level.singles >= max(0.9 * files, CLASS_PICTURES * len(level.files))
        and not _are_numbered(level.files)
    )


def _are_numbered(names: Iterable[str]) -> bool:
    """Whether the names differ only by their numbers, and do not number classes, parts or sites."""
    stems = {_DIGITS.sub("0", name) for name in names}
    words = {key(word) for stem in stems for word in stem.split("0")}
    return len(stems) == 1 and any("0" in stem for stem in stems) and not words & _NO_PATIENTS


def _are_days(names: Iterable[str]) -> bool:
    return all(map(_is_day, names))


def _is_day(name: str) -> bool:
    match = _DAY.fullmatch(name)
    if match is None:
        return False
    year, month, day = (match[1], match[2], match[3]) if match[1] else (match[6], match[5], match[4])
    try:
        return 1980 <= datetime.date(int(year), int(month), int(day)).year < 2100
    except ValueError:
        return match[4] is not None and int(match[5]) <= 31 and int(match[4]) <= 12  # Month first
