"""Pixels that do not begin a byte; frames of single bits: test_file.py."""

import numpy as np
import pytest
from dicom_files import read, stored, write
from pydicom.uid import ExplicitVRBigEndian, MRImageStorage

from dex.prepare.readers import Refused
from dex.prepare.readers.dicom import bits


@pytest.mark.parametrize("signed", [False, True])
def test_pixels_of_twelve_bits(tmp_path, signed):
    """Frames of an odd number of pixels begin within a byte."""
    values = np.random.default_rng(0).integers(0, 4096, (3, 5, 7))
    packed = np.packbits(((values[..., None] >> np.arange(12)) & 1).astype(np.uint8).ravel(), bitorder="little")
    more = {"BitsAllocated": 12, "BitsStored": 12, "HighBit": 11, "Modality": "MR", "PixelRepresentation": int(signed)}
    path = write(tmp_path / "a.dcm", values.astype(np.uint16), data=packed.tobytes(), kind=MRImageStorage, **more)
    expected = np.where(values >= 2048, values - 4096, values) if signed else values
    assert np.array_equal(np.stack(stored(read(path)[0])), expected)


def test_strips_are_one_frame(monkeypatch):
    values = np.random.default_rng(1).integers(0, 2, (2, 9, 11), dtype=np.uint8)
    data = np.packbits(values.ravel(), bitorder="little").tobytes()
    monkeypatch.setattr(bits, "_STRIP", 30)
    frame = bits.frame(lambda start, count: data[start : start + count], (9, 11), 1, False, 1)
    assert np.array_equal(frame, values[1]) and frame.dtype == np.uint8
    with pytest.raises(Refused, match="ends within frame 1"):
        bits.frame(lambda start, count: data[start : start + count][:2], (9, 11), 1, False, 1)


def test_twelve_bits_in_other_layouts_are_refused(tmp_path):
    more = {"BitsAllocated": 12, "BitsStored": 12, "HighBit": 11, "Modality": "MR", "kind": MRImageStorage}
    path = write(tmp_path / "a.dcm", np.zeros((4, 4), np.uint16), syntax=ExplicitVRBigEndian, data=bytes(24), **more)
    with pytest.raises(Refused, match="1 samples of 12 bits"):
        read(path)
