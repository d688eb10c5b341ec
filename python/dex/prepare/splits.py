"""Which images are held out: whole patients if there are enough of them, else smaller units, and the card says so.

An atom is a set of images that must not be split. For each source, the first level is used whose atoms hold out between
half and three times ``val_share`` of the images; if there is none, the level that comes nearest:

    patient   the patient named by header, table or --patient; if none is named, the folder, or the file itself
    study     DICOM studies, and files of other formats
    series    DICOM series, and files of other formats

A named patient stays whole at every level, unless no other patient is named in the source. The hash of an atom's name
decides whether it is held out. If that misses the share, atoms are held out in the order of their hashes, each one that
brings the share nearer. The split is therefore a function of names, numbers of images and ``val_share`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .ids import place_of
from .sources import Source

PATIENT, FOLDER, FILE, STUDY, SERIES = KINDS = ("patient", "folder", "file", "study", "series")
"""Kinds of atoms."""
TRAIN, VAL = "train", "val"
STATED, WHOLE = "stated", "source"
"""How a source is split if nothing is drawn: by the table or ``--split``, or the whole source on one side."""
LEVELS = (PATIENT, STUDY, SERIES)
_PARTED_BY = {FOLDER: "folder", STUDY: "study or file", SERIES: "series or file"}
"""The units of a level in words, for use after a withdrawal, when its atoms are no longer counted."""
HOW = "--patient tells patients apart, --split FILE names what is held out"
LEAST, MOST = 0.5, 3.0
"""Multiples of the wanted share: if less or more is held out, the next level is tried."""

_NAMED, _IN_HEADER = 1, 2  # Flags of a stack: its patient is named; its header names it


class BothSides(ValueError):
    """The user's split puts an atom on both sides."""


class Side(NamedTuple):
    """The atoms of a stack. atoms: the name of its atom at each level. folder: its name by its place alone, if its
    header names the patient. kinds: of the atoms. fixed: the side that the user gave, "" for none."""

    atoms: tuple[str, str, str]
    folder: str
    kinds: tuple[str, str, str]
    fixed: str


def side_of(line: Mapping[str, Any], sides: Mapping[str, str], default: str) -> Side:
    """From a line of a chunk. sides: the user's side of each patient, by group; default: the side of all others."""
    group, by = line["group"], line["by"]
    finest, kind = line.get("series") or line.get("file", group), SERIES if "series" in line else FILE
    kinds = (by, STUDY if "study" in line else kind, kind)
    fixed = line["split"] or sides.get(group, default)
    return Side((group, line.get("study", finest), finest), line.get("folder", group), kinds, fixed)


class Stacks:
    """The stacks of all sources, in order, stored as columns."""

    def __init__(self) -> None:
        self._places, self._kinds, self._flags = bytearray(), bytearray(), bytearray()
        self._fixed, self._parts = bytearray(), bytearray()

    def add(self, part: int, side: Side) -> None:
        """part: the number of its source."""
        names = (*side.atoms, side.folder)
        places = {name: place_of(name).to_bytes(8, "little") for name in set(names)}
        for name in names:
            self._places += places[name]
        self._kinds += bytes(map(KINDS.index, side.kinds))
        named = side.kinds[0] == PATIENT
        self._flags.append(_NAMED * named | _IN_HEADER * (named and side.folder != side.atoms[0]))
        self._fixed.append(("", TRAIN, VAL).index(side.fixed))
        self._parts += part.to_bytes(4, "little")

    def columns(self) -> Columns:
        places = np.frombuffer(self._places, "<u8").reshape(-1, len(LEVELS) + 1)
        flags = np.frombuffer(self._flags, np.uint8)
        return Columns(
            atoms=places[:, : len(LEVELS)],
            folder=places[:, len(LEVELS)],
            kinds=np.frombuffer(self._kinds, np.uint8).reshape(-1, len(LEVELS)),
            named=(flags & _NAMED).astype(bool),
            in_header=(flags & _IN_HEADER).astype(bool),
            fixed=np.frombuffer(self._fixed, np.uint8),
            part=np.frombuffer(self._parts, "<u4").astype(np.int64),
        )


