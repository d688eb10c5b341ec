import re
import shutil

import numpy as np
import pydicom.data
import pytest
import torch
from PIL import Image

from dex.data import FolderDataset
from dex.inference.preprocess import preprocess
from dex.prepare import readers, sources
from dex.prepare.normalise import ct_window, to_uint8
from dex.prepare.slices import slices

nibabel = pytest.importorskip("nibabel")


@pytest.fixture
def dicom():
    """One CT slice of 128 x 128 pixels."""
    return pydicom.data.get_testdata_file("CT_small.dcm", download=False)


@pytest.fixture
def volume(tmp_path):
    values = np.random.default_rng(0).integers(-1000, 1000, (40, 48, 5), dtype=np.int16)
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 2.0, 3.0, 1.0])), path)
    return path


def test_a_picture_is_what_a_plain_folder_gives(images):
    file = images / "mr" / "003.png"
    got = preprocess(file)
    dataset = FolderDataset(images)
    (index,) = [i for i in range(len(dataset)) if dataset.sample_id(i) == "mr/003.png"]
    assert torch.equal(got.images[0], dataset[index].image) and got.images.shape == (1, 3, 256, 256)
    assert got[1:] == (("image",), None, (None,))


def test_with_a_modality_a_picture_goes_the_way_of_prepare(tmp_path):
    wide = np.tile(np.linspace(0, 255, 128).astype(np.uint8), (64, 1))
    Image.fromarray(wide).save(tmp_path / "wide.png")
    padded = preprocess(str(tmp_path / "wide.png"), "xray")
    assert padded.modality == "X-ray" and not torch.equal(padded.images, preprocess(tmp_path / "wide.png").images)
    assert len(padded.images[0, 0, 0].unique()) == 1  # the longer side fills the square, the rest is background


def test_dicom_says_itself_what_it_holds(dicom):
    got = preprocess(dicom)
    assert got.modality == "CT" and len(got.labels) == 1
    (stack,) = readers.read([dicom], "dicom")
    source = sources.resolve("/tmp", modality="CT")[0].for_format("dicom")
    (one,) = slices(stack, source, 256, 8)
    assert torch.equal(got.images[0, 0], torch.from_numpy(one.image)) and torch.equal(
        got.images[0, 0], got.images[0, 2]
    )
    assert torch.equal(preprocess(dicom, "ct").images, got.images)


def test_a_folder_is_one_dicom_series(dicom, tmp_path):
    shutil.copy(dicom, tmp_path / "0001")  # without a suffix
    (tmp_path / "notes.txt").write_text("not an image")
    assert torch.equal(preprocess(tmp_path).images, preprocess(dicom).images)
    (tmp_path / "0001").unlink()
    with pytest.raises(ValueError, match=f"file: expected .*; {tmp_path} holds no DICOM file"):
        preprocess(tmp_path)


def test_a_volume_gives_every_slice_of_its_planes(volume):
    got = preprocess(volume, "CT")
    assert got.images.shape == (5, 3, 256, 256) and got.labels[3] == "axial-003"
    assert len(preprocess(volume, "CT", planes=("axial", "coronal")).images) == 5 + 48
    values = np.asarray(nibabel.load(volume).dataobj)
    assert int(got.images[3].min()) >= to_uint8(ct_window(values)).min() == 0 and got.images[3].max() == 255
    with pytest.raises(ValueError, match="modality: expected one of CT, MR, .* does not say what it holds, got none"):
        preprocess(volume)
    with pytest.raises(ValueError, match="modality: expected one of .*, got 'MRR'"):
        preprocess(volume, "MRR")


def test_slices_that_prepare_would_drop_are_kept_and_named(tmp_path):
    values = np.zeros((40, 48, 3), np.int16)
    values[:, :, 1] = np.arange(48)
    path = tmp_path / "scan.nii"
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    assert preprocess(path, "MR").dropped == ("blank", None, "blank")


def test_what_cannot_be_read_is_named(tmp_path, dicom):
    with pytest.raises(FileNotFoundError, match="file: expected a file of the formats array, dicom, .*; nothing at"):
        preprocess(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="file: expected a file of the formats .*, got None"):
        preprocess(None)
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(ValueError, match=f"file: expected .*, got {tmp_path}/text.txt"):
        preprocess(tmp_path / "text.txt")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=f"file: expected a readable picture; {tmp_path}/broken.png: not a readable"):
        preprocess(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=re.escape(f"file: expected a readable picture file; {tmp_path}/broken.png:")):
        preprocess(tmp_path / "broken.png", "fundus")
    (tmp_path / "broken.dcm").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=re.escape(f"expected a readable dicom file; {tmp_path}/broken.dcm: unreadab")):
        preprocess(tmp_path / "broken.dcm")


def changed(dicom, path, **values):
    """The slice with other values in its header."""
    data = pydicom.dcmread(dicom)
    for name, value in values.items():
        setattr(data, name, value)
    data.save_as(path)
    return path


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"Modality": "SEG"}, "segmentation: labels of another image"),
        ({"Modality": "MR"}, "contradictory header: SOP class and Modality name different ones"),
        ({"Modality": "OT", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, "secondary capture: a secondary capture"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer: a localizer"),
        ({"Modality": "NM", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.20"}, "unknown modality: nuclear medicine"),
    ],
)
def test_dicom_that_prepare_leaves_out_is_refused_by_name(values, reason, dicom, tmp_path):
    file = changed(dicom, tmp_path / "a.dcm", **values)
    said = re.escape(f"file: expected DICOM images that dex prepare takes; {file}: {reason}")
    for modality in (None, "CT"):
        with pytest.raises(ValueError, match=said):
            preprocess(file, modality)


def test_another_modality_than_the_header_says_is_refused(dicom):
    with pytest.raises(ValueError, match="another modality: the header says CT, not MR"):
        preprocess(dicom, "MR")


def test_a_header_that_says_nothing_takes_the_given_modality(dicom, tmp_path):
    file = changed(dicom, tmp_path / "a.dcm", Modality="OT", SOPClassUID="")
    with pytest.raises(ValueError, match="unknown modality: neither SOP class nor Modality names one"):
        preprocess(file)
    got = preprocess(file, "MR")
    assert (got.modality, len(got.images)) == ("MR", 1)


def test_files_of_a_series_that_prepare_leaves_out_give_no_image(dicom, tmp_path):
    changed(dicom, tmp_path / "0.dcm", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], SOPInstanceUID="1.2.3")
    shutil.copy(dicom, tmp_path / "1.dcm")
    got = preprocess(tmp_path)
    assert got.modality == "CT" and torch.equal(got.images, preprocess(dicom).images)
