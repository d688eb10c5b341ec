"""NIfTI through nibabel's own writer, and headers that lie."""

import bz2
import gzip

import nibabel
import numpy as np
import pytest
from volume_files import DATA, DRAW, VALUES, read, save, shown

from dex.prepare import readers
from dex.prepare.readers import Refused


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_nifti(tmp_path, name, kind):
    stack = read(save(tmp_path / name, VALUES, kind=kind))
    assert (stack.quantity, stack.length, stack.volume, stack.described) == ("raw", 4, True, True)
    frames = list(stack.frames(("axial", "coronal", "sagittal"), 1))
    assert len(frames) == 4 + 5 + 6
    assert {f.label.split("-")[0]: f.spacing for f in frames} == {
        "axial": (2, 1.5),
        "coronal": (3, 1.5),
        "sagittal": (3, 2),
    }
    for n in range(4):  # the patient's right on the left, front up
        assert np.array_equal(shown(stack)[n], VALUES[::-1, ::-1, n].T)
    assert np.array_equal(shown(stack, "stored"), VALUES.transpose(2, 1, 0))
    assert stack.percentiles(1, 99) == pytest.approx(np.percentile(VALUES, (1, 99)))


def test_every_orientation_shows_the_same(tmp_path):
    image = nibabel.Nifti1Image(VALUES, np.diag([1.5, 2, 3, 1]))
    expected = {plane: shown(read(save(tmp_path / "a.nii", VALUES)), plane) for plane in readers.PLANES[:3]}
    for codes in ("LPS", "PIR", "SAL", "ARI", "IPL"):
        target = nibabel.orientations.axcodes2ornt(codes)
        turned = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), target))
        nibabel.save(turned, tmp_path / "b.nii.gz")
        stack = read(tmp_path / "b.nii.gz")
        for plane, frames in expected.items():
            got = list(stack.frames((plane,), 1))
            order = np.argsort([frame.label for frame in got])
            assert np.array_equal(np.stack([got[n].pixels for n in order]), frames), (codes, plane)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.float32, np.float64, ">i2"])
def test_nifti_types_and_scaling(tmp_path, dtype):
    values = DRAW.integers(0, 100, (4, 3, 2)).astype(dtype)
    order = ">" if dtype == ">i2" else "<"
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape)
    header.set_slope_inter(0.5, -7)
    header["magic"], header["vox_offset"], header["sform_code"] = b"n+1", 352, 1
    header["srow_x"], header["srow_y"], header["srow_z"] = [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]
    path = tmp_path / "a.nii"
    path.write_bytes(header.binaryblock + bytes(4) + values.tobytes(order="F"))
    stack = read(path)
    assert stack.quantity == "raw" and np.allclose(shown(stack, "stored"), values.transpose(2, 1, 0) * 0.5 - 7)
    assert nibabel.load(path).get_fdata()[1, 2, 1] == shown(stack, "stored")[1, 2, 1]


def test_nifti_for_display(tmp_path):
    eight = DRAW.integers(0, 256, (4, 3, 2), dtype=np.uint8)
    stack = read(save(tmp_path / "a.nii", eight))
    assert stack.quantity == "display8" and np.array_equal(shown(stack, "stored"), eight.transpose(2, 1, 0))
    colour = DRAW.integers(0, 256, (4, 3, 2, 3), dtype=np.uint8)
    kind = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    stack = read(save(tmp_path / "b.nii", np.ascontiguousarray(colour).view(kind)[..., 0]))
    assert stack.quantity == "display8" and np.array_equal(shown(stack, "stored"), colour.transpose(2, 1, 0, 3))
    assert shown(stack, "coronal").shape == (3, 2, 4, 3)


