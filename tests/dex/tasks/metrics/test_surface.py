"""Against the package surface-distance, whose definitions these are, and MONAI, whose are others."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dex.tasks.metrics import surface as surfaces
from dex.tasks.metrics.surface import distances, surface, surface_scores

library = pytest.importorskip("surface_distance", reason="needs surface-distance, of the extra 'adapt'")

MASKS = arrays.arrays(bool, st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)))
SPACING = st.tuples(*[st.sampled_from([0.4, 0.7, 1.0, 2.5, 5.0])] * 3)
few = settings(max_examples=30, deadline=None)


def blobs(rng, shape):
    """Two random masks that are alike, each with a pixel."""
    a = rng.random(shape) < 0.4
    b = a ^ (rng.random(shape) < 0.15)
    a.flat[0] = b.flat[-1] = True
    return a, b


@pytest.mark.filterwarnings("ignore:Please import")
@pytest.mark.parametrize("shape", [(9, 14), (1, 1), (6, 9, 7), (1, 8, 8)])
@pytest.mark.parametrize("seed", range(5))
def test_the_scores_are_those_of_surface_distance(shape, seed):
    rng = np.random.default_rng(seed)
    a, b = blobs(rng, shape)
    spacing = tuple(rng.uniform(0.3, 4, len(shape)))
    found = library.compute_surface_distances(b, a, spacing)
    got = surface_scores(a, b, spacing, 1.0)
    assert got.hd95 == pytest.approx(library.compute_robust_hausdorff(found, 95), rel=1e-12)
    assert got.nsd == pytest.approx(library.compute_surface_dice_at_tolerance(found, 1.0), rel=1e-12)


def test_the_two_ways_to_the_nearest_element_agree(monkeypatch):
    a, b = blobs(np.random.default_rng(0), (8, 12, 10))
    pair, spacing = [surface(m, (3.0, 0.7, 0.7)) for m in (a, b)], (3.0, 0.7, 0.7)
    found = []
    for cost in (0.0, 1e9):  # the tree, the distance transform
        monkeypatch.setattr(surfaces, "_TREE_COST", cost)
        found.append(distances(*pair, a.shape, spacing))
    assert np.allclose(*found, rtol=1e-12) and found[0].max() > 0


def test_a_shifted_box_is_as_far_as_its_shift():
    a = np.zeros((12, 12, 12), bool)
    a[2:5, 2:9, 2:9] = True
    b = np.roll(a, 3, 0)
    assert surface_scores(a, b, (2.0, 1.0, 1.0), 5.9).hd95 == 6.0
    assert surface_scores(a, b, (2.0, 1.0, 1.0), 6.0).nsd == 1.0
    assert surface_scores(a, b, (2.0, 1.0, 1.0), 5.9).nsd < 1.0


def test_monai_counts_pixels_not_areas_and_may_differ_by_a_pixel():
    """MONAI measures between the middles of border voxels, each of which counts alike, whatever its area: the same
    for a shift along an axis, up to a voxel's diagonal apart for other shapes."""
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics", reason="needs monai, of the extra 'adapt'")

    def theirs(a, b, spacing):
        pair = [torch.from_numpy(m)[None, None].float() for m in (a, b)]
        return float(
            monai.compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=list(spacing))
        )

    box = np.zeros((12, 12, 12), bool)
    box[2:5, 2:9, 2:9] = True
    assert theirs(box, np.roll(box, 3, 0), (2, 1, 1)) == surface_scores(box, np.roll(box, 3, 0), (2, 1, 1), 1).hd95
    apart = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        z, y, x = np.ogrid[:20, :20, :20]
        a, b = (
            ((z - c[0]) / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 + ((x - c[2]) / r[2]) ** 2 < 1
            for c, r in ((rng.uniform(8, 12, 3), rng.uniform(3, 7, 3)) for _ in range(2))
        )
        apart.append(theirs(a, b, (2.0, 1.0, 1.0)) - surface_scores(a, b, (2.0, 1.0, 1.0), 1.0).hd95)
    assert 0 < max(map(abs, apart)) <= 6**0.5


@few
@given(MASKS, st.data(), SPACING, st.sampled_from([0.0, 1.0, 3.0]))
def test_symmetry_bounds_and_scale(a, data, spacing, tolerance):
    b = data.draw(arrays.arrays(bool, a.shape))
    a.flat[0] = b.flat[-1] = True
    got, turned = surface_scores(a, b, spacing, tolerance), surface_scores(b, a, spacing, tolerance)
    assert got.hd95 == turned.hd95 and got.nsd == pytest.approx(turned.nsd)
    assert 0 <= got.nsd <= 1 + 1e-12
    diagonal = np.sqrt(sum((n * s) ** 2 for n, s in zip(a.shape, spacing, strict=True)))
    assert 0 <= got.hd95 <= diagonal
    doubled = surface_scores(a, b, tuple(2 * s for s in spacing), 2 * tolerance)
    assert doubled.hd95 == pytest.approx(2 * got.hd95) and doubled.nsd == pytest.approx(got.nsd)
    assert surface_scores(a, a, spacing, 0.0) == (0.0, 1.0)


@few
@given(MASKS, st.data())
def test_a_margin_of_background_changes_nothing(a, data):
    b = data.draw(arrays.arrays(bool, a.shape))
    a.flat[0] = b.flat[0] = True
    padded = [np.pad(m, 2) for m in (a, b)]
    assert surface_scores(*padded, (2.0, 1.0, 1.0), 1.0) == pytest.approx(surface_scores(a, b, (2.0, 1.0, 1.0), 1.0))
