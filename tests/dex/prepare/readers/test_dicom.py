"""DICOM files that the tests write themselves: order in space, numbers, polarity, colours, splits, SUV, refusals.

pydicom's own installed test files serve for the compressed transfer syntaxes.
"""

import datetime
import gzip
import io
import math
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EncapsulatedPDFStorage,
    EnhancedMRImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    MRImageStorage,
    MultiFrameSingleBitSecondaryCaptureImageStorage,
    PositronEmissionTomographyImageStorage,
    RLELossless,
    RTDoseStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from dex.prepare import readers
from dex.prepare.readers import Refused

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
AXIAL = [1, 0, 0, 0, 1, 0]


def write(path, pixels, *, syntax=ExplicitVRLittleEndian, kind=CTImageStorage, stored=None, data=None, **elements):
    """A DICOM file of `pixels`, [H, W], [F, H, W] or, with SamplesPerPixel=3, [H, W, 3]."""
    head = Dataset()
    head.file_meta = FileMetaDataset()
    head.file_meta.TransferSyntaxUID = syntax
    head.file_meta.MediaStorageSOPClassUID = head.SOPClassUID = kind
    head.file_meta.MediaStorageSOPInstanceUID = head.SOPInstanceUID = f"1.2.{path.stem.__hash__() % 10**12}"
    head.SeriesInstanceUID, head.StudyInstanceUID, head.Modality = "1.2.3", "1.2", "CT"
    head.PatientID, head.PatientName = "id-7", "Canary^Patient"
    if pixels is not None:
        colour = elements.get("SamplesPerPixel", 1) == 3
        head.SamplesPerPixel, head.PhotometricInterpretation = 1, "MONOCHROME2"
        head.Rows, head.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
        if pixels.ndim > (3 if colour else 2):
            head.NumberOfFrames = len(pixels)
        head.BitsAllocated = 8 * pixels.itemsize
        head.BitsStored = stored or head.BitsAllocated
        head.HighBit = head.BitsStored - 1
        head.PixelRepresentation = int(pixels.dtype.kind == "i")
        if colour:
            head.PlanarConfiguration = 0
        order = ">" if syntax == ExplicitVRBigEndian else "<"
        body = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes() if data is None else data
        head.PixelData = body + b"\0" * (len(body) % 2)
        head["PixelData"].VR = "OB" if data is not None or pixels.itemsize == 1 else "OW"
    for name, value in elements.items():
        setattr(head, name, value)
    head.save_as(path, enforce_file_format=True)
    return path


def slice_of(path, pixels, z, **elements):
    place = {"ImagePositionPatient": [0, 0, z], "ImageOrientationPatient": AXIAL, "PixelSpacing": [2.0, 3.0]}
    return write(path, pixels, **(place | {"RescaleSlope": 1, "RescaleIntercept": -1024} | elements))


def read(*files):
    return list(readers.read(list(files), "dicom"))


def stored(stack):
    return [frame.pixels for frame in stack.frames(("stored",), 1)]


def test_a_series_is_ordered_by_position_and_rescaled_per_file(tmp_path):
    # names, instance numbers and positions each say another order
    for name, number, z, slope in (("a", 1, 10.0, 1), ("b", 3, 0.0, 2), ("c", 2, 5.0, 3)):
        slice_of(
            tmp_path / f"{name}.dcm",
            np.full((4, 6), z, np.int16),
            z,
            InstanceNumber=number,
            RescaleSlope=slope,
            RescaleIntercept=-100,
        )
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert (stack.quantity, stack.volume, stack.length, stack.patient) == ("HU", True, 3, "id-7")
    frames = list(stack.frames(("axial",), 1))
    assert [frame.label for frame in frames] == ["axial-000", "axial-001", "axial-002"]
    assert [frame.pixels[0, 0] for frame in frames] == [0 * 2 - 100, 5 * 3 - 100, 10 * 1 - 100]
    assert frames[0].pixels.dtype == np.float32 and frames[0].spacing == (2.0, 3.0)
    everything = np.concatenate([frame.pixels.ravel() for frame in frames])
    assert stack.percentiles(10, 90) == pytest.approx(np.percentile(everything, (10, 90)))
    sagittal = next(iter(stack.frames(("sagittal",), 1)))
    assert sagittal.spacing == (5.0, 2.0) and sagittal.pixels[:, 0].tolist() == [-90, -85, -100]  # head up
    assert [frame.label for frame in stack.frames(("axial", "sagittal"), 2)] == [
        "axial-000",
        "axial-002",
        "sagittal-000",
        "sagittal-002",
        "sagittal-004",
    ]


def test_without_positions_the_instance_number_orders_then_the_name(tmp_path):
    for name, number in (("a", 3), ("b", 1), ("c", 2)):
        write(
            tmp_path / f"{name}.dcm",
            np.full((4, 4), number, np.int16),
            kind=MRImageStorage,
            Modality="MR",
            InstanceNumber=number,
        )
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert [int(pixels[0, 0]) for pixels in stored(stack)] == [1, 2, 3] and stack.geometry is None and stack.volume
    for name, value in (("a", 7), ("b", 8)):
        write(tmp_path / f"{name}.dcm", np.full((4, 4), value, np.int16), kind=MRImageStorage, Modality="MR")
    (stack,) = read(tmp_path / "b.dcm", tmp_path / "a.dcm")
    assert [int(pixels[0, 0]) for pixels in stored(stack)] == [7, 8]