def test_the_first_of_several_volumes_is_taken_and_no_more_is_read(tmp_path):
    series = DRAW.integers(0, 1000, (6, 5, 4, 3), dtype=np.int16)
    path = save(tmp_path / "a.nii.gz", series)
    stack = read(path)
    assert np.array_equal(shown(stack, "stored"), series[..., 0].transpose(2, 1, 0))
    assert stack.length == 4 and "2 volumes" in str(stack.refused[0])
    plain = gzip.decompress(path.read_bytes())
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(plain[: 352 + 240]) + b"rubbish after the first volume")
    assert np.array_equal(shown(read(tmp_path / "b.nii.gz"), "stored"), series[..., 0].transpose(2, 1, 0))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_volume_that_does_not_fit_is_streamed(tmp_path, name):
    values = DRAW.integers(-1000, 1000, (64, 64, 2000), dtype=np.int16)
    path = save(tmp_path / name, values.astype(">i2"), affine=np.diag([1, 1, -3, 1]), slope=0.5, intercept=7)
    limits = readers.Limits(memory_mb=40)
    stack, kept = read(path, limits=limits), read(path)
    assert stack.whole is None and kept.whole is not None
    assert stack.percentiles(1, 99) == kept.percentiles(1, 99)
    got, expected = list(stack.frames(("axial",), 100)), list(kept.frames(("axial",), 100))
    assert [frame.label for frame in got] == [frame.label for frame in expected] and len(got) == 20
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(got, expected, strict=True))
    for plane in ("coronal", "sagittal"):  # some of them at a time
        got, expected = list(stack.frames((plane,), 7)), list(kept.frames((plane,), 7))
        assert [frame.label for frame in got] == [frame.label for frame in expected] and len(got) == 10
        assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(got, expected, strict=True))
    save(path, values * 0)
    if name == "a.nii":
        assert read(path, limits=limits).length == 2000
    else:  # nothing but zeros: too long to unpack for what it is
        with pytest.raises(Refused, match="too large"):
            read(path, limits=limits)


def test_flat_nifti_is_one_picture(tmp_path):
    stack = read(save(tmp_path / "a.nii", VALUES[:, :, :1]))
    (frame,) = stack.frames(("axial", "coronal"), 1)
    assert not stack.volume and np.array_equal(frame.pixels, VALUES[::-1, ::-1, 0].T)
    stack = read(save(tmp_path / "b.nii", VALUES[:, :, 0]))
    assert np.array_equal(next(stack.frames(("axial",), 1)).pixels, VALUES[::-1, ::-1, 0].T)


def test_headers_that_lie(tmp_path):
    whole = save(tmp_path / "a.nii", VALUES).read_bytes()
    cases = {
        "shorter": (whole[:-1], "unreadable"),
        "huge": (whole[:42] + np.array([30000, 30000, 300], "<i2").tobytes() + whole[48:], "too large"),
        "deep": (whole[:42] + np.array([900, 900, 1400], "<i2").tobytes() + whole[48:], "too large"),
        "negative": (whole[:42] + np.array([-5], "<i2").tobytes() + whole[44:], "unreadable"),
        "complex": (whole[:70] + np.array([1792, 128], "<i2").tobytes() + whole[74:], "unsupported"),
        "type": (whole[:70] + np.array([7777, 16], "<i2").tobytes() + whole[74:], "unreadable"),
        "pair": (whole[:344] + b"ni1\0" + whole[348:], "unreadable"),
        "magic": (whole[:344] + b"xxxx" + whole[348:], "unreadable"),
        "Analyze": (whole[:344] + bytes(4) + whole[348:], "unsupported"),
        "offset": (whole[:108] + np.array([1e9], "<f4").tobytes() + whole[112:], "unreadable"),
        "nan offset": (whole[:108] + np.array([np.nan], "<f4").tobytes() + whole[112:], "unreadable"),
        "empty": (b"", "unreadable"),
        "rubbish": (b"rubbish" * 100, "unreadable"),
    }
    for name, (data, reason) in cases.items():
        for path, content in ((tmp_path / "b.nii", data), (tmp_path / "b.nii.gz", gzip.compress(data))):
            path.write_bytes(content)
            with pytest.raises(Refused) as caught:
                read(path)
            assert caught.value.reason == reason, (name, caught.value)
    damaged = bytearray(gzip.compress(whole))
    damaged[-6] ^= 1  # the checksum
    (tmp_path / "b.nii.gz").write_bytes(damaged)
    with pytest.raises(Refused, match="unreadable"):
        read(tmp_path / "b.nii.gz")


def test_not_finite_nifti(tmp_path):
    values = DRAW.normal(size=(4, 3, 2)).astype(np.float32)
    values[1, 1, 1] = np.nan
    stack = read(save(tmp_path / "a.nii", values))
    (low, _), got = stack.percentiles(0, 100), shown(stack, "stored")
    assert low == np.nanmin(values) and stack.masked
    assert np.array_equal(got, np.where(np.isnan(values), low, values).transpose(2, 1, 0))
    values[1, 1, 1] = np.inf
    with pytest.raises(Refused, match="not finite"):
        shown(read(save(tmp_path / "b.nii", values)))


