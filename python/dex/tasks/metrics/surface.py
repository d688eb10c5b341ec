"""Distances between the surfaces of two masks: HD95 and the normalised surface distance, by area as Nikolov et al.
(2018, arXiv:1809.04430) define them.

A surface element lies at each corner of pixels whose neighbourhood is neither wholly inside nor wholly outside the
mask; its length or area by spacing comes from the tables of the package ``surface-distance``. Its own functions compute
the same distances, but fail on an empty side under numpy 2 and take far longer for a large structure.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PERCENT = 95.0
_SAMPLE = 256
"""Elements by which the time of a search is foreseen."""
_TREE_COST = 4.0
"""Time of a search per pixel of distance, in that of a pixel of the distance transform; measured on two CT lungs."""


class Surface(NamedTuple):
    """Surface elements of a mask."""

    places: np.ndarray
    """int64 ``[S, 2 or 3]``: corners, 0 the one before the first pixel."""
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
    """HD95, the larger one of both directions' 95th percentiles of distance by area, and NSD.

    predicted, truth: bool ``[H, W]`` or ``[D, H, W]``, each with a pixel that is set, best cropped to both. spacing: in
    mm by axis. tolerance: in mm; a distance equal to it is within.
    """
    a, b = surface(predicted, spacing), surface(truth, spacing)
    to_truth, to_predicted = distances(a, b, predicted.shape, spacing), distances(b, a, predicted.shape, spacing)
    within = a.sizes[to_truth <= tolerance].sum() + b.sizes[to_predicted <= tolerance].sum()
    hd95 = max(_percentile(to_truth, a.sizes), _percentile(to_predicted, b.sizes))
    return SurfaceScores(hd95, float(within / (a.sizes.sum() + b.sizes.sum())))


def surface(mask: np.ndarray, spacing: tuple[float, ...]) -> Surface:
    """The surface elements of a bool mask ``[H, W]`` or ``[D, H, W]``. Beyond the array there is background."""
    from surface_distance import lookup_tables as tables

    flat = mask.ndim == 2
    kernel = tables.ENCODE_NEIGHBOURHOOD_2D_KERNEL if flat else tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL
    code = np.zeros([n + 1 for n in mask.shape], np.uint8)
    for offset, weight in np.ndenumerate(np.asarray(kernel)):
        # Bit ``weight`` of the corner: whether the pixel on that side of it is set.
        code[tuple(slice(1 - o, n + 1 - o) for o, n in zip(offset, mask.shape, strict=True))] |= mask * np.uint8(weight)
    places = np.argwhere((code != 0) & (code != (15 if flat else 255)))
    table = tables.create_table_neighbour_code_to_contour_length if flat else None
    sizes = (table or tables.create_table_neighbour_code_to_surface_area)(spacing)
    return Surface(places, np.asarray(sizes)[code[tuple(places.T)]])


def distances(a: Surface, b: Surface, shape: tuple[int, ...], spacing: tuple[float, ...]) -> np.ndarray:
    """float64 ``[S]``: how far each element of ``a`` lies from the nearest one of ``b``.

    shape: of the masks. A search tree answers few or near elements fast, a distance transform many that are far away.
    """
    from scipy import ndimage
    from scipy.spatial import KDTree

    there = np.zeros([n + 1 for n in shape], bool)
    there[tuple(b.places.T)] = True
    apart = ~there[tuple(a.places.T)]
    asked, scale = a.places[apart], np.asarray(spacing, np.float64)
    found = np.zeros(len(a.places))
    if len(asked):
        tree = KDTree(b.places * scale)
        sample = asked[:: max(1, len(asked) // _SAMPLE)]
        far = tree.query(sample * scale)[0].mean() / scale.min()
        if len(asked) * far * _TREE_COST > there.size:
            indices = ndimage.distance_transform_edt(~there, scale, return_distances=False, return_indices=True)
            nearest = indices[(slice(None), *asked.T)].T
        else:
            nearest = b.places[tree.query(asked * scale)[1]]
        found[apart] = np.sqrt((((asked - nearest) * scale) ** 2).sum(1))
    return found


def _percentile(found: np.ndarray, sizes: np.ndarray) -> float:
    """The distance within which `PERCENT` of the area lies."""
    order = np.argsort(found, kind="stable")
    below = np.cumsum(sizes[order])
    place = np.searchsorted(below / below[-1], PERCENT / 100)
    return float(found[order[min(place, len(found) - 1)]])
