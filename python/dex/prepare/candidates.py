"""Find images of one set that may show the same as an image of another: shifted, cropped, mirrored or rotated.

A view is an image's grey levels at 32 x 32. Two stages, from coarse to fine:

1. Every pair is scored by the correlation of 8 x 8 grids: the best over the eight ways to turn and mirror b, and over
   the whole and the middle 95 % of either image. The ``SIEVE`` best of each b go on.
2. These are scored by 16 x 16 grids, with b turned in every way, shifted and scaled. The ``CANDIDATES`` best go to
   ``alignment``. A symmetric image is there twice.

Shape letters: n, m images of a and b; V views' side; G grid's side; W ways to shift and scale; K candidates.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

from .normalise import grey

VIEW = 32
TURNS = 8
SIEVE, CANDIDATES = 128, 12
LEAST = 0.8
"""Below this correlation of the finer grids, two images show different things. Copies shifted by up to 3 % of their
side, or cropped to 90 %, have more."""
_COARSE, _FINE = 8, 16
_MIDDLE = 0.95
_SHIFTS, _SCALES = (-0.05, 0.0, 0.05), (0.95, 1.0, 1 / 0.95)  # Relative to half a side, and to the side
_ROWS, _BLOCK = 256, 4096  # Images of b and of a at a time


class Candidates(NamedTuple):
    """For each of m images of b, K images of a: ``of`` int64 [m, K] (-1: none); ``turn`` int64 [m, K]: a resembles
    ``turned(b, turn)``; ``score`` float32 [m, K]; ``start`` float32 [m, K, 3]: shift along x and y, in half sides, and
    scale that map a place in the turned b to one in a."""

    of: np.ndarray
    turn: np.ndarray
    score: np.ndarray
    start: np.ndarray


def view(image: np.ndarray) -> np.ndarray:
    """uint8 [V, V] of a uint8 image [S, S] or [S, S, 3]."""
    return np.asarray(Image.fromarray(grey(image)).resize((VIEW, VIEW), Image.Resampling.BOX))


def turned(images: np.ndarray, turn: int) -> np.ndarray:
    """Images [..., H, W] in one of the eight orientations of a square: transposed for turn & 4, then mirrored left to
    right for turn & 1 and top to bottom for turn & 2. For numpy arrays and torch tensors."""
    if turn & 4:
        images = images.swapaxes(-1, -2)
    axes = [axis for bit, axis in ((1, -1), (2, -2)) if turn & bit]
    if not axes:
        return images
    return np.flip(images, axes) if isinstance(images, np.ndarray) else images.flip(axes)


def candidates(views_a: np.ndarray, views_b: np.ndarray) -> Candidates:
    """The views of a, uint8 [n, V, V], that resemble each of m views of b."""
    m = len(views_b)
    likely = _every_pair(views_a, views_b, min(SIEVE, len(views_a)))
    kept = Candidates(
        np.full((m, CANDIDATES), -1, np.int64),
        np.zeros((m, CANDIDATES), np.int64),
        np.zeros((m, CANDIDATES), np.float32),
        np.zeros((m, CANDIDATES, 3), np.float32),
    )
    ways = np.array([(x, y, scale) for scale in _SCALES for y in _SHIFTS for x in _SHIFTS], np.float32)
    down = np.stack([_window(_FINE, y, scale) for _, y, scale in ways])
    across = np.stack([_window(_FINE, x, scale).T for x, _, scale in ways])
    whole = _window(_FINE)
    for row, of in enumerate(likely):
        views = np.stack([turned(views_b[row], turn) for turn in range(TURNS)])[:, None].astype(np.float32)
        tried = _unit((down @ views @ across).reshape(-1, _FINE, _FINE))
        likeness = _unit(_grids(views_a[of], whole, whole)) @ tried.T
        likeness = likeness.reshape(len(of), TURNS, len(ways))
        score, way = likeness.max(axis=2).ravel(), likeness.argmax(axis=2).ravel()
        first = np.argsort(-score, kind="stable")[:CANDIDATES]
        first = first[score[first] >= LEAST]
        kept.of[row, : len(first)], kept.turn[row, : len(first)] = of[first // TURNS], first % TURNS
        kept.score[row, : len(first)], kept.start[row, : len(first)] = score[first], _back(ways[way[first]])
    return kept


def _every_pair(views_a: np.ndarray, views_b: np.ndarray, count: int) -> np.ndarray:
    """int64 [m, count]: for each image of b, the best images of a."""
    m = len(views_b)
    best, of = np.full((m, count), -2, np.float32), np.zeros((m, count), np.int64)
    whole, middle = _window(_COARSE), _window(_COARSE, scale=_MIDDLE)
    whole_b, middle_b = (
        [_unit(turned(_grids(views_b, window, window), turn)) for turn in range(TURNS)] for window in (whole, middle)
    )
    for start in range(0, len(views_a), _BLOCK):
        part = views_a[start : start + _BLOCK]
        whole_a, middle_a = (_unit(_grids(part, window, window)).T for window in (whole, middle))
        for low in range(0, m, _ROWS):
            rows = slice(low, low + _ROWS)
            score = np.full((len(best[rows]), len(part)), -1, np.float32)
            for turn in range(TURNS):
                for b, a in ((whole_b, whole_a), (whole_b, middle_a), (middle_b, whole_a)):
                    np.maximum(score, b[turn][rows] @ a, out=score)
            score = np.concatenate([best[rows], score], axis=1)
            here = np.broadcast_to(np.arange(start, start + len(part)), (len(score), len(part)))
            first = np.argpartition(-score, count - 1, axis=1)[:, :count]
            best[rows] = np.take_along_axis(score, first, 1)
            of[rows] = np.take_along_axis(np.concatenate([of[rows], here], axis=1), first, 1)
    return np.sort(of, axis=1)


def _window(side: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """float32 [side, V]: the matrix that maps a side of a view to ``side`` means over equal parts of a window, which is
    ``scale`` times as long and ``shift`` half sides to the right. Beyond the border, the last level continues."""
    edges = (np.arange(side + 1) / side * 2 - 1) * scale + shift
    places = (edges + 1) / 2 * VIEW
    weights = np.zeros((side, VIEW), np.float32)
    for row, (low, high) in enumerate(itertools.pairwise(places)):
        for pixel in range(int(np.floor(low)), int(np.ceil(high))):
            share = (min(high, pixel + 1) - max(low, pixel)) / (high - low)
            weights[row, min(max(pixel, 0), VIEW - 1)] += share
    return weights


def _grids(views: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """float32 [n, G, G] of uint8 [n, V, V]."""
    return down @ views.astype(np.float32) @ across.T


def _unit(grids: np.ndarray) -> np.ndarray:
    """float32 [n, G * G] with zero mean and length 1; zeros if all levels are equal."""
    flat = grids.reshape(len(grids), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-3)


def _back(start: np.ndarray) -> np.ndarray:
    """The inverse map: if turned b(scale * place + shift) resembles a(place), then a(place / scale - shift / scale)
    resembles turned b(place)."""
    shift, scale = start[:, :2], start[:, 2:]
    return np.concatenate([-shift / scale, 1 / scale], axis=1)
