"""Volumes whose frames are stored one after another: kept in memory if they fit, else read frame by frame in each
pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .files import RATIO, Limits, fill, native, quietly
from .reader import Beat, chosen, left_out, mean_of
from .stack import Refused, Stack


@dataclass(frozen=True)
class Volumes:
    """``count`` volumes with ``frames`` frames of shape ``frame``, [H, W] or [H, W, C], in the byte order of ``dtype``.

    open: opens the unpacked data, whose first value is at byte ``start``. packed: the data end with a checksum. kept:
    whether one volume may be kept in memory (``is_kept``). planes: number of stored frames per frame of a stack. seen:
    converts stored frames [F, H, W, ...] to those of a stack. title: of the format, for messages. fields: further
    fields of the stacks.
    """

    open: Callable[[], AbstractContextManager[Any]] = field(repr=False)
    start: int
    frame: tuple[int, ...]
    frames: int
    dtype: np.dtype
    limits: Limits
    kept: bool
    title: str
    count: int = 1
    packed: bool = False
    planes: int = 1
    seen: Callable[[np.ndarray], np.ndarray] = field(default=lambda frames: frames, repr=False)
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        """Bytes of one volume."""
        return self.frames * self._length

    @property
    def _length(self) -> int:
        return int(np.prod(self.frame)) * self.dtype.itemsize

    def stacks(self, volumes: str, beat: Beat, headers: bool) -> Iterator[Stack]:
        """A stack for each volume to take, or one of their mean. headers: read no values before they are needed."""
        numbers, refused = chosen(volumes, self.count), left_out(volumes, self.count)
        mean = volumes == "mean" and self.count > 1
        if mean and not self.kept:
            raise Refused("too large", f"a mean of volumes of {self.size:,} bytes each; {self.limits.remedy}")
        if headers or not self.kept:
            for number in [0] if mean else numbers:
                stack = self.stack(None, number)
                stack.refused, refused = refused, []
                yield stack
            return
        with self.open() as file:
            wholes = (self._whole(file, number, beat) for number in numbers)
            if mean:
                yield self.stack(mean_of(wholes), 0)
                return
            for number, whole in zip(numbers, wholes, strict=True):
                stack = self.stack(whole, number)
                stack.refused, refused = refused, []
                yield stack
                del stack, whole

    def stack(self, whole: np.ndarray | None, volume: int) -> Stack:
        """The stack of one volume. whole: all its frames, None to read them when they are needed."""
        sample = (
            self.seen(np.zeros((self.planes, *self.frame), self.dtype.newbyteorder("="))) if whole is None else whole
        )
        height, width = self.frame[:2]
        bytes_per_pixel = self._length // (height * width)
        unscaled = (self.fields.get("slope", 1.0), self.fields.get("intercept", 0.0)) == (1.0, 0.0)
        return Stack(
            quantity="display8" if sample.dtype == np.uint8 and unscaled else "raw",
            length=self.frames // self.planes,
            shape=(height, width),
            dtype=sample.dtype,
            channels=sample.shape[3] if sample.ndim > 3 else 1,
            whole=whole,
            load=self._loader(volume),
            holds=lambda stored: whole is None and self.limits.holds(stored, height, width, bytes_per_pixel),
            volume=self.frames > self.planes,
            described=True,
            **self.fields,
        )

    def _whole(self, file: Any, number: int, beat: Beat) -> np.ndarray:
        whole = np.empty((self.frames, *self.frame), self.dtype)
        file.seek(self.start + number * self.size)
        fill(file, whole, beat)
        if self.packed and number == self.count - 1:
            file.read(1)  # Reading the end verifies the checksum
        return self.seen(native(whole))

    def _loader(self, volume: int) -> Callable[[Callable[[int], bool]], Iterator[tuple[int, np.ndarray]]]:
        @quietly(self.title)
        def load(wanted: Callable[[int], bool]) -> Iterator[tuple[int, np.ndarray]]:
            with self.open() as file:
                for number in range(self.frames):
                    if wanted(number):
                        out = np.empty((1, *self.frame), self.dtype)
                        file.seek(self.start + volume * self.size + number * self._length)
                        fill(file, out)
                        yield number, self.seen(native(out))[0]
                if self.packed and volume == self.count - 1 and wanted(self.frames - 1):
                    file.read(1)

        return load


def is_kept(
    limits: Limits, frame: Sequence[int], frames: int, itemsize: int, *, file: int, packing: str = "", copies: int = 1
) -> bool:
    """Whether a volume with that many frames may be kept in memory. Raises Refused if it can neither be kept nor read
    frame by frame.

    frame: H, W and, for colours, the number of channels. file: size of the file in bytes; copies: number of copies of
    the volume in memory while it is made.
    """
    height, width, *channels = frame
    limits.check_frame(height, width)
    bytes_per_pixel = itemsize * int(np.prod(channels or 1))
    size = height * width * frames * bytes_per_pixel
    if limits.holds(size * copies, height, width, bytes_per_pixel):
        return True
    empty = packing and size > RATIO * file  # Nearly constant, and slow to unpack in every pass
    unstreamable = empty or packing == "bzip2" or copies > 1
    if unstreamable or size > limits.streamed or not limits.holds(0, height, width, bytes_per_pixel):
        raise Refused("too large", f"{size:,} bytes declared; {limits.remedy}")
    return False
