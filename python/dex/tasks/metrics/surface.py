"""Distances between the surfaces of two masks: HD95 and the normalised surface distance, by area as defined by Nikolov
et al. (2018, arXiv:1809.04430).

A surface element lies at each corner of pixels whose neighbourhood is partly inside the mask; its length or area comes
from the tables of the package ``surface-distance``. The package's own functions compute the same distances, but fail on
an empty side under numpy 2 and take far longer for large structures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

PERCENT = 95.0
_NEAR = 3.0
"""Distance up to which elements are searched neighbour by neighbour, in units of the smallest spacing."""
_SAMPLE = 256
"""Elements from which the time of a search is estimated."""
_TREE_COST = 4.0
"""Time of a search per pixel of distance, in that of a pixel of the distance transform: measured 2 (small structures
seen from afar) to 50 (the middle of a large one)."""
_BUILD_COST = 4.0
"""Time per element to build the search tree, in the same unit; measured there, 2 to 10."""
_BINS = 4096
"""Bins of the distances, to find the one with the percentile."""


class Surface(NamedTuple):
    """Surface elements of a mask."""

    corners: np.ndarray
    """int64 ``[S]``, ascending: indices into the flattened grid of corners, which is one longer than the mask on each
    axis; its first corner lies before the first pixel."""
    sizes: np.ndarray
    """float64 ``[S]``: lengths in mm, or areas in mm²."""


class SurfaceScores(NamedTuple):
    hd95: float
    """In the units of the spacing, >= 0."""
    nsd: float
    """Share of both surfaces within the tolerance of the other, 0 to 1."""


def surface_scores(
    predicted: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...], tolerance: float
) -> SurfaceScores:
    """HD95, the larger of both directions' 95th percentiles of distance by area, and NSD.

    predicted, truth: bool ``[H, W]`` or ``[D, H, W]``, each with at least one set pixel, preferably cropped to both.
    spacing: in mm by axis. tolerance: in mm, inclusive.
    """
    a, b = surface(predicted, spacing), surface(truth, spacing)
    to_truth, to_predicted = distances(a, b, predicted.shape, spacing), distances(b, a, predicted.shape, spacing)
    within = a.sizes[to_truth <= tolerance].sum() + b.sizes[to_predicted <= tolerance].sum()
    hd95 = max(_percentile(to_truth, a.sizes), _percentile(to_predicted, b.sizes))
    return SurfaceScores(hd95, float(within / (a.sizes.sum() + b.sizes.sum())))


def surface(mask: np.ndarray, spacing: tuple[float, ...]) -> Surface:
    """The surface elements of a bool mask ``[H, W]`` or ``[D, H, W]``. Outside the array is background."""
    from surface_distance import lookup_tables as tables

    flat = mask.ndim == 2
    kernel = tables.ENCODE_NEIGHBOURHOOD_2D_KERNEL if flat else tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL
    grid = tuple(n + 1 for n in mask.shape)
    pixels = np.unravel_index(np.flatnonzero(mask), mask.shape)
    # Each bit of a corner's code is set if the pixel on that side is. Only corners of set pixels are visited.
    code = np.zeros(np.prod(grid), np.uint8)
    first = np.ravel_multi_index(pixels, grid)
    sides = [(int(weight), _step(1 - np.array(offset), grid)) for offset, weight in np.ndenumerate(np.asarray(kernel))]
    for weight, step in sides:
        code[first + step] |= weight
    corners = []
    for weight, step in sides:
        codes = code[first + step]
        # A corner of several pixels is listed once, by its lowest bit; one inside the mask has all bits.
        listed = (codes & (weight - 1) == 0) & (codes != (15 if flat else 255))
        corners.append(first[listed] + step)
    places = np.sort(np.concatenate(corners))
    table = tables.create_table_neighbour_code_to_contour_length if flat else None
    sizes = (table or tables.create_table_neighbour_code_to_surface_area)(spacing)
    return Surface(places, np.asarray(sizes)[code[places]])


def distances(a: Surface, b: Surface, shape: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    """float64 ``[S]``: the distance of each element of ``a`` to the nearest element of ``b``.

    shape: of the masks. Near elements are searched among the neighbours, as between a mask and noise throughout the
    volume; others with a search tree if they are few or not far apart, else by a distance transform.
    """
    grid, scale = tuple(n + 1 for n in shape), np.asarray(spacing, np.float64)
    reach = np.floor(_NEAR * scale.min() / scale + 1e-9).astype(int)
    is_target = np.zeros([n + 2 * r for n, r in zip(grid, reach, strict=True)], bool)
    queries, targets = ([p + r for p, r in zip(np.unravel_index(s.corners, grid), reach, strict=True)] for s in (a, b))
    is_target[tuple(targets)] = True
    result = np.zeros(len(a.corners))
    open_ = np.flatnonzero(~is_target[tuple(queries)])
    sample = open_[:: max(1, len(open_) // _SAMPLE)]
    if len(sample) and np.isfinite(_among_neighbours(_of(queries, sample), is_target, scale, reach)).mean() > 0.5:
        result[open_] = _among_neighbours(_of(queries, open_), is_target, scale, reach)
        open_ = open_[~np.isfinite(result[open_])]
    if len(open_):
        result[open_] = _to_nearest(_of(queries, open_), targets, is_target, scale)
    return result


def _step(offset: np.ndarray, grid: tuple[int, ...]) -> int:
    """The distance in the flattened ``grid`` between corners that are ``offset`` apart by axis."""
    return int(offset @ [math.prod(grid[axis + 1 :]) for axis in range(len(grid))])


def _of(places: Sequence[np.ndarray], chosen: np.ndarray) -> list[np.ndarray]:
    return [axis[chosen] for axis in places]


def _among_neighbours(
    queries: Sequence[np.ndarray], is_target: np.ndarray, scale: np.ndarray, reach: np.ndarray
) -> np.ndarray:
    """float64 ``[S]``: the distance of each query to the nearest target, infinite beyond ``_NEAR`` smallest spacings.

    reach: corners by axis within this distance; queries are at least this far from the border.
    """
    offsets = np.stack(np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), -1).reshape(-1, len(reach))
    lengths = np.sqrt(((offsets * scale) ** 2).sum(1))
    order = np.argsort(lengths, kind="stable")
    flat = np.ravel_multi_index(queries, is_target.shape)
    result, remaining, flat_targets = np.full(len(flat), np.inf), np.arange(len(flat)), is_target.ravel()
    for offset, length in zip(offsets[order], lengths[order], strict=True):
        if length > _NEAR * scale.min() or not len(remaining):
            break  # Beyond this, not every corner is within reach
        hit = flat_targets[flat + _step(offset, is_target.shape)]
        result[remaining[hit]] = length
        remaining, flat = remaining[~hit], flat[~hit]
    return result


def _to_nearest(
    queries: Sequence[np.ndarray], targets: Sequence[np.ndarray], is_target: np.ndarray, scale: np.ndarray
) -> np.ndarray:
    """float64 ``[S]``: the distance of each query to the nearest of ``targets``, which ``is_target`` marks."""
    from scipy import ndimage
    from scipy.spatial import KDTree

    if len(targets[0]) * _BUILD_COST <= is_target.size:
        tree = KDTree(np.stack(targets, -1) * scale)
        points = np.stack(queries, -1) * scale
        distance = tree.query(points[:: max(1, len(points) // _SAMPLE)])[0].mean() / scale.min()
        if len(points) * distance * _TREE_COST <= is_target.size:
            return _length(queries, _of(targets, tree.query(points)[1]), scale)
    indices = ndimage.distance_transform_edt(~is_target, scale, return_distances=False, return_indices=True)
    return _length(queries, (axis[tuple(queries)] for axis in indices), scale)


def _length(places: Iterable[np.ndarray], others: Iterable[np.ndarray], scale: np.ndarray) -> np.ndarray:
    """float64 ``[S]``: distances between positions given by axis."""
    return np.sqrt(sum(((p - o) * s) ** 2 for p, o, s in zip(places, others, scale, strict=True)))


def _percentile(values: np.ndarray, sizes: np.ndarray) -> float:
    """The distance within which ``PERCENT`` of the area lies."""
    wanted = PERCENT / 100 * sizes.sum()
    top = values.max()
    # Sort only the bin with the percentile, since there may be tens of millions of elements.
    bins = np.minimum((values * (_BINS / top)).astype(np.int32), _BINS - 1) if top > 0 else np.zeros(len(values), int)
    below = np.cumsum(np.bincount(bins, sizes, _BINS))
    chosen = min(int(np.searchsorted(below, wanted)), int(bins.max()))
    inside = np.flatnonzero(bins == chosen)
    order = inside[np.argsort(values[inside], kind="stable")]
    reached = np.cumsum(sizes[order]) + (below[chosen - 1] if chosen else 0.0)
    place = np.searchsorted(reached, wanted)
    return float(values[order[min(place, len(order) - 1)]])
