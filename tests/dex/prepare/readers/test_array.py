"""Arrays without pickle, and headers that ask for more than there is."""

import io
import os
import zipfile

import numpy as np
import pytest
from flat_files import COLOUR, DEEP, GREY, frames, read

from dex.prepare import readers
from dex.prepare.readers import Refused


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "array, quantity, expected",
    [
        (GREY, "display8", GREY[None]),
        (COLOUR, "display8", COLOUR[None]),
        (DEEP, "raw", DEEP[None]),
        (DEEP.astype(">u2"), "raw", DEEP[None]),
        (np.stack([DEEP, DEEP + 1]), "raw", np.stack([DEEP, DEEP + 1])),
        (np.stack([COLOUR, 255 - COLOUR]), "display8", np.stack([COLOUR, 255 - COLOUR])),
        (COLOUR[:, :, :1], "display8", COLOUR[None, :, :, 0]),
        (COLOUR / 255.0, "display8", COLOUR[None]),
        (COLOUR.astype(np.uint16) * 257, "display8", COLOUR[None]),
        (GREY > 99, "display8", np.where(GREY > 99, 255, 0)[None]),
        (GREY * -1e3, "raw", GREY[None] * -1e3),
        (GREY.astype(np.float16), "raw", GREY[None]),
        (GREY.astype(np.int64) * 10**12, "raw", (GREY[None].astype(np.int64) * 10**12).astype(np.float32)),
    ],
)
def test_npy(tmp_path, order, array, quantity, expected):
    np.save(tmp_path / "a.npy", np.asarray(array, order=order))
    stack, got = frames(tmp_path / "a.npy")
    assert stack.quantity == quantity and stack.described and stack.volume == (len(expected) > 1)
    assert np.allclose(np.stack(got), expected, rtol=1e-6)


class Canary:
    def __reduce__(self):
        return os.mkdir, ("/tmp/dex-canary-of-the-readers-test",)


def test_npy_that_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[Canary()]], object), allow_pickle=True)
    cases = [(tmp_path / "a.npy").read_bytes()]
    for array in (np.zeros(5), np.zeros((2, 2, 2, 2)), np.zeros((0, 5)), np.zeros((3, 3), complex), np.array([["a"]])):
        np.save(tmp_path / "a.npy", array)
        cases.append((tmp_path / "a.npy").read_bytes())
    np.save(tmp_path / "a.npy", GREY)
    whole = (tmp_path / "a.npy").read_bytes()
    cases += [whole[:-1], whole + b"x", b"", whole[:20], whole.replace(b"(20, 30)", b"(20,-30)")]
    cases.append(whole.replace(b"20, 30), }        ", b"200000, 300000), }"))  # asks for 56 GiB
    for number, content in enumerate(cases):
        (tmp_path / "a.npy").write_bytes(content)
        with pytest.raises(Refused) as caught:
            frames(tmp_path / "a.npy")
        assert caught.value.reason in ("unreadable", "unsupported"), number
    assert not os.path.exists("/tmp/dex-canary-of-the-readers-test")
    np.save(tmp_path / "a.npy", np.where(COLOUR > 9, 2.0, np.nan))
    with pytest.raises(Refused, match="outside 0 to 1"):
        frames(tmp_path / "a.npy")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save):
    save(tmp_path / "a.npz", b=GREY, a=np.stack([DEEP, DEEP]), c=np.zeros(4))
    first, second = read(tmp_path / "a.npz")
    assert (first.series, second.series) == ("a", "b") and (first.length, second.length) == (2, 1)
    assert np.array_equal([f.pixels for f in first.frames(("axial",), 1)], [DEEP, DEEP])
    assert np.array_equal(next(second.frames(("axial",), 1)).pixels, GREY)
    assert [error.reason for error in first.refused] == ["unsupported"] and not second.refused


def test_npz_that_is_refused(tmp_path):
    path = tmp_path / "a.npz"

    def member(shape, size, method=zipfile.ZIP_DEFLATED):
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("../a.npy", head.getvalue() + bytes(size))

    for arguments, reason in (
        (((1000, 1000, 300), 1000), "unreadable"),
        (((20, 30), 2399), "unreadable"),
        (((20, 30), 2400, zipfile.ZIP_BZIP2), "unsupported"),
    ):
        member(*arguments)
        with pytest.raises(Refused) as caught:
            read(path)
        assert caught.value.reason == reason
    member((1000, 1000), 4 * 10**6)
    with pytest.raises(Refused, match="too large"):
        read(path, limits=readers.Limits(memory_mb=40))
    member((20, 30), 2400)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:50], b"PK\x03\x04" + bytes(100), whole + b"comment"):
        path.write_bytes(damaged)
        with pytest.raises(Refused, match="unreadable"):
            read(path)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(1001):
            archive.writestr(str(number), b"")
    with pytest.raises(Refused, match="1001 arrays"):
        read(path)
