"""Small inputs of conditions that readers get wrong, each with every slice that should come of it.

``cases/MODALITY/NAME/`` are the files, ``NAME.expected.npz`` the slices in order, uint16 of [0, 1] before any resize,
which numpy, pydicom and nibabel made without this package.
"""

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from small_runs import start

from dex.data import ShardDataset
from dex.prepare import readers, routing
from dex.prepare.chunks import Settings
from dex.prepare.discover import discover
from dex.prepare.slices import slices
from dex.prepare.sources import resolve

CASES = Path(__file__).parent / "cases"


def read(folder, modality, **fields):
    """The 16-bit images of all stacks at their own size, and what was refused."""
    (source,) = resolve(folder, modality=modality, frame_stride=1, **fields)

    def decide(head, has_pixels):
        return routing.decide(routing.facts_of(head, has_pixels), source.modality_of(""))

    images, refused = [], []
    listing = discover(source, folder)
    for unit in map(listing.unit, range(len(listing.lines))):
        paths = [folder / file.path for file in unit.files]
        for stack in readers.read(paths, unit.format, decide=decide, volumes=source.volumes):
            if (source.slope, source.intercept) != (1, 0):
                stack.rescale(source.slope, source.intercept)
            images += [one.image for one in slices(stack, source, max(stack.shape), 16)]
            refused += map(str, stack.refused)
    return images, refused


@pytest.mark.parametrize(
    ("case", "bound", "fields"),
    [
        ("MR/twoecho", 0, {}),  # one slice of an echo is missing
        ("MR/nii_bz2", 0, {}),
        ("MR/mgz", 0, {}),
        ("CT/dcm_gz", 0, {}),
        ("CT/deeplesion", 0, {"slope": 1.0, "intercept": -32768.0}),  # 16-bit PNG of HU + 32768
        ("X-ray/sameseries", 1, {}),  # four radiographs under one SeriesInstanceUID
    ],
)
def test_every_slice_is_as_it_should_be(case, bound, fields):
    images, refused = read(CASES / case, case.split("/")[0], **fields)
    expected = list(np.load(CASES / f"{case}.expected.npz").values())
    assert refused == [] and len(images) == len(expected)
    for image, wanted in zip(images, expected, strict=True):
        assert np.abs(image.astype(int) - wanted.astype(int)).max() <= bound


def test_a_jpeg_stream_has_the_colour_that_it_says_itself():
    """The header says RGB. Decoders widen the halved colour channels in ways of their own."""
    ((image,), refused) = read(CASES / "ultrasound/jpeg_rgb_nojfif", "ultrasound")
    (expected,) = np.load(CASES / "ultrasound/jpeg_rgb_nojfif.expected.npz").values()
    difference = np.abs(image.astype(int) * 257 - expected.astype(int)) / 257
    assert refused == [] and difference.max() <= 8 and difference.mean() < 1


def test_a_voxel_that_is_nan_is_background():
    images, refused = read(CASES / "MR/nan1voxel", "MR")
    assert refused == [] and len(images) == 6
    values = np.asarray(nibabel.load(CASES / "MR/nan1voxel/a.nii.gz").dataobj)
    assert np.isnan(values).sum() == 1
    values = np.nan_to_num(values, nan=np.nanmin(values))
    low, high = np.percentile(values, (1, 99))
    unit = ((values - low) / (high - low)).clip(0, 1)
    for number, image in enumerate(images):  # stored as it is shown
        assert np.abs(image - 65535 * unit[:, :, number].T).max() <= 1


def test_of_several_volumes_all_can_be_taken():
    expected = list(np.load(CASES / "MR/4d.expected.npz").values())
    for volumes, wanted, says in (
        ("first", expected[:6], ["inconsistent: 1 volumes after the first"]),
        ("all", expected, []),
        ("1", expected, []),
        ("2", expected[:6], ["inconsistent: 1 volumes"]),
    ):
        images, refused = read(CASES / "MR/4d", "MR", volumes=volumes)
        assert refused == says and len(images) == len(wanted)
        assert all(np.array_equal(image, other) for image, other in zip(images, wanted, strict=True))
    images, refused = read(CASES / "MR/4d", "MR", volumes="mean")
    values = np.asarray(nibabel.load(CASES / "MR/4d/a.nii.gz").dataobj, np.float64).mean(axis=3)
    low, high = np.percentile(values.astype(np.float32), (1, 99))
    unit = ((values - low) / (high - low)).clip(0, 1)
    assert refused == [] and len(images) == 6
    assert all(np.abs(image - 65535 * unit[:, :, n].T).max() <= 1 for n, image in enumerate(images))


def test_pictures_of_numbers_need_slope_and_intercept():
    with pytest.raises(readers.Refused, match="ct needs HU, got raw; use --normalisation, or --slope and --intercept"):
        read(CASES / "CT/deeplesion", "CT")


def spine(folder):
    """18 sagittal slices of 4 mm and 1 mm pixels."""
    y, x = np.mgrid[0:256, 0:256]
    for number in range(18):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.SeriesInstanceUID, data.Modality, data.PatientID = "1.2.9", "MR", "p"
        data.ImagePositionPatient, data.ImageOrientationPatient = [4.0 * number, 0, 0], [0, 1, 0, 0, 0, -1]
        data.PixelSpacing, data.SliceThickness, data.InstanceNumber = [1, 1], 4, number
        data.Rows = data.Columns = 256
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
        pixels = 900 * np.exp(-(((x - 100 - 3 * number) / 60) ** 2) - ((y - 120) / (50 + 2 * number)) ** 2)
        data.PixelData = pixels.astype(np.uint16).tobytes()
        data.save_as(folder / f"{number}.dcm", enforce_file_format=True)
    return folder


def test_thick_sagittal_slices_are_taken_as_they_were_acquired(here, tmp_path):
    (tmp_path / "scans").mkdir()
    folder = spine(tmp_path / "scans")
    images, refused = read(folder, "MR")
    assert refused == [] and [image.shape for image in images] == [(256, 256)] * 18
    (source,) = resolve(folder)
    facts, _ = start([source], tmp_path / "out", settings=Settings(size=64))
    assert facts["images"] == 18 and ShardDataset(tmp_path / "out").modalities == ("MR",)