class Columns(NamedTuple):
    """[n] for n stacks; atoms and kinds [n, levels]. An atom is a number computed from its name (``ids.place_of``)."""

    atoms: np.ndarray
    folder: np.ndarray
    kinds: np.ndarray
    named: np.ndarray
    in_header: np.ndarray
    fixed: np.ndarray
    part: np.ndarray


class Split(NamedTuple):
    """val: bool [n]. level: number of the level of each stack's atom; -1: its folder. rows: for the card, one per
    source: how it was split, and the number of atoms on each side."""

    val: np.ndarray
    level: np.ndarray
    rows: list[dict[str, Any]]

    def patients(self, stacks: Columns, some: np.ndarray) -> int:
        """The number of patients of ``some`` stacks, named or by folder or file. Folders and files that were split do
        not count."""
        whole = some[(self.level[some] <= 0) | stacks.named[some]]
        return len(np.unique(np.where(self.level[whole] < 0, stacks.folder[whole], stacks.atoms[whole, 0])))


def name_of(line: Mapping[str, Any], level: int) -> str:
    """The group of a line's image: its patient if named, else its atom at that level."""
    return line["group"] if line["by"] == PATIENT else side_of(line, {}, "").atoms[max(level, 0)]


def draw(stacks: Columns, images: np.ndarray, sources: Sequence[Source]) -> Split:
    """The sides of all stacks. images: int [n], the number of kept images of each.

    A patient of several sources is on one side: that of the first source that drew it, or "val" if a source asks for
    that. If nothing is left to train on, and no source asked for that, everything is trained on. Raises BothSides.
    """
    val = stacks.fixed == 2
    level = np.zeros(len(val), np.int64)
    used = images > 0
    drawn: dict[int, bool] = {}
    how: list[_Drawn | None] = []
    for number, source in enumerate(sources):
        here = stacks.part == number
        free = here & used & (stacks.fixed == 0)
        stated = here & used & (stacks.fixed > 0)
        if stated.any() and not source.split:
            _check_one_side(stacks, stated)
            if _torn(stacks.atoms[stated, 0], val[stated]):  # The user split a folder, so it is not a patient
                level[here & ~stacks.named] = len(LEVELS) - 1
        if not free.any():
            how.append(None)
            continue
        draws = _draw(stacks, images, free, source.val_share, drawn)
        val[free], level[here] = draws.val, draws.level
        # A named patient is whole at every level, unless it is the only one.
        level[here & stacks.named] = 0 if draws.whole else draws.level
        how.append(draws)
        for atom, held in zip(stacks.atoms[free, 0][stacks.named[free]], draws.val[stacks.named[free]], strict=True):
            if draws.whole:
                drawn[int(atom)] = bool(held)
    whole = stacks.named & (level == 0)
    val |= whole & np.isin(stacks.atoms[:, 0], np.unique(stacks.atoms[whole & val & used, 0]))
    asked = any(source.split == VAL or source.val_share >= 1 for source in sources) or (stacks.fixed[used] == 2).any()
    if used.any() and val[used].all() and not asked:
        val[:] = False
    atoms = np.where(level < 0, stacks.folder, stacks.atoms[np.arange(len(val)), np.maximum(level, 0)])
    kinds = np.where(level < 0, KINDS.index(FOLDER), stacks.kinds[np.arange(len(val)), np.maximum(level, 0)])
    rows = []
    for number, (source, draws) in enumerate(zip(sources, how, strict=True)):
        here = used & (stacks.part == number)
        rows.append(_row(source, draws, here, val, atoms, kinds, images))
    return Split(val, level, rows)


class _Drawn(NamedTuple):
    """val: bool, of the free stacks. level: as in ``Split``. whole: whether named patients are whole. fits: whether the
    share is near the wanted one. patients: number of named patients, folders or files."""

    val: np.ndarray
    level: int
    whole: bool
    fits: bool
    patients: int


