"""The published intensity rules and what decides whether a slice is kept."""

import numpy as np
import pytest

from dex.data import normalise


def test_ct_window():
    got = normalise.ct_window(np.array([-3024.0, -200, 100, 400, 3000]))
    assert got.dtype == np.float32 and got.tolist() == [0, 0, 0.5, 1, 1]


def test_percentile_range():
    got = normalise.percentile_range(np.arange(101.0))
    assert got[:2].tolist() == [0, 0] and got[99:].tolist() == [1, 1] and got[50] == 0.5
    with pytest.raises(ValueError, match="nothing to scale"):
        normalise.percentile_range(np.ones((4, 4)))
    with pytest.raises(ValueError, match="finite"):
        normalise.percentile_range(np.array([0, np.nan]))


def test_foreground_sees_past_a_grey_background():
    image = np.full((100, 100), 85, np.uint8)
    assert normalise.background(image) == 85 and normalise.foreground_share(image) == 0
    image[40:60, 40:60] = 95
    assert normalise.foreground_share(image) == 0.04
    image[40:60, 40:60] = 90  # within 0.02 of full scale
    assert normalise.foreground_share(image) == 0
    assert normalise.foreground_share(np.repeat(image[:, :, None], 3, 2)) == 0


def test_difference_hash():
    draw = np.random.default_rng(0)
    one, other = (draw.integers(0, 256, (256, 256), dtype=np.uint8) for _ in range(2))
    near = np.clip(one.astype(int) + draw.integers(-2, 3, one.shape), 0, 255).astype(np.uint8)
    distance = [
        (normalise.difference_hash(one) ^ normalise.difference_hash(image)).bit_count() for image in (one, near, other)
    ]
    assert distance[0] == 0 and distance[1] <= normalise.NEAR_DUPLICATE_BITS < 80 < distance[2]
