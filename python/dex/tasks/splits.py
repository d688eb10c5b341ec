"""Which patients are trained on, which choose between checkpoints, and which are tested on.

A patient stands on one side. Where files say the sides, those are taken; what they leave open is drawn by patient, as
a function of names, labels and seed alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from dex.tasks.task import SPLITS

SHARES = (0.7, 0.15, 0.15)
"""Of train, val and test, where nothing says otherwise."""
VAL_SHARE = 0.15
"""Of the training patients, where files name train and test alone."""
FEW = 10
"""Patients of a side, below which intervals over patients say little."""
HOW = "--patient REGEX, or a column patient, says whose an image is"
DRAW = "draw"
_NAMED = 3


class Sample(NamedTuple):
    """patient: as the files have it. label: a class, "" in segmentation. side: "" where the files do not say."""

    patient: str
    label: str
    side: str
    file: str


def sides_of(
    samples: Sequence[Sample], seed: int, shares: tuple[float, float, float] = SHARES, redraw: bool = False
) -> tuple[list[str], list[str]]:
    """The side of each sample, and what the user should know.

    shares: wanted of the images, of train, val and test. redraw: nothing is taken from the files.
    Raises: ValueError, naming patients, for one on several sides, and for a side without any.
    """
    stated = [sample.side for sample in samples]
    if redraw:
        stated = [""] * len(samples)
    if any(stated) and not all(stated):
        lacking = next(sample.file for sample in samples if not sample.side)
        raise ValueError(f"split: expected a side for each image, or for none; got none for {lacking}")
    notes = []
    if not any(stated):
        drawn = _draw(samples, dict(zip(SPLITS, shares, strict=True)), seed)
        notes.append(f"the split is drawn by patient, with seed {seed}: the files name none")
    else:
        _check_apart(samples, stated)
        drawn = stated
        present = set(stated)
        if "val" not in present and {"train", "test"} <= present:
            of_train = [i for i, side in enumerate(stated) if side == "train"]
            share = shares[1] / (shares[0] + shares[1]) if shares[1] else VAL_SHARE
            inner = _draw([samples[i] for i in of_train], {"train": 1 - share, "val": share}, seed)
            drawn = list(stated)
            for i, side in zip(of_train, inner, strict=True):
                drawn[i] = side
            notes.append(f"val is drawn by patient from train, with seed {seed}: the files name train and test")
        elif "test" not in present and {"train", "val"} <= present:
            notes.append("the files name train and val alone: val is tested on as well, which flatters the result")
    _check_sides(samples, drawn)
    return drawn, [*notes, *_few(samples, drawn)]


def _draw(samples: Sequence[Sample], shares: dict[str, float], seed: int) -> list[str]:
    """Each patient's side. Patients of one label are dealt out apart from the others', in the order of a hash, each to
    the side that lacks most; the first ones go where nothing is yet."""
    images: Counter[str] = Counter(sample.patient for sample in samples)
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        labels[sample.patient][sample.label] += 1
    overall = Counter(sample.label for sample in samples)
    strata: dict[str, list[str]] = defaultdict(list)
    for patient, own in labels.items():
        strata[min(own, key=lambda label: (overall[label], label))].append(patient)  # by its rarest label
    wanted = {side: share for side, share in shares.items() if share > 0}
    side_of: dict[str, str] = {}
    for label in sorted(strata):
        patients = sorted(strata[label], key=lambda patient: _key(seed, patient))
        total = sum(images[patient] for patient in patients)
        taken = dict.fromkeys(wanted, 0)
        for place, patient in enumerate(patients):
            empty = [side for side in wanted if not taken[side]]
            left = len(patients) - place
            open_sides = empty if empty and left <= len(empty) else list(wanted)
            side = max(open_sides, key=lambda s: (wanted[s] * total - taken[s], -SPLITS.index(s)))
            side_of[patient] = side
            taken[side] += images[patient]
    return [side_of[sample.patient] for sample in samples]


def _key(seed: int, patient: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{patient}".encode("utf-8", "surrogatepass")).digest()


def _check_apart(samples: Sequence[Sample], sides: Sequence[str]) -> None:
    """ValueError for patients on several sides."""
    on: dict[str, dict[str, str]] = defaultdict(dict)
    for sample, side in zip(samples, sides, strict=True):
        on[sample.patient].setdefault(side, sample.file)
    torn = {patient: files for patient, files in on.items() if len(files) > 1}
    if torn:
        shown = "; ".join(
            f"{patient} ({', '.join(f'{side}: {file}' for side, file in sorted(files.items()))})"
            for patient, files in sorted(torn.items())[:_NAMED]
        )
        raise ValueError(
            f"split: expected each patient on one side; got {len(torn):,} on several: {shown}. "
            f"--split {DRAW} draws the sides anew by patient; {HOW}"
        )


def _check_sides(samples: Sequence[Sample], sides: Sequence[str]) -> None:
    """ValueError for a side without images, or a class that one of them lacks."""
    counts = {side: Counter(s.label for s, on in zip(samples, sides, strict=True) if on == side) for side in SPLITS}
    for side in ("train", "val"):
        if not counts[side]:
            patients = len({sample.patient for sample in samples})
            raise ValueError(
                f"split: expected images in train and val; got none in {side}: {len(samples):,} images of {patients:,} "
                f"patients; {HOW}"
            )
    labels = sorted({sample.label for sample in samples})
    for side, here in counts.items():
        lacking = [label for label in labels if label and here and not here[label]]
        if lacking:
            patients = {label: len({s.patient for s in samples if s.label == label}) for label in lacking}
            raise ValueError(
                f"split: expected images of each class in {side}; got none of "
                f"{', '.join(f'{label!r} ({patients[label]:,} patients in all)' for label in lacking)}; "
                f"leave such classes out, or draw again with another seed"
            )


def _few(samples: Sequence[Sample], sides: Sequence[str]) -> list[str]:
    notes = []
    for side in SPLITS:
        patients = len({sample.patient for sample, on in zip(samples, sides, strict=True) if on == side})
        if 0 < patients < FEW:
            are = "patient" if patients == 1 else "patients"
            notes.append(f"{side} has {patients} {are}: intervals over so few say little")
    return notes


def shots(samples: Sequence[Sample], sides: Sequence[str], count: int, seed: int) -> list[int]:
    """Places of the samples that are kept: ``count`` training images of each class, drawn with the seed, and all of
    the others. In segmentation that many in all. ValueError where a class has fewer."""
    if count < 1:
        raise ValueError(f"shots: expected at least 1; got {count}")
    by_label: dict[str, list[int]] = defaultdict(list)
    for place, (sample, side) in enumerate(zip(samples, sides, strict=True)):
        if side == "train":
            by_label[sample.label].append(place)
    kept = [place for place, side in enumerate(sides) if side != "train"]
    for label, places in sorted(by_label.items()):
        if len(places) < count:
            of = f" of class {label!r}" if label else ""
            raise ValueError(f"shots: expected at most {len(places)}, the training images{of}; got {count}")
        order = sorted(places, key=lambda place: _key(seed, f"{samples[place].patient}\0{samples[place].file}"))
        kept += order[:count]
    return sorted(kept)