@pytest.mark.parametrize(
    "orientation, normal, plane",
    [
        ([1, 0, 0, 0, 1, 0], (0, 0, 1), "axial"),
        ([-1, 0, 0, 0, 1, 0], (0, 0, -1), "axial"),
        ([0, 1, 0, 0, 0, -1], (-1, 0, 0), "sagittal"),
        ([1, 0, 0, 0, 0, -1], (0, 1, 0), "coronal"),
    ],
)
def test_any_orientation_is_shown_as_a_radiologist_sees_it(tmp_path, orientation, normal, plane):
    """Each pixel's number says where in the patient it is; the shown slice must have right on the left, front up."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    assert np.array_equal(np.cross(row, column), normal)
    size = 5
    for k in range(size):
        origin = np.array(normal) * k
        i, j = np.meshgrid(np.arange(size), np.arange(size))
        place = origin + i[..., None] * row + j[..., None] * column  # left, posterior, superior
        code = (place + 10) @ np.array([400, 20, 1])
        slice_of(
            tmp_path / f"{k}.dcm",
            code.astype(np.int16),
            0,
            ImagePositionPatient=[float(v) for v in origin],
            ImageOrientationPatient=[float(v) for v in orientation],
            PixelSpacing=[1, 1],
            RescaleIntercept=0,
        )
    (stack,) = read(*sorted(tmp_path.iterdir()))
    step = {"axial": (20, 400), "coronal": (-1, 400), "sagittal": (-1, 20)}  # down the rows, along the columns
    for shown in ("axial", "coronal", "sagittal"):
        frames = [frame.pixels for frame in stack.frames((shown,), 1)]
        assert len(frames) == size
        for frame in frames:
            assert (np.diff(frame, axis=0) == step[shown][0]).all(), shown
            assert (np.diff(frame, axis=1) == step[shown][1]).all(), shown
        towards = {"axial": 1, "coronal": -20, "sagittal": -400}[
            shown
        ]  # from feet to head, back to front, left to right
        assert (np.diff([frame[0, 0] for frame in frames]) == towards).all()
    assert stack.geometry.axes.index(2) == {"sagittal": 0, "coronal": 1, "axial": 2}[plane]


def test_series_in_one_folder_are_separate_and_sorted(tmp_path):
    for series in ("1.9", "1.10", "1.2"):
        for z in range(2):
            slice_of(tmp_path / f"{series}-{z}.dcm", np.full((4, 4), z, np.int16), z, SeriesInstanceUID=series)
    stacks = read(*sorted(tmp_path.iterdir(), reverse=True))
    assert [stack.series for stack in stacks] == ["1.10", "1.2", "1.9"] and {s.length for s in stacks} == {2}


def test_one_uid_for_the_series_of_two_patients(tmp_path):
    for patient in range(2):
        for z in range(3):
            pixels = np.full((4, 6), 10 * patient + z, np.int16)
            slice_of(tmp_path / f"{z}{patient}.dcm", pixels, z, PatientID=f"P{patient}", RescaleIntercept=0)
    stacks = read(*sorted(tmp_path.iterdir()))
    assert [stack.patient for stack in stacks] == ["P0", "P1"]
    assert [[frame[0, 0] for frame in stored(stack)] for stack in stacks] == [[0, 1, 2], [10, 11, 12]]


def test_jitter_of_a_header_splits_no_volume(tmp_path):
    """0.005 is where rounding to 0.01 turns."""
    for z in range(6):
        lean = 0.005 + 1e-4 * (z % 2)
        elements = {"ImageOrientationPatient": [1, lean, 0, -lean, 1, 0], "PixelSpacing": [0.5 + 1e-6 * (z % 2), 0.5]}
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 6), z, np.int16), z, RescaleIntercept=0, **elements)
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert stack.geometry.even and [frame[0, 0] for frame in stored(stack)] == [0, 1, 2, 3, 4, 5]
    for z, turn in enumerate((0, 0, 0.02, 0.02)):  # of which this is none
        lean = 0.005 + turn
        elements = {"ImageOrientationPatient": [1, lean, 0, -lean, 1, 0]}
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 6), z, np.int16), z, RescaleIntercept=0, **elements)
    stacks = read(*sorted(tmp_path.iterdir())[:4])
    assert sorted([frame[0, 0] for frame in stored(stack)] for stack in stacks) == [[0, 1], [2, 3]]


def test_a_scout_is_not_mixed_into_the_volume(tmp_path):
    for z in range(3):
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 4), z, np.int16), z, ImageType=["ORIGINAL", "PRIMARY", "AXIAL"])
    for name, orientation in (("front", [1, 0, 0, 0, 0, -1]), ("side", [0, 1, 0, 0, 0, -1])):
        slice_of(
            tmp_path / f"{name}.dcm",
            np.full((4, 4), 9, np.int16),
            1.5,
            ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
            ImageOrientationPatient=orientation,
        )
    volume, scout = sorted(read(*sorted(tmp_path.iterdir())), key=lambda stack: -stack.length)
    assert volume.length == 3 and volume.quantity == "HU" and volume.volume
    assert scout.length == 2 and scout.quantity == "raw" and not scout.volume and "localizer" in scout.note
    assert volume.series != scout.series


def test_other_sizes_are_another_stack(tmp_path):
    for z in range(4):
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 4 + z % 2), z, np.int16), z)
    stacks = read(*sorted(tmp_path.iterdir()))
    assert sorted((stack.shape, stack.length) for stack in stacks) == [((4, 4), 2), ((4, 5), 2)]
    assert len({stack.series for stack in stacks}) == 2


def test_positions_that_recur_are_phases(tmp_path):
    for phase in range(2):
        for z in range(3):
            slice_of(
                tmp_path / f"{z}{phase}.dcm",
                np.full((4, 4), 10 * phase + z, np.int16),
                z,
                AcquisitionNumber=2 - phase,
                InstanceNumber=z,
                RescaleIntercept=0,
            )
    stacks = read(*sorted(tmp_path.iterdir()))
    assert [[int(p[0, 0]) for p in stored(stack)] for stack in stacks] == [[10, 11, 12], [0, 1, 2]]


def test_the_same_instance_twice_is_left_out_once(tmp_path):
    for z in range(2):
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 4), z, np.int16), z)
    (tmp_path / "copy.dcm").write_bytes((tmp_path / "0.dcm").read_bytes())
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert stack.length == 2 and [error.reason for error in stack.refused] == ["inconsistent"]


def test_uneven_spacing_shows_only_what_was_acquired(tmp_path):
    for z in (0, 1, 2, 7):
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 4), z, np.int16), z)
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert len(list(stack.frames(("axial", "coronal"), 1))) == 4 and "unevenly" in str(stack.refused[0])
    with pytest.raises(Refused, match="unevenly"):
        list(stack.frames(("coronal",), 1))


def test_a_tilted_gantry_shows_only_what_was_acquired(tmp_path):
    for z in range(4):
        slice_of(tmp_path / f"{z}.dcm", np.full((4, 4), z, np.int16), 0, ImagePositionPatient=[0, 0.3 * z, z])
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert not stack.geometry.even and len(list(stack.frames(("axial",), 1))) == 4


def test_a_broken_file_refuses_its_series_only(tmp_path):
    for series in ("1.1", "1.2", "1.3"):
        for z in range(3):
            pixels = np.full((64, 64), z, np.int16)
            slice_of(tmp_path / f"{series}-{z}.dcm", pixels, z, SeriesInstanceUID=series)
    whole = (tmp_path / "1.1-1.dcm").read_bytes()
    (tmp_path / "1.1-1.dcm").write_bytes(whole[:-1000])
    jpeg = encapsulate([b"\xff\xd8 this is no image \xff\xd9"])
    slice_of(
        tmp_path / "1.3-1.dcm",
        np.zeros((64, 64), np.int16),
        1,
        SeriesInstanceUID="1.3",
        syntax=JPEG2000Lossless,
        data=jpeg,
    )
    (tmp_path / "rubbish.dcm").write_bytes(b"rubbish" * 100)
    good, broken = read(*sorted(tmp_path.iterdir()))
    assert (good.series, broken.series) == ("1.2", "1.3") and len(stored(good)) == 3
    assert [error.reason for error in good.refused] == ["unreadable", "unreadable", "inconsistent"]
    assert good.refused[2].detail.startswith("2 slices of a series") and good.refused[1].file == "rubbish.dcm"
    with pytest.raises(Refused) as caught:  # what is not seen before it is decoded
        stored(broken)
    assert caught.value.reason == "unreadable"
    with pytest.raises(Refused) as caught:  # a unit that gives nothing says all the same what became of each file
        read(*sorted(tmp_path.glob("1.1-*")), tmp_path / "rubbish.dcm")
    assert [one.file for one in (caught.value, *caught.value.others)] == ["1.1-1.dcm", "rubbish.dcm", ""]


def test_more_frames_than_there_are_bytes(tmp_path):
    for number, (frames, syntax, reason) in enumerate(
        (
            (3, ExplicitVRLittleEndian, "unreadable"),
            (2_000_000_000, ExplicitVRLittleEndian, "too large"),
            (40_000, RLELossless, "unreadable"),
        )
    ):
        data = encapsulate([bytes(100)]) if syntax == RLELossless else None
        pixels = np.zeros((64, 64), np.uint8)
        path = write(tmp_path / f"{number}.dcm", pixels, syntax=syntax, data=data, Modality="US", NumberOfFrames=frames)
        with pytest.raises(Refused) as caught:
            read(path)
        assert caught.value.reason == reason


def test_headers_are_read_within_bounds(tmp_path, monkeypatch):
    pixels = np.zeros((8, 8), np.uint8)
    item = Dataset()
    item.LUTDescriptor, item.LUTExplanation = [4, 0, 16], "x" * 64
    item.add_new("LUTData", "OW", bytes(2 * 2**20))
    path = write(
        tmp_path / "b.dcm", pixels, Modality="US", syntax=ImplicitVRLittleEndian, ModalityLUTSequence=Sequence([item])
    )
    with pytest.raises(Refused, match="too large"):
        read(path)
    path = write(
        tmp_path / "c.dcm", pixels, Modality="US", PatientComments="Canary" * 10**6, syntax=ImplicitVRLittleEndian
    )
    assert len(stored(read(path)[0])) == 1  # what is not used is not read
    monkeypatch.setattr("dex.prepare.readers.dicom.file.HEADER_READS", 20)
    with pytest.raises(Refused, match="too large"):
        read(path)


def test_a_tomogram_of_nuclear_medicine(tmp_path):
    detector = Dataset()
    detector.ImagePositionPatient, detector.ImageOrientationPatient = [0, 0, 5], AXIAL
    pixels = np.arange(4, dtype=np.uint16)[:, None, None] + np.zeros((4, 6, 6), np.uint16)
    path = write(
        tmp_path / "a.dcm",
        pixels,
        Modality="NM",
        ImageType=["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"],
        DetectorInformationSequence=Sequence([detector]),
        SpacingBetweenSlices=4.0,
        PixelSpacing=[2, 2],
    )
    (stack,) = read(path)
    assert stack.volume and stack.geometry.spacing == (2, 2, 4)
    assert [frame.pixels[0, 0] for frame in stack.frames(("axial",), 1)] == [0, 1, 2, 3]


def test_no_header_text_in_a_refusal(tmp_path):
    for number, change in enumerate(({"Rows": 0}, {"NumberOfFrames": "3"}, {"BitsStored": 40})):
        path = write(tmp_path / f"{number}.dcm", np.zeros((8, 8), np.int16), **change)
        with pytest.raises(Refused) as caught:
            for stack in read(path):
                stored(stack)
        shown = f"{caught.value} {caught.value!r} {caught.value.__cause__}"
        assert "Canary" not in shown and "id-7" not in shown and str(tmp_path) not in shown


def test_objects_that_are_no_image(tmp_path):
    cases = (
        write(tmp_path / "a.dcm", None, kind=EncapsulatedPDFStorage, Modality="DOC"),
        write(tmp_path / "b.dcm", np.zeros((4, 4), np.int16), kind=RTDoseStorage, Modality="RTDOSE"),
        write(tmp_path / "c.dcm", np.zeros((4, 4), np.uint8), kind=SegmentationStorage, Modality="SEG"),
    )
    for path in cases:
        with pytest.raises(Refused) as caught:
            read(path)
        assert caught.value.reason == "no image"
    slice_of(tmp_path / "d.dcm", np.zeros((4, 4), np.int16), 0)
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert [error.reason for error in stack.refused] == ["no image"] * 3


def test_burned_in_is_flagged(tmp_path):
    slice_of(tmp_path / "a.dcm", np.zeros((4, 4), np.int16), 0, BurnedInAnnotation="NO")
    slice_of(tmp_path / "b.dcm", np.zeros((4, 4), np.int16), 1, BurnedInAnnotation="YES")
    assert not read(tmp_path / "a.dcm")[0].burned_in
    assert read(tmp_path / "a.dcm", tmp_path / "b.dcm")[0].burned_in


def test_what_is_hounsfield(tmp_path):
    pixels = np.full((4, 4), 100, np.int16)
    cases = {
        "HU": {"RescaleSlope": 2, "RescaleIntercept": -50},
        "raw": {},  # a CT without rescale
    }
    for quantity, elements in cases.items():
        (stack,) = read(write(tmp_path / f"{quantity}.dcm", pixels, **elements))
        assert stack.quantity == quantity and stored(stack)[0][0, 0] == (150 if quantity == "HU" else 100)
    (stack,) = read(write(tmp_path / "type.dcm", pixels, RescaleSlope=1, RescaleIntercept=0, RescaleType="HU_MOD"))
    assert stack.quantity == "raw"
    (stack,) = read(write(tmp_path / "mr.dcm", pixels, Modality="MR", RescaleSlope=2, RescaleIntercept=5))
    assert stack.quantity == "raw" and stored(stack)[0][0, 0] == 205


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("signed", [False, True])
def test_bits_and_signs(tmp_path, syntax, signed):
    values = np.arange(64).reshape(8, 8) * 30 - (1000 if signed else 0)
    pixels = values.astype(np.int16 if signed else np.uint16)
    junk = np.uint16(0xF000)  # bits above the stored 12 are not part of the value
    with_junk = (pixels.view(np.uint16) & 0x0FFF) | junk
    path = write(tmp_path / "a.dcm", with_junk.view(pixels.dtype), syntax=syntax, stored=12, Modality="MR")
    assert np.array_equal(stored(read(path)[0])[0], values)
    shifted = ((pixels.view(np.uint16) << 4) | 0x7).view(pixels.dtype)  # the value in the upper 12 bits
    path = write(tmp_path / "b.dcm", shifted, syntax=syntax, stored=12, Modality="MR", HighBit=15)
    assert np.array_equal(stored(read(path)[0])[0], values)


def test_monochrome1(tmp_path):
    eight = np.arange(64, dtype=np.uint8).reshape(8, 8)
    (stack,) = read(write(tmp_path / "a.dcm", eight, Modality="CR", PhotometricInterpretation="MONOCHROME1"))
    assert stack.quantity == "display8" and not stack.inverted and np.array_equal(stored(stack)[0], 255 - eight)
    deep = eight.astype(np.uint16) * 16
    (stack,) = read(write(tmp_path / "b.dcm", deep, Modality="CR", PhotometricInterpretation="MONOCHROME1"))
    assert stack.quantity == "raw" and stack.inverted and np.array_equal(stored(stack)[0], deep)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_padding_is_as_dark_as_the_darkest_measured(tmp_path, syntax):
    measured = (np.arange(400).reshape(20, 20) + 50).astype(np.int16)
    padded = measured.copy()
    padded[:4] = -(2**15)
    nothing = np.full((20, 20), -(2**15), np.int16)
    for z, pixels in enumerate((padded, measured, nothing)):
        path = tmp_path / f"{z}.dcm"
        slice_of(path, pixels, z, syntax=syntax, Modality="MR", RescaleIntercept=0, PixelPaddingValue=-(2**15))
    (stack,) = read(*sorted(tmp_path.iterdir()))
    expected = padded.astype(np.float32)
    expected[:4] = measured[4, 0]
    assert np.array_equal(stored(stack)[0], expected) and np.array_equal(stored(stack)[1], measured)
    assert not stored(stack)[2].any()
    assert stack.percentiles(1, 99) == tuple(np.percentile([expected, measured, np.zeros((20, 20))], (1, 99)))


def test_padding_of_a_radiograph_is_black(tmp_path):
    film = np.array([[100, 900], [4095, 4090]], np.uint16)
    elements = {"Modality": "CR", "stored": 12, "PhotometricInterpretation": "MONOCHROME1"}
    padding = {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 4090}
    (stack,) = read(write(tmp_path / "a.dcm", film, **elements, **padding))
    assert stack.inverted and stored(stack)[0].tolist() == [[100, 900], [900, 900]]
    eight = np.array([[10, 200], [255, 255]], np.uint8)
    elements = {"Modality": "CR", "PhotometricInterpretation": "MONOCHROME1", "PixelPaddingValue": 255}
    (stack,) = read(write(tmp_path / "b.dcm", eight, **elements))
    assert stored(stack)[0].tolist() == [[245, 55], [55, 55]]


def test_fewer_than_eight_bits_fill_the_range(tmp_path):
    (stack,) = read(write(tmp_path / "a.dcm", np.array([[0, 31], [62, 63]], np.uint8), stored=6, Modality="US"))
    assert stored(stack)[0].tolist() == [[0, 125], [250, 255]]


def test_one_bit_frames(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2, (3, 5, 7), dtype=np.uint8)
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    path = write(
        tmp_path / "a.dcm",
        bits,
        data=packed,
        kind=MultiFrameSingleBitSecondaryCaptureImageStorage,
        Modality="OT",
        BitsAllocated=1,
        BitsStored=1,
        HighBit=0,
    )
    assert np.array_equal(np.stack(stored(read(path)[0])), bits * 255)


def test_modality_lut(tmp_path):
    item = Dataset()
    item.LUTDescriptor, item.ModalityLUTType = [4, 10, 16], "US"
    item.add_new("LUTData", "US", [7, 70, 700, 7000])
    pixels = np.array([[0, 10, 11], [12, 13, 99]], np.uint16)
    path = write(tmp_path / "a.dcm", pixels, Modality="CR", ModalityLUTSequence=Sequence([item]))
    (stack,) = read(path)
    assert stack.quantity == "raw" and stored(stack)[0].tolist() == [[7, 7, 70], [700, 7000, 7000]]


def test_an_empty_modality_lut_is_none(tmp_path):
    item = Dataset()
    item.LUTDescriptor, item.LUTExplanation = None, ""
    pixels = np.arange(16, dtype=np.uint16).reshape(4, 4)
    elements = {"RescaleSlope": 2, "RescaleIntercept": -7, "ModalityLUTSequence": Sequence([item])}
    (stack,) = read(write(tmp_path / "a.dcm", pixels, **elements))
    assert stack.quantity == "HU" and np.array_equal(stored(stack)[0], pixels * 2.0 - 7)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_palette(tmp_path, syntax):
    palette = np.array([[0, 10, 20], [255, 128, 64], [1, 2, 3]])
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    tables = {
        f"{name}PaletteColorLookupTableData": struct.pack(f"{order}3H", *(int(v) * 257 for v in palette[:, c]))
        for c, name in enumerate(("Red", "Green", "Blue"))
    }
    tables |= {f"{name}PaletteColorLookupTableDescriptor": [3, 5, 16] for name in ("Red", "Green", "Blue")}
    pixels = np.array([[0, 5, 6], [7, 8, 255]], np.uint8)
    path = write(
        tmp_path / "a.dcm", pixels, syntax=syntax, Modality="US", PhotometricInterpretation="PALETTE COLOR", **tables
    )
    assert np.array_equal(stored(read(path)[0])[0], palette[[[0, 0, 1], [2, 2, 2]]])


def test_colour_spaces(tmp_path):
    rgb = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    colour = {"SamplesPerPixel": 3, "Modality": "US"}
    path = write(tmp_path / "a.dcm", rgb, PhotometricInterpretation="RGB", **colour)
    assert np.array_equal(stored(read(path)[0])[0], rgb)
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1)).tobytes()
    path = write(tmp_path / "b.dcm", rgb, data=planes, PhotometricInterpretation="RGB", PlanarConfiguration=1, **colour)
    assert np.array_equal(stored(read(path)[0])[0], rgb)
    matrix = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    ybr = np.rint(rgb @ matrix.T + [0, 128, 128]).clip(0, 255).astype(np.uint8)
    path = write(tmp_path / "c.dcm", ybr, PhotometricInterpretation="YBR_FULL", **colour)
    assert np.abs(stored(read(path)[0])[0].astype(int) - rgb).max() <= 3
    path = write(tmp_path / "d.dcm", rgb, PhotometricInterpretation="HSV", **colour)
    with pytest.raises(Refused, match="unsupported"):
        stored(read(path)[0])


def test_sixteen_bit_colour_keeps_the_upper_eight(tmp_path):
    rgb = np.random.default_rng(1).integers(0, 65536, (6, 8, 3), dtype=np.uint16)
    path = write(tmp_path / "a.dcm", rgb, PhotometricInterpretation="RGB", SamplesPerPixel=3, Modality="OT")
    assert np.array_equal(stored(read(path)[0])[0], rgb >> 8)


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "MR_small_expb.dcm",
        "MR_small_padded.dcm",
    ],
)
def test_lossless_transfer_syntaxes_agree(name):
    plain = pydicom.dcmread(FILES / "MR_small.dcm")
    expected = np.frombuffer(plain.PixelData, "<i2").reshape(64, 64)
    assert np.array_equal(stored(read(FILES / name)[0])[0], expected)


@pytest.mark.parametrize(
    "name, tolerance",
    [
        ("SC_rgb_rle.dcm", 0),
        ("SC_rgb_rle_16bit.dcm", 0),
        ("SC_rgb_rle_32bit.dcm", 0),
        ("SC_rgb_jpeg_dcmtk.dcm", 5),  # lossy, YBR_FULL
        ("SC_rgb_dcmtk_+eb+cy+np.dcm", 5),
        ("SC_rgb_dcmtk_+eb+cr.dcm", 3),
        ("SC_rgb_jpeg_lossy_gdcm.dcm", 3),
        ("SC_rgb_gdcm_KY.dcm", 3),  # JPEG 2000
        ("SC_rgb_jls_lossy_line.dcm", 3),
        ("SC_ybr_full_422_uncompressed.dcm", 5),
    ],
)
def test_colour_bars_in_every_compression(name, tolerance):
    """The bars of dcmtk's colour test image, ten rows each."""
    bars = [
        (255, 0, 0),
        (255, 128, 128),
        (0, 255, 0),
        (128, 255, 128),
        (0, 0, 255),
        (128, 128, 255),
        (0, 0, 0),
        (64, 64, 64),
        (192, 192, 192),
        (255, 255, 255),
    ]
    pixels = stored(read(FILES / name)[0])[0]
    assert np.abs(pixels[5::10, 50].astype(int) - np.array(bars)).max() <= tolerance


