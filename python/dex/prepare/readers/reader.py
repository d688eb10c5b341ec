"""The description of a reader: all that the rest of ``dex.prepare`` knows about a format."""

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
"""A sign of life: a long silence of a reader counts as a hang."""
VOLUMES = ("first", "all", "mean")
"""Which of several volumes are taken: the first, each as its own stack, or their mean. A number N as text: every N-th,
starting with the first."""
Decide = Callable[[Any, bool], Decision]
"""Maps a header, and whether pixels follow it, to what the file is or why it is left out."""


@dataclass(frozen=True)
class Reader:
    """The description of a format: ``READER`` in the module or folder of this package with the name of the format.

    Importing that module must not import any module in ``needs``: descriptions are also read without files.

    suffixes: of its files' names, in lower case. read(files, limits, beat): the stacks of one unit, in a fixed order.
    needs: module that it imports -> its distribution. load: imports everything else that ``read`` needs.
    beside: possible names of the separate file with the data of the given one; [] if that file holds its data itself,
    or if its header is refused.
    recognises: whether an opened file without a known suffix has this format.
    whole_folders: whether a unit is all files of one folder. series_of: what files of a large folder share if ``read``
    puts them into one series, by their headers; () if a header cannot be read.
    choices: further keyword arguments of ``read``. "decide", a ``Decide`` or None: the files' headers say what they
    are. "volumes", one of ``VOLUMES`` or a number: a file may hold several. "enough", an int or None: a picture may be
    read at a smaller size if its shorter side keeps this many pixels. "pieces", an int or None: the side of the pieces
    of a large picture; None shrinks it. "headers", a bool: True delays reading the values until they are needed;
    readers without this choice always do.
    frame_stride: N if the corpus takes every N-th frame of stacks that are not volumes.
    passed_over: names of files that are not images, in upper case -> what they are.
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
        """Whether the headers of the files say what they are."""
        return "decide" in self.choices


def mean_of(wholes: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of volumes of one shape, float32, with at most two of them in memory."""
    total, count = 0.0, 0
    for whole in wholes:
        total, count = total + whole.astype(np.float64), count + 1
    return (total / count).astype(np.float32)


def chosen(volumes: str, count: int) -> list[int]:
    """The numbers of the volumes to take, out of ``count``."""
    if volumes == "first":
        return [0]
    return list(range(0, count, int(volumes) if volumes.isdecimal() else 1))


def left_out(volumes: str, count: int) -> list[Refused]:
    """The refusals of the volumes that are not taken."""
    left = count - len(chosen(volumes, count))
    if not left:
        return []
    return [Refused("inconsistent", f"{left} volumes after the first" if volumes == "first" else f"{left} volumes")]
