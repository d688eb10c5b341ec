"""Whether what a reader gives is an image at all: label maps and maps of probabilities are none."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np

from . import label_maps, readers
from .readers import Refused
from .routing import GREY

_CHROMA, _COLOURED = 32, 0.1  # levels between a pixel's channels, and the share of such pixels, from which on is colour
_FILM = (0, 30)  # frames of a film that are looked at


def not_an_image(stack: readers.Stack, format: str, path: str, modality: str = "") -> Refused | None:
    """Why a stack is no image of a modality: by what its file declares, by its colours or by its numbers.

    path: of its file, whose name is a hint, as what its header calls it is.
    """
    reader = readers.reader_of(format)
    if modality in GREY and not reader.decides and _is_coloured(stack, reader.frame_stride != 1):
        return Refused(
            "rendering",
            f"in colour, and {modality} is grey; --modality or --pattern says what it is, or --trust takes it",
        )
    if reader.frame_stride != 1:  # films hold no labels
        return None
    if stack.declared:
        return Refused(stack.declared, "its header declares it")
    named = stack.named or label_maps.suspicious(path)
    if label_maps.judge(_frames(stack), named) or (reader.decides and label_maps.judge(_rescaled(stack), named)):
        return Refused(label_maps.LABEL_MAP, "few values that fill regions")
    if not reader.decides and label_maps.is_probability_map(_frames(stack), os.path.basename(path)):
        return Refused(label_maps.PROBABILITY_MAP, "by its name and numbers")
    return None


def _is_coloured(stack: readers.Stack, film: bool) -> bool:
    """Whether much of a picture or film is in colour: more than marks, arrows or a tint."""
    for frame in stack.sample(frozenset(_FILM if film else label_maps.spread(stack.length))):
        if frame.ndim == 2:
            return False
        values = frame[::2, ::2].astype(np.int16)
        if (np.ptp(values, axis=2) > _CHROMA).mean() > _COLOURED:
            return True
    return False


def _rescaled(stack: readers.Stack) -> Iterator[np.ndarray]:
    """The same frames in the numbers that the header makes of them, where these are others: the labels of a map that
    was given the rescale of its CT begin at 0 in either the one or the other."""
    if np.ndim(stack.slope) == 0 and (stack.slope, stack.intercept) != (1, 0) and stack.quantity != "display8":
        yield from (frame * stack.slope + stack.intercept for frame in _frames(stack))


def _frames(stack: readers.Stack) -> Iterator[np.ndarray]:
    """Some frames of a stack, and all of them where each of these is of one value."""
    blank = True
    for frame in stack.sample(frozenset(label_maps.spread(stack.length))):
        blank = blank and bool((frame[:1] == frame.flat[0]).all() and (frame == frame.flat[0]).all())
        yield frame
    if blank and stack.length > label_maps.FRAMES:
        yield from stack.sample(range(stack.length))
