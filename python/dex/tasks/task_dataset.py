"""The frames of a task for training: each case is read once, made square, and kept in an unnamed temporary file.

Faults of images, masks and splits are found here, before training. The file has no name, so nothing is left of it
however the process ends.

Shape letters: n frames of a case, H rows and W columns of a frame, S side of the model's images, C classes.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dex.data.order import permutation
from dex.tasks.cases import SPLITS, Case, Frames, TaskData, require_classes
from dex.tasks.geometry import Placement, placement
from dex.tasks.model import outputs_of
from dex.tasks.reading import frames_of
from dex.tasks.recipe import Settings
from dex.tasks.task import IGNORED, Task

Say = Callable[[int, int, str], None]
"""Called with (done, total, current activity)."""


class Square(NamedTuple):
    """The frames of a case at the model's image size."""

    images: Tensor
    """uint8 ``[n, 3, S, S]``, or ``[n, 1, S, S]`` for grey frames; the longer side fills it, padding is black."""
    masks: Tensor | None
    """uint8 ``[n, S, S]``; padding is ``IGNORED``."""
    place: Placement


class Stored(NamedTuple):
    """The location of a frame in the file."""

    case: int
    number: int
    """Number of the frame in its case, from 0."""
    offset: int
    channels: int


class Batch(NamedTuple):
    images: Tensor
    """uint8 ``[B, 3, S, S]``."""
    targets: Tensor
    """Masks uint8 ``[B, S, S]``, or labels int64 ``[B]``."""
    ids: tuple[str, ...]
    places: Tensor
    """int64 ``[B]``: position in the whole run, unique for each image."""


def square(images: np.ndarray, masks: np.ndarray | None, size: int, spacing: tuple[float, float] | None) -> Square:
    """Resize uint8 ``[n, H, W]`` or ``[n, H, W, 3]`` and masks uint8 ``[n, H, W]`` to squares of side ``size``.

    spacing: of rows and columns, in mm.
    """
    height, width = images.shape[1:3]
    place = placement(height, width, size, spacing or (1.0, 1.0))
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.movedim(3, 1)
    top, left, tall, wide = place.square
    out = torch.zeros(len(pixels), pixels.shape[1], size, size, dtype=torch.uint8)
    target = None if masks is None else torch.full((len(pixels), size, size), IGNORED, dtype=torch.uint8)
    for i in range(len(pixels)):  # One by one: a volume as float32 would take four times its memory
        frame = pixels[i : i + 1].float()
        if (height, width) != (tall, wide):
            frame = F.interpolate(frame, (tall, wide), mode="bilinear", antialias=True, align_corners=False)
        out[i, :, top : top + tall, left : left + wide] = frame[0].round_().clamp_(0, 255).to(torch.uint8)
        if target is not None:
            mask = torch.from_numpy(np.ascontiguousarray(masks[i]))[None, None].float()
            resized = F.interpolate(mask, (tall, wide), mode="nearest-exact")[0, 0]
            target[i, top : top + tall, left : left + wide] = resized.to(torch.uint8)
    return Square(out, target, place)


