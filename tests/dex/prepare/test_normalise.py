"""The published intensity rules and what decides whether a slice is kept."""

import numpy as np
import pytest

from dex.prepare import normalise
from dex.prepare.readers import Refused, Stack


def test_ct_window():
    got = normalise.ct_window(np.array([-3024.0, -200, 100, 400, 3000]))
    assert got.dtype == np.float32 and got.tolist() == [0, 0, 0.5, 1, 1]


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


def stack_of(array, quantity="raw", **fields):
    """A stack of [F, H, W]."""
    return Stack(
        quantity=quantity,
        length=len(array),
        shape=array.shape[1:],
        dtype=array.dtype,
        load=lambda wanted: ((n, array[n]) for n in range(len(array)) if wanted(n)),
        holds=lambda stored: True,
        **fields,
    )


VALUES = np.random.default_rng(3).gamma(2, 900, (4, 30, 20)).astype(np.float32)


def test_rule_mr_is_that_of_a_whole_volume():
    rule = normalise.normaliser("mr", stack_of(VALUES))
    got = np.stack([rule(frame) for frame in VALUES])
    assert got.dtype == np.float32 and got.min() == 0 and got.max() == 1
    low, high = np.percentile(VALUES, (1, 99))
    assert np.allclose(got, (np.clip(VALUES, low, high) - low) / (high - low), atol=1e-5)


def test_rule_pet_is_clip_then_z_score_then_min_max():
    clipped = np.clip(VALUES.astype(np.float64), *np.percentile(VALUES.astype(np.float64), (1, 99)))
    score = (clipped - clipped.mean()) / clipped.std()
    expected = (score - score.min()) / (score.max() - score.min())
    rule = normalise.normaliser("pet", stack_of(VALUES))
    assert np.allclose(np.stack([rule(frame) for frame in VALUES]), expected, atol=1e-5)


def test_rules_ct_and_suv():
    values = np.array([-500.0, -200, 100, 400, 900], np.float32)
    assert normalise.normaliser("ct", stack_of(VALUES, "HU"))(values).tolist() == [0, 0, 0.5, 1, 1]
    values = np.array([-1.0, 0, 5, 20, 30], np.float32)
    assert normalise.normaliser("suv", stack_of(VALUES, "SUV"))(values).tolist() == [0, 0, 0.25, 1, 1]
    for rule in ("ct", "suv"):  # a format whose files do not say: the description does
        normalise.normaliser(rule, stack_of(VALUES, described=True))
    for rule, quantity in (("ct", "SUV"), ("ct", "raw"), ("suv", "HU"), ("suv", "raw"), ("ct", "display8")):
        with pytest.raises(Refused, match=f"{rule} needs") as caught:
            normalise.normaliser(rule, stack_of(VALUES.astype(np.uint8), quantity))
        assert caught.value.reason == "inconsistent"
    with pytest.raises(Refused, match="suv needs SUV, got SUV: no half-life"):
        normalise.normaliser("suv", stack_of(VALUES, note="SUV: no half-life"))


def test_a_picture_of_eight_bits_is_windowed_already():
    eight = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    for rule in ("ct", "suv"):
        got = normalise.normaliser(rule, stack_of(eight, "display8", windowed=True))(eight[0])
        assert np.array_equal(got, eight[0].astype(np.float32) / np.float32(255))
        with pytest.raises(Refused, match=f"{rule} needs"):  # a label map of one byte, a screen capture in a CT series
            normalise.normaliser(rule, stack_of(eight, "display8"))


def test_rule_display():
    eight = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    got = normalise.normaliser("display", stack_of(eight, "display8"))(eight[0])
    assert got.dtype == np.float32 and np.array_equal(np.rint(got * 255), eight[0]) and got.max() == 1
    deep = normalise.normaliser("display", stack_of(VALUES))(VALUES)
    assert np.array_equal(deep, normalise.normaliser("mr", stack_of(VALUES))(VALUES))
    grey = normalise.normaliser("mr", stack_of(eight, "display8"))(eight[0])
    assert grey.min() == 0 and grey.max() == 1


def test_rules_that_cannot_be_applied():
    with pytest.raises(Refused, match="constant"):
        normalise.normaliser("mr", stack_of(np.ones((2, 3, 3), np.float32)))
    with pytest.raises(Refused, match="not finite"):
        normalise.normaliser("pet", stack_of(np.full((2, 3, 3), np.nan, np.float32)))
    with pytest.raises(ValueError, match="rule"):
        normalise.normaliser("CT", stack_of(VALUES))
