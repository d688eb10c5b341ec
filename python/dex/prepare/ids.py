"""Names of samples and patients in a prepared set: readable for public sources, salted hashes for all others.

A private name is an HMAC-SHA256 under a salt that never leaves the private folder. Without the salt, hashing guesses
does not reveal whether a given patient or file is in the set.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote_from_bytes

from dex.common import atomic, locks

from .folders import names_nobody
from .sources import BY_FOLDER, Source

SALT, SALT_BYTES = "salt", 32
_MAX_NAME = 200
_NOBODY = re.compile(r"(anon\w*|de-?identified|unknown|none|null|patient|n/?a|id|test|0+|[x*_-]+)?", re.IGNORECASE)
"""Placeholders in headers instead of a patient: such an identity is shared by many."""


def read_salt(folder: Path) -> bytes:
    """The salt in ``folder``, created once. Call it under a lock. Raises ValueError for a file that is not a salt."""
    path = folder / SALT
    if not path.exists():
        atomic.write(path, os.urandom(SALT_BYTES), sync=True, mode=0o600, locked=True)
    salt = path.read_bytes()
    if len(salt) != SALT_BYTES:
        raise ValueError(f"salt: expected {SALT_BYTES} bytes, got {len(salt)}; without it the ids are lost: start over")
    return salt


def private_folder(out: Path) -> Path:
    """The folder beside ``out`` with the salt and whatever else must not be shared with it."""
    return out.with_name(f"{out.name}.private")


def shared_salt(folder: Path) -> bytes:
    """``read_salt`` under a lock: the first of several processes creates the salt, and the private folder for it.

    ValueError if the folder cannot be written.
    """
    path = folder
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locks.exclusive(folder):
            path = folder / SALT
            return read_salt(folder)
    except OSError as error:
        raise ValueError(
            f"private: expected a writable folder for the salt of ids, got {path}: {error.strerror}"
        ) from error


class Group(NamedTuple):
    """The group of a patient's images. by: "patient" if the patient is named, "folder" if a folder stands for the
    patient, "file" if only the file itself does."""

    name: str
    by: str


class Names:
    """The names of one source's samples.

    common: the number of leading folders that all paths of the source share; level: the number of the folder in a path
    that tells patients apart (``folders.level_of``); by default, the first one after those.
    """

    def __init__(self, source: Source, salt: bytes, common: int = 0, level: int | None = None):
        self._source, self._salt, self._common = source, salt, common
        self._level = common if level is None else level
        self._folders = source.patient == BY_FOLDER
        self._patient = re.compile(source.patient_pattern) if source.patient_pattern else None

    def sample(self, key: str, label: str) -> str:
        """The id of one image: ``key`` of its unit (a path below the root), ``label`` unique in the unit."""
        if not self._source.public:
            return f"{self._source.name}/{self._hash('sample', self._source.name, key, label)}"
        return "/".join(part for part in (self._source.name, _safe(key), _safe(label)) if part)

    def unit(self, key: str) -> str:
        """The id of a whole unit, for logs."""
        if not self._source.public:
            return f"{self._source.name}/{self._hash('unit', self._source.name, key)}"
        return "/".join(part for part in (self._source.name, _safe(key)) if part)

    def group(self, path: str, patient: str, alone: bool = True) -> str:
        """The name of the group from ``identity``."""
        return self.identity(path, patient, alone).name

    def identity(self, path: str, patient: str, alone: bool = True, stated: str = "") -> Group:
        """The group of a file's images. path: below the root; patient: the header's, or ""; alone: False if the files
        beside it may be of the same patient; stated: the patient by a table, or ""."""
        if stated:
            return Group(self.patient(stated), "patient")
        if (name := self.in_path(path)) is not None:
            return Group(self._folder(name), "patient")
        if self._folders:
            return self.folder(path, alone)._replace(by="patient")
        if not _NOBODY.fullmatch(" ".join(patient.split())):
            return Group(self.patient(patient), "patient")
        return self.folder(path, alone)

    def patient(self, patient: str) -> str:
        """The group of a patient named by a header or a table. It does not depend on the source: a patient may be in
        several."""
        patient = " ".join(patient.split())
        if self._source.public:
            return "patient-" + hashlib.sha256(patient.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return self._hash("patient", patient)

    def in_path(self, path: str) -> str | None:
        """The patient that the source's pattern finds in a path."""
        match = self._patient.search(path) if self._patient else None
        return (match.group(1) or None) if match else None

    def folder(self, path: str, alone: bool = True) -> Group:
        """What stands for an unnamed patient. Folders above the one that tells patients apart are left out, so that
        ``CT/p1`` and ``MR/p1`` are the same patient. Among the folders of patients there may be some named after a
        modality or a split: a folder below them then stands for the patient, or the file."""
        *folders, _ = path.split("/")
        level = self._level
        if not self._folders and not self._source.public:
            while 0 <= level < len(folders) and names_nobody(folders[level]):
                level += 1
        if 0 <= level < len(folders):
            return Group(self._folder("/".join([*folders[: self._common], folders[level]])), "folder")
        if alone:
            return Group(self._folder(path), "file")
        return Group(self._folder("/".join([*folders, ""])), "folder")

    def part(self, kind: str, *identity: str) -> str:
        """The name of a part of a patient's images: a study, a series or a file."""
        if self._source.public:
            digest = hashlib.sha256("\0".join(identity).encode("utf-8", "surrogatepass")).hexdigest()[:32]
            return f"{self._source.name}/{kind}-{digest}"
        return self._hash(kind, self._source.name, *identity)

    def _folder(self, name: str) -> str:
        if self._source.public:
            return f"{self._source.name}/{_safe(name)}"
        return self._hash("folder", self._source.name, name)

    def _hash(self, *parts: str) -> str:
        encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
        message = b"".join(len(part).to_bytes(8, "big") + part for part in encoded)
        return hmac.digest(self._salt, message, "sha256")[:16].hex()


def place_of(group: str) -> int:
    """The hash of a group's name as a number, 0 <= place < 2**64."""
    return int.from_bytes(hashlib.sha256(b"dex split\0" + group.encode()).digest()[:8], "big")


def _safe(name: str) -> str:
    """Printable ASCII without special meaning in shells, pages and paths; different names stay different."""
    quoted = quote_from_bytes(os.fsencode(name), safe="/")
    if len(quoted) <= _MAX_NAME:
        return quoted
    return f"{quoted[: _MAX_NAME - 33]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}"
