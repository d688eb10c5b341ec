"""The forms in which a user's own folder may come."""

import json

import pytest

from dex.tasks import own, patterns
from dex.tasks.task import Layout, Task

OWN = Task("own", layout=Layout("own"))


@pytest.fixture
def held(tmp_path):
    def make(*paths, task=OWN):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        return own.of_folder(patterns.listed(tmp_path), task)

    return make


def shown(found):
    return [(item.image, item.label or item.mask, item.split, item.patient) for item in found.items]


def test_a_folder_for_each_class(held):
    found = held("A/1.png", "A/p 1/2.png", "B/p2/x/y/3.jpg", "B/notes.txt", "readme.md")
    assert found.task.kind == "classification" and found.task.metric == "auc"
    assert shown(found) == [
        ("A/1.png", "A", "", ""),
        ("A/p 1/2.png", "A", "", "p 1"),
        ("B/p2/x/y/3.jpg", "B", "", "p2"),
    ]


def test_a_folder_for_each_side_and_class(held):
    found = held("train/A/1.png", "Validation/A/2.png", "test/B/p/3.png")
    assert shown(found) == [
        ("Validation/A/2.png", "A", "val", ""),
        ("test/B/p/3.png", "B", "test", "p"),
        ("train/A/1.png", "A", "train", ""),
    ]


def test_series_in_folders_of_classes(held):
    found = held("A/s1/0.dcm", "A/s1/1.dcm", "B/s2/0.dcm", "train/A/s3/1.dcm")
    assert [item.image for item in found.items] == ["train/A/s3"]


def test_images_and_masks(held):
    found = held("images/a.b.png", "masks/a.b.png", "images/c.jpg", "masks/c.tif")
    assert found.task.kind == "segmentation" and found.task.metric == "dice"
    assert shown(found) == [("images/a.b.png", "masks/a.b.png", "", ""), ("images/c.jpg", "masks/c.tif", "", "")]


@pytest.mark.parametrize(
    ("image", "mask", "side", "patient"),
    [
        ("train/images/1.png", "train/masks/1.png", "train", ""),
        ("images/test/1.png", "masks/test/1.png", "test", ""),
        ("images/1.nii.gz", "labels/1.nii.gz", "", ""),
        ("images/1.nii.gz", "masks/1_seg.nii.gz", "", ""),
        ("images/p1/0.dcm", "masks/p1.nii.gz", "", ""),
        ("images/p1/0.dcm", "masks/p1/seg.dcm", "", ""),
        ("x.png", "x_mask.png", "", ""),
        ("p7/ct.nii.gz", "p7/ct_seg.nii.gz", "", "p7"),
        ("val/p7/ct.nii.gz", "val/p7/ct_label.nii", "val", "p7"),
    ],
)
def test_places_of_masks(held, image, mask, side, patient):
    (item,) = held(image, mask).items
    of_series = image.endswith(".dcm")
    assert item.image == (image.rpartition("/")[0] if of_series else image)
    assert item.mask == (mask.rpartition("/")[0] if mask.endswith("/seg.dcm") else mask)
    assert (item.split, item.patient) == (side, patient)


def test_an_image_without_a_mask_and_one_with_two(held):
    with pytest.raises(ValueError, match=r"images/b.png has none in masks/ \(1 of 2 images have none\)"):
        held("images/a.png", "images/b.png", "masks/a.png")
    with pytest.raises(ValueError, match=r"one mask per image; .*images/a.png has 2: masks/a.png, masks/a.tif"):
        held("masks/b.png", "masks/a.tif")


def test_two_images_of_one_mask(held):
    with pytest.raises(ValueError, match=r"one image per mask; .*masks/a.png has 2: images/a.jpg, images/a.png"):
        held("images/a.png", "images/a.jpg", "masks/a.png")


def test_a_mask_without_an_image_is_said(held):
    found = held("images/a.png", "masks/a.png", "masks/b.png", "masks/readme.txt")
    assert found.notes == ("1 masks belong to no image, such as masks/b.png",)


