"""Checks of the places that a command reads from and writes to, before hours of work and before slow imports.

``RUN``, ``TUNED``, ``INIT``, ``INPUT`` and ``FILE`` begin the errors about paths of that kind.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

RUN = "run: expected a run folder, one of its checkpoint folders, or a folder or .safetensors file of dex export"
TUNED = "folder: expected a folder that dex finetune wrote"
INIT = "model.init: expected a file of weights (.safetensors, .pth, .bin, .onnx), a run folder or a checkpoint folder"
FILE = "file: expected files, DICOM folders, or folders of them"
INPUT = "input: expected a shard set, a folder or a file"


def require(path: str | os.PathLike[str], expected: str) -> Path:
    """``path`` as a Path. FileNotFoundError: nothing is there. ValueError: it is empty. Both errors begin with
    ``expected``.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"{expected}, got {path!r}")
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{expected}; nothing at {place}")
    return place


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
