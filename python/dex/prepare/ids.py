"""Names of samples and patients in a prepared set: readable for public sources, salted hashes for all others.

A private name is an HMAC-SHA256 under a salt that never leaves the private folder: without it nobody can tell whether
a given patient or file is in the set by hashing guesses.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from pathlib import Path
from urllib.parse import quote_from_bytes

from dex.common import atomic

from .sources import Source

SALT, SALT_BYTES = "salt", 32
_MAX_NAME = 200
_NOBODY = re.compile(r"(anon\w*|de-?identified|unknown|none|null|patient|n/?a|id|test|0+|[x*_-]+)?", re.IGNORECASE)
"""What stands in a header instead of a patient: such an identity names many."""


def read_salt(folder: Path) -> bytes:
    """The salt in `folder`, made once. ValueError when the file there is not one. To be called under a lock."""
    path = folder / SALT
    if not path.exists():
        atomic.write(path, os.urandom(SALT_BYTES), sync=True, mode=0o600, locked=True)
    salt = path.read_bytes()
    if len(salt) != SALT_BYTES:
        raise ValueError(f"salt: expected {SALT_BYTES} bytes, got {len(salt)}; without it the ids are lost: begin anew")
    return salt


class Names:
    """The names of one source's samples.

    common: the number of folders that all paths of the source begin with; the first one that tells patients apart is
    the next.
    """

    def __init__(self, source: Source, salt: bytes, common: int = 0):
        self._source, self._salt, self._common = source, salt, common
        self._patient = re.compile(source.patient) if source.patient else None

    def sample(self, key: str, label: str) -> str:
        """The id of one image: unit `key` (a path below the root), `label` unique in the unit."""
        if not self._source.public:
            return f"{self._source.name}/{self._hash('sample', self._source.name, key, label)}"
        return "/".join(part for part in (self._source.name, _safe(key), _safe(label)) if part)

    def unit(self, key: str) -> str:
        """The id of a whole unit, for logs."""
        if not self._source.public:
            return f"{self._source.name}/{self._hash('unit', self._source.name, key)}"
        return "/".join(part for part in (self._source.name, _safe(key)) if part)

    def group(self, path: str, patient: str, alone: bool = True) -> str:
        """What keeps a patient's images together. path: of a file, below the root; patient: the header's, or "";
        alone: False where the files beside it may be the same patient's."""
        match = self._patient.search(path) if self._patient else None
        if match and match.group(1):
            return self._folder(match.group(1))
        patient = " ".join(patient.split())
        if not _NOBODY.fullmatch(patient):
            if self._source.public:
                return "patient-" + hashlib.sha256(patient.encode("utf-8", "surrogatepass")).hexdigest()[:32]
            return self._hash("patient", patient)  # without the source: a patient may be in several
        parts = path.split("/")
        if not alone:
            parts[-1] = ""
        return self._folder("/".join(parts[: self._common + 1]))

    def _folder(self, name: str) -> str:
        if self._source.public:
            return f"{self._source.name}/{_safe(name)}"
        return self._hash("folder", self._source.name, name)

    def _hash(self, *parts: str) -> str:
        encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
        message = b"".join(len(part).to_bytes(8, "big") + part for part in encoded)
        return hmac.digest(self._salt, message, "sha256")[:16].hex()


def split_of(group: str, val_share: float) -> str:
    """ "train" or "val", by the hash of the group alone."""
    place = int.from_bytes(hashlib.sha256(b"dex split\0" + group.encode()).digest()[:8], "big")
    return "val" if place < val_share * 2**64 else "train"


def _safe(name: str) -> str:
    """Printable ASCII that no shell, page or path takes for anything else; different names stay different."""
    quoted = quote_from_bytes(os.fsencode(name), safe="/")
    if len(quoted) <= _MAX_NAME:
        return quoted
    return f"{quoted[: _MAX_NAME - 33]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}"
