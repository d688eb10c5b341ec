"""NIfTI through nibabel's own writer, MHA and NRRD through SimpleITK's and by hand, and headers that lie."""

import bz2
import gzip
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest

from dex.prepare import readers
from dex.prepare.readers import Refused
from dex.prepare.readers.files import Unpacked, opened

DATA = Path(nibabel.__file__).parent / "tests" / "data"
DRAW = np.random.default_rng(3)
VALUES = DRAW.integers(-1000, 1000, (6, 5, 4), dtype=np.int16)


def save(path, values, affine=None, kind=nibabel.Nifti1Image, slope=None, intercept=None):
    image = kind(values, np.diag([1.5, 2, 3, 1]) if affine is None else affine)
    if slope is not None:
        image.header.set_slope_inter(slope, intercept)
    nibabel.save(image, path)
    return path


def read(path, **more):
    format = readers.format_of(path)
    others = [path.with_name(name) for name in readers.beside(path, format)]
    (stack,) = readers.read([path, *(other for other in others if other.exists())][:2], format, **more)
    return stack


def shown(stack, plane="axial"):
    return np.stack([frame.pixels for frame in stack.frames((plane,), 1)])


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
    assert stack.percentiles(1, 99) == pytest.approx(kept.percentiles(1, 99), rel=1e-6)
    got, expected = list(stack.frames(("axial",), 100)), list(kept.frames(("axial",), 100))
    assert [frame.label for frame in got] == [frame.label for frame in expected] and len(got) == 20
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(got, expected, strict=True))
    with pytest.raises(Refused, match="too large: coronal"):
        next(stack.frames(("coronal",), 1))
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
    values = np.zeros((4, 3, 2), np.float32)
    values[1, 1, 1] = np.nan
    with pytest.raises(Refused, match="not finite"):
        shown(read(save(tmp_path / "a.nii", values)))


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


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
@pytest.mark.parametrize("packed", [False, True])
def test_metaimage(tmp_path, name, packed):
    sitk = pytest.importorskip("SimpleITK")
    values = VALUES.transpose(2, 1, 0)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((1.5, 2, 3))
    sitk.WriteImage(image, str(tmp_path / name), packed)
    stack = read(tmp_path / name)
    assert (stack.quantity, stack.length, stack.volume, stack.described) == ("raw", 4, True, True)
    # SimpleITK's identity direction is left, posterior, superior: columns run to the left, rows to the back
    assert np.array_equal(shown(stack), values)
    frames = {frame.label: frame for frame in stack.frames(("coronal",), 1)}
    assert np.array_equal(frames["coronal-000"].pixels, values[::-1, -1]) and frames["coronal-000"].spacing == (3, 1.5)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    sitk.WriteImage(image, str(tmp_path / name), packed)
    assert np.array_equal(shown(read(tmp_path / name)), values[:, ::-1, ::-1])
    colour = DRAW.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(colour, isVector=True), str(tmp_path / name), packed)
    stack = read(tmp_path / name)
    assert stack.quantity == "display8" and np.array_equal(shown(stack)[0], colour)


def test_metaimage_series_and_types(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    series = DRAW.integers(0, 1000, (3, 4, 5, 6), dtype=np.uint16)
    sitk.WriteImage(sitk.GetImageFromArray(series, isVector=False), str(tmp_path / "a.mha"))
    stack = read(tmp_path / "a.mha")
    assert np.array_equal(shown(stack, "stored"), series[0]) and "2 volumes" in str(stack.refused[0])
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6), np.complex64)), str(tmp_path / "b.mha"))
    with pytest.raises(Refused, match="unsupported"):
        read(tmp_path / "b.mha")


MHA = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\n{more}DimSize = {size}\nElementType = MET_SHORT\n"
    "ElementDataFile = {file}\n"
)
NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: {size}\nencoding: raw\nendian: little\n{more}\n"


