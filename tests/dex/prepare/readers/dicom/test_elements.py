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
        assert header.pixels == pixels, path.name
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