def test_nifti_packed_by_bzip2(tmp_path, monkeypatch):
    whole = save(tmp_path / "a.nii", VALUES).read_bytes()
    path = tmp_path / "b.nii.bz2"
    path.write_bytes(bz2.compress(whole))
    assert readers.format_of(path) == "nifti"
    assert np.array_equal(shown(read(path)), shown(read(tmp_path / "a.nii")))
    path.write_bytes(bz2.compress(whole)[:-20])
    with pytest.raises(Refused, match="unreadable"):
        read(path)
    path.write_bytes(bz2.compress(whole))
    monkeypatch.setattr("dex.prepare.readers.nifti.BZIP2_BYTES", VALUES.nbytes - 1)
    with pytest.raises(Refused, match="too large: .* packed by bzip2"):
        read(path)


@pytest.mark.parametrize("name", ["anatomical.nii", "example4d.nii.gz", "example_nifti2.nii.gz", "functional.nii"])
def test_files_that_come_with_nibabel(name):
    image = nibabel.as_closest_canonical(nibabel.load(DATA / name))
    values = np.asanyarray(image.dataobj).astype(np.float64)
    values = values[..., 0] if values.ndim == 4 else values
    frames = {frame.label: frame.pixels for frame in read(DATA / name).frames(("axial", "coronal", "sagittal"), 1)}
    assert len(frames) == sum(values.shape)
    assert np.allclose(frames["axial-001"], values[::-1, ::-1, 1].T)
    assert np.allclose(frames["coronal-002"], values[::-1, 2, ::-1].T)
    assert np.allclose(frames["sagittal-003"], values[3, ::-1, ::-1].T)


