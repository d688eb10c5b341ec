"""Values, palettes and colours of masks become classes, or a named error."""

import numpy as np
import pytest
from PIL import Image

from dex.prepare import readers
from dex.tasks import masks
from dex.tasks.own import parse_classes
from dex.tasks.task import Layout, Parts, Task

LABELS = np.zeros((12, 17), np.uint8)
LABELS[2:5, 3:9], LABELS[7:10, 11:16] = 1, 2
PALETTE = [0, 0, 0, 255, 0, 0, 0, 0, 255]


def task(*entries, **fields):
    classes, values = parse_classes(entries)
    return Task("t", classes=classes, modality="endoscopy", layout=Layout("own", values=values), **fields)


@pytest.fixture
def image(tmp_path):
    Image.fromarray(np.zeros((*LABELS.shape, 3), np.uint8)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.fixture
def stored(image):
    (stack,) = readers.read([image], "picture")
    return lambda target, task: masks.stored(target, task, stack, image)[0]


def test_numbers_mean_the_classes_in_order(tmp_path, stored, save_png):
    assert np.array_equal(stored(save_png(tmp_path / "m.png", LABELS), task("one", "two")), LABELS)
    np.save(tmp_path / "m.npy", LABELS.astype(np.int64))
    assert np.array_equal(stored(tmp_path / "m.npy", task("one", "two")), LABELS)
    Image.fromarray(LABELS.astype(np.float32)).save(tmp_path / "m.tif")
    assert np.array_equal(stored(tmp_path / "m.tif", task("one", "two")), LABELS)
    Image.fromarray(LABELS.astype(np.uint16) * 300).save(tmp_path / "m16.png")
    assert np.array_equal(stored(tmp_path / "m16.png", task("one=300", "two=600")), LABELS)


def test_stated_values_background_and_ignore(tmp_path, stored, save_png):
    values = np.array([7, 255, 40], np.uint8)[LABELS]
    mask = stored(save_png(tmp_path / "m.png", values), task("background=7", "lesion=255", "ignore=40"))
    assert np.array_equal(mask, np.array([0, 1, 255])[LABELS])


def test_a_palette_gives_its_numbers_or_its_colours(tmp_path, stored, save_png):
    mask = save_png(tmp_path / "m.png", LABELS, PALETTE)
    assert np.array_equal(stored(mask, task("one=1", "two=2")), LABELS)
    assert np.array_equal(stored(mask, task("two=#0000FF", "one=#ff0000")), np.array([0, 2, 1])[LABELS])


def test_colours_of_rgb_with_an_opaque_alpha_channel_or_without(tmp_path, stored, save_png):
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)[LABELS]
    both = task("one=#ff0000", "two=#0000ff")
    assert np.array_equal(stored(save_png(tmp_path / "m.png", colours), both), LABELS)
    opaque = np.dstack([colours, np.full(LABELS.shape, 255, np.uint8)])
    assert np.array_equal(stored(save_png(tmp_path / "a.png", opaque), both), LABELS)
    opaque[0, 0, 3] = 0
    with pytest.raises(ValueError, match="no transparency"):
        stored(save_png(tmp_path / "b.png", opaque), both)
    with pytest.raises(ValueError, match=r"expected numbers, got colours .* #000000, #0000ff, #ff0000"):
        stored(tmp_path / "m.png", task("one", "two"))


def test_numbered_instances_are_one_class(tmp_path, stored):
    instances = (LABELS.astype(np.uint16) * 700) + (LABELS > 0)
    Image.fromarray(instances).save(tmp_path / "m.png")
    assert np.array_equal(stored(tmp_path / "m.png", task("nucleus=nonzero")), LABELS > 0)
    Image.fromarray(LABELS == 1).save(tmp_path / "one.png")
    assert np.array_equal(stored(tmp_path / "one.png", task("nucleus=nonzero")), LABELS == 1)


def test_a_jpeg_is_a_mask_of_one_class_alone(tmp_path, stored):
    wide = np.kron(LABELS > 0, np.ones((1, 1))).astype(np.uint8) * 255
    Image.fromarray(wide).save(tmp_path / "m.jpg", quality=70)
    assert np.mean(stored(tmp_path / "m.jpg", task("lesion=nonzero")) == (LABELS > 0)) > 0.97
    with pytest.raises(ValueError, match="save masks as PNG"):
        stored(tmp_path / "m.jpg", task("lesion=255"))


