"""Decide whether a stack is an image at all: label maps and probability maps are not."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from . import label_maps, readers
from .readers import Refused
from .routing import GREY

_CHROMA, _COLOURED = 32, 0.1  # In colour: levels between a pixel's channels, and share of such pixels, at least
_FILM = (0, 30)  # Frames of a film that are examined


def not_an_image(stack: readers.Stack, format: str, path: str, modality: str = "") -> Refused | None:
    """Why a stack is not an image of a modality: because of its file's declaration, its colours or its values.

    path: of its file; like the name in its header, the file's name is a hint.
    """
    reader = readers.reader_of(format)
    if modality in GREY and not reader.decides and _is_coloured(stack, reader.frame_stride != 1):
        return Refused(
            "rendering",
            f"in colour, but {modality} is grey; give its modality with --modality or --pattern, or --trust to take it",
        )
    if reader.frame_stride != 1:  # Films hold no labels
        return None
    if stack.declared:
        return Refused(stack.declared, "its header declares it")
    named = stack.named or label_maps.suspicious(path)
    if label_maps.judge(_frames(stack), named) or (reader.decides and label_maps.judge(_rescaled(stack), named)):
        return Refused(label_maps.LABEL_MAP, "few values that fill regions")
    if not reader.decides and label_maps.is_probability_map(_frames(stack), os.path.basename(path)):
        return Refused(label_maps.PROBABILITY_MAP, "by its name and values")
    return None


def _is_coloured(stack: readers.Stack, film: bool) -> bool:
    """Whether much of a picture or film is in colour, more than marks, arrows or a tint."""
    for frame in stack.sample(frozenset(_FILM if film else label_maps.spread(stack.length))):
        if frame.ndim == 2:
            return False
        values = frame[::2, ::2].astype(np.int16)
        if (np.ptp(values, axis=2) > _CHROMA).mean() > _COLOURED:
            return True
    return False


def _rescaled(stack: readers.Stack) -> Iterator[np.ndarray]:
    """The same frames after the header's rescale, if that changes them: the labels of a map with the rescale of its CT
    start at 0 either before or after it."""
    if np.ndim(stack.slope) == 0 and (stack.slope, stack.intercept) != (1, 0) and stack.quantity != "display8":
        yield from (frame * stack.slope + stack.intercept for frame in _frames(stack))


def _frames(stack: readers.Stack) -> Iterator[np.ndarray]:
    """A sample of the frames of a stack; if each of these has a single value, then all frames."""
    blank = True
    for frame in stack.sample(frozenset(label_maps.spread(stack.length))):
        blank = blank and bool((frame[:1] == frame.flat[0]).all() and (frame == frame.flat[0]).all())
        yield frame
    if blank and stack.length > label_maps.FRAMES:
        yield from stack.sample(range(stack.length))
