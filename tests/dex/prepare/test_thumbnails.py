"""Thumbnails: what they show, how large they are, and which of them are shown."""

import io
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dex.prepare import thumbnails
from dex.prepare.thumbnails import LeftOut, Thumbnail


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def named(name, reason="blank", **fields):
    given = {"source": "s", "path": f"{name}.png", "detail": "", "groups": ("g",), "ids": (), "pictures": (b"x",)}
    return Thumbnail(reason=reason, name=name, public=False, **given | fields)


@pytest.mark.parametrize(
    "levels, values",
    [
        ([[-5.0, np.nan], [5.0, 0.0]], [[0, 128], [255, 128]]),
        (np.full((2, 2), 7, np.int16), [[0, 0], [0, 0]]),
        (np.array([[0, 200], [90, 30]], np.uint8), [[0, 200], [90, 30]]),
        (np.array([[0, 1], [2, 2]], np.uint8), [[0, 127], [255, 255]]),
    ],
)
def test_numbers_become_visible(levels, values):
    """Blocks, since it is a JPEG."""
    frame = np.kron(np.asarray(levels), np.ones((16, 16))).astype(np.asarray(levels).dtype)
    got = opened(thumbnails.thumbnail(frame))[8::16, 8::16].astype(int)
    assert np.abs(got - values).max() <= 2


def test_a_thumbnail_is_small():
    noise = np.random.default_rng(0).integers(0, 256, (900, 300, 3), np.uint8)
    data = thumbnails.thumbnail(noise)
    assert opened(data).shape == (160, 53, 3) and len(data) < 8_000
    square = thumbnails.of_slice(np.random.default_rng(0).integers(0, 2**16, (256, 256), np.uint16))
    assert opened(square).shape == (160, 160) and len(square) < 16_000


def test_a_few_of_each_reason_are_chosen_whatever_their_order():
    some = [named(str(number), reason) for number in range(40) for reason in ("blank", "foreground")]
    chosen = thumbnails.choose(some)
    assert Counter(one.reason for one in chosen) == {"blank": thumbnails.SHOWN, "foreground": thumbnails.SHOWN}
    random.Random(0).shuffle(some)
    assert thumbnails.choose(some) == thumbnails.choose(chosen) == chosen


def test_what_a_withdrawal_takes():
    some = [
        named("theirs", groups=("p2",)),
        named("a pair", groups=("p1", "p2")),
        named("by id", ids=("one", "two")),
        named("by unit", path="unit"),
        named("nobody knows", groups=()),
        named("another's", groups=("p3",), ids=("three",)),
    ]
    left = thumbnails.without(some, frozenset({"p2"}), frozenset({"two"}), frozenset({"unit"}))
    assert [one.name for one in left] == ["another's"]


def test_names_are_no_html_and_any_bytes():
    html = thumbnails.figures([named("<b>\udcff", detail="<i>", pictures=())])
    assert "&lt;b&gt;\\udcff" in html and "&lt;i&gt;" in html and "no image" in html


def test_the_record_holds_all_of_it():
    left = LeftOut(Counter({"blank": 3}), [named("a", pictures=(b"1", b"2")), named("\udcff")])
    assert LeftOut.from_json(left.to_json()) == left