def test_jpeg_lossless_and_extended():
    assert stored(read(FILES / "JPGExtended.dcm")[0])[0].max() == 264  # 12 bits, lossy
    (stack,) = read(FILES / "examples_ybr_color.dcm")  # JPEG baseline, YBR_FULL_422, 30 frames
    frames = list(stack.frames(("axial",), 7))
    assert [frame.label for frame in frames] == [f"frame-{n:04d}" for n in (0, 7, 14, 21, 28)]
    assert stack.quantity == "display8" and frames[0].pixels.shape == (240, 320, 3) and not stack.volume


def test_a_sequential_jpeg_that_declares_no_coefficients(tmp_path):
    """Twelve bits as a widely used encoder wrote them: "0 to 0" in the scan's header, where 0 to 63 belongs."""
    data = (FILES / "JPGExtended.dcm").read_bytes()
    scan = data.index(b"\xff\xda\x00\x08\x01")
    assert data[scan + 7 : scan + 9] == b"\x00\x3f"
    (tmp_path / "a.dcm").write_bytes(data[: scan + 8] + b"\x00" + data[scan + 9 :])
    (expected,) = stored(read(FILES / "JPGExtended.dcm")[0])
    assert np.array_equal(stored(read(tmp_path / "a.dcm")[0])[0], expected)


