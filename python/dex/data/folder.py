"""A data set from a plain folder of pictures and NPY files, with one sub-folder per modality."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shlex
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

import numpy as np

from dex.common import formats

from . import images
from .dataset import IMAGE_SIZE, Dataset, SampleError, raise_if_exhausted

logger: logging.Logger = logging.getLogger("dex.data")

UNKNOWN = "unknown"
_KINDS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".npy": "npy"}
VAL_SHARE = 0.05

_THREADS = 8  # Hashing threads, enough to keep a disk or a network busy
_PART = 256  # Files per task of a thread
_CHUNK = 2**18  # Bytes that a thread reads before it checks whether to stop
_RETRY_AFTER = (0.1, 0.5, 2.0)  # Seconds before each retry to read a file
_UNREADABLE = b"unreadable"

CALL_EVERY = 0.5
"""Seconds between calls of ``meanwhile`` in ``FolderDataset.take_fingerprint``."""


class _Cancelled(Exception):
    """The hash is no longer needed."""


class _Progress:
    """Shared state of the hashing threads: ``bytes`` read so far, and ``stop``, which ends them."""

    def __init__(self) -> None:
        self.bytes, self.stop, self._lock = 0, threading.Event(), threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count


class FolderDataset(Dataset):
    """Images in ``root/<modality>/**/<image>``; images directly in ``root`` have modality "unknown".

    The id of a sample is its path below ``root``; samples are sorted by the bytes of their ids, independent of the
    locale. Each image is resized (antialiased) so that its shorter side is ``image_size``, and cropped to the centre
    square. About 5 % of the ids, chosen by their hash, are the split "val", so that adding files moves no other file to
    another split. Slices of one patient may be in both splits; a shard set stores the split of each sample.

    Symbolic links are never followed. ``ignored`` counts skipped entries by suffix or reason. Scans, films and other
    formats of ``dex.common.formats`` that a plain folder cannot hold raise ValueError with the ``dex prepare`` command
    to run; they are never skipped.

    ``fingerprint`` covers the paths and every byte of the files, which are all read at its first use, since neither
    size nor date proves that pixels are the same. One core hashes 300 to 700 MB, or 10,000 small files, per second.
    Larger sets should be converted to shards (``dex prepare``), whose manifest has the hashes.
    """

    def __init__(self, root: str | Path, image_size: int = IMAGE_SIZE):
        self.root: Path = Path(root).resolve(strict=True)
        self.name: str = self.root.name
        self.image_size = image_size
        self._fingerprint: str | None = None
        self.ignored: Counter[str] = Counter()
        scans: Counter[str] = Counter()
        files = sorted(self._walk(scans))
        if scans:
            raise ValueError(_for_prepare(self.root, scans, len(files)))
        if self.ignored:
            logger.warning(
                "%s: ignored %s",
                self.name,
                ", ".join(f"{count} {what}" for what, count in sorted(self.ignored.items())),
            )
        if not files:
            raise ValueError(
                f"path: expected PNG, JPEG or NPY files, or other pictures, below {str(root)!r}, found none "
                f"(ignored: {dict(sorted(self.ignored.items())) or 'nothing'}); `dex prepare` converts scans to images"
            )
        self._paths = [path for path, _ in files]
        self._sizes = np.array([size for _, size in files], np.int64)
        names = [_modality(path) for path in self._paths]
        self.modalities: tuple[str, ...] = tuple(sorted(set(names)))
        number = {name: index for index, name in enumerate(self.modalities)}
        self._modality = np.array([number[name] for name in names], dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        return self.take_fingerprint()

    def take_fingerprint(self, meanwhile: Callable[[int, int], None] | None = None) -> str:
        """``fingerprint``, computed by threads at the first call; ``meanwhile`` is called as in ``Dataset``.

        A file that has been replaced by a link or device since the folder was listed, or has grown too large, counts
        only by its name. ValueError names a file that the system repeatedly failed to read.
        """
        if self._fingerprint is None:
            self._fingerprint = self._read_fingerprint(meanwhile)
        return self._fingerprint

    def _read_fingerprint(self, meanwhile: Callable[[int, int], None] | None) -> str:
        total, progress = int(self._sizes.sum()), _Progress()
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fingerprint")
        try:
            parts = [
                pool.submit(self._content_hashes, self._paths[start : start + _PART], progress)
                for start in range(0, len(self._paths), _PART)
            ]
            digest, unread = hashlib.sha256(b"dex folder 2\n"), 0
            due = time.monotonic() + CALL_EVERY
            for start, part in zip(range(0, len(self._paths), _PART), parts, strict=True):
                done = False
                while not done:
                    done = bool(wait([part], max(0.0, due - time.monotonic())).done)
                    if time.monotonic() >= due:
                        due = time.monotonic() + CALL_EVERY
                        if meanwhile is not None:
                            meanwhile(progress.bytes, total)
                paths, contents = self._paths[start : start + _PART], part.result()
                for path, content in zip(paths, contents, strict=True):
                    unread += content is None
                    digest.update(b"%d %s " % (len(path), path) + (content or _UNREADABLE) + b"\n")
        finally:
            progress.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if unread:
            logger.warning("%s: %d files cannot be read; the fingerprint covers only their names", self.name, unread)
        return digest.hexdigest()

    @property
    def earlier_fingerprint(self) -> str:
        """The fingerprint of format 1, which covered paths and sizes but not pixels."""
        digest = hashlib.sha256(b"dex folder 1\n")
        for path, size in zip(self._paths, self._sizes.tolist(), strict=True):
            digest.update(b"%d %d " % (len(path), size) + path + b"\n")
        return digest.hexdigest()

    def _content_hashes(self, paths: Sequence[bytes], progress: _Progress) -> list[bytes | None]:
        """SHA-256 of each file; None for a refused file, which training replaces by another sample."""
        hashes: list[bytes | None] = []
        for path in paths:
            for pause in (*_RETRY_AFTER, None):
                try:
                    hashes.append(self._content_hash(path, progress))
                    break
                except OSError as error:  # May be temporary: an overloaded network disk, too many open files
                    if pause is None:
                        reason = f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"
                        raise ValueError(f"{_printable(path)}: expected a readable file, got {reason}") from error
                    if progress.stop.wait(pause):
                        raise _Cancelled from None
        return hashes

    def _content_hash(self, path: bytes, progress: _Progress) -> bytes | None:
        try:
            with self._open(path) as file:
                digest = hashlib.sha256()
                while chunk := file.read(_CHUNK):
                    if progress.stop.is_set():
                        raise _Cancelled
                    digest.update(chunk)
                    progress.add(len(chunk))
                return digest.digest()
        except ValueError:
            return None
        except OSError:
            # Opening a link or a socket fails.
            if stat.S_ISREG(os.lstat(os.path.join(os.fsencode(self.root), path)).st_mode):
                raise
            return None

    def _walk(self, scans: Counter[str]) -> list[tuple[bytes, int]]:
        """Paths and sizes of the images. Counts files for ``dex prepare`` by suffix in ``scans``."""
        listed = []
        root = os.fsencode(self.root)
        pending = [b""]
        while pending:
            folder = pending.pop()
            for entry in os.scandir(os.path.join(root, folder)):
                below = os.path.join(folder, entry.name)
                if entry.is_symlink():
                    self.ignored["symbolic link"] += 1
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(below)
                elif not entry.is_file(follow_symlinks=False):
                    self.ignored[_suffix(entry.name)] += 1
                elif formats.is_plain(entry.name):
                    listed.append((below, entry.stat(follow_symlinks=False).st_size))
                elif formats.format_of(entry.name) is not None:
                    scans[formats.suffix_of(entry.name)] += 1
                elif self._is_dicom(below):
                    scans["DICOM without a suffix"] += 1
                else:
                    self.ignored[_suffix(entry.name)] += 1
        return listed

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
            image, maximum = images.decode_with_maximum(self._bytes(path), kind_of(path), images.PICTURES)
        except (ValueError, OSError) as error:
            raise_if_exhausted(error)
            # Without the text of an OSError, which contains the full path
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise SampleError(_printable(path), reason) from error
        self.note_maximum(_printable(path), maximum)
        images.to_planes(image, out)
        return int(self._modality[index]), _printable(path)

    def _is_dicom(self, path: bytes) -> bool:
        """Whether a file with an unknown suffix has the magic number of DICOM."""
        try:
            with self._open(path) as file:
                return file.read(132)[128:] == b"DICM"
        except (ValueError, OSError):
            return False

    def _bytes(self, path: bytes) -> bytes:
        with self._open(path) as file:
            return file.read(images.MAX_FILE_BYTES)

    def _open(self, path: bytes) -> IO[bytes]:
        """Open a listed file. ValueError if it has become a link or device, or is too large to be read at once."""
        descriptor = os.open(os.path.join(os.fsencode(self.root), path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("expected a regular file")
            if status.st_size > images.MAX_FILE_BYTES:
                raise ValueError(f"expected at most {images.MAX_FILE_BYTES} bytes, got {status.st_size}")
            undo.pop_all()
        return os.fdopen(descriptor, "rb")

    def _in_split(self, name: str) -> np.ndarray:
        limit = int(VAL_SHARE * 2**64)
        val = np.array([int.from_bytes(hashlib.sha256(path).digest()[:8], "big") < limit for path in self._paths])
        return val if name == "val" else ~val


def kind_of(path: bytes | str | os.PathLike[str]) -> str | None:
    """Argument ``kind`` of ``images.decode`` for a file of a plain folder; None if a plain folder cannot hold it."""
    return _KINDS.get(formats.suffix_of(path), "picture") if formats.is_plain(path) else None


def _for_prepare(root: Path, scans: Counter[str], images: int) -> str:
    """Error for a folder with scans, with the commands to run."""
    counts = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(scans.items()))
    beside = f", beside {images:,} pictures" if images else ""
    folder, out = shlex.quote(str(root)), shlex.quote(str(root.with_name(f"{root.name}-set")))
    return (
        f"path: expected PNG, JPEG or NPY files, or other pictures, got {counts}{beside}. `dex prepare` converts them: "
        f"dex prepare {folder} --out {out}; dex pretrain --data {out}"
    )


def _suffix(name: bytes) -> str:
    return os.path.splitext(os.fsdecode(name))[1].lower() or "without suffix"


def _modality(path: bytes) -> str:
    first, separator, _ = path.partition(b"/")
    return _printable(first) if separator else UNKNOWN


def _printable(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
