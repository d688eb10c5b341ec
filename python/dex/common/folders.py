"""Checks of the places a command will write to, before hours of work."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def check_folder(folder: Path, name: str = "out") -> None:
    """ValueError, naming option ``name``, unless ``folder`` is a writable folder or can become one.

    Nothing stays on disk.
    """
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # A name that is too long or contains forbidden characters
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{name}: expected the path of a folder, got {str(folder)!r}: {reason}") from error
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.exists():
        raise ValueError(f"{name}: expected a folder, got the broken link {existing}")
    if not existing.is_dir():
        raise ValueError(f"{name}: expected a folder, got the file {existing}")
    try:
        with tempfile.TemporaryFile(dir=existing):  # Permissions do not tell: root may write to /proc, but it fails
            pass
    except OSError as error:
        raise ValueError(f"{name}: expected a writable folder, got {existing}: {error.strerror}") from error


def check_file(path: Path, name: str = "out") -> None:
    """ValueError, naming option ``name``, unless ``path`` is a file in a writable folder or can become one."""
    check_folder(path.absolute().parent, name)
    if path.is_dir():
        raise ValueError(f"{name}: expected a file, got the folder {path}")
