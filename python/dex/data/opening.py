"""Open the data set at a path."""

from __future__ import annotations

import os
from pathlib import Path

from .dataset import EMBEDDED, Dataset
from .folder import FolderDataset
from .shard_format import MANIFEST
from .shards import ShardDataset


def open_dataset(path: str | Path | None = None) -> Dataset:
    """Open a data set for reading.

    ``None`` is the small set of real images in the package; a folder with ``manifest.json`` is a shard set
    (``ShardDataset``); any other folder is a plain one of pictures and NPY files (``FolderDataset``).

    FileNotFoundError: nothing is at ``path``. ValueError: ``path`` is empty or not a folder, contains no image, or its
    manifest does not match its files.
    """
    root = locate(path)
    if (root / MANIFEST).exists() or path is None:
        return ShardDataset(root)
    return FolderDataset(root)


def locate(path: str | Path | None, name: str = "path") -> Path:
    """The folder of ``open_dataset(path)``. Errors as there if it is no folder; they name the argument ``name``."""
    if path is not None and not os.fspath(path):  # Path("") would be the current folder
        raise ValueError(f"{name}: expected a folder of images or shards, or None for the embedded set, got {path!r}")
    root = EMBEDDED if path is None else Path(path).expanduser()
    if not root.exists():
        if path is None:
            raise FileNotFoundError(
                "the embedded data set is not in this installation; pass a folder, such as DIR after "
                "`dex prepare embedded --out DIR`"
            )
        raise FileNotFoundError(f"{name}: expected a folder of images or shards, found nothing at {str(root)!r}")
    if not root.is_dir():
        raise ValueError(f"{name}: expected a folder of images or shards, got the file {str(root)!r}")
    return root
