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
    theirs = library.compute_surface_distances(b, a, spacing)
    got = surface_scores(a, b, spacing, 1.0)
    assert got.hd95 == pytest.approx(library.compute_robust_hausdorff(theirs, 95), rel=1e-12)
    assert got.nsd == pytest.approx(library.compute_surface_dice_at_tolerance(theirs, 1.0), rel=1e-12)


WAYS = {
    "tree": {"_NEAR": 0.0, "_TREE_COST": 0.0, "_BUILD_COST": 0.0},
    "transform": {"_NEAR": 0.0, "_TREE_COST": 1e9},
    "no tree of many elements": {"_NEAR": 0.0, "_BUILD_COST": 1e9},
    "neighbours": {},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("shape", "spacing"), [((8, 12, 10), (3.0, 0.7, 0.7)), ((20, 17), (0.5, 1.25))])
def test_every_way_to_the_nearest_element_gives_its_distance(monkeypatch, way, shape, spacing):
    for name, value in WAYS[way].items():
        monkeypatch.setattr(surfaces, name, value)
    rng = np.random.default_rng(0)
    close = blobs(rng, shape)
    far = np.zeros((2, *shape), bool)
    far[0].flat[0] = far[1, -2:] = True
    for a, b in (close, far, far[::-1]):
        pair = [surface(mask, spacing) for mask in (a, b)]
        places = [np.stack(np.unravel_index(s.corners, [n + 1 for n in shape]), -1) * spacing for s in pair]
        expected = np.sqrt(((places[0][:, None] - places[1][None]) ** 2).sum(-1)).min(1)
        assert np.allclose(distances(*pair, a.shape, spacing), expected, rtol=1e-12) and expected.max() > 0


def test_noise_all_over_needs_no_search_tree_of_it(monkeypatch):
    from scipy import spatial

    rng = np.random.default_rng(0)
    truth = np.zeros((12, 40, 40), bool)
    truth[3:9, 10:30, 10:30] = True
    predicted = truth ^ (rng.random(truth.shape) < 0.2)
    sizes, tree = [], spatial.KDTree
    monkeypatch.setattr(spatial, "KDTree", lambda points: sizes.append(len(points)) or tree(points))
    scores = surface_scores(predicted, truth, (3.0, 1.0, 1.0), 2.0)
    assert max(sizes, default=0) < len(surface(predicted, (3.0, 1.0, 1.0)).corners) / 4
    theirs = library.compute_surface_distances(truth, predicted, (3.0, 1.0, 1.0))
    assert scores.hd95 == pytest.approx(library.compute_robust_hausdorff(theirs, 95), rel=1e-12)
    assert scores.nsd == pytest.approx(library.compute_surface_dice_at_tolerance(theirs, 2.0), rel=1e-12)


@few
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0 + 1e-9, 7.0, 300.0]), min_size=1, max_size=40), st.data())
def test_the_percentile_is_that_of_the_sorted_distances(values, data):
    sizes = np.array(data.draw(st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=len(values), max_size=len(values))))
    order = np.argsort(values)
    below = np.cumsum(sizes[order])
    expected = np.array(values)[order][np.searchsorted(below, 0.95 * below[-1])]
    assert surfaces._percentile(np.array(values), sizes) == expected


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
