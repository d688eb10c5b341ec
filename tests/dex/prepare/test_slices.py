"""From stacks to stored images: against Pillow's own resizing, and values worked out by hand."""

import numpy as np
import pytest
from PIL import Image

from dex.data import open_dataset
from dex.prepare import normalise, readers
from dex.prepare.readers import Geometry, Refused, Stack
from dex.prepare.slices import OVERSAMPLING, enough, resize, resize_eight, slices
from dex.prepare.sources import Source, Tile

DRAW = np.random.default_rng(8)


def stack_of(array, quantity="raw", **fields):
    """A stack of [F, H, W] or [F, H, W, 3]."""
    values = {
        "quantity": quantity,
        "length": len(array),
        "shape": array.shape[1:3],
        "dtype": array.dtype,
        "channels": array.shape[3] if array.ndim == 4 else 1,
        "load": lambda wanted: ((n, array[n]) for n in range(len(array)) if wanted(n)),
        "holds": lambda stored: True,
    }
    return Stack(**(values | fields))


def source(**fields):
    return Source(**({"name": "test", "modality": "X-ray", "normalisation": "display"} | fields))


def images(stack, size=16, bits=8, **fields):
    return list(slices(stack, source(**fields), size, bits))


def resized(unit, width, height, box=None):
    """What Pillow makes of a whole float image at once."""
    image = Image.fromarray(unit.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.asarray(image).clip(0, 1)


def test_the_same_size_is_left_alone():
    array = DRAW.integers(0, 256, (1, 16, 16), dtype=np.uint8)
    (one,) = images(stack_of(array, "display8"))
    assert one.label == "image" and np.array_equal(one.image, array[0]) and one.small
    (one,) = images(stack_of(array, "display8"), bits=16)
    assert one.image.dtype == np.uint16 and np.array_equal(one.image, array[0].astype(np.uint16) * 257)


@pytest.mark.parametrize("bits, top", [(8, 255), (16, 65535)])
def test_one_rounding_at_the_end(bits, top):
    array = DRAW.normal(0, 300, (1, 70, 50))
    (one,) = images(stack_of(array, "HU"), size=32, bits=bits, modality="CT", normalisation="ct")
    unit = resized((array[0].clip(-200, 400) + 200) / 600, 23, 32)
    content = one.image[:, 4:27]
    assert np.abs(content - unit * top).max() <= 0.5 + 2e-3 * top / 255
    assert not one.small


def test_padding_is_the_background_of_the_content():
    array = np.full((1, 20, 40), 70, np.uint8)
    array[0, 5:15, 10:30] = 200
    (one,) = images(stack_of(array, "display8"), size=40)
    assert np.array_equal(one.image[10:30], array[0]) and (one.image[[*range(10), *range(30, 40)]] == 70).all()
    assert one.share == 0.25  # of the content, not of the padded image
    values = np.full((1, 20, 40), 0.5, np.float32)
    values[0, 5:15, 10:30] = 1
    (one,) = images(stack_of(values, "SUV"), size=40, bits=16, modality="PET", normalisation="suv")
    assert (one.image[0] == round(0.5 / 20 * 65535)).all()
    colour = np.zeros((1, 20, 40, 3), np.uint8)
    colour[:] = (10, 200, 30)
    (one,) = images(stack_of(colour, "display8"), size=40)
    assert (one.image == (10, 200, 30)).all()


def test_pixels_become_square_by_the_spacing():
    array = DRAW.integers(0, 256, (1, 40, 40), dtype=np.uint8)
    (one,) = images(stack_of(array, "display8", spacing=(1.0, 2.0)), size=40)
    expected = np.rint(resized(array[0] / 255, 40, 20) * 255)
    assert np.abs(one.image[10:30] - expected).max() <= 1
    (one,) = images(stack_of(array, "display8", spacing=(1.0, 2.0)), size=40, fit="crop")
    expected = np.rint(resized(array[0] / 255, 40, 40, box=(10, 0, 30, 40)) * 255)
    assert np.abs(one.image - expected).max() <= 1
    geometry = Geometry((0, 1, 2), (1, 1, 1), (1.0, 1.0, 4.0))
    volume = stack_of(DRAW.integers(0, 256, (10, 40, 40), dtype=np.uint8), "display8", geometry=geometry, volume=True)
    first = images(volume, size=40, planes=("coronal",))[0]
    assert first.label == "coronal-000" and first.small  # ten slices of 4 mm fill the square, but are few


def test_crop_by_modality():
    array = DRAW.integers(0, 256, (1, 30, 51, 3), dtype=np.uint8)
    (one,) = images(stack_of(array, "display8"), size=30, modality="fundus")
    expected = np.stack([resized(array[0, :, :, c] / 255, 30, 30, box=(10.5, 0, 40.5, 30)) for c in range(3)], 2)
    assert one.image.shape == (30, 30, 3) and np.abs(one.image - expected * 255).max() <= 1
    assert images(stack_of(array, "display8"), size=30, modality="fundus", fit="pad")[0].image.shape == (30, 30, 3)


def test_large_pictures_go_in_strips(monkeypatch):
    array = DRAW.integers(0, 256, (1, 301, 200, 3), dtype=np.uint8)
    (whole,) = images(stack_of(array, "display8"), size=64)
    monkeypatch.setattr("dex.prepare.slices._STRIP", 5000)
    (strips,) = images(stack_of(array, "display8"), size=64)
    assert np.array_equal(whole.image, strips.image)


def test_monochrome1_is_inverted_after_the_rule():
    array = np.arange(256, dtype=np.uint16).reshape(1, 16, 16) * 16
    (plain,) = images(stack_of(array))
    (inverted,) = images(stack_of(array, inverted=True))
    assert np.abs(inverted.image + plain.image.astype(int) - 255).max() <= 1  # a half is rounded to even
    assert inverted.image[0, 0] == 255 and inverted.image[-1, -1] == 0


def test_tiles_lie_beside_the_whole():
    array = DRAW.integers(0, 256, (2, 20, 30), dtype=np.uint8)
    tiles = (Tile(8, 8, (4, 2, 24, 20)), Tile(20, 10))
    got = images(stack_of(array, "display8"), size=8, tiles=tiles)
    labels = [one.label for one in got[: len(got) // 2]]
    assert labels == ["frame-0000", *(f"frame-0000-x{x}-y{y}-s8" for y in (2, 10) for x in (4, 12))] + [
        "frame-0000-x0-y0-s20",
        "frame-0000-x10-y0-s20",
    ]
    cut = {one.label: one.image for one in got}["frame-0001-x12-y10-s8"]
    assert np.array_equal(cut, array[1, 10:18, 12:20])
    only = images(stack_of(array, "display8"), size=8, tiles=tiles, whole=False)
    assert [one.label for one in only] == [one.label for one in got if "-s" in one.label]
    assert all(one.small for one in only)


def test_grey_stored_as_colour_becomes_grey():
    grey = DRAW.integers(0, 256, (1, 16, 16, 1), dtype=np.uint8)
    (one,) = images(stack_of(np.repeat(grey, 3, 3), "display8"), bits=16)
    assert np.array_equal(one.image, grey[0, :, :, 0].astype(np.uint16) * 257)
    colour = np.repeat(grey, 3, 3)
    colour[0, 3, 3, 1] ^= 1
    (one,) = images(stack_of(colour, "display8"), bits=16)
    assert one.image.dtype == np.uint8 and np.array_equal(one.image, colour[0])


def test_the_frame_stride_is_for_what_is_no_volume_and_the_slice_stride_for_volumes():
    array = DRAW.integers(0, 256, (5, 16, 16), dtype=np.uint8)
    assert [s.label for s in images(stack_of(array, "display8"), frame_stride=2)] == [
        "frame-0000",
        "frame-0002",
        "frame-0004",
    ]
    assert len(images(stack_of(array, "display8", volume=True), frame_stride=2)) == 5
    volume = images(stack_of(array, "display8", volume=True))
    third = images(stack_of(array, "display8", volume=True), slice_stride=3)
    assert [s.label for s in third] == [volume[0].label, volume[3].label]
    assert np.array_equal(third[1].image, volume[3].image)
    assert len(images(stack_of(array, "display8"), slice_stride=3)) == 5


def test_what_a_rule_refuses():
    array = DRAW.integers(0, 256, (1, 16, 16), dtype=np.uint16)
    with pytest.raises(Refused, match="ct needs HU"):
        images(stack_of(array), normalisation="ct")
    with pytest.raises(Refused, match="constant"):
        images(stack_of(array * 0), normalisation="mr")
    with pytest.raises(ValueError, match="bits"):
        images(stack_of(array), bits=12)
    with pytest.raises(ValueError, match="size"):
        images(stack_of(array), size=0)


def test_parts_are_scaled_each_by_its_own_numbers():
    array = DRAW.integers(0, 1000, (4, 40, 40), dtype=np.uint16)
    array[1] = array[0] * 50
    array[2] = 7  # constant: nothing to scale
    stack = stack_of(array, parts=(0, 1, 2, 3), inverted=True)
    frames = images(stack, size=40, normalisation="mr")
    assert [frame.label for frame in frames] == ["frame-0000", "frame-0001", "frame-0003"]
    assert np.array_equal(frames[0].image, frames[1].image)
    assert [str(one) for one in stack.refused] == [
        "constant: the percentiles (1.0, 99.0) coincide: nearly all of it is one value",
    ]
    alone = images(stack_of(array[3:], inverted=True), size=40, normalisation="mr")
    assert np.array_equal(frames[2].image, alone[0].image)
    with pytest.raises(Refused, match="ct needs HU"):
        images(stack_of(array, parts=(0, 1, 2, 3)), normalisation="ct")


def real_images():
    """uint8 [256, 256, 3], one of each modality."""
    dataset = open_dataset(None)
    index = dataset.modality_index()
    return [
        dataset[int(np.flatnonzero(index == m)[3])].image.numpy().transpose(1, 2, 0)
        for m, count in enumerate(dataset.modality_counts().values())
        if count
    ]


BOXES = ((0, 0, 256, 256), (10.5, 0, 245.25, 200), (40, 30, 140, 250), (3, 60, 64, 256))


@pytest.mark.parametrize("box", BOXES)
def test_bytes_are_resized_as_floats_are(box):
    """Where no means are taken: to 400, to a half, and down to a fourth of the sides. Within one level everywhere, and
    the same in all but one of a thousand pixels."""
    other = []
    for image in real_images():
        for pixels in (image, image[:, :, 0]):
            for height, width in ((400, 300), (128, 128), ((box[3] - box[1]) // 3.9 + 1, (box[2] - box[0]) // 3.9 + 1)):
                height, width = int(height), int(width)
                exact = np.rint(resize(pixels, normalise.display, box, height, width) * 255)
                got = resize_eight(pixels, box, height, width)
                assert got.dtype == np.uint8 and got.shape == exact.shape
                assert np.abs(got - exact).max() <= 1
                other.append((got != exact).ravel())
    assert np.concatenate(other).mean() < 1e-3


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("by", [4, 5.3, 8, 11])
def test_means_of_neighbours_stay_near_the_exact_levels(box, by, monkeypatch):
    """The stated bound, at small sizes, where neighbours differ most."""
    for image in real_images():
        height, width = round((box[3] - box[1]) / by), round((box[2] - box[0]) / by)
        got = resize_eight(image, box, height, width)
        difference = np.abs(got - np.rint(resize(image, normalise.display, box, height, width) * 255))
        assert difference.mean() <= 1.4
        monkeypatch.setattr("dex.prepare.slices._STRIP", 5000)
        assert np.array_equal(resize_eight(image, box, height, width), got)


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_a_jpeg_at_a_part_of_its_sides_gives_nearly_the_same_slice(tmp_path, fit):
    settings = {"size": 24, "bits": 8}
    for image in real_images():
        Image.fromarray(image[:250, :203]).save(tmp_path / "a.jpg", quality=95)
        both = []
        for least in (None, enough(source(), **settings)):
            (stack,) = readers.read([tmp_path / "a.jpg"], "picture", enough=least)
            both += slices(stack, source(fit=fit), **settings)
        assert stack.extent == (250 / 4, 203 / 4)
        whole, part = (one.image.astype(int) for one in both)
        assert whole.shape == part.shape and (whole != part).any()
        content = slice(2, 21) if fit == "pad" else slice(None)  # the level around it is one of many in a small ring
        assert np.abs(whole - part)[:, content].mean() <= 1.4 and not both[1].small


def test_what_needs_the_whole_picture():
    assert enough(source(), 256, 8) == OVERSAMPLING * 256 == enough(source(normalisation="ct", modality="CT"), 256, 8)
    assert enough(source(), 256, 16) is None
    for fields in ({"normalisation": "mr"}, {"normalisation": "ct", "slope": 2.0}, {"tiles": (Tile(8, 8),)}):
        assert enough(source(**fields), 256, 8) is None