@pytest.mark.parametrize(
    "name, head, reason",
    [
        ("a.mha", MHA.format(more="", size="1000 1000 1000", file="LOCAL"), "too large"),
        ("a.mha", MHA.format(more="", size="9 9 0", file="LOCAL"), "unsupported"),
        ("a.mhd", MHA.format(more="", size="9 9 10", file="other.raw"), "unreadable"),
        ("a.mhd", MHA.format(more="", size="9 9 9", file="lost.raw"), "unreadable"),
        ("a.mhd", MHA.format(more="", size="9 9 9", file="a.mhd"), "unreadable"),
        ("a.mhd", MHA.format(more="", size="9 9 9", file="link.raw"), "unreadable"),
        ("a.mhd", MHA.format(more="", size="9 9 9", file="../other.raw"), "unsupported"),
        ("a.mhd", MHA.format(more="", size="9 9 9", file="sub/other.raw"), "unsupported"),
        ("a.mhd", MHA.format(more="", size="9 9 9", file="sub\\other.raw"), "unsupported"),
        ("a.mhd", MHA.format(more="", size="9 9 9", file="/dev/zero"), "unsupported"),
        ("a.mhd", MHA.format(more="", size="9 9 9", file=".."), "unsupported"),
        ("a.mhd", MHA.format(more="", size="9 9 9", file=""), "unsupported"),
        ("a.mhd", MHA.format(more="", size="9 9 9", file="local"), "unsupported"),
        ("a.mhd", MHA.format(more="HeaderSize = 1\n", size="9 9 9", file="other.raw"), "unreadable"),
        ("a.mhd", MHA.format(more="HeaderSize = -2\n", size="9 9 9", file="other.raw"), "unsupported"),
        ("a.mhd", MHA.format(more="CompressedData = True\n", size="9 9 9", file="other.raw"), "unreadable"),
        ("a.mhd", MHA.format(more="BinaryData = False\n", size="9 9 9", file="other.raw"), "unsupported"),
        ("a.mha", MHA.format(more="", size="9 9 9", file="LIST"), "unsupported"),
        ("a.mha", MHA.format(more="", size="9 9 9", file="LIST 2"), "unsupported"),
        ("a.mha", MHA.format(more="", size="9 9 9", file="%d.raw 1 9 1"), "unsupported"),
        ("a.mha", MHA.format(more="elementdatafile = x.raw\n", size="9 9 9", file="LOCAL"), "unsupported"),
        ("a.mha", MHA.format(more="Comment = ElementDataFile = x\n", size="9 9 9", file="LOCAL"), "unreadable"),
        ("a.mha", MHA.format(more="no equals sign\n", size="9 9 9", file="LOCAL"), "unreadable"),
        ("a.mha", "NRRD", "unreadable"),
        ("a.mha", "", "unreadable"),
        ("a.nrrd", NRRD.format(more="", size="1000 1000 1000"), "too large"),
        ("a.nhdr", NRRD.format(more="data file: other.raw\n", size="9 9 10"), "unreadable"),
        ("a.nhdr", NRRD.format(more="data file: link.raw\n", size="9 9 9"), "unreadable"),
        ("a.nhdr", NRRD.format(more="Data  File: other.raw\n", size="9 9 9"), "unreadable"),
        ("a.nhdr", NRRD.format(more="data file: /dev/zero\n", size="9 9 9"), "unsupported"),
        ("a.nhdr", NRRD.format(more="data file: ../other.raw\n", size="9 9 9"), "unsupported"),
        ("a.nhdr", NRRD.format(more="data file: other.raw\ndatafile: x\n", size="9 9 9"), "unsupported"),
        ("a.nhdr", NRRD.format(more="# data file: other.raw\n", size="9 9 9"), "unsupported"),
        ("a.nhdr", NRRD.format(more="data file: other.raw\nline skip: 1\n", size="9 9 9"), "unsupported"),
        ("a.nhdr", NRRD.format(more="data file: other.raw\nbyte skip: 1\n", size="9 9 9"), "unreadable"),
        ("a.nhdr", NRRD.format(more="data file: o%03d.raw 1 9 1\n", size="9 9 9"), "unsupported"),
        ("a.nrrd", NRRD.format(more="datafile: LIST\nother.raw\n", size="9 9 9"), "unsupported"),
        ("a.nhdr", "NRRD0004\ntype: short\ndata file: other.raw\n", "unsupported"),
        ("a.nrrd", "NRRD0004\ntype: short", "unreadable"),
        ("a.nrrd", NRRD.format(more="", size="9 9 9"), "unreadable"),
    ],
)
def test_metaimage_headers_that_lie(tmp_path, name, head, reason):
    pytest.importorskip("SimpleITK")
    (tmp_path / "sub").mkdir()
    for other in ("other.raw", "sub/other.raw"):
        (tmp_path / other).write_bytes(bytes(2 * 9**3))
    (tmp_path / "link.raw").symlink_to("other.raw")
    (tmp_path / name).write_bytes(head.encode() + bytes(100))
    with pytest.raises(Refused) as caught:
        shown(read(tmp_path / name))
    assert caught.value.reason == reason, caught.value


TURNED = (0, -1, 0, 1, 0, 0, 0, 0, 1)  # columns run to the back, rows to the right


