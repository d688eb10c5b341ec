"""What a reader says of itself: the only thing that the rest of `dex.prepare` knows of a format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..routing import Decision
from .files import BoundedFile, Limits
from .stack import Stack

Beat = Callable[[], None]
"""A sign of life: whoever runs a reader takes a long silence for a hang."""
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
    decides: the files' headers say what they are, so `read` takes a `Decide`, or None, as a fourth argument.
    frame_stride: of stacks that are no volume the corpus takes one frame in so many.
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
    decides: bool = False
    frame_stride: int = 1
    passed_over: Mapping[str, str] = field(default_factory=dict)
