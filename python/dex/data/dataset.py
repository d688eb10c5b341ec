"""What a data set is to the rest of `dex`: numbered samples, a modality each, a fingerprint, two splits.

Shape letters: S side of a stored image in pixels.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

logger: logging.Logger = logging.getLogger("dex.data")

SPLITS = ("train", "val")
IMAGE_SIZE = 256
EMBEDDED = Path(__file__).parent / "embedded"
"""The small real data set that comes with the package."""
DIM = 2**14  # 16-bit images whose maximum is below this use a quarter of their range at most


class SampleError(ValueError):
    """One sample cannot be used. `sample_id` names it, `reason` says why; `Loader` puts another in its place."""

    def __init__(self, sample_id: str, reason: str = ""):
        super().__init__(f"sample {sample_id!r}: {reason}" if reason else sample_id)
        self.sample_id = sample_id
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.sample_id, self.reason)


class Sample(NamedTuple):
    """`image` uint8 [3, S, S], RGB; `modality` indexes `Dataset.modalities`; `id` is unique in the data set."""

    image: torch.Tensor
    modality: int
    id: str


class Withdrawal(NamedTuple):
    """Images that were taken out of a data set. date: UTC; before: its fingerprint until then."""

    date: str
    images: int
    before: str


class Dataset:
    """Base of all data sets: samples 0 .. len - 1 in an order that is a property of the content alone.

    name: for people; modalities: the names that occur, `Sample.modality` indexes them; empty_modalities: names the
    data set knows of and holds no image of; image_size: S; channels: C,
    3, or 1 for luminance; dim: id and maximum of the first 16-bit sample read that
    uses little of its range (None: none so far).
    fingerprint: sha256 (hex) of the content's identity. It may take a while, so ask for it on one rank only;
    `take_fingerprint` can be interrupted.
    earlier_fingerprint: what an earlier version of dex would have called the same content, None if nothing else.
    withdrawals: what was taken out of it, in order.

    A subclass gives `__len__`, `read`, `sample_id`, `modality_index` and `_in_split`.
    """

    name: str
    modalities: tuple[str, ...]
    empty_modalities: tuple[str, ...] = ()
    fingerprint: str
    earlier_fingerprint: str | None = None
    withdrawals: tuple[Withdrawal, ...] = ()
    image_size: int = IMAGE_SIZE
    channels: int = 3
    dim: tuple[str, int] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, its image in memory of its own; errors as of `read`."""
        image = np.empty((self.channels, self.image_size, self.image_size), np.uint8)
        modality, sample_id = self.read(index, image)
        return Sample(torch.from_numpy(image), modality, sample_id)

    def read(self, index: int, out: np.ndarray) -> tuple[int, str]:
        """Put the image of sample `index` into `out` uint8 [C, S, S], contiguous; returns its modality and id.

        SampleError when the sample cannot be given, `out` is then of no use; IndexError outside 0 .. len - 1: negative
        numbers are not indices.
        """
        raise NotImplementedError

    def sample_id(self, index: int) -> str:
        """The id of sample `index`, without reading its image."""
        raise NotImplementedError

    def modality_index(self) -> np.ndarray:
        """int64 [len]: every sample's index into `modalities`, without reading an image."""
        raise NotImplementedError

    def modality_counts(self) -> dict[str, int]:
        """Samples of each name in `modalities`; a view may hold 0 of a name that its whole set has."""
        counts = np.bincount(self.modality_index(), minlength=len(self.modalities))
        return {name: int(count) for name, count in zip(self.modalities, counts, strict=True)}

    def take_fingerprint(self, meanwhile: Callable[[int, int], None] | None = None) -> str:
        """`fingerprint`. While it takes long, ``meanwhile(bytes read, bytes in all)`` is called every half second.

        What ``meanwhile`` raises ends it.
        """
        return self.fingerprint

    def withdrawn_since(self, fingerprint: str) -> list[Withdrawal]:
        """The withdrawals that it has seen since it had this fingerprint; none where it never had."""
        before = [withdrawal.before for withdrawal in self.withdrawals]
        return list(self.withdrawals[before.index(fingerprint) :]) if fingerprint in before else []

    def split(self, name: str) -> Dataset:
        """The samples of split `name` ("train" or "val") as a data set of their own; may be empty."""
        if name not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {name!r}")
        return View(self, np.flatnonzero(self._in_split(name)), name)

    def _in_split(self, name: str) -> np.ndarray:
        """bool [len]: the samples of split `name`."""
        raise NotImplementedError

    def note_maximum(self, sample_id: str, maximum: int | None) -> None:
        """Warn, once per data set, when a 16-bit sample's maximum is far below 65535; `maximum` None: not 16-bit.

        A worker of a `Loader` keeps it in `dim`, which the loader hands to the data set of its own process.
        """
        if maximum is None or not 0 < maximum < DIM or self.dim is not None:
            return
        self.dim = (sample_id, maximum)
        if torch.utils.data.get_worker_info() is None:
            logger.warning(
                "%s: the 16-bit image %r has no value above %d, 65535 is white: it comes out nearly black, and so may "
                "others. Rescale 16-bit images to the full range, or store NPY floats within [0, 1]",
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
    """Some samples of another data set, in its order; numbering of the modalities stays that of the whole."""

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

    def take_fingerprint(self, meanwhile: Callable[[int, int], None] | None = None) -> str:
        """`fingerprint`. While it takes long, ``meanwhile(bytes read, bytes in all)`` is called every half second.

        What ``meanwhile`` raises ends it.
        """
        return self.fingerprint

    def split(self, name: str) -> Dataset:
        raise ValueError(f"split: {self.name!r} is already a split; ask the whole data set for {name!r}")
