"""A plain folder of PNG, JPEG and NPY files as a data set: one sub-folder per modality."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections import Counter
from pathlib import Path

import numpy as np

from . import images
from .dataset import IMAGE_SIZE, Dataset, SampleError

logger = logging.getLogger("dex.data")

KINDS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".npy": "npy"}
UNKNOWN = "unknown"
VAL_SHARE = 0.05


class FolderDataset(Dataset):
    """`root/<modality>/**/<image>`; images that lie in `root` itself are of modality "unknown".

    The id of a sample is its path below `root`; order is that of the ids' bytes, whatever the locale. Each image is
    resized (antialiased) so that its shorter side is `image_size` and cut to the centre square. About 5 % of the
    ids, chosen by their hash alone, are the split "val": adding files moves no other file across. Slices of one
    patient may so stand on both sides; in a shard set whoever writes it says on which side each sample is.

    Symbolic links are never followed. `ignored` counts what was passed over, by suffix or reason.
    The fingerprint covers paths and sizes, not pixels.
    """

    def __init__(self, root: str | Path, image_size: int = IMAGE_SIZE):
        self.root = Path(root).resolve(strict=True)
        self.name = self.root.name
        self.image_size = image_size
        self.ignored: Counter[str] = Counter()
        found = sorted(self._walk())
        if self.ignored:
            logger.warning(
                "%s: ignored %s",
                self.name,
                ", ".join(f"{count} {what}" for what, count in sorted(self.ignored.items())),
            )
        if not found:
            raise ValueError(
                f"path: expected PNG, JPEG or NPY files below {str(root)!r}, found none "
                f"(ignored: {dict(sorted(self.ignored.items())) or 'nothing'})"
            )
        self._paths = [path for path, _ in found]
        names = [_modality(path) for path in self._paths]
        self.modalities = tuple(sorted(set(names)))
        number = {name: index for index, name in enumerate(self.modalities)}
        self._modality = np.array([number[name] for name in names], dtype=np.int64)
        digest = hashlib.sha256(b"dex folder 1\n")
        for path, size in found:
            digest.update(b"%d %d " % (len(path), size) + path + b"\n")
        self.fingerprint = digest.hexdigest()

    def _walk(self) -> list[tuple[bytes, int]]:
        found = []
        root = os.fsencode(self.root)
        pending = [b""]
        while pending:
            folder = pending.pop()
            for entry in os.scandir(os.path.join(root, folder)):
                below = os.path.join(folder, entry.name)
                suffix = os.path.splitext(os.fsdecode(entry.name))[1].lower()
                if entry.is_symlink():
                    self.ignored["symbolic link"] += 1
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(below)
                elif suffix in KINDS and entry.is_file(follow_symlinks=False):
                    found.append((below, entry.stat(follow_symlinks=False).st_size))
                else:
                    self.ignored[suffix or "without suffix"] += 1
        return found

    def __len__(self) -> int:
        return len(self._paths)

    def sample_id(self, index: int) -> str:
        return _printable(self._paths[self._check_index(index)])

    def modality_index(self) -> np.ndarray:
        return self._modality

    def read(self, index: int, out: np.ndarray) -> tuple[int, str]:
        index = self._check_index(index)
        path = self._paths[index]
        try:
            image, maximum = images.decode_with_maximum(
                self._bytes(path), KINDS[os.path.splitext(os.fsdecode(path))[1].lower()]
            )
        except (ValueError, OSError) as error:
            # no path in the reason: an OSError's own text would name the whole of it
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise SampleError(_printable(path), reason) from error
        self.note_maximum(_printable(path), maximum)
        images.to_planes(image, out)
        return int(self._modality[index]), _printable(path)

    def _bytes(self, path: bytes) -> bytes:
        # a file may have become a link or a device since the folder was listed
        descriptor = os.open(os.path.join(os.fsencode(self.root), path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("expected a regular file")
            if status.st_size > images.MAX_FILE_BYTES:
                raise ValueError(f"expected at most {images.MAX_FILE_BYTES} bytes, got {status.st_size}")
            return file.read(images.MAX_FILE_BYTES)

    def _in_split(self, name: str) -> np.ndarray:
        limit = int(VAL_SHARE * 2**64)
        val = np.array([int.from_bytes(hashlib.sha256(path).digest()[:8], "big") < limit for path in self._paths])
        return val if name == "val" else ~val


def _modality(path: bytes) -> str:
    first, separator, _ = path.partition(b"/")
    return _printable(first) if separator else UNKNOWN


def _printable(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
