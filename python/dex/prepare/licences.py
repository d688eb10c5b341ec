"""The licence texts of a set: those of the packages that contain its images, and the notices of its sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from . import packages
from .sources import Source

FOLDER = "licences"


def texts(sources: Sequence[Source], cache: Path) -> dict[str, bytes]:
    """Documents of the set by name: ``licences/PACKAGE-VERSION.txt`` for each package whose description names its
    licence file, and ``licences/SOURCE.txt`` for each source with a notice. cache: folder of downloaded packages.
    Raises the errors of ``packages.unpack``."""
    documents = {}
    for source in sources:
        package = source.package
        if package is not None and package.licence_file:
            path = packages.unpack(package, [package.licence_file], cache) / package.licence_file
            documents[f"{FOLDER}/{package.name}-{package.version}.txt"] = path.read_bytes()
        if source.notice:
            documents[f"{FOLDER}/{source.name}.txt"] = source.notice.encode()
    return documents
