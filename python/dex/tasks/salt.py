"""The salt of ids in the user's own tasks: the same for every run on the same data, so that runs can be paired."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from dex.prepare.ids import SALT, read_salt


def private_of(root: Path) -> Path:
    """The private folder beside the data."""
    root = root.resolve()
    return root.with_name(f"{root.name}.private")


def salt_of(root: Path, private: Path | None) -> bytes:
    """The salt in ``private``, or beside the data; the first of several processes creates it.

    ValueError naming --private if the folder cannot be written.
    """
    folder = private_of(root) if private is None else private
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _not_writable(folder, error) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return read_salt(folder)
    except PermissionError as error:
        raise _not_writable(folder / SALT, error) from None
    finally:
        os.close(descriptor)


def _not_writable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"private: expected a writable folder for the salt of ids; {path}: {error.strerror}; --private DIR sets another"
    )