@pytest.mark.parametrize("ending", ["hdr", "hdr.gz", "HDR"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
def test_nifti_pairs(tmp_path, ending, kind):
    nibabel.save(kind(VALUES, np.diag([1.5, 2, 3, 1])), tmp_path / "x.y.hdr")
    header, image = (tmp_path / f"x.y.{end}" for end in ("hdr", "img"))
    if ending == "HDR":
        header, image = header.rename(tmp_path / "x.y.HDR"), image.rename(tmp_path / "x.y.IMG")
    if ending == "hdr.gz":
        for path in (header, image):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        header, image = (path.with_name(path.name + ".gz") for path in (header, image))
    assert readers.format_of(header) == "nifti" and readers.format_of(image) is None
    stack = read(header)
    assert (stack.length, stack.volume) == (4, True)
    assert np.array_equal(shown(stack), VALUES[::-1, ::-1].transpose(2, 1, 0))
    assert next(stack.frames(("coronal",), 1)).spacing == (3, 1.5)
    data = image.read_bytes()
    image.write_bytes(data[:-1] if ending != "hdr.gz" else data[:-9])
    with pytest.raises(Refused, match="unreadable"):
        read(header)
    image.unlink()
    with pytest.raises(Refused, match="unreadable: the file with its image"):
        read(header)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(data)
    image.symlink_to(elsewhere)
    with pytest.raises(Refused, match="unreadable"):
        read(header)


def test_a_pair_that_does_not_fit_is_streamed(tmp_path):
    values = DRAW.integers(-1000, 1000, (64, 64, 2000), dtype=np.int16)
    nibabel.save(nibabel.Nifti1Pair(values, np.eye(4)), tmp_path / "a.hdr")
    stack = read(tmp_path / "a.hdr", limits=readers.Limits(memory_mb=40))
    assert stack.whole is None
    for n, frame in zip(range(0, 2000, 500), stack.frames(("axial",), 500), strict=True):
        assert np.array_equal(frame.pixels, values[::-1, ::-1, n].T)


def test_more_than_four_sides(tmp_path):
    """Sides of 1 are none; three or four bytes at each place are a colour, as planes one after the other; other numbers
    at each place (fields, tensors) are no images."""
    for shape in ((6, 5, 4, 1, 1), (6, 5, 4, 1, 1, 1, 1)):
        assert np.array_equal(
            shown(read(save(tmp_path / "a.nii", VALUES.reshape(shape)))), shown(read(save(tmp_path / "b.nii", VALUES)))
        )
    colour = DRAW.integers(0, 256, (6, 5, 4, 1, 3), dtype=np.uint8)
    for name in ("c.nii", "c.nii.gz"):
        stack = read(save(tmp_path / name, colour))
        assert (stack.quantity, stack.channels, stack.refused) == ("display8", 3, [])
        assert np.array_equal(shown(stack, "stored"), colour[:, :, :, 0].transpose(2, 1, 0, 3))
    alpha = np.concatenate([colour, colour[..., :1]], axis=4)
    assert np.array_equal(
        shown(read(save(tmp_path / "d.nii", alpha)), "stored"), colour[:, :, :, 0].transpose(2, 1, 0, 3)
    )
    for values in (
        colour.astype(np.float32),
        colour[..., :2],
        np.repeat(colour, 2, axis=3),
        VALUES.reshape(6, 5, 2, 1, 2),
    ):
        with pytest.raises(Refused, match="unsupported: .* at each place"):
            read(save(tmp_path / "e.nii", values))
    series = DRAW.integers(0, 1000, (6, 5, 1, 9), dtype=np.int16)
    stack = read(save(tmp_path / "f.nii", series))
    assert stack.length == 1 and "8 volumes" in str(stack.refused[0])


@pytest.mark.parametrize(
    ("intent", "declared"), [(0, ""), (1002, "label map"), (3, "derived map"), (1006, "derived map")]
)
def test_intents_declare_what_is_no_image(tmp_path, intent, declared):
    image = nibabel.Nifti1Image(VALUES, np.eye(4))
    image.header.set_intent(intent, (1,) if intent == 3 else ())
    nibabel.save(image, tmp_path / "a.nii")
    assert read(tmp_path / "a.nii").declared == declared


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nii.bz2"])
@pytest.mark.parametrize("streamed", [False, True])
def test_which_volumes_are_taken(tmp_path, name, streamed, monkeypatch):
    values = np.stack([VALUES + 7 * n for n in range(5)], axis=3)
    whole = save(tmp_path / "whole.nii", values, slope=2.0, intercept=1.0).read_bytes()
    packed = {"nii": bytes, "gz": gzip.compress, "bz2": bz2.compress}[name.rsplit(".", 1)[1]](whole)
    (tmp_path / name).write_bytes(packed)
    if streamed and name.endswith("bz2"):
        pytest.skip("files packed by bzip2 are never streamed")
    if streamed:
        monkeypatch.setattr(readers.Limits, "holds", lambda self, stored, *_: stored == 0)
    for volumes, wanted, says in (
        ("first", [0], ["inconsistent: 4 volumes after the first"]),
        ("all", [0, 1, 2, 3, 4], []),
        ("2", [0, 2, 4], ["inconsistent: 2 volumes"]),
    ):
        stacks = list(readers.read([tmp_path / name], "nifti", volumes=volumes))
        assert len(stacks) == len(wanted) and [str(one) for stack in stacks for one in stack.refused] == says
        for stack, number in zip(stacks, wanted, strict=True):
            assert np.array_equal(shown(stack, "stored"), values[..., number].transpose(2, 1, 0) * 2 + 1)
    if streamed:
        with pytest.raises(Refused, match="too large: a mean of volumes"):
            list(readers.read([tmp_path / name], "nifti", volumes="mean"))
    else:
        (stack,) = readers.read([tmp_path / name], "nifti", volumes="mean")
        mean = values.mean(axis=3).transpose(2, 1, 0) * 2 + 1
        assert np.allclose(shown(stack, "stored"), mean, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_one_file_called_img_is_known_by_its_content(tmp_path, kind):
    save(tmp_path / "a.nii", VALUES, kind=kind)
    data = (tmp_path / "a.nii").read_bytes()
    want = shown(read(tmp_path / "a.nii"))
    for name, packed in (
        ("a.img", data),
        ("b.img.gz", gzip.compress(data)),
        ("scan", data),
        ("c.IMG", bz2.compress(data)),
    ):
        path = tmp_path / name
        path.write_bytes(packed)
        assert readers.format_of(path) is None and readers.recognised(path) == "nifti"
        assert np.array_equal(shown(next(readers.read([path], "nifti"))), want)
    pair = nibabel.Nifti1Pair(VALUES, np.eye(4))
    nibabel.save(pair, tmp_path / "d.img")  # its header is another file's
    other = (tmp_path / "d.img").read_bytes()
    for start in (other, data[:6], b"", gzip.compress(data)[:40], b"\x1f\x8b", b"BZh9"):
        (tmp_path / "e").write_bytes(start)
        assert readers.recognised(tmp_path / "e") is None
