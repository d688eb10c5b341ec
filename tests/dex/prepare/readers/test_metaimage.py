"""MHA and NRRD through SimpleITK's own writer and by hand, and headers that lie."""

import bz2
import gzip
import zlib

import numpy as np
import pytest
from volume_files import DRAW, VALUES, read, save, shown

from dex.prepare import readers
from dex.prepare.readers import Refused


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
        ("a.mha", MHA.format(more="", size="2000 2000 2000", file="LOCAL"), "too large"),
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
        ("a.nrrd", NRRD.format(more="", size="2000 2000 2000"), "too large"),
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


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "packed.mha"])
def test_which_volumes_are_taken(tmp_path, name):
    sitk = pytest.importorskip("SimpleITK")
    series = DRAW.integers(0, 1000, (5, 4, 5, 6), dtype=np.uint16)
    sitk.WriteImage(sitk.GetImageFromArray(series, isVector=False), str(tmp_path / name), "packed" in name)
    files = sorted(tmp_path.iterdir(), key=lambda path: path.name != name)
    for volumes, wanted in (("first", [0]), ("all", [0, 1, 2, 3, 4]), ("2", [0, 2, 4])):
        stacks = list(readers.read(files, "metaimage", volumes=volumes))
        assert len(stacks) == len(wanted)
        assert all(np.array_equal(shown(stack, "stored"), series[n]) for stack, n in zip(stacks, wanted, strict=True))
        refused = [str(one) for stack in stacks for one in stack.refused]
        assert refused == {"first": ["inconsistent: 4 volumes after the first"], "2": ["inconsistent: 2 volumes"]}.get(
            volumes, []
        )
    (stack,) = readers.read(files, "metaimage", volumes="mean")
    assert np.allclose(shown(stack, "stored"), series.mean(axis=0))