def test_deflated(tmp_path):
    pixels = np.arange(4096, dtype=np.int16).reshape(64, 64)
    path = write(tmp_path / "a.dcm", pixels, syntax=DeflatedExplicitVRLittleEndian, Modality="MR")
    assert np.array_equal(stored(read(path)[0])[0], pixels)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless])
def test_a_compressed_size_that_is_not_the_headers(tmp_path, syntax):
    """The decoder would allocate what the codestream says."""
    if syntax == RLELossless:
        data = struct.pack("<16L", 9, *range(64, 64 + 15)) + bytes(64)
    else:
        sizes = struct.pack(">HH8LH", 47, 0, 60000, 60000, 0, 0, 60000, 60000, 0, 0, 1)
        data = b"\xff\x4f\xff\x51" + sizes + bytes(100)
    path = write(tmp_path / "a.dcm", np.zeros((8, 8), np.int16), syntax=syntax, data=encapsulate([data]))
    with pytest.raises(Refused, match="inconsistent"):
        stored(read(path)[0])


def test_enhanced_multiframe(tmp_path):
    """Frames in a wrong order, each with a position, a rescale and a phase of its own."""
    frames, groups = [], []
    for phase, z in ((1, 2), (0, 0), (1, 0), (0, 2), (1, 1), (0, 1)):
        frames.append(np.full((4, 4), 10 * phase + z, np.uint16))
        group = Dataset()
        group.PlanePositionSequence = Sequence([Dataset()])
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 4.0 * z]
        group.PixelValueTransformationSequence = Sequence([Dataset()])
        group.PixelValueTransformationSequence[0].RescaleSlope = 2 + z
        group.PixelValueTransformationSequence[0].RescaleIntercept = 1
        group.FrameContentSequence = Sequence([Dataset()])
        group.FrameContentSequence[0].TemporalPositionIndex = phase + 1
        groups.append(group)
    shared = Dataset()
    shared.PlaneOrientationSequence = Sequence([Dataset()])
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = AXIAL
    shared.PixelMeasuresSequence = Sequence([Dataset()])
    shared.PixelMeasuresSequence[0].PixelSpacing = [1.5, 0.5]
    path = write(
        tmp_path / "a.dcm",
        np.stack(frames),
        kind=EnhancedMRImageStorage,
        Modality="MR",
        SharedFunctionalGroupsSequence=Sequence([shared]),
        PerFrameFunctionalGroupsSequence=Sequence(groups),
    )
    first, second = read(path)
    for phase, stack in enumerate((first, second)):
        shown = list(stack.frames(("axial",), 1))
        assert [frame.pixels[0, 0] for frame in shown] == [(10 * phase + z) * (2 + z) + 1 for z in range(3)]
        assert stack.geometry.spacing == (0.5, 1.5, 4.0) and shown[0].spacing == (1.5, 0.5)
    path = write(
        tmp_path / "b.dcm",
        np.stack(frames),
        kind=EnhancedMRImageStorage,
        Modality="MR",
        PerFrameFunctionalGroupsSequence=Sequence(groups[:4]),
    )
    with pytest.raises(Refused, match="functional groups"):
        read(path)