def _draw(stacks: Columns, images: np.ndarray, free: np.ndarray, share: float, drawn: Mapping[int, bool]) -> _Drawn:
    named, counts = stacks.named[free], images[free]
    patients = np.unique(stacks.atoms[free, 0])
    only = named.all() and len(patients) == 1 and int(patients[0]) not in drawn
    whole = not only
    candidates = [(0, stacks.atoms[free, 0])]
    if only and stacks.in_header[free].all() and len(np.unique(stacks.folder[free])) > 1:
        candidates.append((-1, stacks.folder[free]))  # All headers give the same name, so it identifies nobody
    for number in range(1, len(LEVELS)):
        candidates.append((number, np.where(named & whole, stacks.atoms[free, 0], stacks.atoms[free, number])))
    tried, by_folders = [], True
    for level, atoms in candidates:
        val, fits = _choose(atoms, counts, share, drawn)
        if level == 0 and _torn(stacks.atoms[free, 1][~named], val[~named]):  # A study in two folders
            fits, by_folders = False, False
        tried.append(_Drawn(val, level, whole or level == 0, fits, len(patients)))
        if fits:
            break
    # If none fits, the first of the nearest: patients are not split unless that brings the share nearer.
    best = tried[-1] if tried[-1].fits else min(tried, key=lambda drawn: _distance(counts, drawn.val, share))
    # Even the finest atoms may happen to leave all patients whole.
    if by_folders and not _torn(stacks.atoms[free, 0], best.val):
        best = best._replace(level=0, whole=True)
    return best


def _choose(atoms: np.ndarray, images: np.ndarray, share: float, drawn: Mapping[int, bool]) -> tuple[np.ndarray, bool]:
    """Which stacks are held out, bool [n], and whether their share is near the wanted one."""
    if share <= 0 or share >= 1:
        return np.full(len(atoms), share >= 1), True
    codes, inverse = np.unique(atoms, return_inverse=True)
    counts = np.bincount(inverse, images).astype(np.int64)
    total = int(counts.sum())
    known = {number: drawn[int(code)] for number, code in enumerate(codes) if int(code) in drawn} if drawn else {}

    def fits(held: np.ndarray) -> bool:
        taken = int(counts[held].sum())
        return LEAST * share * total <= taken <= MOST * share * total and 0 < taken < total

    held = codes < np.uint64(int(share * 2**64))
    for number, value in known.items():
        held[number] = value
    if not fits(held):
        held = np.zeros(len(codes), bool)
        held[[number for number, value in known.items() if value]] = True
        taken = int(counts[held].sum())
        free = [number for number in range(len(codes)) if number not in known]  # In the order of the hashes
        for number in free:
            if abs(taken + counts[number] - share * total) < abs(taken - share * total):
                held[number] = True
                taken += int(counts[number])
        if not taken and len(codes) > 1 and free:
            held[min(free, key=lambda number: (counts[number], number))] = True
    return held[inverse], fits(held)


def _distance(images: np.ndarray, val: np.ndarray, share: float) -> tuple[bool, float]:
    """The distance from the wanted share; nothing held out is farthest."""
    held = int(images[val].sum())
    return not held, abs(held - share * int(images.sum()))


def _torn(atoms: np.ndarray, val: np.ndarray) -> bool:
    return len(np.intersect1d(atoms[val], atoms[~val])) > 0


def _check_one_side(stacks: Columns, fixed: np.ndarray) -> None:
    """Raise BothSides if named patients or series are on both sides."""
    val = stacks.fixed[fixed] == 2
    for kind, column in (("patients", 0), ("files or series", len(LEVELS) - 1)):
        atoms = stacks.atoms[fixed, column]
        rows = stacks.named[fixed] if column == 0 else np.ones(len(atoms), bool)
        both = np.intersect1d(atoms[rows & val], atoms[rows & ~val])
        if len(both):
            raise BothSides(f"split: expected each patient on one side, got {len(both):,} {kind} on both")


