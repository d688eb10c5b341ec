"""Readers of medical image files: from a unit (a file with its separate data file, or a folder's DICOM files) to its
stacks.

A format is a module or a folder of this package with a description, ``READER`` (``reader.Reader``), and has its name.
There is no table of formats: to add one, add its module.

Readers only open regular files, check declared sizes before they allocate anything, and unpickle nothing. No message of
a library leaves a reader, since it could contain values of a header.
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
    """The description of a format. Raises ValueError for an unknown one."""
    described = _described(tuple(__path__))
    if format not in described:
        raise ValueError(f"format: expected one of {', '.join(described)}, got {format!r}")
    return described[format]


def format_of(path: bytes | str | os.PathLike[str]) -> str | None:
    """The format for a file's suffix, in any letter case; the longest matching suffix decides. None for an unknown
    suffix or none. The file is not read; ``recognised`` does that for files without a suffix."""
    name = os.path.basename(os.fsdecode(path)).lower()
    described = _described(tuple(__path__))
    fitting = [(len(s), f) for f, reader in described.items() for s in reader.suffixes if name.endswith(s)]
    return max(fitting)[1] if fitting else None


def recognised(path: Path) -> str | None:
    """The format of a regular file by its first bytes, for formats whose files often lack a suffix. If one reader
    refuses the file, the others are still asked."""
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
    """What a file with this name is, if it is known not to be an image; None for any other name."""
    reasons = (reader.passed_over.get(name.upper()) for reader in _described(tuple(__path__)).values())
    return next(filter(None, reasons), None)


def beside(path: Path, format: str) -> list[str]:
    """Possible names of the separate file with the data, by the file's name or header; [] if the file holds its data
    itself, or if its header is refused."""
    return reader_of(format).beside(path)


def series_of(path: Path, format: str, limits: Limits) -> str:
    """A name of the series that ``read`` puts a file of a large folder into, by its header; "" if it cannot be read."""
    load(format)
    shared = reader_of(format).series_of(path, limits)
    return hashlib.sha256("\0".join(shared).encode("utf-8", "surrogatepass")).hexdigest()[:16] if shared else ""


def load(format: str) -> None:
    """Import what the reader of a format needs, so that the process's memory can be limited afterwards. Raises
    Refused("unsupported"), with the name of the library, if one is not installed."""
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
    """The stacks of one unit, in a fixed order. files: a folder's DICOM files, or one file of another format, followed
    by the one that ``beside`` names.

    Raises Refused for a unit without stacks; a refused part is listed in the ``refused`` of a stack. ``beat`` is called
    for every DICOM header that was read, for every decoded frame and while volumes are read.
    ``decide``: whether a file is left out, for formats whose headers say what they are; without it, all are taken.
    ``volumes``: which volumes of a file are taken: one of VOLUMES, or "N" for every N-th.
    ``headers``: read no pixels; the values of the stacks must not be used.
    ``enough``: a picture may be read with sides divided by a whole number, if its shorter side keeps this many pixels.
    ``pieces``: a picture larger than the frame limit is cut into squares of this side, one per frame. By default it is
    shrunk, and with 0 it is refused.
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
    """Format -> description, for the modules in ``folders``, the package's path."""
    described: dict[str, Reader] = {}
    owners: dict[str, str] = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(folders)):
        reader = vars(importlib.import_module(f"{__name__}.{name}")).get("READER")
        if reader is None:  # A module that readers share
            continue
        for suffix in reader.suffixes:
            if suffix in owners:
                raise ValueError(f"suffixes: expected {suffix} in one reader, got it in {owners[suffix]} and {name}")
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
