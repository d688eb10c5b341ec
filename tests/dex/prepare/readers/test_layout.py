"""Where a header says that its numbers are; SimpleITK is not asked."""

import pytest

from dex.prepare.readers import Refused
from dex.prepare.readers.files import opened
from dex.prepare.readers.layout import Layout, images_of, layout

META = "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_SHORT\n"
NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n"


def laid_out(tmp_path, text, data=b""):
    (tmp_path / "a").write_bytes(text.encode() + data)
    with opened(tmp_path / "a") as file:
        return layout(file)


def test_the_image_of_a_nifti_header():
    assert images_of("a b.hdr") == ["a b.img", "a b.img.gz", "a b.IMG", "a b.IMG.GZ"]
    assert images_of("A.HDR.gz") == images_of("A.hdr")
    assert images_of("a.nii") == images_of("hdr") == images_of("a.hdr.txt") == []


@pytest.mark.parametrize(
    "lines, place",
    [
        ("ElementDataFile = LOCAL\n", ("", None, "", "<")),
        ("BinaryDataByteOrderMSB = True\nElementDataFile = LOCAL\n", ("", None, "", ">")),
        ("CompressedData = True\nElementDataFile = LOCAL\n", ("", None, "zlib", "<")),
        ("ElementDataFile = ./b c.raw\n", ("b c.raw", 0, "", "<")),
        ("HeaderSize = 12\nElementDataFile = b.raw\n", ("b.raw", 12, "", "<")),
        ("HeaderSize = -1\nElementDataFile = b.raw\n", ("b.raw", "end", "", "<")),
    ],
)
def test_metaimage(tmp_path, lines, place):
    name, start, packing, order = place
    start = {"end": None, None: len(META + lines)}.get(start, start)  # the last of the bytes; right behind the header
    assert laid_out(tmp_path, META + lines, bytes(16)) == Layout("MetaImageIO", name, start, packing, order, True)


@pytest.mark.parametrize(
    "lines, place",
    [
        ("\n", ("", None, "", "<", False)),
        ("endian: big\nkinds: domain domain domain\n\n", ("", None, "", ">", False)),
        ("kinds: RGB-color domain domain\n\n", ("", None, "", "<", True)),
        ("data file: b.raw\nbyte skip: 7\n", ("b.raw", 7, "", "<", False)),
        ("data file: b.raw\nbyte skip: -1\n\n", ("b.raw", "end", "", "<", False)),
    ],
)
def test_nrrd(tmp_path, lines, place):
    name, start, packing, order, interleaved = place
    start = {"end": None, None: len(NRRD + lines)}.get(start, start)
    assert laid_out(tmp_path, NRRD + lines, b"" if name else bytes(16)) == Layout(
        "NrrdImageIO", name, start, packing, order, interleaved
    )


@pytest.mark.parametrize("encoding, packing", [("gzip", "gzip"), ("gz", "gzip"), ("bzip2", "bzip2"), ("bz2", "bzip2")])
def test_packed_nrrd(tmp_path, encoding, packing):
    assert laid_out(tmp_path, NRRD.replace("raw", encoding) + "\n").packing == packing


@pytest.mark.parametrize(
    "text, reason",
    [
        (META + "ElementDataFile = ../b.raw\n", "another folder"),
        (META + "ElementDataFile = /etc/passwd\n", "another folder"),
        (META + "ElementDataFile = LIST\n", "several files"),
        (META + "ElementDataFile = b%03d.raw 1 3 1\n", "several files"),
        (META + "BinaryData = False\nElementDataFile = LOCAL\n", "as text"),
        (META + "HeaderSize = 9\nElementDataFile = LOCAL\n", "do not follow the header"),
        (META.replace("= 3", "= 11") + "ElementDataFile = LOCAL\n", "axes"),
        (META, "not the header"),
        ("%PDF-1.4\n", "not the header"),
        (NRRD + "data file: LIST\n", "several files"),
        (NRRD + "data file: a/b.raw\n", "another folder"),
        (NRRD.replace("raw", "ascii") + "\n", "as text"),
        (NRRD + "line skip: 1\n\n", "do not follow the header"),
        (NRRD + "byte skip: 8\n\n", "do not follow the header"),
    ],
)
def test_places_that_are_not_read(tmp_path, text, reason):
    with pytest.raises(Refused, match=reason):
        laid_out(tmp_path, text, bytes(16))
