"""How a unit is read: as its source and a table say, at the size that is wanted."""

import numpy as np
import pytest
from PIL import Image
from small_runs import described, picture, save_series, source

from dex.prepare import readers
from dex.prepare.reading import Reading

MR = {"modality": "auto", "normalisation": "auto", "trusted": False}


@pytest.fixture
def photograph(tmp_path):
    Image.fromarray(picture(1, 1400)).save(tmp_path / "a.jpg")
    return tmp_path / "a.jpg"


def first_frame(stacks):
    (stack,) = stacks
    return stack, next(stack.sample(frozenset([0])))


@pytest.mark.parametrize(
    "path, asked, sides",
    [
        ("a.jpg", {"size": 64}, 175),  # an eighth, of which 128 pixels are left
        ("a.jpg", {"size": 64, "bits": 16}, 1400),
        ("a.jpg", {"size": None}, 1400),
        ("a.jpg", {"size": 64, "headers": True}, 1400),
        ("a_mask.jpg", {"size": 64}, 1400),  # every number counts
    ],
)
def test_a_picture_is_decoded_at_what_suffices(photograph, path, asked, sides):
    reading = Reading(source(photograph.parent), path)
    stack = next(reading.stacks([photograph], "picture", **asked))
    assert stack.shape == (sides, sides)


def test_a_picture_beyond_the_limits_is_cut_or_refused_where_its_size_is_to_stay(tmp_path):
    Image.fromarray(picture(2, 600)).save(tmp_path / "a.png")
    limits = readers.Limits(pixels=100_000)
    reading = Reading(source(tmp_path, modality="pathology"), "a.png")
    stack, frame = first_frame(reading.stacks([tmp_path / "a.png"], "picture", size=64, limits=limits))
    assert stack.length > 1 and frame.size < 100_000
    with pytest.raises(readers.Refused, match="too large"):
        list(reading.stacks([tmp_path / "a.png"], "picture", size=None, limits=limits))


def test_headers_decide_and_a_table_contradicts_them(tmp_path):
    save_series(tmp_path, 3, 4, iter(f"{n}.dcm" for n in range(4)), SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    files = sorted(tmp_path.iterdir())
    routed = described(**MR).for_format("dicom")
    (stack,) = Reading(routed, "0.dcm").stacks(files, "dicom", size=64)
    assert Reading(routed, "0.dcm").for_stack(stack).modality == "CT"
    for reading in (Reading(routed, "0.dcm", "MR"), Reading(described(modality="MR", normalisation="mr"), "0.dcm")):
        with pytest.raises(readers.Refused, match="another modality"):
            list(reading.stacks(files, "dicom", size=64))
    trusted = described(modality="MR", normalisation="mr", trusted=True).for_format("dicom")
    (stack,) = Reading(trusted, "0.dcm").stacks(files, "dicom", size=64)
    assert stack.decision is None and Reading(trusted, "0.dcm").for_stack(stack).modality == "MR"


def test_slope_and_intercept_are_for_formats_that_have_none(tmp_path):
    Image.fromarray(picture(4)).save(tmp_path / "a.png")
    save_series(tmp_path, 5, 1, iter(["a.dcm"]), SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    reading = Reading(described(slope=3.0, intercept=-7.0, trusted=True), "a")
    (of_picture,) = reading.stacks([tmp_path / "a.png"], "picture", size=None)
    (of_dicom,) = reading.stacks([tmp_path / "a.dcm"], "dicom", size=None)
    before = of_dicom.slope, of_dicom.intercept
    reading.rescale(of_picture, "picture")
    reading.rescale(of_dicom, "dicom")
    assert (of_picture.slope, of_picture.intercept) == (3.0, -7.0)
    assert (of_dicom.slope, of_dicom.intercept) == before
    assert np.isfinite(before).all()
