"""Volumes that do not fit into the memory give what they would give if they did, bit for bit."""

import gzip
import struct

import nibabel
import numpy as np
import pytest

from dex.prepare import readers
from dex.prepare.readers import Refused

SHAPE = (90, 48, 40)  # frames, rows, columns
DRAW = np.random.default_rng(5)
FLIPPED = np.diag([-1.0, 2.0, 3.0, 1.0])
"""Columns towards the left, rows towards the front, in the axes of NIfTI."""
SMALL = 33
"""MiB, of which 32 are not for volumes: none of these fits."""


def mha(path, frames, packed=False):
    import SimpleITK

    image = SimpleITK.GetImageFromArray(frames)
    image.SetSpacing((1, 2, 3))
    image.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))  # of ITK: left, back, up
    SimpleITK.WriteImage(image, str(path), useCompression=packed)


def nrrd(path, frames, pack=lambda data: data, encoding="raw"):
    kind = {"int16": "short", "float32": "float"}[frames.dtype.name]
    head = f"NRRD0004\ntype: {kind}\ndimension: 3\nspace: left-posterior-superior\nsizes: 40 48 90\n"
    head += "space directions: (1,0,0) (0,-2,0) (0,0,3)\nspace origin: (0,0,0)\n"
    path.write_bytes(f"{head}endian: little\nencoding: {encoding}\n\n".encode() + pack(frames.tobytes()))


def nifti(path, frames):
    nibabel.save(nibabel.Nifti1Image(frames.transpose(2, 1, 0), FLIPPED), path)


def mgh(path, frames):
    nibabel.save(nibabel.MGHImage(frames.transpose(2, 1, 0), FLIPPED), path)


def npz(path, frames, save=np.savez):
    save(path, second=frames[:1], first=frames)


WRITERS = {
    "a.mha": mha,
    "packed.mha": lambda path, frames: mha(path, frames, packed=True),
    "a.mhd": mha,
    "a.nrrd": nrrd,
    "packed.nrrd": lambda path, frames: nrrd(path, frames, gzip.compress, "gzip"),
    "a.nii": nifti,
    "a.nii.gz": nifti,
    "a.mgh": mgh,
    "a.mgz": mgh,
    "a.npy": np.save,
    "a.npz": npz,
    "packed.npz": lambda path, frames: npz(path, frames, np.savez_compressed),
}


def volumes(dtype):
    values = DRAW.normal(0, 300, SHAPE).astype(dtype)
    if dtype == np.float32:
        values[3, 7, 5] = np.nan
    return values


def read(path, **limits):
    paths = sorted(path.parent.iterdir(), key=lambda other: other != path)
    return next(readers.read(paths[:2], readers.format_of(path), limits=readers.Limits(**limits)))


@pytest.fixture
def small_memory(monkeypatch):
    """Each MiB of memory is 100,000 bytes: tests need no large volumes."""
    monkeypatch.setattr(readers.Limits, "holds", lambda self, stored, *frame: stored <= 100_000 * self.memory_mb)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize("name", WRITERS)
def test_a_volume_read_frame_by_frame(tmp_path, name, dtype, small_memory):
    pytest.importorskip("SimpleITK")
    values = volumes(dtype)
    WRITERS[name](tmp_path / name, values)
    streamed, kept = (read(tmp_path / name, memory_mb=memory) for memory in (1, 10))
    assert streamed.whole is None and kept.whole is not None
    assert streamed.percentiles(1, 99) == kept.percentiles(1, 99)
    numbers = np.nan_to_num(values, nan=np.nanmin(values))
    assert streamed.percentiles(1, 99) == pytest.approx(np.percentile(numbers, (1, 99)), rel=1e-6)
    planes = ("stored",) if streamed.geometry is None else ("axial", "coronal", "sagittal", "stored")
    for plane in planes:
        got, expected = (list(stack.frames((plane,), 5)) for stack in (streamed, kept))
        assert [one.label for one in got] == [one.label for one in expected] and len(got) >= 8
        assert all(
            np.array_equal(a.pixels, b.pixels) and a.spacing == b.spacing for a, b in zip(got, expected, strict=True)
        )
    assert streamed.whole is None and np.array_equal(got[1].pixels, numbers[5])  # as stored
    sample = [frame.copy() for frame in streamed.sample([2, 60])]
    assert np.array_equal(sample, values[[2, 60]], equal_nan=True)


def test_what_can_be_read_by_no_means(tmp_path):
    head = "NDims = 3\nDimSize = 3000 3000 2000\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (tmp_path / "a.mha").write_bytes(head.encode())
    with pytest.raises(Refused, match="too large: 36,000,000,000 bytes declared; --memory above 512 takes more"):
        read(tmp_path / "a.mha")
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b/a.npy", np.zeros((100, 100, 100), np.float32, order="F"))
    with pytest.raises(Refused, match="in Fortran order; save it in C order, or --memory above 33 takes more"):
        read(tmp_path / "b/a.npy", memory_mb=SMALL)
    with pytest.raises(Refused, match="a mean of volumes"):
        data = struct.pack(">7ih15f", 1, 100, 100, 100, 2, 3, 0, 0, *[0.0] * 15).ljust(284, b"\0")
        (tmp_path / "b/a.mgh").write_bytes(data + bytes(8 * 100**3))
        list(readers.read([tmp_path / "b/a.mgh"], "mgh", limits=readers.Limits(memory_mb=SMALL), volumes="mean"))


def test_more_memory_takes_larger_files(tmp_path):
    limits = readers.Limits.within(1024)
    assert (limits.memory_mb, limits.pixels, limits.seconds) == (1024, 80_000_000, 2 * readers.Limits().seconds)
    assert readers.Limits.within(128) == readers.Limits(128, pixels=10_000_000)
    assert readers.Limits.within(512) == readers.Limits() and limits.streamed == 2 * readers.Limits().streamed


def test_frames_that_are_lacking_refuse_a_stack_that_is_read_frame_by_frame(tmp_path, small_memory):
    nrrd(tmp_path / "a.nrrd", volumes(np.int16), lambda data: gzip.compress(data[:-100]), "gzip")
    stack = read(tmp_path / "a.nrrd", memory_mb=1)
    assert stack.whole is None
    with pytest.raises(Refused, match="unreadable"):
        list(stack.frames(("axial",), 1))
