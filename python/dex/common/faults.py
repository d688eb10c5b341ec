"""Our own description of what is wrong with a file, from the type of a library's exception.

The library's message is never shown, since it may contain private values of a header.
"""

from __future__ import annotations

import errno
import os
import traceback
from typing import NamedTuple

AGAIN = "copy the file again, or leave it out"


class _Fault(NamedTuple):
    """A kind of fault."""

    names: tuple[str, ...]
    """Exception types, in any module, including base classes."""
    sentence: str
    """What is wrong with the file."""
    sure: bool = True
    """False if the fault may also be in the code."""


_FAULTS = (
    _Fault(("UnidentifiedImageError",), "its first bytes are not those of a picture; its suffix may be wrong"),
    _Fault(("BadZipFile", "LargeZipFile"), f"it is not a complete zip archive; {AGAIN}"),
    _Fault(("InvalidDicomError",), "it is not a DICOM file; its suffix may be wrong"),
    _Fault(("EOFError", "IncompleteReadError"), f"it ends early; {AGAIN}"),
    _Fault(("NotImplementedError",), "it uses a variant of its format that is not supported; save it in another one"),
    _Fault(("RecursionError",), "its header is nested too deeply; leave it out"),
    _Fault(("UnicodeError",), f"its header has bytes that are not text: it is damaged or of another format; {AGAIN}"),
    _Fault(("zlib.error", "LZMAError", "BadGzipFile"), f"its compressed data are damaged; {AGAIN}"),
    _Fault(
        ("struct.error", "IndexError", "KeyError", "SyntaxError", "AttributeError", "TypeError", "HeaderDataError"),
        f"its header is cut off or inconsistent, or it is of another format; {AGAIN}",
        sure=False,
    ),
    _Fault(("ArithmeticError",), f"its header has an impossible number; {AGAIN}"),
)
_OTHERWISE = f"it is damaged, cut off or of another format; {AGAIN}"


def is_exhausted(error: BaseException) -> bool:
    """Whether this process or the machine has no file descriptors left, which says nothing about the file."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def sentence(error: BaseException) -> str:
    """What is wrong with the file for which ``error`` was raised, and what to do."""
    if (fault := _fault_of(error)) is not None:
        return fault.sentence
    if isinstance(error, OSError):
        if error.errno:
            return f"the system cannot read it: {os.strerror(error.errno)}"
        if "truncated" in str(error):
            return f"it ends before its image does; {AGAIN}"
        return f"its data are damaged; {AGAIN}"
    return _OTHERWISE


def described(error: BaseException) -> str:
    """``sentence``, with the place in the code if the fault may be there."""
    fault = _fault_of(error)
    sure = isinstance(error, OSError) if fault is None else fault.sure
    return sentence(error) if sure else f"{sentence(error)} ({where(error)})"


def where(error: BaseException) -> str:
    """Type of an error and the lines of code that it passed through, without its message or any value."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return f"{type(error).__name__} at " + " < ".join(
        f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}" for frame in reversed(frames)
    )


def _fault_of(error: BaseException) -> _Fault | None:
    names = {name for kind in type(error).__mro__ for name in (kind.__name__, f"{kind.__module__}.{kind.__name__}")}
    return next((fault for fault in _FAULTS if not names.isdisjoint(fault.names)), None)