def test_a_film_of_one_place_is_no_volume(tmp_path):
    for number in range(4):
        slice_of(
            tmp_path / f"{number}.dcm", np.full((4, 4), number, np.uint8), 0, Modality="US", InstanceNumber=-number
        )
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert [int(pixels[0, 0]) + 1024 for pixels in stored(stack)] == [3, 2, 1, 0]
    assert stack.geometry is None and not stack.volume


def test_aspect_ratio_and_unknown_spacing(tmp_path):
    pixels = np.zeros((4, 4), np.uint8)
    (stack,) = read(write(tmp_path / "a.dcm", pixels, Modality="US", PixelAspectRatio=[2, 1], PixelSpacing=[0, 0]))
    assert stack.spacing == (2, 1)
    assert read(write(tmp_path / "b.dcm", pixels, Modality="US"))[0].spacing == (1, 1)


def test_a_file_without_preamble_is_read_and_rubbish_is_not(tmp_path):
    pixels = np.arange(64, dtype=np.int16).reshape(8, 8)
    whole = write(tmp_path / "a.dcm", pixels, Modality="MR").read_bytes()
    bare = tmp_path / "bare.dcm"
    bare.write_bytes(whole[132:])
    assert np.array_equal(stored(read(bare)[0])[0], pixels)
    assert [readers.recognised(path) for path in (tmp_path / "a.dcm", bare, tmp_path)] == ["dicom", None, None]
    for content in (b"", b"\0" * 132, b"\0" * 128 + b"DICM", b"hello" * 1000):
        bare.write_bytes(content)
        with pytest.raises(Refused) as caught:
            read(bare)
        assert caught.value.reason in ("unreadable", "no image")


def test_frames_are_decoded_when_they_are_asked_for(tmp_path):
    path = write(tmp_path / "a.dcm", np.zeros((10, 64, 64), np.uint8), Modality="US")
    beats = []
    (stack,) = readers.read([path], "dicom", beat=lambda: beats.append(1))
    assert len(beats) == 1
    next(iter(stack.frames(("stored",), 3)))
    assert len(beats) == 2
    assert len(list(stack.frames(("stored",), 3))) == 4 and len(beats) == 6


