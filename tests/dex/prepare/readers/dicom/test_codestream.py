"""The sizes that compressed frames declare."""

import io
import struct

import numpy as np
import pytest
from dicom_files import FILES, read, stored, write
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from dex.prepare.readers import Refused
from dex.prepare.readers.dicom.codestream import j2k_size, jpeg_colour, jpeg_size, rle_segments, whole_spectrum


def test_a_sequential_jpeg_that_declares_no_coefficients(tmp_path):
    """Twelve bits as a widely used encoder wrote them: "0 to 0" in the scan's header, where 0 to 63 belongs."""
    data = (FILES / "JPGExtended.dcm").read_bytes()
    scan = data.index(b"\xff\xda\x00\x08\x01")
    assert data[scan + 7 : scan + 9] == b"\x00\x3f"
    (tmp_path / "a.dcm").write_bytes(data[: scan + 8] + b"\x00" + data[scan + 9 :])
    (expected,) = stored(read(FILES / "JPGExtended.dcm")[0])
    assert np.array_equal(stored(read(tmp_path / "a.dcm")[0])[0], expected)


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


def jpeg_of(height, width, mode="RGB", **options):
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, **options)
    return stream.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
def test_the_size_of_a_jpeg(progressive):
    data = jpeg_of(7, 300, format="JPEG", progressive=progressive)
    assert jpeg_size(data) == (7, 300, 3)
    assert jpeg_size(data[:2] + b"\xff" * 9 + data[2:]) == (7, 300, 3)  # bytes that fill up before a marker
    for cut in (2, data.index(b"\xff\xc2" if progressive else b"\xff\xc0") + 6):
        with pytest.raises(Refused, match="no frame header"):
            jpeg_size(data[:cut])


@pytest.mark.parametrize("bare", [False, True])
def test_the_size_of_a_jpeg_2000(bare):
    data = jpeg_of(9, 17, "L", format="JPEG2000", no_jp2=bare)
    assert j2k_size(data) == (9, 17, 1)
    with pytest.raises(Refused, match="no size"):
        j2k_size(data[: data.index(b"\xff\x4f\xff\x51") + 20])


def test_the_segments_of_an_rle_frame():
    assert [rle_segments(struct.pack("<16L", count, *[64] * 15)) for count in (1, 3, 15)] == [1, 3, 15]
    for frame in (struct.pack("<16L", 0, *[64] * 15), struct.pack("<16L", 16, *[64] * 15), b"\1\0\0\0"):
        with pytest.raises(Refused, match="without a header"):
            rle_segments(frame)


def test_only_a_sequential_scan_gets_its_coefficients():
    for progressive in (False, True):
        data = jpeg_of(8, 8, "L", format="JPEG", progressive=progressive)
        assert whole_spectrum(data) == data
    sequential = jpeg_of(8, 8, "L", format="JPEG")
    end = sequential.index(b"\xff\xda") + 2 + 8
    assert sequential[end - 2 : end - 1] == b"\x3f"
    assert whole_spectrum(sequential[: end - 2] + b"\0" + sequential[end - 1 :]) == sequential
    for cut in (b"", sequential[:1], sequential[: end - 12]):
        assert whole_spectrum(cut) == cut


def marked(data, *, adobe=None, jfif=True, names=b"\1\2\3"):
    """A JPEG stream of Pillow's with other markers and names of its components."""
    if not jfif:
        data = data[:2] + data[data.index(b"\xff\xdb") :]
    if adobe is not None:
        data = data[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0" + bytes([adobe]) + data[2:]
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    out = bytearray(data)
    for number, name in enumerate(names):
        out[frame + 10 + 3 * number] = name
        out[scan + 5 + 2 * number] = name
    return bytes(out)


@pytest.mark.parametrize(
    ("markers", "colour"),
    [
        ({}, "YBR_FULL"),  # JFIF
        ({"jfif": False}, "YBR_FULL"),
        ({"jfif": False, "names": b"\0\1\2"}, ""),
        ({"jfif": False, "names": b"RGB"}, "RGB"),
        ({"jfif": False, "adobe": 0}, "RGB"),
        ({"jfif": False, "adobe": 1, "names": b"RGB"}, "YBR_FULL"),
    ],
)
def test_the_colour_of_a_jpeg_stream_is_what_it_says_itself(tmp_path, markers, colour):
    y, x = np.mgrid[0:32, 0:32]
    image = np.stack([x * 8, y * 8, 255 - x * 4], axis=2).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95, subsampling=0)
    data = marked(stream.getvalue(), **markers)
    assert jpeg_colour(data) == colour
    raw = np.asarray(Image.fromarray(image).convert("YCbCr"))
    for header in ("RGB", "YBR_FULL_422"):
        path = tmp_path / f"{header}.dcm"
        more = {"PhotometricInterpretation": header, "SamplesPerPixel": 3, "Modality": "US"}
        write(path, image, syntax=JPEGBaseline8Bit, data=encapsulate([data]), **more)
        as_rgb = (colour or header) == "RGB"
        error = np.abs(stored(read(path)[0])[0].astype(int) - (raw if as_rgb else image)).mean()
        assert error < 3, (header, error)


def test_streams_that_say_no_colour():
    grey = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(grey, "JPEG")
    assert jpeg_colour(grey.getvalue()) in ("", "YBR_FULL")
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff\xda\0\x08", b"\xff\xd8\xff\xc0\0\x08\x08", b"\0" * 40):
        assert jpeg_colour(data) == ""
