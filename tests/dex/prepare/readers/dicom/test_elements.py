"""A plain header is read as pydicom reads it, or is left to it."""

import random
from pathlib import Path

import pytest

pydicom = pytest.importorskip("pydicom")

from pydicom.filereader import read_partial  # noqa: E402

from dex.prepare.readers.dicom import elements  # noqa: E402
from dex.prepare.readers.dicom.file import _PIXELS, _WANTED, _at_pixels  # noqa: E402
from dex.prepare.readers.files import has_magic, opened  # noqa: E402

FILES = sorted(Path(pydicom.__file__).parent.glob("data/test_files/*.dcm"))


def plain(path):
    with opened(path) as file:
        return elements.plain(file, _WANTED, _PIXELS) if has_magic(file) else None


def by_pydicom(path):
    """The elements as text, and where the pixels are."""
    with open(path, "rb") as file:
        head = read_partial(file, stop_when=_at_pixels, specific_tags=list(_WANTED))
        return values(head), head.file_meta.get("TransferSyntaxUID"), file.tell(), head


def values(head):
    return {int(element.tag): (element.VR, str(element.value)) for element in head}


@pytest.mark.filterwarnings("ignore")
def test_headers_are_as_pydicom_reads_them():
    fast = 0
    for path in FILES:
        header = plain(path)
        if header is None:
            continue
        fast += 1
        expected, syntax, pixels, head = by_pydicom(path)
        assert (values(header.head), header.syntax) == (expected, syntax), path.name
        assert header.pixels == min(pixels, path.stat().st_size), path.name  # of one that is cut off
        for keyword in ("PatientName", "Rows", "ImageType", "RescaleSlope", "NoSuchKeyword", (0x0028, 0x0010)):
            assert str(header.head.get(keyword, "absent")) == str(head.get(keyword, "absent"))
    assert fast > len(FILES) / 3 > 10


@pytest.mark.filterwarnings("ignore")
def test_damaged_headers_are_as_pydicom_reads_them_or_left_to_it(tmp_path):
    draw = random.Random(0)
    starts = [path.read_bytes() for path in FILES if plain(path) is not None]
    target, fast = tmp_path / "x.dcm", 0
    for trial in range(400):
        data = bytearray(starts[trial % len(starts)])
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(132, min(len(data), 3000))] = draw.randrange(256)
        if draw.random() < 0.3:
            data = data[: draw.randrange(140, len(data))]
        target.write_bytes(data)
        header = plain(target)
        if header is None:
            continue
        fast += 1
        try:
            expected, syntax, pixels, _ = by_pydicom(target)
        except Exception as error:
            pytest.fail(f"pydicom does not read what is taken for plain: {type(error).__name__}")
        assert values_or_error(header.head) == values_or_error(expected) and header.pixels == min(pixels, len(data)), (
            trial
        )
    assert fast > 100


def values_or_error(head):
    try:
        return head if isinstance(head, dict) else values(head)
    except Exception as error:
        return type(error).__name__


def written(path, implicit, **tags):
    """A header and a pixel, little endian."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    syntax = pydicom.uid.ImplicitVRLittleEndian if implicit else pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = "1.2", "1.3"
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = b"\0\0"
    data["PixelData"].VR = "OW"
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


def test_the_same_bytes_mean_what_the_rest_of_their_header_says(tmp_path):
    """Values are converted once for all headers; not where an encoding, a sign or a block decides about them."""
    names = {}
    for characters in ("ISO_IR 100", "ISO_IR 192"):
        path = written(tmp_path / f"{characters}.dcm", False, SpecificCharacterSet=characters, PatientName="A")
        path.write_bytes(path.read_bytes().replace(b"PN\x02\x00A ", b"PN\x02\x00\xc3\xa4"))
        for _ in range(2):
            names[characters] = str(plain(path).head.get("PatientName"))
    assert names == {"ISO_IR 100": "Ã¤", "ISO_IR 192": "ä"}
    for signed, value in ((0, 65000), (1, -536), (0, 65000)):
        tags = {"BitsAllocated": 16, "PixelRepresentation": signed, "PixelPaddingValue": value}
        path = written(tmp_path / f"{signed}.dcm", True, **tags)
        assert plain(path).head.get("PixelPaddingValue") == value
    for creator, value in (("SIEMENS MR HEADER", "100"), ("SOMEBODY ELSE", b"100 ")):
        path = tmp_path / "private.dcm"
        data = pydicom.Dataset()
        data.private_block(0x19, creator, create=True).add_new(0x0C, "IS", "100")
        written(path, True, **{})
        whole = pydicom.dcmread(path)
        whole.update(data)
        whole.save_as(path)
        assert plain(path).head.get((0x0019, 0x100C)).value == value
        assert plain(path).head.get((0x0019, 0x100A), "absent") == "absent"


def test_values_that_are_shared_are_as_pydicom_reads_them():
    """A second time, when all of them are known."""
    for path in FILES:
        if (header := plain(path)) is not None:
            first = {tag: (one.VR, one.value) for tag, one in ((int(one.tag), one) for one in header.head)}
            again = plain(path).head
            assert {int(one.tag): (one.VR, one.value) for one in again} == first
            assert all(again[tag] is again[tag] for tag in again.keys())