@pytest.mark.parametrize(
    "name",
    [
        "MR_small_jpeg_ls_lossless.dcm",
        "JPEGLSNearLossless_16.dcm",
        "JPGExtended.dcm",
        "SC_rgb_jpeg_dcmtk.dcm",
        "SC_rgb_jpeg_app14_dcmd.dcm",
    ],
)
def test_a_compressed_frame_that_ends_early_is_no_image(tmp_path, name):
    """Its decoder gives a picture, grey where data are lacking. A frame that lacks its end marker alone is whole."""
    data = pydicom.dcmread(FILES / name)
    whole = next(generate_frames(data.PixelData, number_of_frames=1))
    whole = whole[: whole.rindex(b"\xff\xd9")]
    expected = stored(read(FILES / name)[0])[0]

    def of(frame):
        data.PixelData = encapsulate([frame + b"\0" * (len(frame) % 2)])
        data.save_as(tmp_path / "a.dcm")
        return stored(read(tmp_path / "a.dcm")[0])[0]

    for end in (b"", b"\xff\xd9", b"\xff\xd9\0\0\0\0"):
        assert np.array_equal(of(whole + end), expected)
    for lacking in (4, 8, len(whole) // 10, len(whole) // 3):
        with pytest.raises(Refused, match="unreadable"):
            of(whole[:-lacking])


# SUV by body weight. The image holds 1000 Bq/ml; F-18 has a half-life of 6586.2 s.
HALF_LIFE = 6586.2
WEIGHT, DOSE = 70.0, 3.5e8


def pet(path, z=0, drug=None, **elements):
    item = Dataset()
    for name, value in {
        "RadionuclideTotalDose": DOSE,
        "RadionuclideHalfLife": HALF_LIFE,
        "RadiopharmaceuticalStartTime": "090000.00",
        **(drug or {}),
    }.items():
        if value is not None:
            setattr(item, name, value)
    header = {
        "Modality": "PT",
        "Units": "BQML",
        "DecayCorrection": "START",
        "CorrectedImage": ["ATTN", "DECY", "SCAT"],
        "PatientWeight": WEIGHT,
        "SeriesDate": "20200101",
        "SeriesTime": "100000",
        "AcquisitionDate": "20200101",
        "AcquisitionTime": "100000",
        "RescaleSlope": 2,
        "RescaleIntercept": 0,
        "RadiopharmaceuticalInformationSequence": Sequence([item]),
    }
    values = {name: value for name, value in (header | elements).items() if value is not None}
    return slice_of(path, np.full((4, 4), 500, np.int16), z, kind=PositronEmissionTomographyImageStorage, **values)


def suv(path):
    (stack,) = read(path)
    return stored(stack)[0][0, 0] if stack.quantity == "SUV" else stack.note


def test_suv_of_an_hour(tmp_path):
    decayed = DOSE * math.exp(-math.log(2) * 3600 / HALF_LIFE)
    assert suv(pet(tmp_path / "a.dcm")) == pytest.approx(1000 / (decayed / (WEIGHT * 1000)), rel=1e-6)


def test_suv_to_the_time_of_injection(tmp_path):
    assert suv(pet(tmp_path / "a.dcm", DecayCorrection="ADMIN")) == pytest.approx(1000 * 70000 / DOSE, rel=1e-6)


def test_suv_across_midnight(tmp_path):
    expected = 1000 * 70000 / (DOSE * 0.5 ** (2 * 3600 / HALF_LIFE))
    times = {"SeriesTime": "010000", "AcquisitionTime": "010000"}
    clock = pet(tmp_path / "a.dcm", drug={"RadiopharmaceuticalStartTime": "230000"}, **times)
    assert suv(clock) == pytest.approx(expected, rel=1e-6)
    dated = {"RadiopharmaceuticalStartTime": None, "RadiopharmaceuticalStartDateTime": "20191231230000.000000"}
    assert suv(pet(tmp_path / "b.dcm", drug=dated, **times)) == pytest.approx(expected, rel=1e-6)


def test_suv_of_a_rewritten_series_takes_the_first_acquisition(tmp_path):
    """The series' time lies after the acquisitions': the earliest of these is what decay was corrected to."""
    for z, time in ((0, "100500"), (1, "100000")):
        pet(tmp_path / f"{z}.dcm", z, SeriesTime="150000", AcquisitionTime=time)
    (stack,) = read(*sorted(tmp_path.iterdir()))
    expected = 1000 * 70000 / (DOSE * 0.5 ** (3600 / HALF_LIFE))
    assert [frame[0, 0] for frame in stored(stack)] == pytest.approx([expected, expected], rel=1e-6)


def test_suv_takes_the_scan_time_of_ge(tmp_path):
    path = pet(tmp_path / "a.dcm", SeriesTime="150000", AcquisitionTime="100500")
    head = pydicom.dcmread(path)
    head.private_block(0x0009, "GEMS_PETD_01", create=True).add_new(0x0D, "DT", "20200101100000.00")
    head.save_as(path)
    assert suv(path) == pytest.approx(1000 * 70000 / (DOSE * 0.5 ** (3600 / HALF_LIFE)), rel=1e-6)


def test_suv_with_slopes_per_slice_and_other_units(tmp_path):
    for z in range(2):
        pet(tmp_path / f"{z}.dcm", z, RescaleSlope=1 + z, DecayCorrection="ADMIN")
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert [frame[0, 0] for frame in stored(stack)] == pytest.approx([0.1, 0.2])
    assert suv(pet(tmp_path / "gml.dcm", Units="GML", RescaleSlope=0.01)) == pytest.approx(5.0)
    counts = pet(tmp_path / "cnts.dcm", Units="CNTS")
    assert "calibration" in suv(counts)
    for element, value, expected in (
        (0x00, "0.004", 1000 * 0.004),
        (0x09, "3.0", 3000 * 70000 / (DOSE * 0.5 ** (3600 / HALF_LIFE))),
    ):
        head = pydicom.dcmread(pet(tmp_path / "cnts.dcm", Units="CNTS"))
        head.private_block(0x7053, "Philips PET Private Group", create=True).add_new(element, "DS", value)
        head.save_as(counts)
        assert suv(counts) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "elements, drug, why",
    [
        ({"PatientWeight": None}, {}, "weight"),
        ({"PatientWeight": 0}, {}, "weight"),
        ({}, {"RadionuclideTotalDose": None}, "dose"),
        ({}, {"RadionuclideTotalDose": 350.0}, "dose"),  # in MBq
        ({}, {"RadionuclideHalfLife": None}, "half-life"),
        ({}, {"RadiopharmaceuticalStartTime": None}, "injection"),
        ({"Units": "PROPCPS"}, {}, "units"),
        ({"DecayCorrection": "NONE"}, {}, "decay correction"),
        ({"CorrectedImage": ["ATTN"]}, {}, "DECY"),
        ({"SUVType": "LBM"}, {}, "body weight"),
        ({"SeriesTime": None, "AcquisitionTime": None}, {}, "time of the scan"),
    ],
)
def test_without_what_suv_needs_the_numbers_are_raw(tmp_path, elements, drug, why):
    assert why in suv(pet(tmp_path / "a.dcm", drug=drug, **elements))


def test_suv_needs_one_weight_in_a_series(tmp_path):
    for z in range(2):
        pet(tmp_path / f"{z}.dcm", z, PatientWeight=70 + z)
    (stack,) = read(*sorted(tmp_path.iterdir()))
    assert stack.quantity == "raw" and "weight" in stack.note


def coded(units, slope, intercept=0.0):
    """One real world value mapping."""
    item, code = Dataset(), Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = units, "UCUM", "units"
    item.RealWorldValueSlope, item.RealWorldValueIntercept = slope, intercept
    item.MeasurementUnitsCodeSequence = Sequence([code])
    return item


def enhanced_pet(path, mappings, per_frame=None, drug=None, **elements):
    """Three frames of 500, 501 and 502 in one file; `per_frame`: mappings of each frame in the place of the shared."""
    shared, item, groups = Dataset(), Dataset(), []
    turned, measures = Dataset(), Dataset()
    turned.ImageOrientationPatient, measures.PixelSpacing = AXIAL, [2.0, 3.0]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([turned]), Sequence([measures])
    transform = Dataset()
    transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = 7, 9, "US"
    shared.PixelValueTransformationSequence = Sequence([transform])
    if mappings:
        shared.RealWorldValueMappingSequence = Sequence(mappings)
    for z in range(3):
        group, plane = Dataset(), Dataset()
        plane.ImagePositionPatient = [0, 0, 4 * z]
        group.PlanePositionSequence = Sequence([plane])
        if per_frame:
            group.RealWorldValueMappingSequence = Sequence(per_frame[z])
        groups.append(group)
    for name, value in {
        "RadionuclideTotalDose": DOSE,
        "RadionuclideHalfLife": HALF_LIFE,
        "RadiopharmaceuticalStartDateTime": "20200101090000",
        **(drug or {}),
    }.items():
        setattr(item, name, value)
    header = {
        "Modality": "PT",
        "PatientWeight": WEIGHT,
        "DecayCorrected": "YES",
        "AttenuationCorrected": "YES",
        "DecayCorrectionDateTime": "20200101100000.000000",
        "AcquisitionDateTime": "20200101103000",  # later than what decay was corrected to
        "RadiopharmaceuticalInformationSequence": Sequence([item]),
        "SharedFunctionalGroupsSequence": Sequence([shared]),
        "PerFrameFunctionalGroupsSequence": Sequence(groups),
    }
    pixels = np.stack([np.full((4, 4), 500 + z, np.uint16) for z in range(3)])
    values = {name: value for name, value in (header | elements).items() if value is not None}
    return write(path, pixels, kind="1.2.840.10008.5.1.4.1.1.130", **values)


