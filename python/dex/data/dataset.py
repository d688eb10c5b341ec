"""The interface of data sets: numbered samples with a modality each, a fingerprint and two splits.

Shape letters: S side of a stored image in pixels.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dex.common import faults

if TYPE_CHECKING:
    import torch

logger: logging.Logger = logging.getLogger("dex.data")

SPLITS = ("train", "val")
IMAGE_SIZE = 256
EMBEDDED = Path(__file__).parent / "embedded"
"""The small set of real images in the package."""
DIM = 2**14
"""16-bit images whose maximum is below this use at most a quarter of their range."""


class SampleError(ValueError):
    """The sample ``sample_id`` cannot be used because of ``reason``; ``Loader`` replaces it by another."""

    def __init__(self, sample_id: str, reason: str = ""):
        super().__init__(f"sample {sample_id!r}: {reason}" if reason else sample_id)
        self.sample_id = sample_id
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.sample_id, self.reason)


def raise_if_exhausted(error: Exception) -> None:
    """Raise ``error`` again, without the path in it, if no other file could be read either."""
    if isinstance(error, OSError) and faults.is_exhausted(error):
        raise OSError(error.errno, error.strerror) from None  # The cause would show the path in a traceback


class Sample(NamedTuple):
    """A sample of a data set."""

    image: torch.Tensor
    """uint8 ``[C, S, S]``, RGB or luminance."""
    modality: int
    """Index into ``Dataset.modalities``."""
    id: str
    """Unique in the data set."""


class Withdrawal(NamedTuple):
    """Images that were removed from a data set."""

    date: str
    """UTC."""
    images: int
    before: str
    """Fingerprint of the set before the withdrawal."""


class Dataset:
    """Base of all data sets: samples 0 .. len - 1 in an order that depends only on the content.

    A subclass implements ``__len__``, ``read``, ``sample_id``, ``modality_index`` and ``_in_split``.
    """

    name: str
    """Name for display."""
    modalities: tuple[str, ...]
    """Names of the modalities that occur."""
    empty_modalities: tuple[str, ...] = ()
    """Names of modalities without an image."""
    fingerprint: str
    """SHA-256 (hex) of the content. May take long, so only one rank should compute it; see ``take_fingerprint``."""
    earlier_fingerprint: str | None = None
    """Fingerprint of the same content in an earlier version of dex; None if it is the same."""
    withdrawals: tuple[Withdrawal, ...] = ()
    """Withdrawals from this set, in order."""
    image_size: int = IMAGE_SIZE
    """S."""
    channels: int = 3
    """C: 3, or 1 for luminance."""
    dim: tuple[str, int] | None = None
    """Id and maximum of the first 16-bit sample that was nearly black; see ``note_maximum``."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """Sample ``index`` with a new image; errors as in ``read``."""
        import torch  # Not at the top: `dex prepare` and `dex data` read the format of shards without it

        image = np.empty((self.channels, self.image_size, self.image_size), np.uint8)
        modality, sample_id = self.read(index, image)
        return Sample(torch.from_numpy(image), modality, sample_id)

    def read(self, index: int, out: np.ndarray) -> tuple[int, str]:
        """Write the image of sample ``index`` to ``out``, uint8 ``[C, S, S]``, contiguous; returns its modality and id.

        SampleError: the sample cannot be read, and ``out`` is undefined. IndexError: not in 0 .. len - 1; negative
        indices are not supported.
        """
        raise NotImplementedError

    def sample_id(self, index: int) -> str:
        """The id of sample ``index``, without reading its image."""
        raise NotImplementedError

    def modality_index(self) -> np.ndarray:
        """int64 ``[len]``: the index of every sample into ``modalities``, without reading images."""
        raise NotImplementedError

    def modality_counts(self) -> dict[str, int]:
        """Number of samples of each modality; may be 0 in a view."""
        counts = np.bincount(self.modality_index(), minlength=len(self.modalities))
        return {name: int(count) for name, count in zip(self.modalities, counts, strict=True)}

    def take_fingerprint(self, meanwhile: Callable[[int, int], None] | None = None) -> str:
        """``fingerprint``, calling ``meanwhile(bytes read, bytes in total)`` every half second if it takes long.

        An exception from ``meanwhile`` aborts it.
        """
        return self.fingerprint

    def withdrawn_since(self, fingerprint: str) -> list[Withdrawal]:
        """The withdrawals since the set had this fingerprint; none if it never had it."""
        before = [withdrawal.before for withdrawal in self.withdrawals]
        return list(self.withdrawals[before.index(fingerprint) :]) if fingerprint in before else []

    def split(self, name: str) -> Dataset:
        """The samples of split ``name`` ("train" or "val") as a data set, which may be empty."""
        if name not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {name!r}")
        return View(self, np.flatnonzero(self._in_split(name)), name)

    def _in_split(self, name: str) -> np.ndarray:
        """bool ``[len]``: the samples of split ``name``."""
        raise NotImplementedError

    def note_maximum(self, sample_id: str, maximum: int | None) -> None:
        """Warn once per data set if the maximum of a 16-bit sample is far below 65535; ``maximum`` None: not 16-bit.

        In a worker of a ``Loader`` it only sets ``dim``, which the loader passes to the data set of the main process.
        """
        if maximum is None or not 0 < maximum < DIM or self.dim is not None:
            return
        self.dim = (sample_id, maximum)
        import torch

        if torch.utils.data.get_worker_info() is None:
            logger.warning(
                "%s: the 16-bit image %r has no value above %d, where 65535 is white: it becomes nearly black, and so "
                "may others. Rescale 16-bit images to the full range, or store NPY floats within [0, 1]",
                self.name,
                sample_id,
                maximum,
            )

    def _check_index(self, index: int) -> int:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 <= index < {len(self)} for data set {self.name!r}, got {index}")
        return index


class View(Dataset):
    """Some samples of another data set, in its order and with its modalities."""

    def __init__(self, base: Dataset, indices: Sequence[int] | np.ndarray, label: str):
        self._base = base
        self._indices = np.asarray(indices, dtype=np.int64)
        self.label = label
        self.name: str = f"{base.name}/{label}"
        self.modalities: tuple[str, ...] = base.modalities
        self.empty_modalities: tuple[str, ...] = base.empty_modalities
        self.image_size: int = base.image_size
        self.channels: int = base.channels

    @functools.cached_property
    def fingerprint(self) -> str:
        return self._fingerprint_of(self._base.fingerprint)

    @property
    def earlier_fingerprint(self) -> str | None:
        earlier = self._base.earlier_fingerprint
        return None if earlier is None else self._fingerprint_of(earlier)

    def _fingerprint_of(self, base: str) -> str:
        return hashlib.sha256(f"{base}/{self.label}/".encode() + self._indices.astype("<i8").tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int, out: np.ndarray) -> tuple[int, str]:
        return self._base.read(int(self._indices[self._check_index(index)]), out)

    def sample_id(self, index: int) -> str:
        return self._base.sample_id(int(self._indices[self._check_index(index)]))

    def modality_index(self) -> np.ndarray:
        return self._base.modality_index()[self._indices]

    @property
    def dim(self) -> tuple[str, int] | None:
        return self._base.dim

    def note_maximum(self, sample_id: str, maximum: int | None) -> None:
        self._base.note_maximum(sample_id, maximum)

    def split(self, name: str) -> Dataset:
        raise ValueError(f"split: expected a whole data set to take {name!r} from, got the split {self.name!r}")
