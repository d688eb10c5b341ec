"""Label maps are left out whatever their format; what numbers show: test_label_maps.py."""

from collections import Counter

import numpy as np
import pytest
from small_runs import picture, save_dicom, source, start

from dex.prepare import readers
from dex.prepare.no_images import not_an_image


def labels(count, sides=(64, 64)):
    """int16 [5, H, W]: `count` labels that fill regions, each from the border of its neighbours on."""
    y, x = np.mgrid[0 : sides[0], 0 : sides[1]]
    rng = np.random.default_rng(count)
    places = rng.uniform(8, 56, (count, 2))
    near = np.argmin([(y - a) ** 2 + (x - b) ** 2 for a, b in places], axis=0)
    frames = [np.where((y - 32) ** 2 + (x - 32) ** 2 < (20 + z) ** 2, 1 + near, 0) for z in range(5)]
    return np.stack(frames).astype(np.int16)


@pytest.mark.parametrize(
    ("modality", "count", "offset", "intercept", "tags"),
    [
        ("CT", 20, 0, 0, {}),
        ("CT", 20, 1024, -1024, {}),  # numbers of a CT, which its rescale makes labels
        ("CT", 20, 0, -1024, {}),  # labels under the header of their CT
        ("MR", 6, 0, 0, {}),
        ("MR", 1, 0, 0, {}),
        ("PT", 3, 0, 0, {}),
        ("MR", 2, 500, 0, {"SeriesDescription": "tumor segmentation"}),  # by what it is called
    ],
)
def test_label_maps_of_dicom_are_left_out(here, tmp_path, modality, count, offset, intercept, tags):
    kind = {"CT": "2", "MR": "4", "PT": "128"}[modality]
    number = {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1, "Modality": modality}
    scale = {"RescaleSlope": 1, "RescaleIntercept": intercept, "SOPClassUID": f"1.2.840.10008.5.1.4.1.1.{kind}"}
    for name, frames in (
        ("map", labels(count) + offset),
        ("scan", [picture(z).astype(np.int16) - intercept for z in range(5)]),
    ):
        series = {"SeriesInstanceUID": f"1.2.{len(name)}"} | (tags if name == "map" else {})
        for z, frame in enumerate(frames):
            place = {"ImagePositionPatient": [0, 0, 2 * z], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
            noisy = frame if name == "map" else frame + np.random.default_rng(z).integers(0, 9, frame.shape, np.int16)
            save_dicom(tmp_path / f"root/a/{name}{z}.dcm", noisy.astype(np.int16), **number, **scale, **place, **series)
    fields = {"modality": "auto", "normalisation": "auto", "planes": ("auto",), "trusted": False}
    facts, _ = start([source(tmp_path / "root", **fields)], tmp_path / "out")
    refused = Counter()
    for one in facts["sources"]:
        refused.update(one["refused"])
    assert refused == {"label map": 1} and facts["images"] == 5


def stack_of(frames, **fields):
    frames = np.asarray(frames)
    return readers.Stack(
        quantity="raw",
        length=len(frames),
        shape=frames.shape[1:],
        dtype=frames.dtype,
        load=lambda wanted: iter(()),
        holds=lambda stored: True,
        whole=frames,
        **fields,
    )


def test_what_a_file_declares_and_what_it_is_called():
    scan = [picture(z) for z in range(5)]
    assert not_an_image(stack_of(scan), "nifti", "a/scan.nii") is None
    assert not_an_image(stack_of(scan, declared="derived map"), "nifti", "a.nii").reason == "derived map"
    odd = labels(2) + 500  # three values, and numbers that no list of labels begins with
    assert not_an_image(stack_of(odd), "nifti", "a/1.nii") is None
    for format, path, fields in (("nifti", "a/1_seg.nii", {}), ("dicom", "a/1", {"named": True})):
        assert not_an_image(stack_of(odd, **fields), format, path).reason == "label map"
    assert not_an_image(stack_of(labels(9)), "video", "labels.mp4") is None  # films hold no labels
    shares = np.where(labels(1) > 0, np.linspace(0.1, 1, 64, dtype=np.float32), 0).astype(np.float32)
    assert not_an_image(stack_of(shares), "nifti", "a_gm.nii").reason == "probability map"
    assert not_an_image(stack_of(shares), "dicom", "a_gm") is None


def test_of_a_stack_of_blank_frames_all_are_looked_at():
    frames = np.zeros((40, 64, 64), np.int16)
    frames[3] = labels(4)[0]  # between those that are looked at first
    assert not_an_image(stack_of(frames), "nifti", "a.nii").reason == "label map"
