"""The builder of the embedded set, without the network: orientation, spacing, order, pinned hashes, a failed build."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

import build_embedded_data as builder  # noqa: E402

from dex.data.dataset import EMBEDDED  # noqa: E402


def source(**changes):
    return dataclasses.replace(builder.SOURCES[0], **changes)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIR", "SLA"])
def test_slices_stand_as_a_radiologist_sees_them(tmp_path, axes):
    # brightness marks the patient's right, front and head, whatever order and direction the file stores
    x, y, z = np.meshgrid(np.arange(20), np.arange(30), np.arange(40), indexing="ij")
    ras = np.where(x < 10, 0.0, 50) + np.where(y < 15, 0.0, 100) + np.where(z < 20, 0.0, 200)  # left/right: + is right
    image = nibabel.Nifti1Image(ras.astype(np.int16), np.diag([2.0, 1.0, 3.0, 1.0]))
    target = nibabel.orientations.axcodes2ornt(axes)
    image = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), target))
    assert nibabel.aff2axcodes(image.affine) == tuple(axes)
    image.to_filename(tmp_path / "volume.nii.gz")
    chosen = source(modality="CT", strides={"axial": 21, "coronal": 17, "sagittal": 15})
    slices = {frame.label.split("-")[0]: frame for frame in builder.frames(chosen, tmp_path)}
    assert {frame.member for frame in slices.values()} == {"volume.nii.gz"}
    axial, coronal, sagittal = (slices[name].pixels.astype(int) for name in ("axial", "coronal", "sagittal"))
    assert axial.shape == (30, 20) and coronal.shape == (40, 20) and sagittal.shape == (40, 30)
    assert slices["axial"].spacing == (1, 2) and slices["coronal"].spacing == (3, 2)
    assert slices["sagittal"].spacing == (3, 1)
    assert (axial[:, 0] > axial[:, -1]).all() and (axial[0] > axial[-1]).all()  # right on the left, front up
    assert (coronal[:, 0] > coronal[:, -1]).all() and (coronal[0] > coronal[-1]).all()  # right on the left, head up
    assert (sagittal[:, 0] > sagittal[:, -1]).all() and (sagittal[0] > sagittal[-1]).all()  # front on the left, head up


def test_pixels_become_square_and_padding_takes_the_background():
    pixels = np.full((40, 20), 85, np.uint8)
    pixels[10:30, 5:15] = 200
    content = builder.shrink(builder.Frame("f", pixels, (3.0, 2.0), "m"))
    assert content.shape == (256, round(256 * 40 / 120))
    whole = builder.pad(content)
    assert whole.shape == (256, 256) and (whole[:, :80] == 85).all() and (whole[:, -80:] == 85).all()


def write_dicom(path, pixels, **elements):
    """A file with one frame: uint8 or int16 [H, W]."""
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    header.SeriesInstanceUID = header.StudyInstanceUID = "1.2.3"
    header.PatientID, header.SamplesPerPixel, header.PhotometricInterpretation = "p", 1, "MONOCHROME2"
    header.Rows, header.Columns = pixels.shape
    header.BitsAllocated = header.BitsStored = 8 * pixels.dtype.itemsize
    header.HighBit, header.PixelRepresentation = header.BitsStored - 1, int(pixels.dtype.kind == "i")
    header.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(header, name, value)
    header.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, 1, 0]])  # the normal up and down
def test_series_are_ordered_from_the_feet_to_the_head(tmp_path, orientation):
    chosen = source(modality="MR", read="series", strides={})
    for name, z in (("a", 30.0), ("b", -10.0), ("c", 10.0)):
        pixels = np.arange(256, dtype=np.int16).reshape(16, 16) + int(10 * z)
        place = {"ImageOrientationPatient": orientation, "ImagePositionPatient": [5, 9, z]}
        write_dicom(tmp_path / f"{name}.dcm", pixels, Modality="MR", PixelSpacing=[2, 2], **place)
    got = list(builder.frames(chosen, tmp_path))
    assert [frame.member for frame in got] == ["b.dcm", "c.dcm", "a.dcm"]
    assert got[0].pixels.mean() < got[1].pixels.mean() < got[2].pixels.mean()


def test_a_series_that_is_not_axial_is_refused(tmp_path):
    for name, y in (("a", 30.0), ("b", -2.0)):
        pixels = np.arange(256, dtype=np.int16).reshape(16, 16)
        place = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1], "ImagePositionPatient": [5, y, 9]}
        write_dicom(tmp_path / f"{name}.dcm", pixels, Modality="MR", PixelSpacing=[2, 2], **place)
    with pytest.raises(ValueError, match="ts-aorta: expected axial slices"):
        list(builder.frames(source(modality="MR", read="series", strides={}), tmp_path))


def intensities(folder, chosen, pixels, **elements):
    folder.mkdir()
    write_dicom(folder / "m.dcm", pixels, **elements)
    (stack,) = builder.readers.read([folder / "m.dcm"], "dicom", limits=builder.LIMITS)
    return builder.intensities(chosen, stack)


def test_intensities(tmp_path):
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    xray, ct, mr = (source(modality=modality, read="frames") for modality in ("X-ray", "CT", "MR"))
    inverted = {"Modality": "DX", "PhotometricInterpretation": "MONOCHROME1"}
    assert (intensities(tmp_path / "8", xray, eight, **inverted) == 255 - eight).all()
    stored = np.array([[0, 412, 562, 712, 4000, 0, 0, 0]], np.int16)
    rescale = {"Modality": "CT", "RescaleSlope": 2, "RescaleIntercept": -1024}
    scaled = intensities(tmp_path / "ct", ct, stored, **rescale)
    assert scaled[0, 0, :5].tolist() == [0, 0, 128, 255, 255]
    # percentiles are of the stored numbers, and padding has its own value where the table says so
    deep = np.arange(256, dtype=np.int16).reshape(16, 16)
    padded = {"Modality": "MR", "PixelPaddingValue": 0, "RescaleSlope": 3, "RescaleIntercept": 7}
    expected = builder.normalise.to_uint8(builder.normalise.percentile_range(np.maximum(deep, 1).astype(np.float64)))
    assert (intensities(tmp_path / "mr", mr, deep, **padded)[0] == expected).all()
    kept = dataclasses.replace(mr, padding=-300)
    changed = np.where(deep < 2, -300, deep).astype(np.float64)
    expected = builder.normalise.to_uint8(builder.normalise.percentile_range(changed, (1.0, 99.0)))
    assert (intensities(tmp_path / "padding", kept, deep, **padded)[0] == expected).all()


def test_burned_in_annotation_is_refused(tmp_path):
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    write_dicom(tmp_path / "m.dcm", eight, Modality="US", BurnedInAnnotation="YES")
    with pytest.raises(ValueError, match="expected no burned-in annotation"):
        list(builder.frames(source(modality="ultrasound", read="frames", strides={}), tmp_path))


def test_a_package_of_another_hash_is_refused(tmp_path):
    package = builder.PACKAGES["nilearn"]
    (tmp_path / package.file).write_bytes(b"something else")
    with pytest.raises(ValueError, match=f"{package.file}: expected sha256 {package.sha256}, got"):
        builder.unpack(package, [package.licence_member], tmp_path)


def test_a_failed_build_leaves_the_earlier_set(tmp_path, monkeypatch):
    out = tmp_path / "set"
    out.mkdir()
    (out / "manifest.json").write_text("earlier")

    def build(folder, cache):
        folder.mkdir()
        raise OSError("no space")

    monkeypatch.setattr(builder, "build", build)
    with pytest.raises(OSError):
        builder.replace(out, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["set"] and (out / "manifest.json").read_text() == "earlier"
    (out / "manifest.json").rename(out / "mine.txt")
    with pytest.raises(SystemExit, match="--out: expected an empty folder or an earlier set"):
        builder.replace(out, tmp_path)


def test_the_table_is_the_one_the_set_was_built_from():
    rows = [json.loads(line) for line in (EMBEDDED / "card.jsonl").read_text().splitlines()]
    table = {entry.key: entry for entry in builder.SOURCES}
    assert {row["group"] for row in rows} == set(table) and len(table) == len(builder.SOURCES)
    for row in rows:
        entry = table[row["group"]]
        assert (row["package"], row["modality"]) == (entry.package, entry.modality)
        assert row["version"] == builder.PACKAGES[entry.package].version
    card = (EMBEDDED / "DATA_CARD.md").read_text()
    for package in builder.PACKAGES.values():
        assert package.sha256 in card and len(package.sha256) == len(hashlib.sha256().hexdigest())
