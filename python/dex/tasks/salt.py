"""The salt of the ids of a task of one's own: the same for every run on the same data, so that runs can be paired."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from dex.prepare.ids import SALT, read_salt


def private_of(root: Path) -> Path:
    """The folder beside the data that is never to be given away."""
    root = root.resolve()
    return root.with_name(f"{root.name}.private")


def salt_of(root: Path, private: Path | None) -> bytes:
    """The salt in ``private``, or beside the data, made by the first of several processes.

    ValueError naming --private where it cannot be written.
    """
    folder = private_of(root) if private is None else private
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ValueError(
            f"private: expected a folder for the salt of ids that can be written; {folder}: {error.strerror}; "
            "--private DIR names another"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return read_salt(folder)
    except PermissionError as error:
        raise ValueError(
            f"private: expected a folder for the salt of ids that can be written; {folder / SALT}: {error.strerror}; "
            "--private DIR names another"
        ) from None
    finally:
        os.close(descriptor)