def test_nnunet(held, tmp_path):
    (tmp_path / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "liver": 1, "tumour": 2, "ignore": 3}})
    )
    found = held("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b_0000.nii.gz")
    assert found.task.classes == ("liver", "tumour")
    assert found.task.layout.values == (("0", "background"), ("1", "liver"), ("2", "tumour"), ("3", "ignore"))
    assert shown(found) == [("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz", "", "")]
    found = held("labelsTs/b.nii.gz")
    assert [(item.image, item.split) for item in found.items] == [
        ("imagesTr/a_0000.nii.gz", "train"),
        ("imagesTs/b_0000.nii.gz", "test"),
    ]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver"}}))
    assert held().task.classes == ("liver",)
    for text in ("[]", '{"labels": {"liver": "x"}}', "{", '{"labels": [1]}'):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(ValueError, match=r"data: expected labels.*dataset.json"):
            held()


def test_nnunet_of_several_channels_or_without_a_mask(held):
    with pytest.raises(ValueError, match=r"a has none|none at .*labelsTr/a.nii.gz"):
        held("imagesTr/a_0000.nii.gz")
    with pytest.raises(ValueError, match="one channel"):
        held("imagesTr/a_0001.nii.gz")


def test_no_form_names_them_all(held):
    with pytest.raises(ValueError, match=r"(?s)--labels.*CLASS/FILE.*images/NAME.*imagesTr.*with 1 files: a.png"):
        held("a.png")


def test_a_folder_with_nothing_in_it(tmp_path):
    with pytest.raises(ValueError, match="with no files"):
        own.of_folder(patterns.listed(tmp_path), OWN)


def test_classes_and_their_values():
    assert own.parse_classes(["a", "b"]) == (("a", "b"), ())
    assert own.parse_classes(["a=1", "b=#FF00aa", "ignore=3"]) == (
        ("a", "b"),
        (("1", "a"), ("#ff00aa", "b"), ("3", "ignore")),
    )
    assert own.parse_classes(["a", "b", "ignore=9"]) == (("a", "b"), (("1", "a"), ("2", "b"), ("9", "ignore")))
    assert own.parse_classes(["a=1", "a=2"]) == (("a",), (("1", "a"), ("2", "a")))


@pytest.mark.parametrize("entries", [[], ["=1"], ["a="], ["a=1", "b"], ["a=1", "b=1"], ["ignore"], ["background=0"]])
def test_classes_that_cannot_be(entries):
    with pytest.raises(ValueError, match="classes: expected"):
        own.parse_classes(entries)


@pytest.fixture
def table(tmp_path):
    def make(text, **options):
        (tmp_path / "data").mkdir(exist_ok=True)
        for name in ("a.png", "ü b.png", "m.png"):
            (tmp_path / "data" / name).touch()
        (tmp_path / "labels.csv").write_bytes(text.encode(options.pop("encoding", "utf-8")))
        return own.of_table(tmp_path / "labels.csv", tmp_path / "data", **options)

    return make


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_table_in_another_encoding_says_how_to_save_it(table, encoding):
    with pytest.raises(ValueError, match=r"labels: expected .*in UTF-8; .*labels\.csv has another encoding"):
        table("file,label,patient\na.png,x,Müller\n", encoding=encoding)


def test_a_table_of_labels(table):
    items = table("file,label,patient,split\na.png,x,p1,train\nü b.png,y,p2,Validation\n", encoding="utf-8-sig")
    assert items == [
        own.Item("a.png", "x", split="train", patient="p1"),
        own.Item("ü b.png", "y", split="val", patient="p2"),
    ]
    assert table("path;label\na.png;x, y\n") == [own.Item("a.png", "x, y")]
    assert table("file,label\n..\\data\\a.png,x\n") == [own.Item("../data/a.png", "x")]
    assert table("file,mask\na.png,m.png\n") == [own.Item("a.png", mask="m.png")]
    assert table("name,class\na,x\n", columns={"file": "name", "label": "class"}, loose=True) == [own.Item("a", "x")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no line"),
        ("a,b\n1,2\n", "has a, b"),
        ("file,label\na.png,\n", "row 2, has none"),
        ("file,label\n,x\n", "row 2, has no file"),
        ("file,label\na.png,x,y\n", "row 2, has too many values"),
        ("file,label\na.png,x\na.png,y\n", "rows 2 and 3, name a.png"),
        ("file,label\nnone.png,x\n", "row 2: nothing at"),
        ("file,label,split\na.png,x,dinner\n", "got 'dinner', in .*row 2"),
        ('file,label\n"a.png,x\n', "labels.csv"),
    ],
)
def test_tables_that_cannot_be(table, text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        table(text)


def test_a_table_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing at"):
        own.of_table(tmp_path / "labels.csv", tmp_path)
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="labels: expected a CSV file"):
        own.of_table(tmp_path / "labels.csv", tmp_path)
