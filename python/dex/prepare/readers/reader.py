"""What a reader says of itself: the only thing that the rest of `dex.prepare` knows of a format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..routing import Decision
from .files import BoundedFile, Limits
from .stack import Refused, Stack

Beat = Callable[[], None]
"""A sign of life: whoever runs a reader takes a long silence for a hang."""
VOLUMES = ("first", "all", "mean")
"""Which of several volumes are taken: the first, each as a stack of its own, or their mean. A number N, as text: every
N-th, from the first on."""
Decide = Callable[[Any, bool], Decision]
"""From a header, and whether pixels follow it, to what the file is, or why it is left out."""


@dataclass(frozen=True)
class Reader:
    """The description of a format, ``READER`` in the module or folder of this package that the format is called after.

    Importing that module must import nothing that ``needs`` names: descriptions are read where no file is.

    suffixes: of its files' names, in lower case. read(files, limits, beat): the stacks of one unit, in a fixed order.
    needs: modules that it imports -> the distributions that they come with. load: imports whatever else reading takes.
    beside: what the file beside the given one that holds its data may be called; nothing where it has them itself, or
    says so in a way that is refused.
    recognises: whether an opened file without a known suffix is of this format.
    whole_folders: a unit is all files of one folder. series_of: what the files of a large folder that `read` puts
    together have in common, by their headers; () where that cannot be read.
    choices: what else `read` takes, by keyword. "decide", a `Decide` or None: the files' headers say what they are.
    "volumes", one of `VOLUMES` or a number: a file may hold several. "enough", the pixels of the shorter side from
    which on a picture may be given at a part of its size, or None. "pieces", the sides of those that a large picture is
    cut into, or None: it is shrunk. "headers", a bool: the reader would read numbers before it gives a stack; where
    True it leaves that until they are asked for. Readers without this choice look at headers alone until then.
    frame_stride: N where the corpus takes every N-th frame of stacks that are no volume.
    passed_over: names of files, in upper case, that are no images -> what they are.
    """

    suffixes: tuple[str, ...]
    read: Callable[..., Iterator[Stack]]
    needs: Mapping[str, str] = field(default_factory=dict)
    load: Callable[[], None] = lambda: None
    beside: Callable[[Path], list[str]] = lambda path: []
    recognises: Callable[[BoundedFile], bool] = lambda file: False
    whole_folders: bool = False
    series_of: Callable[[Path, Limits], tuple[str, ...]] | None = None
    choices: tuple[str, ...] = ()
    frame_stride: int = 1
    passed_over: Mapping[str, str] = field(default_factory=dict)

    @property
    def decides(self) -> bool:
        """Whether the files' headers say what they are."""
        return "decide" in self.choices


def mean_of(wholes: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of volumes of one shape, float32, with two of them in memory at a time."""
    total, count = 0.0, 0
    for whole in wholes:
        total, count = total + whole.astype(np.float64), count + 1
    return (total / count).astype(np.float32)


def chosen(volumes: str, count: int) -> list[int]:
    """The numbers of the volumes that are taken of `count`."""
    if volumes == "first":
        return [0]
    return list(range(0, count, int(volumes) if volumes.isdecimal() else 1))


def left_out(volumes: str, count: int) -> list[Refused]:
    """What is said of the volumes that are not taken."""
    left = count - len(chosen(volumes, count))
    if not left:
        return []
    return [Refused("inconsistent", f"{left} volumes after the first" if volumes == "first" else f"{left} volumes")]
