"""Bicubic resampling against Pillow's in floats, and against sums in whole numbers."""

import numpy as np
import pytest
from PIL import Image

from dex.prepare import resampling
from dex.prepare.resampling import bicubic

DRAW = np.random.default_rng(3)
NOISE = DRAW.integers(0, 256, (170, 191, 3), np.uint8)
STEPS = (np.kron(DRAW.integers(0, 2, (22, 24, 3)), np.ones((8, 8, 1)))[:170, :191] * 255).astype(np.uint8)
COMB = np.where(np.arange(191)[None, :, None] % 6 < 2, 255, 0) * np.ones((170, 1, 3))
IMAGES = {"noise": NOISE, "steps": STEPS, "comb": COMB.astype(np.uint8), "grey": NOISE[:, :, 0]}
BOXES = ((0, 0, 191, 170), (10.5, 3, 150.25, 160), (40, 30, 60, 50))
SIZES = ((57, 64), (170, 191), (300, 201), (1, 1), (43, 3), (5, 48))


def exact(pixels, box, height, width):
    """In floats, one channel at a time; not rounded."""
    bands = [
        np.asarray(band.convert("F").resize((width, height), Image.Resampling.BICUBIC, box=box))
        for band in Image.fromarray(pixels).split()
    ]
    return np.stack(bands, axis=2) if pixels.ndim == 3 else bands[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("kind", IMAGES)
def test_within_a_tenth_of_a_level_of_floats_before_rounding(kind, box, size):
    """The stated bound: so within one level after it."""
    want = exact(IMAGES[kind], box, *size).clip(0, 255)
    got = bicubic(IMAGES[kind], box, *size)
    assert got.dtype == np.uint8 and got.shape == want.shape
    assert np.abs(got - want).max() <= 0.5 + 0.1
    assert np.abs(got - np.rint(want)).max() <= 1


def test_products_and_sums_are_whole_numbers_that_are_held_exactly():
    """So the result does not depend on the order of the additions, nor on the processor."""
    for length, start, end, wanted in ((170, 0, 170, 57), (191, 10.5, 150.25, 300), (4000, 3, 3999, 1000)):
        for bits, kind, largest, most in ((15, np.float32, 255, 2**24), (24, np.float64, 2**24, 2**53)):
            for band in resampling._bands(length, start, end, wanted, bits, kind):
                assert np.array_equal(band.weights, np.rint(band.weights))
                assert (band.weights.sum(axis=1) == 2**bits).all()
                assert largest * np.abs(band.weights).sum(axis=1).max() < most


def whole(length, wanted, bits):
    """The matrix of weights, int64 [wanted, length]."""
    out = np.zeros((wanted, length), np.int64)
    for band in resampling._bands(length, 0, length, wanted, bits, np.float64):
        count, inputs = band.weights.shape
        out[band.out : band.out + count, band.first : band.first + inputs] = band.weights
    return out


def test_the_result_is_that_of_whole_numbers():
    for channel in range(3):
        sums = whole(170, 57, 15) @ NOISE[:, :, channel].astype(np.int64) @ whole(191, 64, 24).T
        want = np.rint(sums / 2.0**39).clip(0, 255)
        assert np.array_equal(bicubic(NOISE, (0, 0, 191, 170), 57, 64)[:, :, channel], want)


@pytest.mark.parametrize("level", [0, 1, 127, 255])
def test_a_level_stays_what_it_is(level):
    flat = np.full((90, 70, 3), level, np.uint8)
    for size in SIZES:
        assert (bicubic(flat, (3.5, 0, 70, 81.25), *size) == level).all()