class TaskDataset:
    """The frames of one split at one size, filled by ``add``."""

    def __init__(self, task: Task, size: int):
        self.task: Task = task
        self.size: int = size
        self.cases: list[Case] = []
        self.frames: list[Stored] = []
        self.labels: list[int] = []
        """Label of each case; -1 in segmentation."""
        self.counts: Tensor = torch.zeros(outputs_of(task), dtype=torch.int64)
        """``[C]``: pixels of each class with the background first, or frames of each class."""
        self._file = tempfile.TemporaryFile()
        self._end = 0
        self._hash = hashlib.sha256(f"{task.name} {size} {task.classes}".encode())

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def fingerprint(self) -> str:
        """Hash of every pixel, target, id and patient, in order."""
        return self._hash.hexdigest()

    def add(self, case: Case, frames: Frames) -> None:
        spacing = None if frames.spacing_mm is None else frames.spacing_mm[1:]
        squares = square(frames.images, frames.masks, self.size, spacing)
        number = len(self.cases)
        self.cases.append(case)
        self.labels.append(-1 if frames.label is None else frames.label)
        self._hash.update(f"{case.id} {case.patient} {frames.label} {len(squares.images)}".encode())
        for i, image in enumerate(squares.images):
            self.frames.append(Stored(number, i, self._end, len(image)))
            self._append(image)
            if squares.masks is not None:
                self._append(squares.masks[i])
        if frames.masks is not None:  # At the stored size, since small structures may vanish at the model's size
            self.counts += torch.from_numpy(np.bincount(frames.masks.ravel(), minlength=256)[: len(self.counts)])
        else:
            self.counts[frames.label] += len(squares.images)

    def _append(self, array: Tensor) -> None:
        data = array.contiguous().numpy().tobytes()
        self._hash.update(data)
        self._file.seek(self._end)
        self._file.write(data)
        self._end += len(data)

    def image(self, index: int) -> Tensor:
        """uint8 ``[3, S, S]``."""
        frame = self.frames[index]
        return self._bytes(frame.offset, frame.channels).view(frame.channels, self.size, self.size).expand(3, -1, -1)

    def target(self, index: int) -> Tensor:
        """The mask, uint8 ``[S, S]``, or the label, int64 0-dim."""
        frame = self.frames[index]
        if self.task.kind == "classification":
            return torch.tensor(self.labels[frame.case])
        return self._bytes(frame.offset + frame.channels * self.size**2, 1).view(self.size, self.size)

    def _bytes(self, offset: int, channels: int) -> Tensor:
        self._file.flush()
        data = bytearray(os.pread(self._file.fileno(), channels * self.size**2, offset))
        return torch.frombuffer(data, dtype=torch.uint8)

    def name(self, index: int) -> str:
        frame = self.frames[index]
        return f"{self.cases[frame.case].id}#{frame.number}"

    def batch(self, step: int, size: int, seed: int, rank: int = 0, world_size: int = 1) -> Batch:
        """This rank's part of batch ``step``. Epochs follow each other without a gap, each a new permutation."""
        part = size // world_size
        first = step * size + rank * part
        places = np.arange(first, first + part)
        orders = {epoch: permutation(seed, epoch, len(self)) for epoch in {int(p) // len(self) for p in places}}
        indices = [int(orders[int(p) // len(self)][int(p) % len(self)]) for p in places]
        return Batch(
            torch.stack([self.image(i) for i in indices]),
            torch.stack([self.target(i) for i in indices]),
            tuple(self.name(i) for i in indices),
            torch.from_numpy(places.astype(np.int64)),
        )

    def of_case(self, case: int) -> list[int]:
        """The frames of a case, in order."""
        return [i for i, frame in enumerate(self.frames) if frame.case == case]


def spread_cases(cases: Sequence[Case], most: int) -> list[Case]:
    """At most ``most`` cases, spread evenly over the list, always the same ones."""
    if len(cases) <= most:
        return list(cases)
    return [cases[i * len(cases) // most] for i in range(most)]


class Splits(NamedTuple):
    train: TaskDataset
    val: TaskDataset
    notes: tuple[str, ...]
    fingerprint: str


def read_splits(data: TaskData, size: int, settings: Settings, say: Say = lambda done, total, text: None) -> Splits:
    """Read and check every case; those of training, and the validation cases of an epoch, are kept.

    Without validation cases, a note says that no best checkpoint can be chosen. ValueError naming what training or the
    evaluation after it cannot use.
    """
    task = data.task
    sides = {side: [case for case in data.cases if case.split == side] for side in SPLITS}
    if not sides["train"]:
        raise ValueError(f"data: expected training cases of {task.name}, got {_counted(sides)}")
    val_cases = spread_cases(sides["val"], settings.evaluate_cases)
    train, val = TaskDataset(task, size), TaskDataset(task, size)
    kept = {case: dataset for dataset, cases in ((train, sides["train"]), (val, val_cases)) for case in cases}
    cases = [*kept, *(case for side in ("val", "test") for case in sides[side] if case not in kept)]
    present = {side: np.zeros(len(task.classes), np.int64) for side in SPLITS}
    contents = frames_of(cases, task, settings.processes)
    for done, (case, frames) in enumerate(zip(cases, contents, strict=True)):
        say(done, len(cases), "reading cases")
        present[case.split] += _contained(checked(case, frames, task), task)
        if case.split == "test":
            check_distances(case, frames)
        if case in kept:
            kept[case].add(case, frames)
    notes = list(_check_classes(train, val, task))
    for side in ("val", "test"):
        if sides[side]:
            require_classes(task, side, len(sides[side]), present[side].tolist())
    if not val_cases:
        notes.append("no validation cases: the last checkpoint counts as the best, and the run does not end early")
    elif len(val_cases) < len(sides["val"]):
        count = f"{len(val_cases)} of {len(sides['val'])}"
        notes.append(f"epochs are evaluated on {count} validation cases (evaluate_cases)")
    fingerprint = hashlib.sha256(f"{train.fingerprint} {val.fingerprint}".encode()).hexdigest()
    return Splits(train, val, tuple(notes), fingerprint)


def checked(case: Case, frames: Frames, task: Task) -> Frames:
    """The same frames. ValueError for frames that training cannot use; the message may name the file."""
    if len(frames.images) == 0:
        raise ValueError(f"data: expected at least one image; {case.image} holds none")
    if task.kind == "classification":
        if frames.label is None or not 0 <= frames.label < len(task.classes):
            expected = f"a label of {task.name}, 0 to {len(task.classes) - 1}"
            raise ValueError(f"data: expected {expected}; {case.image} has {frames.label!r}")
        return frames
    if frames.masks is None:
        raise ValueError(f"data: expected a mask for every case of {task.name}; {case.image} has none")
    if frames.masks.shape != frames.images.shape[:3]:
        shapes = f"{list(frames.masks.shape)} for images {list(frames.images.shape[:3])}"
        raise ValueError(f"data: expected masks of the images' size; {case.image} has {shapes}")
    values = np.unique(frames.masks)
    unknown = values[(values > len(task.classes)) & (values != IGNORED)]
    if len(unknown):
        expected = f"values 0 to {len(task.classes)} of {task.name}, or {IGNORED} for ignored pixels"
        raise ValueError(f"data: expected {expected}; the mask of {case.image} holds {unknown.tolist()[:8]}")
    return frames


def check_distances(case: Case, frames: Frames) -> None:
    """ValueError for a mask of unevenly spaced slices: HD95 and NSD in mm need a single spacing."""
    if frames.masks is not None and frames.grid is not None and not frames.grid.even:
        raise ValueError(
            f"file: expected evenly spaced slices, which distances in mm need, got others in {case.image}; add the "
            "missing slices, or leave out those with another spacing"
        )


def _contained(frames: Frames, task: Task) -> np.ndarray:
    """Bool ``[C]``: the classes that the target contains."""
    if frames.masks is None:
        return np.arange(len(task.classes)) == frames.label
    return np.bincount(frames.masks.ravel(), minlength=256)[1 : len(task.classes) + 1] > 0


def _check_classes(train: TaskDataset, val: TaskDataset, task: Task) -> Iterator[str]:
    """Notes on missing classes. ValueError if there is nothing to learn."""
    first = int(task.kind == "segmentation")
    present = (train.counts[first:] > 0).tolist()
    missing = [name for name, is_present in zip(task.classes, present, strict=True) if not is_present]
    if not any(present):
        raise ValueError(f"data: expected some mask of {task.name} that is not empty; all training masks are empty")
    if task.kind == "classification" and sum(present) < 2:
        only = task.classes[present.index(True)]
        raise ValueError(f"data: expected at least two classes in the training split of {task.name}, got {only} only")
    if missing:
        raise ValueError(
            f"data: expected every class of {task.name} in the training split; missing: {', '.join(missing)}. Leave "
            "them out of the task's classes, or move cases"
        )
    if len(val):
        absent = [name for name, n in zip(task.classes, val.counts[first:].tolist(), strict=True) if n == 0]
        if absent:
            yield f"the validation cases of an epoch do not contain {', '.join(absent)}: the metric ignores them"


def _counted(sides: dict[str, list[Case]]) -> str:
    return ", ".join(f"{len(cases)} {side}" for side, cases in sides.items())
