"""Siemens mosaics are taken apart into their slices."""

import gzip
import io
import struct
import tempfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import AXIAL, read, stored, write
from pydicom.uid import (
    MRImageStorage,
    RLELossless,
)

from dex.prepare.readers import Refused


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
        ({"told": None}, "unsupported: a mosaic without the number of slices in its header; convert it"),
        ({"count": 0}, "unsupported: a mosaic without the number of slices in its header; convert it"),
        ({"count": 2000}, "too large: a mosaic of more than"),
        ({"count": 17}, "inconsistent: a mosaic of"),  # a square of five into twelve pixels
        (
            {"told": None, "header": b"SV10" + bytes(4) + b"\xff" * 400},
            "unsupported: a mosaic without the number of slices in its header; convert it",
        ),
        (
            {"told": None, "header": csa(NumberOfImagesInMosaic=["nine"])},
            "unsupported: a mosaic without the number of slices in its header; convert it",
        ),
        (
            {"told": None, "header": csa(NumberOfImagesInMosaic=[9])[:120]},
            "unsupported: a mosaic without the number of slices in its header; convert it",
        ),
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