def test_suv_of_an_enhanced_file(tmp_path):
    """The mapping's numbers, not the rescale's; decay to the time that the header names."""
    per_becquerel = WEIGHT * 1000 / (DOSE * 0.5 ** (3600 / HALF_LIFE))
    (stack,) = read(enhanced_pet(tmp_path / "a.dcm", [coded("Bq/ml", 2.0, 10.0)]))
    assert stack.quantity == "SUV" and stack.volume and stack.geometry.spacing == (3.0, 2.0, 4.0)
    expected = [(2 * (500 + z) + 10) * per_becquerel for z in range(3)]
    assert [frame[0, 0] for frame in stored(stack)] == pytest.approx(expected, rel=1e-6)
    # each frame has a slope of its own, and in grams per millilitre no more is needed, whatever stands beside it
    for units in ("{SUVbw}g/ml", "g/ml{SUVbw}"):
        per_frame = [[coded("Bq/ml", 5.0), coded(units, 0.01 * (z + 1), -1.0)] for z in range(3)]
        bare = {"PatientWeight": None, "DecayCorrected": None}
        (stack,) = read(enhanced_pet(tmp_path / "b.dcm", [coded("Bq/ml", 3.0)], per_frame, **bare))
        expected = [(500 + z) * 0.01 * (z + 1) - 1 for z in range(3)]
        assert stack.quantity == "SUV"
        assert [frame[0, 0] for frame in stored(stack)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "mappings, per_frame, elements, why",
    [
        ([], None, {}, "units"),
        ([coded("{counts}/s", 2.0)], None, {}, "units"),
        ([coded("{SUVlbm}g/ml", 2.0)], None, {}, "units"),
        ([], [[coded("Bq/ml", 1.0)], [coded("{SUVbw}g/ml", 1.0)], [coded("Bq/ml", 1.0)]], {}, "units"),
        ([coded("Bq/ml", 2.0)], None, {"DecayCorrected": "NO"}, "DECY"),
        ([coded("Bq/ml", 2.0)], None, {"AttenuationCorrected": None}, "ATTN"),
        ([coded("Bq/ml", 2.0)], None, {"DecayCorrectionDateTime": None}, "decay correction"),
        ([coded("Bq/ml", 2.0)], None, {"DecayCorrectionDateTime": "20200101085959"}, "within a day"),
        ([coded("Bq/ml", 2.0)], None, {"PatientWeight": None}, "weight"),
    ],
)
def test_an_enhanced_file_without_what_suv_needs_is_raw(tmp_path, mappings, per_frame, elements, why):
    (stack,) = read(enhanced_pet(tmp_path / "a.dcm", mappings, per_frame, **elements))
    assert stack.quantity == "raw" and why in stack.note


def test_suv_of_a_converted_file(tmp_path):
    """Elements of single images that have no place in an enhanced file are kept aside; slopes are each frame's."""
    aside = Dataset()
    aside.Units, aside.DecayCorrection, aside.CorrectedImage = "BQML", "START", ["ATTN", "DECY"]
    bare = {"DecayCorrected": None, "AttenuationCorrected": None, "DecayCorrectionDateTime": None}
    times = {"SeriesDate": "20200101", "SeriesTime": "100000"}
    path = enhanced_pet(tmp_path / "a.dcm", [], **bare, **times)
    head = pydicom.dcmread(path)
    shared = head.SharedFunctionalGroupsSequence[0]
    shared.UnassignedSharedConvertedAttributesSequence = Sequence([aside])
    del shared.PixelValueTransformationSequence
    for z, group in enumerate(head.PerFrameFunctionalGroupsSequence):
        transform = Dataset()
        transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = 1 + z, 0, "BQML"
        group.PixelValueTransformationSequence = Sequence([transform])
    head.save_as(path)
    (stack,) = read(path)
    per_becquerel = WEIGHT * 1000 / (DOSE * 0.5 ** (3600 / HALF_LIFE))
    assert stack.quantity == "SUV"
    expected = [(500 + z) * (1 + z) * per_becquerel for z in range(3)]
    assert [frame[0, 0] for frame in stored(stack)] == pytest.approx(expected, rel=1e-6)


def test_dates_without_sense(tmp_path):
    late = {"RadiopharmaceuticalStartDateTime": (datetime.datetime(2019, 1, 1)).strftime("%Y%m%d%H%M%S")}
    assert "within a day" in suv(pet(tmp_path / "b.dcm", drug=late))


def test_a_deflated_file_that_inflates_to_too_much(tmp_path):
    limits = readers.Limits(memory_mb=48)
    pixels = np.zeros((16, 1024, 1024), np.uint8)
    path = write(tmp_path / "a.dcm", pixels, syntax=DeflatedExplicitVRLittleEndian, kind=SecondaryCaptureImageStorage)
    assert path.stat().st_size < 50_000 and zlib is not None
    with pytest.raises(Refused, match="too large"):
        list(readers.read([path], "dicom", limits=limits))


def csa(**fields):
    """Siemens' private header of the second kind, with strings."""
    data = b"SV10\4\3\2\1" + struct.pack("<2I", len(fields), 77)
    for name, values in fields.items():
        data += struct.pack("<64si4s3i", name.encode(), len(values), b"FD", 4, 6, 77)
        for value in [*values, *[""] * (6 - len(values))]:
            text = f"{value}\0".encode() if value != "" else b""
            data += struct.pack("<4i", len(text), len(text), 77, len(text)) + text + bytes(-len(text) % 4)
    return data


