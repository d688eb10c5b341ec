"""The division of patients into training, validation and test.

All images of a patient are in one split. Splits stated by the files are used; others are drawn by patient, as a
function of names, labels and seed only.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from dex.tasks.task import SPLITS

SHARES = (0.7, 0.15, 0.15)
"""Default shares of train, val and test."""
VAL_SHARE = 0.15
"""Share of the training patients for val, if files state only train and test."""
FEW = 10
"""Patients of a split below which intervals over patients are unreliable."""
HOW = "--patient REGEX, or a column patient, assigns images to patients"
DRAW = "draw"
_NAMED = 3


class Sample(NamedTuple):
    """patient: from the files. label: a class, "" in segmentation. side: the split, "" if the files do not state it."""

    patient: str
    label: str
    side: str
    file: str


def sides_of(
    samples: Sequence[Sample], seed: int, shares: tuple[float, float, float] = SHARES, redraw: bool = False
) -> tuple[list[str], list[str]]:
    """The split of each sample, and notes for the user.

    shares: of the images, for train, val and test. redraw: ignore the splits of the files.
    Raises: ValueError if a patient is in several splits, naming patients, or if a split is empty.
    """
    stated = [sample.side for sample in samples]
    if redraw:
        stated = [""] * len(samples)
    if any(stated) and not all(stated):
        lacking = next(sample.file for sample in samples if not sample.side)
        raise ValueError(f"split: expected a split for each image, or for none, got none for {lacking}")
    notes = []
    if not any(stated):
        sides = _draw(samples, dict(zip(SPLITS, shares, strict=True)), seed)
        notes.append(f"the split is drawn by patient, with seed {seed}: the files state none")
    else:
        _check_apart(samples, stated)
        sides = stated
        present = set(stated)
        if "val" not in present and {"train", "test"} <= present:
            of_train = [i for i, side in enumerate(stated) if side == "train"]
            share = shares[1] / (shares[0] + shares[1]) if shares[1] else VAL_SHARE
            drawn = _draw([samples[i] for i in of_train], {"train": 1 - share, "val": share}, seed)
            sides = list(stated)
            for i, side in zip(of_train, drawn, strict=True):
                sides[i] = side
            notes.append(f"val is drawn by patient from train, with seed {seed}: the files state only train and test")
        elif "test" not in present and {"train", "val"} <= present:
            notes.append("the files state only train and val: val is also the test split, so results are optimistic")
    _check_sides(samples, sides)
    return sides, [*notes, *_few(samples, sides)]


def _draw(samples: Sequence[Sample], shares: dict[str, float], seed: int) -> list[str]:
    """The split of each sample. Patients are drawn separately for each label, in the order of a hash; each goes to the
    split that lacks most images, or to an empty one if few patients are left."""
    images: Counter[str] = Counter(sample.patient for sample in samples)
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        labels[sample.patient][sample.label] += 1
    overall = Counter(sample.label for sample in samples)
    strata: dict[str, list[str]] = defaultdict(list)
    for patient, counts in labels.items():
        strata[min(counts, key=lambda label: (overall[label], label))].append(patient)  # By its rarest label
    wanted = {side: share for side, share in shares.items() if share > 0}
    side_of: dict[str, str] = {}
    for label in sorted(strata):
        patients = sorted(strata[label], key=lambda patient: _key(seed, patient))
        total = sum(images[patient] for patient in patients)
        taken = dict.fromkeys(wanted, 0)
        for place, patient in enumerate(patients):
            empty = [side for side in wanted if not taken[side]]
            remaining = len(patients) - place
            candidates = empty if empty and remaining <= len(empty) else list(wanted)
            side = max(candidates, key=lambda s: (wanted[s] * total - taken[s], -SPLITS.index(s)))
            side_of[patient] = side
            taken[side] += images[patient]
    return [side_of[sample.patient] for sample in samples]


def _key(seed: int, patient: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{patient}".encode("utf-8", "surrogatepass")).digest()


def _check_apart(samples: Sequence[Sample], sides: Sequence[str]) -> None:
    """ValueError for patients in several splits."""
    by_patient: dict[str, dict[str, str]] = defaultdict(dict)
    for sample, side in zip(samples, sides, strict=True):
        by_patient[sample.patient].setdefault(side, sample.file)
    divided = {patient: files for patient, files in by_patient.items() if len(files) > 1}
    if divided:
        shown = "; ".join(
            f"{patient} ({', '.join(f'{side}: {file}' for side, file in sorted(files.items()))})"
            for patient, files in sorted(divided.items())[:_NAMED]
        )
        raise ValueError(
            f"split: expected each patient in one split, got {len(divided):,} in several: {shown}. "
            f"--split {DRAW} draws a new split by patient; {HOW}"
        )


def _check_sides(samples: Sequence[Sample], sides: Sequence[str]) -> None:
    """ValueError for a split without images, or without images of some class."""
    counts = {side: Counter(s.label for s, on in zip(samples, sides, strict=True) if on == side) for side in SPLITS}
    for side in ("train", "val"):
        if not counts[side]:
            patients = len({sample.patient for sample in samples})
            raise ValueError(
                f"split: expected images in train and val, got none in {side}: {len(samples):,} images of {patients:,} "
                f"patients; {HOW}"
            )
    labels = sorted({sample.label for sample in samples})
    for side, of_side in counts.items():
        lacking = [label for label in labels if label and of_side and not of_side[label]]
        if lacking:
            patients = {label: len({s.patient for s in samples if s.label == label}) for label in lacking}
            raise ValueError(
                f"split: expected images of each class in {side}, got none of "
                f"{', '.join(f'{label!r} ({patients[label]:,} patients in all)' for label in lacking)}; "
                "leave these classes out, or draw with another seed"
            )


def _few(samples: Sequence[Sample], sides: Sequence[str]) -> list[str]:
    notes = []
    for side in SPLITS:
        patients = len({sample.patient for sample, on in zip(samples, sides, strict=True) if on == side})
        if 0 < patients < FEW:
            noun = "patient" if patients == 1 else "patients"
            notes.append(f"{side} has only {patients} {noun}: intervals over patients are unreliable")
    return notes


def shots(samples: Sequence[Sample], sides: Sequence[str], count: int, seed: int) -> list[int]:
    """The places of samples to keep: ``count`` training images per class (in all, for segmentation), drawn with the
    seed, and everything outside train. ValueError if a class has fewer."""
    if count < 1:
        raise ValueError(f"shots: expected at least 1, got {count}")
    by_label: dict[str, list[int]] = defaultdict(list)
    for place, (sample, side) in enumerate(zip(samples, sides, strict=True)):
        if side == "train":
            by_label[sample.label].append(place)
    kept = [place for place, side in enumerate(sides) if side != "train"]
    for label, places in sorted(by_label.items()):
        if len(places) < count:
            of_class = f" of class {label!r}" if label else ""
            raise ValueError(f"shots: expected at most {len(places)}, the training images{of_class}, got {count}")
        order = sorted(places, key=lambda place: _key(seed, f"{samples[place].patient}\0{samples[place].file}"))
        kept += order[:count]
    return sorted(kept)
