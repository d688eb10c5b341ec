"""Readers of medical image files: one unit (a file with the one that holds its data, or a folder's DICOM files) in, its
stacks out.

A format is a module or a folder of this package with a description, ``READER`` (`reader.Reader`), and is called after
it. No table names the formats: to add one, add its module.

Files are opened as regular files only, declared sizes are checked before anything is allocated, nothing is unpickled,
and no text of a library, which could hold a header's, leaves a reader.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .files import Limits, opened
from .reader import VOLUMES, Decide, Reader
from .stack import PLANES, REASONS, Frame, Geometry, Refused, Stack


def formats() -> tuple[str, ...]:
    """The names of all formats, sorted."""
    return tuple(_described(tuple(__path__)))


def reader_of(format: str) -> Reader:
    """The description of a format. ValueError for one that there is not."""
    described = _described(tuple(__path__))
    if format not in described:
        raise ValueError(f"format: expected one of {', '.join(described)}, got {format!r}")
    return described[format]


def format_of(path: bytes | str | os.PathLike[str]) -> str | None:
    """The format that a file's suffix names, in any case, the longest suffix that fits; None for another or no suffix.
    Nothing is read: what a file without a suffix is, `recognised` says."""
    name = os.path.basename(os.fsdecode(path)).lower()
    described = _described(tuple(__path__))
    fitting = [(len(s), f) for f, reader in described.items() for s in reader.suffixes if name.endswith(s)]
    return max(fitting)[1] if fitting else None


def recognised(path: Path) -> str | None:
    """The format of a regular file by its first bytes, for those formats whose files often have no suffix. A reader
    that refuses the file leaves it to the others."""
    try:
        file = opened(path)
    except Refused:
        return None
    with file:
        for format, reader in _described(tuple(__path__)).items():
            with contextlib.suppress(Refused, OSError):
                file.seek(0)
                if reader.recognises(file):
                    return format
    return None


def passed_over(name: str) -> str | None:
    """What a file of this name is that no reader takes for an image; None for any other name."""
    each = (reader.passed_over.get(name.upper()) for reader in _described(tuple(__path__)).values())
    return next(filter(None, each), None)


def beside(path: Path, format: str) -> list[str]:
    """What the file beside it that holds its data may be called, by its name or header; nothing where it has them
    itself, or says so in a way that is refused."""
    return reader_of(format).beside(path)


def series_of(path: Path, format: str, limits: Limits) -> str:
    """A name for what `read` puts a file of a large folder together with, by its header; "" where that cannot be
    read."""
    load(format)
    shared = reader_of(format).series_of(path, limits)
    return hashlib.sha256("\0".join(shared).encode("utf-8", "surrogatepass")).hexdigest()[:16] if shared else ""


def load(format: str) -> None:
    """Import what reading a format takes, so that a limit on the process's memory can be set afterwards.
    Refused("unsupported") names a library that is not installed."""
    reader = reader_of(format)
    for module, distribution in reader.needs.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            if error.name != module.partition(".")[0]:
                raise
            raise Refused("unsupported", f"{distribution} is not installed (extra 'data')") from None
    reader.load()


def read(
    files: Sequence[Path],
    format: str,
    *,
    limits: Limits = Limits(),  # noqa: B008
    beat: Callable[[], None] | None = None,
    decide: Decide | None = None,
    volumes: str = "first",
    enough: int | None = None,
    pieces: int | None = None,
    headers: bool = False,
) -> Iterator[Stack]:
    """The stacks of one unit, in a fixed order: a folder's DICOM files, or one file of another format and, after it,
    the one that `beside` names.

    Refused is raised for a unit that gives nothing; a part that was left out stands in a stack's `refused`. `beat` is
    called for every DICOM file whose header was read, for every frame that was decoded and while volumes are read.
    `decide`: for each file of a format whose headers say what they are, whether it is left out; without it none is.
    `volumes`: which are taken of a file that holds several, one of VOLUMES or "N", every N-th.
    `headers`: no pixel is read: the numbers of the stacks are not to be used.
    `enough`: a picture may be given with sides divided by a whole number while its shorter one has so many pixels left.
    `pieces`: a picture of more pixels than `limits` has for a frame is cut into squares of so many pixels a side, a
    frame each; without it such a picture is shrunk, and with 0 it is refused.
    """
    load(format)
    if not files:
        raise ValueError("files: expected at least one")
    beat = beat or (lambda: None)
    paths = [Path(os.fsdecode(path)) for path in files]
    reader = reader_of(format)
    given = {"decide": decide, "volumes": volumes, "enough": enough, "pieces": pieces, "headers": headers}
    for stack in reader.read(paths, limits, beat, **{name: given[name] for name in reader.choices}):
        stack.beat = beat
        yield stack
        del stack


@functools.cache
def _described(folders: tuple[str, ...]) -> dict[str, Reader]:
    """Format -> description, of the modules in ``folders``, the package's path."""
    described: dict[str, Reader] = {}
    owners: dict[str, str] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(folders)):
        reader = vars(importlib.import_module(f"{__name__}.{name}")).get("READER")
        if reader is None:  # what readers share
            continue
        for suffix in reader.suffixes:
            if suffix in owners:
                raise ValueError(f"suffixes: expected {suffix} of one reader, got it of {owners[suffix]} and {name}")
            owners[suffix] = name
        described[name] = reader
    return described


__all__ = [
    "PLANES",
    "REASONS",
    "VOLUMES",
    "Frame",
    "Geometry",
    "Limits",
    "Reader",
    "Refused",
    "Stack",
    "beside",
    "format_of",
    "formats",
    "load",
    "passed_over",
    "read",
    "reader_of",
    "recognised",
    "series_of",
]
