"""Which files without a suffix are DICOM."""

import gzip
import random

import numpy as np
import pytest
from dicom_files import FILES, read, write
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

from dex.prepare import readers

WITHOUT_PREAMBLE = ("ExplVR_LitEndNoMeta.dcm", "ExplVR_BigEndNoMeta.dcm")


@pytest.mark.parametrize("name", [*WITHOUT_PREAMBLE, "CT_small.dcm", "MR_small_bigendian.dcm"])
def test_files_of_pydicom(tmp_path, name):
    if not (FILES / name).exists():
        pytest.skip("not among the files that pydicom brings")
    (tmp_path / "1.2.840").write_bytes((FILES / name).read_bytes())
    assert readers.recognised(tmp_path / "1.2.840") == "dicom"
    assert readers.series_of(tmp_path / "1.2.840", "dicom", readers.Limits())


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("meta", [True, False])
def test_files_whose_preamble_is_lacking(tmp_path, syntax, meta):
    more = {} if syntax is None else {"syntax": syntax}
    data = write(tmp_path / "a.dcm", np.zeros((4, 4), np.int16), **more).read_bytes()
    start = 132 if meta else 132 + 12 + int.from_bytes(data[140:144], "little")
    (tmp_path / "bare").write_bytes(data[start:])
    assert readers.recognised(tmp_path / "bare") == "dicom"
    (stack,) = read(tmp_path / "bare")
    assert stack.shape == (4, 4)


def test_other_files_are_none(tmp_path):
    draw = random.Random(0)
    others = [b"", b"\0" * 600, b"notes\n" * 100, gzip.compress(bytes(5000)), b"%PDF-1.4\n" * 50, b"PK\x03\x04" * 100]
    others += [draw.randbytes(600) for _ in range(200)]
    others += [b"\x08\0" + draw.randbytes(600) for _ in range(200)]  # of the right group, by chance
    for number, data in enumerate(others):
        path = tmp_path / str(number)
        path.write_bytes(data)
        assert readers.recognised(path) is None, data[:16]