def mosaic(path, slices, beside, *, count=None, normal=None, header=None, told="private", **elements):
    """`slices` [N, h, w] in a square of `beside`, at the place where Siemens says that such an image is."""
    height, width = slices.shape[1:]
    whole = np.zeros((beside * height, beside * width), slices.dtype)
    for n, piece in enumerate(slices):
        top, left = n // beside * height, n % beside * width
        whole[top : top + height, left : left + width] = piece
    # the image that is as large as the mosaic has the same centre as the slice: at (10, 20, -30) is the slice's corner
    corner = np.array([10.0, 20, -30]) - [3.0 * (beside - 1) * width / 2, 2.0 * (beside - 1) * height / 2, 0]
    place = {"ImagePositionPatient": [float(v) for v in corner], "ImageOrientationPatient": AXIAL}
    kind = {"kind": MRImageStorage, "Modality": "MR", "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]}
    write(path, whole, **(place | kind | {"PixelSpacing": [2.0, 3.0], "SpacingBetweenSlices": 5} | elements))
    data = pydicom.dcmread(path)
    if told == "private":
        data.add(pydicom.DataElement((0x0019, 0x0010), "LO", "SIEMENS MR HEADER"))
        data.add(pydicom.DataElement((0x0019, 0x100A), "US", len(slices) if count is None else count))
    fields = {"NumberOfImagesInMosaic": [len(slices) if count is None else count]} if told == "CSA" else {}
    fields |= {} if normal is None else {"SliceNormalVector": normal}
    if fields or header:
        data.add(pydicom.DataElement((0x0029, 0x0010), "LO", "SIEMENS CSA HEADER"))
        data.add(pydicom.DataElement((0x0029, 0x1010), "OB", header or csa(**fields)))
    data.save_as(path)
    return path


@pytest.mark.parametrize("count, beside", [(1, 1), (2, 2), (4, 2), (5, 3), (9, 3)])
@pytest.mark.parametrize("told", ["private", "CSA"])
def test_a_mosaic_is_taken_apart(tmp_path, count, beside, told):
    slices = np.random.default_rng(1).integers(1, 1000, (count, 5, 7), dtype=np.uint16)
    (stack,) = read(mosaic(tmp_path / "a.dcm", slices, beside, normal=(0, 0, 1), told=told))
    assert stack.shape == (5, 7) and np.array_equal(stored(stack), slices)
    if count > 1:
        assert stack.volume and stack.geometry.spacing == (3.0, 2.0, 5.0)
        frames = {frame.label: frame for frame in stack.frames(("axial", "coronal"), 1)}
        assert np.array_equal(frames[f"axial-{count - 1:03d}"].pixels, slices[-1])
        assert np.array_equal(frames["coronal-000"].pixels, slices[::-1, -1])  # from the back, head up
        # the other way round: the first is the uppermost
        (stack,) = read(mosaic(tmp_path / "a.dcm", slices, beside, normal=(0, 0, -1), told=told))
        assert np.array_equal(next(stack.frames(("axial",), 1)).pixels, slices[-1])
        assert np.array_equal(next(stack.frames(("coronal",), 1)).pixels, slices[:, -1])


def test_mosaics_of_a_series_are_its_phases(tmp_path):
    """As many volumes as there are files, in the order of time, whether the places are known or not."""
    slices = np.random.default_rng(2).integers(1, 1000, (3, 6, 4, 4), dtype=np.uint16)
    for normal in ((0, 0, 1), None):
        for time in range(3):
            name = tmp_path / f"{2 - time}.dcm"
            mosaic(name, slices[time], 3, normal=normal, InstanceNumber=time + 1, AcquisitionNumber=time + 1)
        stacks = read(*sorted(tmp_path.iterdir()))
        assert [stack.volume for stack in stacks] == [True] * 3 and len({stack.series for stack in stacks}) == 3
        got = [stored(stack) for stack in stacks]
        if normal is None:
            assert stacks[0].geometry is None
            got.reverse()  # in the order of names
        assert np.array_equal(got, slices)


def test_mosaics_are_placed_where_their_slices_are(tmp_path):
    """Beside ordinary slices of the same series: a mosaic's first is where the header of a slice would say."""
    slices = np.random.default_rng(3).integers(1, 1000, (4, 5, 7), dtype=np.uint16)
    mosaic(tmp_path / "a.dcm", slices[:3], 2, normal=(0, 0, 1))
    place = {"ImagePositionPatient": [10, 20, -15], "ImageOrientationPatient": AXIAL, "PixelSpacing": [2.0, 3.0]}
    write(tmp_path / "b.dcm", slices[3], kind=MRImageStorage, Modality="MR", **place)
    (stack,) = read(tmp_path / "a.dcm", tmp_path / "b.dcm")
    assert np.array_equal(stored(stack), slices) and stack.geometry.even


def test_real_mosaics():
    """Diffusion images that come with nibabel, against its own reader of mosaics."""
    nibabel = pytest.importorskip("nibabel")
    from nibabel.nicom import dicomwrappers

    folder = Path(nibabel.__file__).parent / "nicom" / "tests" / "data"
    for name in ("siemens_dwi_0.dcm.gz", "siemens_dwi_1000.dcm.gz"):
        if not (folder / name).exists():
            pytest.skip("nibabel without its test data")
    for name in ("siemens_dwi_0.dcm.gz", "siemens_dwi_1000.dcm.gz"):
        data = gzip.decompress((folder / name).read_bytes())
        wrapper = dicomwrappers.wrapper_from_data(pydicom.dcmread(io.BytesIO(data)))
        # its axes are rows, columns, slices of DICOM's left, posterior, superior
        image = nibabel.Nifti1Image(wrapper.get_unscaled_data(), np.diag([-1, -1, 1, 1]) @ wrapper.affine)
        values = np.asanyarray(nibabel.as_closest_canonical(image).dataobj)
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "a.dcm"
            path.write_bytes(data)
            (stack,) = read(path)
            frames = {frame.label: frame.pixels for frame in stack.frames(("axial", "coronal", "sagittal"), 1)}
        assert stack.length == 48 and len(frames) == 48 + 128 + 128 and stack.geometry.even
        for n in range(0, 48, 7):
            assert np.array_equal(frames[f"axial-{n:03d}"], values[::-1, ::-1, n].T)
            assert np.array_equal(frames[f"coronal-{n:03d}"], values[::-1, n, ::-1].T)
            assert np.array_equal(frames[f"sagittal-{n:03d}"], values[n, ::-1, ::-1].T)


@pytest.mark.parametrize(
    "more, reason",
    [
        ({"told": None}, "unsupported: a mosaic whose number"),
        ({"count": 0}, "unsupported: a mosaic whose number"),
        ({"count": 2000}, "too large: a mosaic of more than"),
        ({"count": 17}, "inconsistent: a mosaic of"),  # a square of five into twelve pixels
        ({"told": None, "header": b"SV10" + bytes(4) + b"\xff" * 400}, "unsupported: a mosaic whose number"),
        ({"told": None, "header": csa(NumberOfImagesInMosaic=["nine"])}, "unsupported: a mosaic whose number"),
        ({"told": None, "header": csa(NumberOfImagesInMosaic=[9])[:120]}, "unsupported: a mosaic whose number"),
    ],
)
def test_mosaics_that_do_not_say_what_they_are(tmp_path, more, reason):
    with pytest.raises(Refused, match=reason):
        read(mosaic(tmp_path / "a.dcm", np.ones((9, 4, 4), np.uint16), 3, **more))


@pytest.mark.parametrize("normal", [(0, 0, 5), (0, 0, 0), ("nan", 0, 1), (1, 2)])
def test_a_normal_that_is_none_gives_slices_without_places(tmp_path, normal):
    slices = np.random.default_rng(1).integers(1, 1000, (4, 5, 7), dtype=np.uint16)
    (stack,) = read(mosaic(tmp_path / "a.dcm", slices, 2, normal=normal))
    assert stack.geometry is None and stack.volume and np.array_equal(stored(stack), slices)


def test_a_packed_mosaic(tmp_path):
    slices = np.random.default_rng(1).integers(1, 1000, (4, 6, 8), dtype=np.uint16)
    data = pydicom.dcmread(mosaic(tmp_path / "a.dcm", slices, 2, normal=(0, 0, 1)))
    data.compress(RLELossless)
    data.save_as(tmp_path / "a.dcm")
    (stack,) = read(tmp_path / "a.dcm")
    assert np.array_equal(stored(stack), slices)