@pytest.mark.parametrize("entries", [("one",), ("one=1",)])
def test_an_unknown_value_is_named_with_count_and_place(tmp_path, stored, save_png, entries):
    mask = save_png(tmp_path / "m.png", LABELS)
    with pytest.raises(
        ValueError, match=r"0 background, 1 one, got 2 in 15 pixels of .*m.png, 2 first in frame 0, row 7, column 11"
    ):
        stored(mask, task(*entries))


def test_nothing_is_ignored_that_nobody_said(tmp_path, stored, save_png):
    with pytest.raises(ValueError, match="got 255 in 33 pixels"):
        stored(save_png(tmp_path / "m.png", (LABELS > 0).astype(np.uint8) * 255), task("lesion"))


def test_parts_are_laid_upon_each_other_in_the_order_of_classes(tmp_path, stored, save_png):
    one = save_png(tmp_path / "one.png", (LABELS == 1).astype(np.uint8) * 255)
    two = save_png(tmp_path / "two.png", (LABELS > 0).astype(np.uint8))
    assert np.array_equal(stored(Parts((one, two)), task("one", "two")), np.array([0, 2, 2])[LABELS])
    assert np.array_equal(stored(Parts((one, None)), task("one", "two")), LABELS == 1)


def polygons(path, name="Epithelial", extra=""):
    vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in ((3, 2), (8, 2), (8, 4), (3, 4)))
    path.write_text(
        f'{extra}<Annotations MicronsPerPixel="0.25"><Annotation Id="1"><Attributes><Attribute Name="{name}" Id="0"/>'
        f'</Attributes><Regions><Region Id="1"><Vertices>{vertices}</Vertices></Region></Regions></Annotation>'
        "</Annotations>"
    )
    return path


def test_polygons_of_imagescope(tmp_path, stored):
    known = Task("t", classes=("epithelial",), modality="pathology", layout=Layout("own", values=(("Odd", "ignore"),)))
    assert np.array_equal(stored(polygons(tmp_path / "m.xml"), known), LABELS == 1)
    assert np.array_equal(stored(polygons(tmp_path / "m.xml", "odd"), known), np.where(LABELS == 1, 255, 0))
    with pytest.raises(ValueError, match="expected polygons of epithelial, got 'Fat'"):
        stored(polygons(tmp_path / "m.xml", "Fat"), known)


@pytest.mark.parametrize("text", ["", "<a/>", "<Annotations>", "\0\1\2"])
def test_other_xml_is_refused(tmp_path, stored, text):
    (tmp_path / "m.xml").write_text(text)
    with pytest.raises(ValueError, match="polygons of ImageScope"):
        stored(tmp_path / "m.xml", task("one"))


def test_entities_are_refused_unread(tmp_path, stored):
    bomb = '<!DOCTYPE a [<!ENTITY b "bbbbbbbb">]>'
    with pytest.raises(ValueError, match="without entities"):
        stored(polygons(tmp_path / "m.xml", extra=bomb), task("epithelial"))


def test_a_map_of_probabilities_is_no_mask(tmp_path, stored):
    Image.fromarray(LABELS.astype(np.float32) / 3).save(tmp_path / "m.tif")
    with pytest.raises(ValueError, match="whole numbers"):
        stored(tmp_path / "m.tif", task("one", "two"))
    np.save(tmp_path / "m.npy", LABELS / 3)
    with pytest.raises(ValueError, match="probabilities"):
        stored(tmp_path / "m.npy", task("one", "two"))


def test_files_that_are_no_masks(tmp_path, stored):
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "m.txt").write_text("mask")
    (tmp_path / "link.png").symlink_to(tmp_path / "m.png")
    for name in ("m.png", "m.txt", "link.png", "nothing.png"):
        with pytest.raises(ValueError, match=f"mask: expected .*{name}"):
            stored(tmp_path / name, task("one"))


def test_values_for_a_message(tmp_path, save_png):
    assert masks.values_in(save_png(tmp_path / "m.png", LABELS)) == ["0", "1", "2"]
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)[LABELS]
    assert masks.values_in(save_png(tmp_path / "c.png", colours)) == ["#000000", "#0000ff", "#ff0000"]
    assert masks.values_in(tmp_path / "nothing.png") == []


def test_a_video_that_does_not_say_its_length_has_no_mask(tmp_path, image, save_png):
    (stack,) = readers.read([image], "picture")
    stack.length = None
    target = save_png(tmp_path / "m.png", LABELS)
    for given in (target, Parts((target,))):
        with pytest.raises(ValueError, match="image.png is a video"):
            masks.stored(given, task("one"), stack, image)
