"""Overlays: what is painted where, and whether colours can be told apart."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from dex.tasks import overlay
from dex.tasks.task import IGNORED

GREY = np.full((40, 60), 100, np.uint8)
CLASSES = ("liver", "spleen")


def mask(*boxes):
    out = np.zeros(GREY.shape, np.uint8)
    for value, top, left, bottom, right in boxes:
        out[top:bottom, left:right] = value
    return out


def panels(picture, count):
    """The panels' pixels, without title and legend: 320 wide, 213 high, with margins."""
    top = picture.shape[0] - 213 - 10 - 5 - 18 * (1 + (count == 3))
    return [picture[top : top + 213, 10 + n * 330 : 330 + n * 330] for n in range(count)]


def test_each_class_is_filled_and_outlined_in_its_colour():
    rgb = np.repeat(GREY[:, :, None], 3, 2)
    painted = overlay.painted(rgb, mask((1, 5, 5, 15, 15), (2, 20, 20, 30, 40)))
    assert tuple(painted[5, 5]) == overlay.COLOURS[0] and tuple(painted[20, 30]) == overlay.COLOURS[1]
    inside = 0.62 * 100 + 0.38 * np.array(overlay.COLOURS[1])
    assert np.abs(painted[25, 30] - inside).max() <= 0.5
    assert (painted[0:4] == 100).all()


def test_truth_and_prediction_have_panels_of_their_own_and_the_truth_is_outlined_on_the_prediction():
    truth, prediction = mask((1, 5, 5, 25, 25)), mask((2, 10, 30, 30, 50))
    picture = overlay.overlay(GREY, prediction, CLASSES, truth=truth, title="a case")
    assert picture.dtype == np.uint8 and picture.shape[1] == 3 * 330 + 10
    image, left, right = panels(picture, 3)
    first, second = overlay.COLOURS[:2]
    assert not (image == first).all(2).any()
    assert (left == first).all(2).sum() > 100 and not (left == second).all(2).any()
    assert (right == second).all(2).sum() > 100 and (right == 255).all(2).sum() > 300
    alone = overlay.overlay(GREY, prediction, CLASSES)
    assert alone.shape[1] == 2 * 330 + 10
    assert np.asarray(Image.open(io.BytesIO(overlay.png(picture)))).shape == picture.shape


def test_ignored_pixels_are_hatched_and_colour_images_stay_in_colour():
    colour = np.zeros((40, 60, 3), np.uint8)
    colour[..., 0] = 200
    picture = overlay.overlay(colour, mask((IGNORED, 0, 0, 20, 60)), CLASSES)
    image, panel = panels(picture, 2)
    assert (image == (200, 0, 0)).all(2).any()
    assert (panel == overlay._QUIET).all(2).sum() > 500


@pytest.mark.parametrize("classes", [1, 30, 254])
def test_any_number_of_classes_and_long_names(classes):
    names = [f"a very long name of a class that goes on and on {n}" for n in range(classes)]
    values = np.arange(2400, dtype=np.int64).reshape(40, 60) % (classes + 1)
    picture = overlay.overlay(GREY, values.astype(np.uint8), names, title="t" * 400)
    assert picture.shape[1] == 670


def test_tiny_huge_and_oblong_images():
    for height, width, spacing in ((1, 1, (1, 1)), (8, 900, (1, 1)), (2000, 1500, (1, 1)), (20, 100, (5, 1))):
        image = np.zeros((height, width), np.uint8)
        picture = overlay.overlay(image, image, CLASSES, truth=image, spacing=spacing)
        assert max(picture.shape) < 3 * 650 + 400


def test_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"truth: expected a mask \[40, 60\]"):
        overlay.overlay(GREY, mask(), CLASSES, truth=np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match="prediction: expected values of 0 to 2, or 255, got 3"):
        overlay.overlay(GREY, mask((3, 0, 0, 5, 5)), CLASSES)


def test_the_frame_that_tells_most():
    masks = np.zeros((4, 8, 8), np.uint8)
    assert overlay.telling_frame(masks) == 2
    masks[1, :2] = 1
    masks[3] = IGNORED
    assert overlay.telling_frame(masks) == 1
    truth = np.zeros_like(masks)
    truth[0, 0, 0] = 1
    assert overlay.telling_frame(masks, truth) == 0
    assert overlay.telling_frame(masks, 0 * truth) == 1


def test_colours_are_told_apart_without_red_green_or_blue():
    """Distances in CIELAB after the simulation of Machado, Oliveira and Fernandes (2009) at full severity; 2.3 is just
    noticeable."""
    simulations = {
        "none": np.eye(3),
        "protanopia": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deuteranopia": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.01182, 0.04294, 0.968881],
        ],
        "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def lab(colour, simulation):
        value = np.array(colour) / 255
        linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
        xyz = to_xyz @ np.clip(np.array(simulation) @ linear, 0, 1) / (0.9505, 1, 1.089)
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    for name, simulation in simulations.items():
        for a, b in itertools.combinations(overlay.COLOURS, 2):
            assert np.linalg.norm(lab(a, simulation) - lab(b, simulation)) > 14, (name, a, b)