def _row(
    source: Source,
    drawn: _Drawn | None,
    here: np.ndarray,
    val: np.ndarray,
    atoms: np.ndarray,
    kinds: np.ndarray,
    images: np.ndarray,
) -> dict[str, Any]:
    groups = {}
    for number, kind in enumerate(KINDS):
        of_kind = here & (kinds == number)
        sides = {name: len(np.unique(atoms[of_kind & side])) for name, side in ((TRAIN, ~val), (VAL, val))}
        if any(sides.values()):
            groups[kind] = sides
    if drawn is None:
        by = WHOLE if source.split else STATED
    else:
        by = FOLDER if drawn.level < 0 else LEVELS[drawn.level]
    row = {
        "source": source.name,
        "by": by,
        "images": {name: int(images[here & side].sum()) for name, side in ((TRAIN, ~val), (VAL, val))},
        "groups": groups,
    }
    return row if drawn is None else row | {"wanted": source.val_share, "patients": drawn.patients, "fits": drawn.fits}


def sides(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """For train and val, in words: the number of images, and the numbers of atoms."""
    described = []
    for side in (TRAIN, VAL):
        groups = dict.fromkeys(KINDS, 0)
        for row in facts.get("split", ()):
            for kind, count in row["groups"].items():
                groups[kind] += count[side]
        share = f" ({100 * facts[VAL] / facts['images']:.1f} %)" if side == VAL and facts[VAL] else ""
        listed = ", ".join(_count(count, kind) for kind, count in groups.items() if count)
        described.append((f"{_count(facts[side], 'image')}{share}", listed))
    return described


def hints(facts: Mapping[str, Any]) -> list[str]:
    """Notes on the split: a sentence for each source that needs one."""
    notes = []
    for row in facts.get("split", ()):
        images, by, name = row["images"], row["by"], row["source"]
        total = sum(images.values())
        if by in (WHOLE, STATED) or not 0 < row["wanted"] < 1 or not total:
            continue
        wanted = f"{100 * row['wanted']:g} %"
        loose = unnamed_kinds(row)
        few = row["patients"] * MOST * row["wanted"] < 1
        if not images[VAL]:
            notes.append(f"{name}: no image is held out: all are of one {next(iter(row['groups']), PATIENT)}; {HOW}")
        elif by != PATIENT and (few or by == FOLDER):
            are = "is" if row["patients"] == 1 else "are"
            parted = " and ".join(loose if row["groups"] else ()) or _PARTED_BY[by]
            notes.append(
                f"{name}: {_count(row['patients'], 'patient')}, by headers and folders, {are} too few to hold out "
                f"{wanted}: split by {parted}, so that a patient may be on both sides; {HOW}"
            )
        elif loose and (by != PATIENT or FILE in loose or not row["sure"]):
            counts = {kind: sum(sides.values()) for kind, sides in row["groups"].items()}
            unnamed = " and ".join(_count(counts[kind], kind) if counts else f"some {_plural(kind)}" for kind in loose)
            notes.append(
                f"{name}: nothing names the patients of {unnamed}; each counts as one, so that a patient may be on "
                f"both sides; {HOW}"
            )
        if images[VAL] and not row["fits"]:
            share = f"{100 * images[VAL] / total:.0f} %"
            notes.append(f"{name}: {share} of the images are held out: {wanted} cannot be met")
    return notes


def unnamed_kinds(row: Mapping[str, Any]) -> list[str]:
    """The kinds of atoms that stand for unnamed patients; also after a withdrawal, when their numbers are lost."""
    return [kind for kind in row["groups"] if kind != PATIENT] or list(row.get("unnamed", ()))


def _count(number: int, kind: str) -> str:
    return f"{number:,} {kind if number == 1 else _plural(kind)}"


def _plural(kind: str) -> str:
    return {STUDY: "studies", SERIES: SERIES}.get(kind, f"{kind}s")