@pytest.mark.parametrize("name, other", [("a.mhd", "a.raw"), ("a.nhdr", "a.raw")])
@pytest.mark.parametrize("packed", [False, True])
def test_data_in_a_file_of_their_own(tmp_path, name, other, packed):
    sitk = pytest.importorskip("SimpleITK")
    values = VALUES.transpose(2, 1, 0)
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((1.5, 2, 3))
    image.SetDirection(TURNED)
    sitk.WriteImage(image, str(tmp_path / name), packed)
    (data,) = {path.name for path in tmp_path.iterdir()} - {name}
    assert data == {"a.mhd": "a.zraw", "a.nhdr": "a.raw.gz"}[name] if packed else other
    assert readers.beside(tmp_path / name, "metaimage") == [data]
    stack = read(tmp_path / name)
    assert (stack.quantity, stack.length, stack.dtype) == ("raw", 4, np.int16)
    assert np.array_equal(shown(stack, "stored"), values)
    # LPS: the first index runs to the back, the second to the right, which is where the picture's left is
    assert np.array_equal(shown(stack), values.swapaxes(1, 2)[:, :, ::-1])
    assert next(stack.frames(("axial",), 1)).spacing == (1.5, 2.0)
    whole = (tmp_path / data).read_bytes()
    for harmed in (whole[:-1], whole[: len(whole) // 2], b""):
        (tmp_path / data).write_bytes(harmed)
        with pytest.raises(Refused, match="unreadable"):
            read(tmp_path / name)


def detached(tmp_path, head, body, other="b c.bin"):
    (tmp_path / other).write_bytes(body)
    path = tmp_path / ("a.nhdr" if head.startswith("NRRD") else "a.mhd")
    path.write_text(head)
    return read(path)


@pytest.mark.parametrize(
    "kind, name", [("<i2", "SHORT"), (">u2", "USHORT"), (">f4", "FLOAT"), ("<f8", "DOUBLE"), (">i4", "INT")]
)
def test_mhd_by_hand(tmp_path, kind, name):
    """Lines as people write them: no BinaryData, either name of the byte order, data behind a header of their own."""
    pytest.importorskip("SimpleITK")
    values = (VALUES.transpose(2, 1, 0) if kind[1] != "u" else VALUES.transpose(2, 1, 0) + 1000).astype(kind)
    for order in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"):
        for skip, body in (("0", b""), ("7", b"seven.."), ("-1", b"any header")):
            head = (
                f"NDims = 3\nDimSize = 6 5 4\n{order} = {kind[0] == '>'}\nHeaderSize = {skip}\n"
                f"ElementSpacing = 1.5 2 3\nElementType = MET_{name}\nElementDataFile = ./b c.bin"
            )
            stack = detached(tmp_path, head, body + values.tobytes())
            assert stack.dtype == values.dtype.newbyteorder("=")
            assert np.array_equal(shown(stack, "stored"), values.astype(np.float32))


@pytest.mark.parametrize(
    "encoding, pack", [("raw", bytes), ("bzip2", bz2.compress), ("bz2", bz2.compress), ("gz", gzip.compress)]
)
def test_nrrd_by_hand(tmp_path, encoding, pack):
    pytest.importorskip("SimpleITK")
    values = VALUES.transpose(2, 1, 0).astype(">i2")
    head = f"NRRD0004\ntype: short\ndimension: 3\nsizes: 6 5 4\nspacings: 1.5 2 3\nendian: big\nencoding: {encoding}\n"
    body = pack(values.tobytes())
    (tmp_path / "a.nrrd").write_bytes(head.encode() + b"\n" + body)
    for stack in (read(tmp_path / "a.nrrd"), detached(tmp_path, head + "data file: b c.bin\n", body)):
        assert np.array_equal(shown(stack, "stored"), VALUES.transpose(2, 1, 0)) and stack.dtype == np.int16
        assert next(stack.frames(("axial",), 1)).spacing == (2.0, 1.5)
    for lost in (1, len(body) // 2):
        with pytest.raises(Refused, match="unreadable"):
            detached(tmp_path, head + "data file: b c.bin\n", body[:-lost])
    if encoding == "raw":
        for skip, before in ((5, b"12345"), (-1, b"whatever")):
            stack = detached(tmp_path, f"{head}byte skip: {skip}\ndata file: b c.bin\n", before + body)
            assert np.array_equal(shown(stack, "stored"), VALUES.transpose(2, 1, 0))


def test_colours_of_an_nrrd(tmp_path):
    """Components that follow each other are a colour; planes one after the other are not read as one."""
    pytest.importorskip("SimpleITK")
    colour = DRAW.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    head = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: {}\nkinds: {}\nencoding: raw\n\n"
    for kind in ("RGB-color", "vector", "3-color"):
        (tmp_path / "a.nrrd").write_bytes(head.format("3 6 5", f"{kind} domain domain").encode() + colour.tobytes())
        stack = read(tmp_path / "a.nrrd")
        assert stack.channels == 3 and np.array_equal(shown(stack, "stored")[0], colour)
    planes = np.ascontiguousarray(colour.transpose(2, 0, 1))
    (tmp_path / "a.nrrd").write_bytes(head.format("6 5 3", "domain domain vector").encode() + planes.tobytes())
    with pytest.raises(Refused, match="unsupported"):
        read(tmp_path / "a.nrrd")


def test_volumes_of_an_mhd_series(tmp_path):
    """Of the first volume alone the numbers are read."""
    sitk = pytest.importorskip("SimpleITK")
    series = DRAW.integers(0, 1000, (3, 4, 5, 6), dtype=np.uint16)
    sitk.WriteImage(sitk.GetImageFromArray(series, isVector=False), str(tmp_path / "a.mhd"))
    stack = read(tmp_path / "a.mhd")
    assert np.array_equal(shown(stack, "stored"), series[0]) and "2 volumes" in str(stack.refused[0])
    limits = readers.Limits(memory_mb=40)
    series = np.zeros((8, 40, 256, 256), np.int16)  # 42 MB, the first volume 5
    series[0] = DRAW.integers(0, 1000, series.shape[1:])
    sitk.WriteImage(sitk.GetImageFromArray(series, isVector=False), str(tmp_path / "b.mhd"))
    assert np.array_equal(shown(read(tmp_path / "b.mhd", limits=limits), "stored"), series[0])


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


def test_another_format_by_content_is_not_opened(tmp_path):
    """What SimpleITK would open as a PNG or a NIfTI is no MHA."""
    pytest.importorskip("SimpleITK")
    (tmp_path / "a.mha").write_bytes(save(tmp_path / "a.nii", VALUES).read_bytes())
    with pytest.raises(Refused, match="unreadable"):
        read(tmp_path / "a.mha")


def test_packed_data_of_an_mha_that_are_lacking_are_no_image(tmp_path):
    """MetaIO itself would give what its memory holds, without an error."""
    simpleitk = pytest.importorskip("SimpleITK")
    image = simpleitk.GetImageFromArray(DRAW.integers(0, 1000, (4, 48, 48), dtype=np.int16))
    simpleitk.WriteImage(image, tmp_path / "a.mha", True)
    data = (tmp_path / "a.mha").read_bytes()
    assert len(shown(read(tmp_path / "a.mha"))) == 4
    start = data.index(b"LOCAL\n") + 6
    for lacking in (1, 100, (len(data) - start) // 2, len(data) - start):
        (tmp_path / "b.mha").write_bytes(data[: len(data) - lacking])
        with pytest.raises(Refused, match="unreadable"):
            read(tmp_path / "b.mha")
    (tmp_path / "b.mha").write_bytes(data[:-4] + bytes(4))  # the checksum
    with pytest.raises(Refused, match="unreadable"):
        read(tmp_path / "b.mha")
    short = zlib.compress(bytes(2 * 48 * 48 * 3))
    size = next(line for line in data.split(b"\n") if line.startswith(b"CompressedDataSize"))
    (tmp_path / "c.mha").write_bytes(data[:start].replace(size, b"CompressedDataSize = %d" % len(short)) + short)
    with pytest.raises(Refused, match="unreadable"):
        read(tmp_path / "c.mha")


@pytest.mark.parametrize("cuts", [(), (0,), (17, 17, 5000), (1, 2, 3)])
def test_gzip_members_are_one_file(tmp_path, cuts):
    data = DRAW.integers(0, 256, 2**18, dtype=np.uint8).tobytes()
    places = [0, *cuts, len(data)]
    members = [gzip.compress(data[a:b]) for a, b in zip(places, places[1:], strict=False)]
    for tail in (b"", bytes(10), bytes(2**17)):
        (tmp_path / "a.gz").write_bytes(b"".join(members) + tail)
        with opened(tmp_path / "a.gz") as raw:
            file = Unpacked(raw)
            assert file.read(540) == data[:540]
            file.seek(352)
            assert file.read(2**20) == data[352:] and file.read(1) == b""
            file.seek(2**17 + 1)
            assert file.read(9) == data[2**17 + 1 :][:9]


@pytest.mark.parametrize("harm", [lambda d: d[:-1], lambda d: d[:-9], lambda d: d[:-6] + b"abcdef", lambda d: d + b"x"])
def test_damaged_gzip_is_refused(tmp_path, harm):
    (tmp_path / "a.gz").write_bytes(harm(gzip.compress(bytes(5000))))
    with opened(tmp_path / "a.gz") as raw, pytest.raises((Refused, zlib.error)):
        file = Unpacked(raw)
        assert len(file.read(5000)) == 5000
        file.read(1)
