"""What a model says of frames, at their own size."""

import numpy as np
import pytest
import torch

from dex.tasks.load import load_task_model
from dex.tasks.probabilities import of_frames


@pytest.fixture(scope="module")
def loaded(finetuned):
    return load_task_model(finetuned)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 40, 56)).astype(np.uint8)


@pytest.mark.parametrize("window", [None, 2.0])
def test_probabilities_have_the_frames_size_and_add_up_to_1(loaded, images, window):
    parts = list(of_frames(loaded, images, batch_size=2, window=window))
    assert [len(part) for part in parts] == [2, 2, 1]
    whole = torch.cat(parts)
    assert whole.shape == (5, 2, 40, 56) and whole.dtype == torch.float32
    torch.testing.assert_close(whole.sum(1), torch.ones(5, 40, 56), atol=1e-4, rtol=0)
    again = torch.cat(list(of_frames(loaded, images, batch_size=5, window=window)))
    torch.testing.assert_close(again, whole, atol=1e-4, rtol=0)


def test_colour_and_grey_of_one_shade_are_one(loaded, images):
    (grey,) = of_frames(loaded, images)
    (colour,) = of_frames(loaded, np.stack([images] * 3, -1))
    torch.testing.assert_close(colour, grey, atol=1e-5, rtol=0)


def test_spacing_changes_what_the_model_sees(loaded, images):
    (plain,) = of_frames(loaded, images)
    (stretched,) = of_frames(loaded, images, (2.0, 1.0))
    assert stretched.shape == plain.shape and (stretched - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"images": np.zeros((1, 8, 8), np.float32)}, "images: expected uint8"),
        ({"images": np.zeros((1, 8, 8, 4), np.uint8)}, "images"),
        ({"batch_size": 0}, "batch_size"),
        ({"window": 0.5}, "window: expected a factor above 1"),
    ],
)
def test_what_cannot_be_shown_is_refused(loaded, images, changes, word):
    arguments = {"images": images} | changes
    with pytest.raises(ValueError, match=word):
        list(of_frames(loaded, arguments.pop("images"), **arguments))


def test_the_middle_of_a_window_is_what_a_window_says(loaded):
    image = np.zeros((1, 64, 64), np.uint8)
    image[0, 24:40, 24:40] = 200
    (windows,) = of_frames(loaded, image, window=2.0)
    (alone,) = of_frames(loaded, image[:, 16:48, 16:48])
    # The window in the middle has the largest share there; its neighbours see half of the square.
    assert (windows[0, 1, 30:34, 30:34] - alone[0, 1, 14:18, 14:18]).abs().mean() < 0.2
