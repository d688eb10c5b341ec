"""A plain folder of pictures and NPY files as a data set: one sub-folder per modality."""

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
from .dataset import IMAGE_SIZE, Dataset, SampleError

logger: logging.Logger = logging.getLogger("dex.data")

UNKNOWN = "unknown"
_KINDS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".npy": "npy"}
VAL_SHARE = 0.05

_THREADS = 8  # that hash: enough to keep a disk or a network busy
_PART = 256  # files that a thread hashes at a time
_CHUNK = 2**18  # bytes that a thread reads between two looks at whether it is still wanted
_RETRY_AFTER = (0.1, 0.5, 2.0)  # seconds before each further try to read a file
_UNREADABLE = b"unreadable"

CALL_EVERY = 0.5
"""Seconds between two calls of `FolderDataset.take_fingerprint`'s ``meanwhile``."""


class _Unwanted(Exception):
    """Nobody waits for this hash any more."""


class _Progress:
    """What threads that hash have in common: ``bytes`` read so far, and ``stop``, after which they end."""

    def __init__(self) -> None:
        self.bytes, self.stop, self._lock = 0, threading.Event(), threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count


class FolderDataset(Dataset):
    """`root/<modality>/**/<image>`; images that lie in `root` itself are of modality "unknown".

    The id of a sample is its path below `root`; order is that of the ids' bytes, whatever the locale. Each image is
    resized (antialiased) so that its shorter side is `image_size` and cut to the centre square. About 5 % of the
    ids, chosen by their hash alone, are the split "val": adding files moves no other file across. Slices of one
    patient may so stand on both sides; in a shard set whoever writes it says on which side each sample is.

    Symbolic links are never followed. `ignored` counts what was passed over, by suffix or reason. Scans, films and
    whatever else `dex prepare` reads and a plain folder does not are a ValueError with the command to give: none of
    `dex.common.formats` is passed over.

    `fingerprint` covers the paths and every byte of the files. All of them are read when it is first asked for: no
    size or date proves that the pixels are the same. One core hashes 300 to 700 MB, or 10,000 small files, a second.
    A set that is too large for that belongs into shards (`dex prepare`), whose manifest holds the hashes.
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
                f"(ignored: {dict(sorted(self.ignored.items())) or 'nothing'}); scans become images by `dex prepare`"
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
        """`fingerprint`, read by threads at the first call; ``meanwhile`` is called as in `Dataset`.

        A link or device that has replaced a file since the folder was listed, or a file that has grown too large,
        counts with its name alone. ValueError names a file that the system fails to read several times.
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
            logger.warning("%s: %d files cannot be read; the fingerprint covers their names alone", self.name, unread)
        return digest.hexdigest()

    @property
    def earlier_fingerprint(self) -> str:
        """The fingerprint up to format 1, which covered paths and sizes but no pixels."""
        digest = hashlib.sha256(b"dex folder 1\n")
        for path, size in zip(self._paths, self._sizes.tolist(), strict=True):
            digest.update(b"%d %d " % (len(path), size) + path + b"\n")
        return digest.hexdigest()

    def _content_hashes(self, paths: Sequence[bytes], progress: _Progress) -> list[bytes | None]:
        """sha256 of each file; None for one that is refused, which training replaces by another sample."""
        hashes: list[bytes | None] = []
        for path in paths:
            for pause in (*_RETRY_AFTER, None):
                try:
                    hashes.append(self._content_hash(path, progress))
                    break
                except OSError as error:  # it may pass: an overloaded network disk, too many open files
                    if pause is None:
                        reason = f"{error.strerror} ({errno.errorcode.get(error.errno or 0, error.errno)})"
                        raise ValueError(
                            f"{_printable(path)}: expected a file that can be read, got {reason}"
                        ) from error
                    if progress.stop.wait(pause):
                        raise _Unwanted from None
        return hashes

    def _content_hash(self, path: bytes, progress: _Progress) -> bytes | None:
        try:
            with self._open(path) as file:
                digest = hashlib.sha256()
                while chunk := file.read(_CHUNK):
                    if progress.stop.is_set():
                        raise _Unwanted
                    digest.update(chunk)
                    progress.add(len(chunk))
                return digest.digest()
        except ValueError:
            return None
        except OSError:
            # A link or a socket is refused when it is opened.
            if stat.S_ISREG(os.lstat(os.path.join(os.fsencode(self.root), path)).st_mode):
                raise
            return None

    def _walk(self, scans: Counter[str]) -> list[tuple[bytes, int]]:
        """Paths and sizes of the images. scans: takes the count of what `dex prepare` reads, by suffix."""
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
                    scans["DICOM without a suffix of its own"] += 1
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
            # no path in the reason: an OSError's own text would name the whole of it
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise SampleError(_printable(path), reason) from error
        self.note_maximum(_printable(path), maximum)
        images.to_planes(image, out)
        return int(self._modality[index]), _printable(path)

    def _is_dicom(self, path: bytes) -> bool:
        """By the magic of DICOM, of a file whose suffix says nothing."""
        try:
            with self._open(path) as file:
                return file.read(132)[128:] == b"DICM"
        except (ValueError, OSError):
            return False

    def _bytes(self, path: bytes) -> bytes:
        with self._open(path) as file:
            return file.read(images.MAX_FILE_BYTES)

    def _open(self, path: bytes) -> IO[bytes]:
        """A listed file. It may have become a link or a device since; ValueError unless it may be read as a whole."""
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
    """What `images.decode` calls a file of a plain folder, by its name; None for a file that none may hold."""
    return _KINDS.get(formats.suffix_of(path), "picture") if formats.is_plain(path) else None


def _for_prepare(root: Path, scans: Counter[str], images: int) -> str:
    """What to do with a folder that holds scans."""
    counts = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(scans.items()))
    beside = f", beside {images:,} pictures" if images else ""
    folder, out = shlex.quote(str(root)), shlex.quote(str(root.with_name(f"{root.name}-set")))
    return (
        f"path: expected PNG, JPEG or NPY files, or other pictures; got {counts}{beside}, which `dex prepare` makes "
        f"images of: dex prepare {folder} --out {out}; dex pretrain --data {out}"
    )


def _suffix(name: bytes) -> str:
    return os.path.splitext(os.fsdecode(name))[1].lower() or "without suffix"


def _modality(path: bytes) -> str:
    first, separator, _ = path.partition(b"/")
    return _printable(first) if separator else UNKNOWN


def _printable(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
