"""DICOM segmentations on the series that they were drawn on."""

import numpy as np
import pydicom
import pytest

from dex.prepare import readers
from dex.tasks import segmentations
from dex.tasks.own import parse_classes
from dex.tasks.task import Layout, Task

LABELS = np.zeros((4, 16, 14), np.uint8)
LABELS[1:3, 2:9, 3:8], LABELS[2:, 10:13, 9:13] = 1, 2
NAMES = ["Liver", "Tumour"]


@pytest.fixture
def series(tmp_path, save_series):
    heads = save_series(tmp_path / "s", LABELS.astype(np.int16) * 100)
    (stack,) = readers.read(sorted((tmp_path / "s").iterdir()), "dicom", decide=None)
    return heads, lambda target, task: segmentations.read(target, task, stack, tmp_path / "s")


def task(*entries):
    classes, values = parse_classes(entries)
    return Task("t", classes=classes, modality="CT", layout=Layout("own", values=values))


def test_segments_by_label_by_number_and_by_what_the_task_says(tmp_path, series, save_segmentation):
    heads, read = series
    seg = save_segmentation(tmp_path / "seg.dcm", LABELS, heads, NAMES)
    assert np.array_equal(read(seg, task("liver", "tumour")), LABELS)
    assert np.array_equal(read(seg, task("tumour", "liver")), np.array([0, 2, 1])[LABELS])
    assert np.array_equal(read(seg, task("one", "two")), LABELS)
    assert np.array_equal(read(seg, task("lesion=Tumour", "background=1")), LABELS == 2)
    assert np.array_equal(read(seg, task("lesion=1", "ignore=2")), np.array([0, 1, 255])[LABELS])


def test_a_folder_that_holds_the_segmentation_alone(tmp_path, series, save_segmentation):
    heads, read = series
    save_segmentation(tmp_path / "seg/1.dcm", LABELS, heads, NAMES)
    assert np.array_equal(read(tmp_path / "seg", task(*NAMES)), LABELS)
    save_segmentation(tmp_path / "seg/2.dcm", LABELS, heads, NAMES)
    with pytest.raises(ValueError, match="holds 2 DICOM files"):
        read(tmp_path / "seg", task(*NAMES))


def test_unknown_segments_are_named(tmp_path, series, save_segmentation):
    heads, read = series
    seg = save_segmentation(tmp_path / "seg.dcm", LABELS, heads, NAMES)
    with pytest.raises(
        ValueError, match=r"expected segments of liver, got 2 'tumour' \(1 of 2 segments\) in .*seg.dcm"
    ):
        read(seg, task("liver"))


def test_other_objects_and_other_places_are_refused(tmp_path, series, save_segmentation):
    heads, read = series
    with pytest.raises(ValueError, match="is not a segmentation, but CT"):
        read(tmp_path / "s" / "000.dcm", task(*NAMES))
    with pytest.raises(ValueError, match=r"lies on none of the 4"):
        read(save_segmentation(tmp_path / "far.dcm", LABELS, heads, NAMES, shift=1.0), task(*NAMES))
    with pytest.raises(ValueError, match="expected the size of its image, 16 x 14, got 15 x 14"):
        read(save_segmentation(tmp_path / "small.dcm", LABELS[:, 1:], heads, NAMES), task(*NAMES))


@pytest.mark.parametrize("name", ["SegmentSequence", "PerFrameFunctionalGroupsSequence", "PixelData"])
def test_a_segmentation_that_lacks_something_is_refused(tmp_path, series, save_segmentation, name):
    heads, read = series
    head = pydicom.dcmread(save_segmentation(tmp_path / "seg.dcm", LABELS, heads, NAMES))
    delattr(head, name)
    head.save_as(tmp_path / "seg.dcm")
    with pytest.raises(ValueError, match=r"mask: expected a DICOM segmentation .*seg.dcm"):
        read(tmp_path / "seg.dcm", task(*NAMES))
