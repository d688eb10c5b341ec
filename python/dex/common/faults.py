"""What is wrong with a file, in our own words, from the exception that a library raised on it.

A library's text is never repeated: it may hold what a header says. Its type tells enough.
"""

from __future__ import annotations

import os
import traceback
from typing import NamedTuple

AGAIN = "copy the file anew, or leave it out"


class _Sort(NamedTuple):
    """names: of exception types, in any module, their base classes included. says: what a file then is. sure: False
    where the fault may as well be the code's."""

    names: tuple[str, ...]
    says: str
    sure: bool = True


_SORTS = (
    _Sort(("UnidentifiedImageError",), "its first bytes are those of no picture; it may bear another format's suffix"),
    _Sort(("BadZipFile", "LargeZipFile"), f"it is not a whole zip archive; {AGAIN}"),
    _Sort(("InvalidDicomError",), "it is not a DICOM file; it may bear another format's suffix"),
    _Sort(("EOFError", "IncompleteReadError"), f"it ends early; {AGAIN}"),
    _Sort(("NotImplementedError",), "it uses a variant of its format that is not read; save it in another one"),
    _Sort(("RecursionError",), "its header is nested without end; leave it out"),
    _Sort(("UnicodeError",), f"its header holds bytes that are no text: it is damaged or of another format; {AGAIN}"),
    _Sort(("zlib.error", "LZMAError", "BadGzipFile"), f"its packed data are damaged; {AGAIN}"),
    _Sort(
        ("struct.error", "IndexError", "KeyError", "SyntaxError", "AttributeError", "TypeError", "HeaderDataError"),
        f"its header is cut off or contradicts itself, or it is of another format; {AGAIN}",
        sure=False,
    ),
    _Sort(("ArithmeticError",), f"its header holds a number that cannot be; {AGAIN}"),
)
_OTHERWISE = f"it is damaged, cut off or of another format; {AGAIN}"


def sentence(error: BaseException) -> str:
    """What is wrong with the file that `error` was raised on, and the way out."""
    if (sort := _sort_of(error)) is not None:
        return sort.says
    if isinstance(error, OSError):
        if error.errno:
            return f"the system does not read it: {os.strerror(error.errno)}"
        if "truncated" in str(error):
            return f"it ends before its image does; {AGAIN}"
        return f"its data are damaged; {AGAIN}"
    return _OTHERWISE


def described(error: BaseException) -> str:
    """`sentence`, and the place in the code where the file may not be to blame."""
    sort = _sort_of(error)
    sure = isinstance(error, OSError) if sort is None else sort.sure
    return sentence(error) if sure else f"{sentence(error)} ({where(error)})"


def where(error: BaseException) -> str:
    """An error's type and the lines of code it came through, without its text or any value."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return f"{type(error).__name__} at " + " < ".join(
        f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}" for frame in reversed(frames)
    )


def _sort_of(error: BaseException) -> _Sort | None:
    names = {name for kind in type(error).__mro__ for name in (kind.__name__, f"{kind.__module__}.{kind.__name__}")}
    return next((sort for sort in _SORTS if not names.isdisjoint(sort.names)), None)
