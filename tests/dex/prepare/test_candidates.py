"""Views that may show the same: found among others of their kind, with the way one has to be laid upon the other."""

import itertools

import numpy as np
import pytest
from PIL import Image

from dex.data import open_dataset
from dex.prepare import candidates as module
from dex.prepare.candidates import LEAST, TURNS, candidates, turned, view


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    dataset = open_dataset(None)
    return [dataset[index].image.numpy().transpose(1, 2, 0) for index in range(0, len(dataset), 9)]


@pytest.fixture(scope="module")
def views(images):
    return np.stack([view(image) for image in images])


def test_the_eight_ways_a_square_can_lie():
    square = np.arange(9).reshape(3, 3)
    ways = {turned(square, turn).tobytes() for turn in range(TURNS)}
    assert len(ways) == TURNS
    assert ways == {np.rot90(one, k).tobytes() for one, k in itertools.product((square, square[:, ::-1]), range(4))}
    assert np.array_equal(turned(square, 1), square[:, ::-1]) and np.array_equal(turned(square, 6), np.rot90(square))


@pytest.mark.parametrize("turn", range(TURNS))
def test_every_turn_is_found(images, views, turn):
    chosen = list(range(0, len(images), 7))
    back = next(
        one
        for one in range(TURNS)
        if np.array_equal(turned(turned(np.arange(4).reshape(2, 2), turn), one).ravel(), range(4))
    )
    tried = np.stack([turned(images[place].transpose(2, 0, 1), turn).transpose(1, 2, 0) for place in chosen])
    result = candidates(views, np.stack([view(np.ascontiguousarray(image)) for image in tried]))
    for row, place in enumerate(chosen):
        pairs = list(zip(result.of[row].tolist(), result.turn[row].tolist(), strict=True))
        assert (place, back) in pairs and result.score[row].max() > 0.999
        here = pairs.index((place, back))
        assert result.start[row, here].tolist() == [0, 0, 1]


@pytest.mark.parametrize("place, corner", [((0, 0, 244, 244), -1), ((12, 12, 256, 256), 1)])
def test_a_crop_says_where_it_lies(images, views, place, corner):
    """A twentieth cut off below and right, or above and left: the other way round, it is that much larger."""
    chosen = list(range(0, len(images), 7))
    cut = [Image.fromarray(images[one]).resize((256, 256), Image.Resampling.BICUBIC, box=place) for one in chosen]
    result = candidates(views, np.stack([view(np.asarray(image)) for image in cut]))
    first = [result.of[row].tolist().index(one) for row, one in enumerate(chosen)]
    start = result.start[np.arange(len(chosen)), first]
    assert np.median(start[:, 2]) == pytest.approx(0.95)
    assert np.sign(np.median(start[:, 0])) == np.sign(np.median(start[:, 1])) == corner


def test_parts_and_few_images_change_nothing(views, monkeypatch):
    whole = candidates(views, views[:20])
    monkeypatch.setattr(module, "_ROWS", 7)
    monkeypatch.setattr(module, "_BLOCK", 13)
    parts = candidates(views, views[:20])
    assert np.array_equal(whole.of, parts.of) and np.array_equal(whole.turn, parts.turn)
    one = candidates(views[:1], views[:3])
    assert one.of[0, 0] == 0 and set(one.of.ravel().tolist()) <= {0, -1} and (one.score[one.of >= 0] >= LEAST).all()


def test_nothing_is_like_an_even_grey(views):
    assert (candidates(views, np.full((1, 32, 32), 90, np.uint8)).of == -1).all()
