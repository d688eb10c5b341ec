"""MGH and MGZ through nibabel's own writer, and headers that lie."""

import gzip
import struct

import nibabel
import numpy as np
import pytest
from volume_files import VALUES, read, shown

from dex.prepare import readers
from dex.prepare.readers import Refused


def save(path, values, affine=None):
    affine = np.diag([1.5, 2.0, 3.0, 1.0]) if affine is None else affine
    nibabel.save(nibabel.MGHImage(values, affine), path)
    return path


def by_label(stack):
    return {frame.label: frame.pixels for frame in stack.frames(readers.PLANES[:3], 1)}


@pytest.mark.parametrize("name", ["a.mgz", "a.mgh"])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.uint8])
def test_volumes(tmp_path, name, dtype):
    values = (VALUES % 200).astype(dtype)
    stack = read(save(tmp_path / name, values))
    assert (stack.length, stack.volume, stack.described) == (4, True, True)
    assert stack.quantity == ("display8" if dtype == np.uint8 else "raw")
    frames = list(stack.frames(("axial", "coronal", "sagittal"), 1))
    assert {f.label.split("-")[0]: f.spacing for f in frames} == {
        "axial": (2, 1.5),
        "coronal": (3, 1.5),
        "sagittal": (3, 2),
    }
    for n in range(4):
        assert np.array_equal(shown(stack)[n], values[::-1, ::-1, n].T.astype(np.float32))


def test_every_orientation_shows_the_same(tmp_path):
    values = VALUES.astype(np.int16)
    image = nibabel.Nifti1Image(values, np.diag([1.5, 2, 3, 1]))
    expected = by_label(read(save(tmp_path / "a.mgz", values)))
    for codes in ("LPS", "PIR", "SAL", "ARI", "LIA"):
        target = nibabel.orientations.axcodes2ornt(codes)
        turned = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), target))
        got = by_label(read(save(tmp_path / "b.mgz", np.asarray(turned.dataobj), turned.affine)))
        assert got.keys() == expected.keys()
        assert all(np.array_equal(got[label], expected[label]) for label in expected), codes


@pytest.mark.parametrize("name", ["a.mgz", "a.mgh"])
def test_which_volumes_are_taken(tmp_path, name):
    values = np.stack([VALUES * (n + 1) for n in range(5)], axis=3).astype(np.float32)
    path = save(tmp_path / name, values)
    for volumes, wanted, says in (
        ("first", [0], ["inconsistent: 4 volumes after the first"]),
        ("all", [0, 1, 2, 3, 4], []),
        ("2", [0, 2, 4], ["inconsistent: 2 volumes"]),
    ):
        stacks = list(readers.read([path], "mgh", volumes=volumes))
        assert len(stacks) == len(wanted) and [str(one) for stack in stacks for one in stack.refused] == says
        for stack, number in zip(stacks, wanted, strict=True):
            assert np.array_equal(shown(stack, "stored"), values[..., number].transpose(2, 1, 0))
    (stack,) = readers.read([path], "mgh", volumes="mean")
    assert np.allclose(shown(stack, "stored"), values.mean(axis=3).transpose(2, 1, 0))


def test_headers_that_lie(tmp_path):
    whole = save(tmp_path / "a.mgh", VALUES.astype(np.int16)).read_bytes()
    for place, value, says in (
        (0, 2, "unreadable: no MGH header"),
        (4, -1, "unreadable: no MGH header"),
        (4, 2**30, "too large"),
        (12, 2**30, "too large"),
        (20, 7, "unsupported: numbers of type 7"),
    ):
        (tmp_path / "b.mgh").write_bytes(whole[:place] + struct.pack(">i", value) + whole[place + 4 :])
        (tmp_path / "b.mgz").write_bytes(gzip.compress((tmp_path / "b.mgh").read_bytes()))
        for name in ("b.mgh", "b.mgz"):
            with pytest.raises(Refused, match=says):
                read(tmp_path / name)
    for cut in (100, 300):
        (tmp_path / "c.mgh").write_bytes(whole[:cut])
        (tmp_path / "c.mgz").write_bytes(gzip.compress(whole[:cut]))
        for name in ("c.mgh", "c.mgz"):
            with pytest.raises(Refused, match="unreadable"):
                read(tmp_path / name)
    without = bytearray(whole)
    without[28:30] = b"\0\0"  # no geometry: coronal
    (tmp_path / "d.mgh").write_bytes(without)
    assert [frame.label for frame in read(tmp_path / "d.mgh").frames(("coronal",), 1)][:1] == ["coronal-000"]
