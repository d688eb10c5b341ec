"""Batches in an order that depends only on seed, epoch and temperature, whatever the position, workers and ranks."""

from __future__ import annotations

import errno
import itertools
import logging
import multiprocessing
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from dex.common import exits

from .dataset import Dataset, SampleError
from .order import epoch_order, replacement
from .shared_memory import Slots

logger: logging.Logger = logging.getLogger("dex.data")

MAX_CORRUPT = 10
MAX_CORRUPT_SHARE = 0.001
_ATTEMPTS = 32
_AHEAD = 2
_NAMED = 20


class CorruptDataError(ValueError):
    """More samples cannot be read than a run may replace; ``samples`` maps their ids to reasons."""

    def __init__(self, message: str, samples: dict[str, str] | None = None):
        super().__init__(message)
        self.samples: dict[str, str] = dict(samples or {})


class Batch(NamedTuple):
    """This rank's part of a batch."""

    images: torch.Tensor
    """uint8 ``[B, C, S, S]``."""
    modality: torch.Tensor
    """int64 ``[B]``, indices into ``Dataset.modalities``."""
    ids: tuple[str, ...]
    places: torch.Tensor
    """int64 ``[B]``: number of the global batch times its size, plus the position in it; unique in a run."""


class Loader:
    """An endless iterator over full batches of ``dataset``; also a context manager.

    Args:
        dataset: at least ``batch_size`` samples.
        batch_size: images per *global* batch.
        seed: of the order, 0 <= seed < 2^63.
        temperature: of the shares of modalities, 0 to 1.
        num_workers: processes that read ahead; 0 reads in the caller.
        start_batch: number of the first batch, counted over all epochs.
        rank, world_size: this process gets part ``rank`` of ``world_size`` equal parts of every global batch, so the
            global order does not depend on the number of ranks.

    An epoch is as long as the data set; its incomplete last batch is dropped. At temperature 1 it is a new permutation
    of the data set. Below, a modality of n samples gets a share of the epoch proportional to n ** temperature, so at 0
    all shares are equal. Within a modality, every sample comes once before any comes again, also across epochs (except
    for the dropped ends). ``position`` is the number of the next batch: a loader with ``start_batch=position``
    continues exactly there on any number of ranks, whatever the workers have read ahead. Global random number
    generators are neither used nor advanced.

    A sample that raises ``SampleError`` is replaced by one drawn from (seed, epoch, place in the epoch), so that all
    ranks agree on the order, and is named once in a warning of the logger "dex.data". More than max(10, 0.1 % of the
    data set) such samples, or none readable in 32 draws, raise ``CorruptDataError`` with their names. ``corrupt`` has
    the ids and reasons so far on this rank.

    Each worker reads two batches ahead and keeps the order of one epoch, 8 bytes per sample. Workers write to memory
    shared with the caller, enough for the batches ahead and two more; the memory of a batch is reused when nothing
    refers to its images any more. A caller that keeps more batches gets newly allocated ones.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        *,
        seed: int,
        temperature: float = 1.0,
        num_workers: int = 0,
        start_batch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        _check_int("batch_size", batch_size, 1)
        _check_int("seed", seed, 0, 2**63)
        if not (isinstance(temperature, (int, float)) and 0 <= temperature <= 1):
            raise ValueError(f"temperature: expected a number from 0 to 1, got {temperature!r}")
        _check_int("num_workers", num_workers, 0)
        _check_int("start_batch", start_batch, 0)
        _check_int("world_size", world_size, 1)
        _check_int("rank", rank, 0, world_size)
        if batch_size % world_size:
            raise ValueError(f"batch_size: expected a multiple of world_size {world_size}, got {batch_size}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.temperature = temperature
        self.num_workers = num_workers
        self.batches_per_epoch: int = batches_per_epoch(dataset, batch_size)
        self.corrupt: dict[str, str] = {}
        self._position = start_batch
        self._reader = _BatchReader(dataset, batch_size, seed, temperature, rank, world_size)
        self._workers: tuple[Iterator, Slots] | None = None

    @property
    def position(self) -> int:
        """The number, over all epochs, of the next batch to be given."""
        return self._position

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self.num_workers == 0:
            images = torch.empty(self._reader.shape, dtype=torch.uint8)
            read = self._reader.read(self._position, images.numpy())
        else:
            if self._workers is None:
                self._workers = self._start_workers()
            batches, slots = self._workers
            read, slot, images = next(batches)
            if slot is not None:
                images = slots.lend(slot)
        self._report(read.corrupt)
        if read.dim is not None:
            self.dataset.note_maximum(*read.dim)
        if not read.ids:
            raise CorruptDataError(
                f"batch {self._position}: no readable replacement in {_ATTEMPTS} draws; "
                f"unreadable: {_name(self.corrupt)}",
                self.corrupt,
            )
        first = self._position * self.batch_size + self._reader.first
        places = torch.arange(len(read.ids), dtype=torch.int64) + first
        self._position += 1
        return Batch(images, torch.tensor(read.modality, dtype=torch.int64), read.ids, places)

    def _start_workers(self) -> tuple[Iterator, Slots]:
        try:
            slots = Slots(_AHEAD * self.num_workers + 2, self._reader.shape)
            multiprocessing.Lock()  # Also needs shared memory; fails here rather than half-way through DataLoader
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                errno.ENOSPC,
                f"{error.strerror}: no space in shared memory (/dev/shm) for {self.num_workers} reading processes; "
                "enlarge it, free some of it, or set data.num_workers to 0",
            ) from None
        loader = torch.utils.data.DataLoader(
            _Worker(self._reader, slots),
            batch_size=None,
            sampler=_Tasks(self._position, slots),
            num_workers=self.num_workers,
            prefetch_factor=_AHEAD,
            collate_fn=_identity,
            worker_init_fn=_ignore_stop_signals,
            generator=torch.Generator().manual_seed(0),  # Otherwise it advances the global generator
        )
        return iter(loader), slots

    def _report(self, corrupt: list[tuple[str, str]]) -> None:
        for sample_id, reason in corrupt:
            if sample_id not in self.corrupt:
                self.corrupt[sample_id] = reason
                logger.warning("sample %r cannot be read and was replaced: %s", sample_id, reason)
        limit = max(MAX_CORRUPT, int(MAX_CORRUPT_SHARE * len(self.dataset)))
        if len(self.corrupt) > limit:
            raise CorruptDataError(
                f"data set {self.dataset.name!r}: more than {limit} of {len(self.dataset)} samples "
                f"cannot be read: {_name(self.corrupt)}",
                self.corrupt,
            )

    def close(self) -> None:
        """End the workers. ``next`` starts new ones at ``position``."""
        workers, self._workers = self._workers, None
        if workers is not None:
            workers[0]._shutdown_workers()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def batches_per_epoch(dataset: Dataset, batch_size: int) -> int:
    """Number of full batches per epoch. ValueError: ``dataset`` is smaller than a batch."""
    _check_int("batch_size", batch_size, 1)
    if len(dataset) < batch_size:
        raise ValueError(
            f"batch_size: expected at most the {len(dataset)} samples of data set {dataset.name!r}, got {batch_size}"
        )
    return len(dataset) // batch_size


class _Read(NamedTuple):
    """A batch without its images; ``ids`` is empty if it could not be filled."""

    modality: list[int]
    ids: tuple[str, ...]
    corrupt: list[tuple[str, str]]
    dim: tuple[str, int] | None


class _BatchReader:
    """Reads this rank's part of global batches: images of ``shape [B, C, S, S]``, from place ``first`` of a batch."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, temperature: float, rank: int, world_size: int):
        self.dataset, self.batch_size, self.seed, self.temperature = dataset, batch_size, seed, temperature
        part = batch_size // world_size
        self.shape = (part, dataset.channels, dataset.image_size, dataset.image_size)
        self.first = rank * part
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def read(self, number: int, images: np.ndarray) -> _Read:
        """Write the images of global batch ``number`` to ``images``, uint8 of ``shape``."""
        epoch, batch = divmod(number, len(self.dataset) // self.batch_size)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, self.dataset.modality_index(), self.temperature))
        start = batch * self.batch_size + self.first
        modalities, ids, corrupt = [], [], []
        for place, image in enumerate(images, start):
            index = int(self._order[1][place])
            for attempt in range(_ATTEMPTS):
                try:
                    modality, sample_id = self.dataset.read(index, image)
                    break
                except SampleError as error:
                    corrupt.append((error.sample_id, error.reason))
                    index = replacement(self.seed, epoch, place, attempt, len(self.dataset))
            else:
                return _Read([], (), corrupt, self.dataset.dim)
            modalities.append(modality)
            ids.append(sample_id)
        return _Read(modalities, tuple(ids), corrupt, self.dataset.dim)


class _Worker(torch.utils.data.Dataset):
    """(number of a global batch, slot or None) -> (batch without images, the slot, or the images if there is no
    slot)."""

    def __init__(self, reader: _BatchReader, slots: Slots):
        self.reader, self.slots = reader, slots

    def __getitem__(self, task: tuple[int, int | None]) -> tuple[_Read, int | None, torch.Tensor | None]:
        number, slot = task
        if slot is not None:
            return self.reader.read(number, self.slots.array(slot)), slot, None
        images = torch.empty(self.reader.shape, dtype=torch.uint8)
        return self.reader.read(number, images.numpy()), None, images


def _ignore_stop_signals(worker: int) -> None:
    """Leave signals to the parent, which still needs batches to finish its step and save."""
    exits.ignore_stop_signals()


class _Tasks(torch.utils.data.Sampler):
    """Numbers of the batches to read, with a free slot for each."""

    def __init__(self, start: int, slots: Slots):
        self.start, self.slots = start, slots

    def __iter__(self) -> Iterator[tuple[int, int | None]]:
        for number in itertools.count(self.start):
            yield number, self.slots.take()


def _identity(item: object) -> object:
    return item


def _name(samples: dict[str, str]) -> str:
    named = "; ".join(f"{sample_id} ({reason})" for sample_id, reason in itertools.islice(samples.items(), _NAMED))
    return named + (f"; and {len(samples) - _NAMED} more" if len(samples) > _NAMED else "")


def _check_int(name: str, value: object, low: int, end: int | None = None) -> None:
    is_int = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_int or value < low or (end is not None and value >= end):
        expected = f"a whole number >= {low}" + (f" and < {end}" if end is not None else "")
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
