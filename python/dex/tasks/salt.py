"""The salt of ids in the user's own tasks: the same for every run on the same data, so that runs can be paired."""

from __future__ import annotations

from pathlib import Path

from dex.prepare.ids import private_folder, shared_salt


def salt_of(root: Path, private: Path | None) -> bytes:
    """The salt in ``private``, or beside the data. ValueError naming --private if the folder cannot be written."""
    try:
        return shared_salt(private_folder(root.resolve()) if private is None else private)
    except ValueError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        raise ValueError(f"{error}; --private DIR sets another") from error
