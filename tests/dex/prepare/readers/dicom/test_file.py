"""One file: its header within bounds, and its numbers, polarity and colours in every transfer syntax."""

import gzip
import struct
import zlib
from collections import Counter

import numpy as np
import pydicom
import pytest
from dicom_files import FILES, read, slice_of, stored, write
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MultiFrameSingleBitSecondaryCaptureImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from dex.prepare import readers
from dex.prepare.readers import Limits, Refused


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
    path = write(tmp_path / "d.dcm", pixels, Modality="US", syntax=ExplicitVRBigEndian)  # left to pydicom
    monkeypatch.setattr("dex.prepare.readers.dicom.file.HEADER_READS", 20)
    with pytest.raises(Refused, match="too large"):
        read(path)


def test_no_header_text_in_a_refusal(tmp_path):
    for number, change in enumerate(({"Rows": 0}, {"NumberOfFrames": "3"}, {"BitsStored": 40})):
        path = write(tmp_path / f"{number}.dcm", np.zeros((8, 8), np.int16), **change)
        with pytest.raises(Refused) as caught:
            for stack in read(path):
                stored(stack)
        shown = f"{caught.value} {caught.value!r} {caught.value.__cause__}"
        assert "Canary" not in shown and "id-7" not in shown and str(tmp_path) not in shown


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


def test_deflated(tmp_path):
    pixels = np.arange(4096, dtype=np.int16).reshape(64, 64)
    path = write(tmp_path / "a.dcm", pixels, syntax=DeflatedExplicitVRLittleEndian, Modality="MR")
    assert np.array_equal(stored(read(path)[0])[0], pixels)


def test_a_file_without_preamble_is_read_and_rubbish_is_not(tmp_path):
    pixels = np.arange(64, dtype=np.int16).reshape(8, 8)
    whole = write(tmp_path / "a.dcm", pixels, Modality="MR").read_bytes()
    bare = tmp_path / "bare.dcm"
    bare.write_bytes(whole[132:])
    assert np.array_equal(stored(read(bare)[0])[0], pixels)
    assert [readers.recognised(path) for path in (tmp_path / "a.dcm", bare, tmp_path)] == ["dicom", "dicom", None]
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


def test_a_deflated_file_that_inflates_to_too_much(tmp_path):
    limits = readers.Limits(memory_mb=48)
    pixels = np.zeros((16, 1024, 1024), np.uint8)
    path = write(tmp_path / "a.dcm", pixels, syntax=DeflatedExplicitVRLittleEndian, kind=SecondaryCaptureImageStorage)
    assert path.stat().st_size < 50_000 and zlib is not None
    with pytest.raises(Refused, match="too large"):
        list(readers.read([path], "dicom", limits=limits))


def test_files_packed_by_gzip(tmp_path):
    pixels = np.arange(64, dtype=np.int16).reshape(8, 8)
    whole = write(tmp_path / "a.dcm", pixels, RescaleSlope=1, RescaleIntercept=0).read_bytes()
    path = tmp_path / "b.dcm.gz"
    path.write_bytes(gzip.compress(whole))
    assert readers.format_of(path) == "dicom"
    assert np.array_equal(stored(read(path)[0])[0], pixels)
    path.write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(Refused, match="unreadable"):
        read(path)
    path.write_bytes(gzip.compress(whole + b"\0" * 2**25))
    with pytest.raises(Refused, match="too large: unpacks to more than"):
        list(readers.read([path], "dicom", limits=Limits(memory_mb=96)))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("shape", ["", "IDENTITY", "INVERSE"])
def test_bright_is_high_by_photometric_interpretation_and_lut_shape(tmp_path, photometric, shape):
    elements = {"Modality": "DX", "PhotometricInterpretation": photometric}
    elements |= {"PresentationLUTShape": shape} if shape else {}
    inverse = photometric == "MONOCHROME1" or shape == "INVERSE"
    eight = np.arange(16, dtype=np.uint8).reshape(4, 4)
    (stack,) = read(write(tmp_path / "a.dcm", eight, **elements))
    assert np.array_equal(stored(stack)[0], 255 - eight if inverse else eight) and not stack.inverted
    (stack,) = read(write(tmp_path / "b.dcm", eight.astype(np.uint16), stored=12, **elements))
    assert stack.inverted == inverse


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_file_that_is_cut_within_its_header_is_unreadable(tmp_path, syntax):
    """Not an object without pixels, wherever it is cut but between two elements."""
    data = Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.Modality, data.Rows, data.Columns = "1.2.840.10008.5.1.4.1.1.2", "CT", 8, 8
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = data.SOPClassUID, "1.2"
    path = tmp_path / "a.dcm"
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    whole = path.read_bytes()
    outcomes = Counter()
    for end in range(1, len(whole) + 1):
        path.write_bytes(whole[:end])
        with pytest.raises(Refused) as caught:
            list(readers.read([path], "dicom"))
        outcomes[caught.value.reason] += 1
    assert outcomes == {"no image": 4, "unreadable": len(whole) - 4}
