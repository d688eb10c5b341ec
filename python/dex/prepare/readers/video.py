"""Video files through OpenCV's FFmpeg, streamed: every frame is decoded, but only the wanted ones are converted.

A container is recognised by its first bytes. FFmpeg may only use the demuxer of that container and the file protocol,
so a playlist or an address inside a file leads nowhere. It gets the opened file, not its name. The frame size is
checked where the container declares it, and again before the first frame is requested. Opening a stream may already
decode a frame, so the memory limit of the process is the last defence.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from dex.common import formats

from .files import BoundedFile, Limits, only, opened, quiet, quietly
from .reader import Beat, Reader
from .stack import Refused, Stack

if TYPE_CHECKING:
    import cv2

MAX_BOXES = 10_000
MOST = 0.9  # Least share of the declared frames; at a variable frame rate, the declaration is an estimate
_CAPTURE_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_NESTED = (b"moov", b"trak")


@functools.cache
def _opencv() -> ModuleType:
    """OpenCV, silent and on one thread."""
    import cv2

    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # Quiet; read once, when FFmpeg is first used
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    cv2.setNumThreads(1)
    return cv2


def read(files: Sequence[Path], limits: Limits, beat: Beat) -> Iterator[Stack]:
    cv2, path = _opencv(), only(files)
    with quiet("video"), opened(path) as file:
        with _capture(file, limits) as (capture, _):
            width, height = (int(capture.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            turned = int(capture.get(cv2.CAP_PROP_ORIENTATION_META)) % 180 == 90
            declared = int(min(max(capture.get(cv2.CAP_PROP_FRAME_COUNT), 0), 2**31))
            aspect = [capture.get(p) for p in (cv2.CAP_PROP_SAR_NUM, cv2.CAP_PROP_SAR_DEN)]
    square = aspect[0] / aspect[1] if min(aspect) > 0 and 0.1 <= aspect[0] / aspect[1] <= 10 else 1.0

    @quietly("video")
    def load(wanted: Callable[[int], bool]) -> Iterator[tuple[int, np.ndarray]]:
        with opened(path) as file, _capture(file, limits) as (capture, shape):
            number = 0
            while capture.grab():
                if wanted(number):
                    good, frame = capture.retrieve()
                    if not good or frame is None or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                        raise Refused("unreadable", f"frame {number} cannot be converted")
                    if frame.shape[:2] != shape:
                        raise Refused("inconsistent", f"frame {number} has another size")
                    yield number, np.ascontiguousarray(frame[:, :, ::-1])
                number += 1
        if 0 < number < MOST * declared and not stack.refused:
            stack.refused.append(Refused("inconsistent", f"{declared} frames declared, {number} decoded"))

    stack = Stack(
        quantity="display8",
        length=declared or None,
        shape=(height, width),
        dtype=np.dtype(np.uint8),
        load=load,
        holds=lambda stored: False,
        channels=3,
        windowed=True,
        spacing=(square, 1.0) if turned else (1.0, square),
    )
    yield stack


@contextmanager
def _capture(file: BoundedFile, limits: Limits) -> Iterator[tuple[cv2.VideoCapture, tuple[int, int]]]:
    """An opened video with frames within the limits, and their H, W."""
    cv2 = _opencv()
    demuxer = _demuxer(file, limits)
    before = os.environ.get(_CAPTURE_OPTIONS)
    os.environ[_CAPTURE_OPTIONS] = f"protocol_whitelist;file|format_whitelist;{demuxer}"
    try:
        capture = cv2.VideoCapture(f"/dev/fd/{file.fileno()}", cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    finally:
        if before is None:
            del os.environ[_CAPTURE_OPTIONS]
        else:
            os.environ[_CAPTURE_OPTIONS] = before
    try:
        if not capture.isOpened():
            raise Refused("unreadable", "no video stream that can be decoded; convert it, to H.264 in MP4 for instance")
        width, height = (int(capture.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        _check(height, width, limits)
        yield capture, (height, width)
    finally:
        capture.release()


def _check(height: int, width: int, limits: Limits) -> None:
    limits.check_frame(height, width)
    if not limits.holds(0, height, width, 6):  # A decoder keeps several reference frames
        raise Refused("too large", f"video frames of {height} x {width} pixels")


def _demuxer(file: BoundedFile, limits: Limits) -> str:
    """FFmpeg's name of the container, by its first bytes."""
    file.seek(0)
    start = file.read(72)
    if start[4:8] in _BOXES:
        for height, width in _track_sizes(file):
            _check(height, width, limits)
        return "mov"
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        if start[24:28] == b"avih":
            _check(int.from_bytes(start[68:72], "little"), int.from_bytes(start[64:68], "little"), limits)
        return "avi"
    if start[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if start[:16] == _ASF:
        return "asf"
    if start[:4] == b"\0\0\1\xba":
        return "mpeg"
    if start[:4] == b"\0\0\1\xb3":
        return "mpegvideo"
    raise Refused("unreadable", "not a supported video container (MP4, MOV, AVI, Matroska, ASF, MPEG); convert it")


def _track_sizes(file: BoundedFile) -> Iterator[tuple[int, int]]:
    """H, W of every track of an MP4 or QuickTime file, except sound, which has none."""
    place = 0
    for _ in range(MAX_BOXES):
        file.seek(place)
        head = file.read(16)
        if len(head) < 8:
            return
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if kind in _NESTED:
            place += 16 if head[:4] == b"\0\0\0\1" else 8
            continue
        if kind == b"tkhd" and size <= 2**10:
            file.seek(place + size - 8)
            width, height = (int.from_bytes(file.read(4), "big") >> 16 for _ in range(2))
            if width and height:
                yield height, width
        if size < 8:
            return
        place += size
    raise Refused("unreadable", f"more than {MAX_BOXES} boxes")


def load() -> None:
    _opencv()


READER = Reader(
    suffixes=formats.of("video").suffixes,
    read=read,
    needs=formats.of("video").needs,
    load=load,
    frame_stride=30,
)
