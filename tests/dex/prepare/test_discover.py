"""Listings: which files, in which order, cut into which chunks."""

import os
import random

import pytest
from small_runs import SALT, described

from dex.prepare import discover
from dex.prepare.discover import Chunk, File, cut, is_unchanged, passed_over_counts, read_units
from dex.prepare.ids import Names
from dex.prepare.sources import Route, resolve

DICOM = b"\0" * 128 + b"DICM"


def write(root, *names, data=b"x"):
    for name in names:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)


def units(listing, tmp_path):
    path = tmp_path / "listing.jsonl"
    path.write_bytes(b"".join(listing.lines))
    return [unit for chunk in listing.chunks for unit in read_units(path, chunk)]


def test_dicom_by_folder_all_else_by_file_sorted_by_bytes(tmp_path):
    root = tmp_path / "root"
    write(root, "b/2.dcm", "b/1.dcm", "b/1.2.840.4", "a.nii.gz", "b/x.png", "Z.mp4", data=DICOM)
    write(root, "é.npy", "notes.txt", ".hidden.png", "DICOMDIR")
    os.symlink(root / "b", root / "link")
    os.symlink(root / "a.nii.gz", root / "link.nii.gz")
    os.mkfifo(root / "pipe.png")
    listing = discover.discover(described(), root)
    found = units(listing, tmp_path)
    assert [(unit.key, unit.format) for unit in found] == [
        ("Z.mp4", "video"),
        ("a.nii.gz", "nifti"),
        ("b", "dicom"),
        ("b/x.png", "picture"),
        ("é.npy", "array"),
    ]
    assert [file.path for file in found[2].files] == ["b/1.2.840.4", "b/1.dcm", "b/2.dcm"]
    status = os.stat(root / "b/1.dcm")
    assert found[2].files[1] == File("b/1.dcm", 132, status.st_mtime_ns)
    assert (listing.files, sum(listing.sizes)) == (7, 6 * 132 + 1)
    assert listing.formats == ["array", "dicom", "nifti", "picture", "video"]
    assert listing.ignored == {
        "symbolic links": 2,
        "hidden files": 1,
        "DICOMDIR files": 1,
        "pipes, sockets and devices": 1,
        "of no known format": 1,
    }


MHD = b"NDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\nElementDataFile = %s\n"


def test_a_file_that_holds_the_data_of_another_belongs_to_it(tmp_path):
    root = tmp_path / "root"
    write(root, "p/scan.mhd", data=MHD % b"scan 1.raw")
    write(root, "p/scan 1.raw", "p/other.raw", "q/a.hdr", "q/a.img", "q/b.hdr", "c.HDR.gz", "c.img.gz", data=bytes(8))
    write(root, "p/two.nhdr", data=b"NRRD0004\nencoding: raw\ndata file: two.dat\n")
    write(root, "p/two.dat", data=bytes(8))
    for name, place in (("out", b"../secret.raw"), ("link", b"link.raw"), ("own", b"own.mhd"), ("lost", b"lost.raw")):
        write(root, f"r/{name}.mhd", data=MHD % place)
    write(tmp_path, "secret.raw")
    os.symlink(root / "p/other.raw", root / "r/link.raw")
    listing = discover.discover(described(), root)
    found = {unit.key: (unit.format, [file.path for file in unit.files]) for unit in units(listing, tmp_path)}
    assert found == {
        "c.HDR.gz": ("nifti", ["c.HDR.gz", "c.img.gz"]),
        "p/scan.mhd": ("metaimage", ["p/scan.mhd", "p/scan 1.raw"]),
        "p/two.nhdr": ("metaimage", ["p/two.nhdr", "p/two.dat"]),
        "q/a.hdr": ("nifti", ["q/a.hdr", "q/a.img"]),
        "q/b.hdr": ("nifti", ["q/b.hdr"]),
        **{f"r/{name}.mhd": ("metaimage", [f"r/{name}.mhd"]) for name in ("out", "link", "own", "lost")},
    }
    assert listing.ignored == {"of no known format": 1, "symbolic links": 1}  # p/other.raw, r/link.raw
    assert listing.files == 13
    os.utime(root / "p/scan 1.raw", ns=(0, 1))
    assert discover.discover(described(), root).digest != listing.digest
    # patterns need not name it, and where they do, or say what every file is, it is no unit of its own
    for files, format in ((("p/*.mhd",), "auto"), (("p/scan*",), "auto"), (("p/scan*",), "metaimage")):
        listing = discover.discover(described(files=files, format=format), root)
        assert [[file.path for file in unit.files] for unit in units(listing, tmp_path)] == [found["p/scan.mhd"][1]]
        assert listing.ignored == {"not named by the patterns": 12, "symbolic links": 1}


def test_names_that_are_no_utf8_and_patterns(tmp_path):
    root = tmp_path / "root"
    write(root, b"p\xff/scan.nii", "q/scan.nii", "q/labels.nii", "q/scan.png")
    listing = discover.discover(described(files=("**/*.nii",), exclude=("**/labels.nii",), format="nifti"), root)
    found = units(listing, tmp_path)
    assert [os.fsencode(unit.key) for unit in found] == [b"p\xff/scan.nii", b"q/scan.nii"]
    assert is_unchanged(root, found[0].files[0])
    names = Names(described(public=True), SALT)
    assert names.sample(found[0].key, "axial-001") == "mine/p%FF/scan.nii/axial-001"


def test_order_and_chunks_do_not_depend_on_the_file_system(tmp_path):
    names = [f"{i % 7}/{i:04d}.png" for i in range(200)]
    digests = set()
    for turn in range(2):
        random.Random(turn).shuffle(names)
        root = tmp_path / str(turn)
        write(root, *names)
        for name in names:
            os.utime(root / name, ns=(0, 10**9))
        listing = discover.discover(described(), root)
        digests.add(listing.digest)
    assert len(digests) == 1
    assert [chunk.units for chunk in listing.chunks] == [64, 64, 64, 8]
    assert [unit.key for unit in units(listing, tmp_path)] == sorted(names)
    os.utime(root / names[3], ns=(0, 10**9 + 1))
    assert discover.discover(described(), root).digest not in digests
    os.utime(root / names[3], ns=(0, 10**9))
    assert discover.discover(described(), root).digest in digests
    write(root, names[5], data=b"yy")
    os.utime(root / names[5], ns=(0, 10**9))
    assert discover.discover(described(), root).digest not in digests


def test_cut_by_units_and_bytes():
    mb = 2**20
    assert cut([]) == []
    assert cut([(10, 300 * mb), (20, mb), (30, 255 * mb), (40, 1)]) == [
        Chunk(0, 10, 1),
        Chunk(10, 50, 2),
        Chunk(60, 40, 1),
    ]
    chunks = cut([(1, 1)] * 130)
    assert [chunk.units for chunk in chunks] == [64, 64, 2] and [chunk.offset for chunk in chunks] == [0, 64, 128]


@pytest.mark.parametrize("make", [lambda root: None, lambda root: root.mkdir(), lambda root: write(root, "notes.txt")])
def test_nothing_to_read_is_an_error_without_a_path(make, tmp_path):
    root = tmp_path / "Jane Doe"
    make(root)
    with pytest.raises(ValueError, match="^mine: expected ") as error:
        discover.discover(described(), root)
    assert "Jane" not in str(error.value)


def test_a_changed_or_missing_file_is_seen(tmp_path):
    write(tmp_path, "a.png")
    mtime = os.stat(tmp_path / "a.png").st_mtime_ns
    assert is_unchanged(tmp_path, File("a.png", 1, mtime)) and is_unchanged(tmp_path, File("a.png", 1, 0))
    assert not is_unchanged(tmp_path, File("a.png", 2, mtime))
    assert not is_unchanged(tmp_path, File("a.png", 1, mtime + 1))
    assert not is_unchanged(tmp_path, File("b.png", 1, mtime))


def test_common_folders(tmp_path):
    write(tmp_path / "one", "data/img/p1/a.png", "data/img/p2/b.png")
    write(tmp_path / "two", "data/img/p1/a.png", "data/c.png")
    assert discover.discover(described(), tmp_path / "one").common == 2
    assert discover.discover(described(), tmp_path / "two").common == 1


def routed(**fields):
    return described(modality="auto", normalisation="auto", **fields)


def test_files_whose_modality_nothing_says_are_named_by_suffix(tmp_path):
    write(tmp_path, "ct/1.dcm", "ct/2.png", "mr/3.PNG", "mr/4.nii.gz", "mr/5_seg.nii.gz", "us/a.avi", data=DICOM)
    source = routed()
    listing = discover.discover(source, tmp_path)
    with pytest.raises(discover.Undetermined) as caught:
        discover.check_modalities(source, listing)
    assert (caught.value.suffixes, caught.value.by_folders) == ([".avi", ".nii.gz", ".png"], True)
    assert str(caught.value).endswith("got 1 .avi, 1 .nii.gz, 2 .png of none")
    routes = (Route("CT", ("ct/**", "mr/*.png")), Route("echo", ("**/*.avi",)))
    with pytest.raises(discover.Undetermined, match="got 1 .nii.gz of none"):
        discover.check_modalities(routed(routes=routes), listing)
    discover.check_modalities(described(modality="from-folders", normalisation="auto"), listing)
    discover.check_modalities(described(), listing)


def test_folders_that_name_no_modality_do_not_say_it(tmp_path):
    write(tmp_path, "Jane Doe/1.png", "ct/2.png", "ct/mr/3.png")
    source = described(modality="from-folders", normalisation="auto")
    with pytest.raises(discover.Undetermined, match="got 2 .png of none") as caught:
        discover.check_modalities(source, discover.discover(source, tmp_path))
    assert not caught.value.by_folders and "Jane" not in str(caught.value)
    bare = described(modality="auto", normalisation="auto", format="picture")
    write(tmp_path, "x/Jane.jpeg2000")
    with pytest.raises(discover.Undetermined, match="3 .png, 1 without suffix") as caught:
        discover.check_modalities(bare, discover.discover(bare, tmp_path))
    assert "Jane" not in str(caught.value)
    assert caught.value.patterns == ["**/*.png", "**/*"]


def test_the_patterns_to_give_name_no_file_whose_folder_says_its_modality(tmp_path):
    """A pattern goes before a folder's name."""
    write(tmp_path, "ct/1.png", "fundus/a/2.png", "3.png", "4.jpg", "x/y/z/5.jpg", "ct/6.nii", "x/7.nii")
    source = described(modality="from-folders", normalisation="auto")
    with pytest.raises(discover.Undetermined, match="got 2 .jpg, 1 .nii, 1 .png of none") as caught:
        discover.check_modalities(source, discover.discover(source, tmp_path))
    assert caught.value.patterns == ["**/*.jpg", "*.png"] and caught.value.unnamed == [".nii"]
    source = routed(routes=(Route("CT", ("ct/*",)),))  # an earlier pattern goes before a later one
    with pytest.raises(discover.Undetermined, match="got 2 .jpg, 1 .nii, 2 .png of none") as caught:
        discover.check_modalities(source, discover.discover(source, tmp_path))
    assert caught.value.patterns == ["**/*.jpg", "**/*.nii", "**/*.png"] and not caught.value.unnamed


def by_folders(**fields):
    return described(modality="from-folders", normalisation="auto", **fields)


def check(source, root):
    discover.check_modalities(source, discover.discover(source, root))


def test_a_pattern_is_suggested_if_only_patterns_or_a_table_name_the_others(tmp_path):
    """An earlier pattern and a table take precedence over the suggested one."""
    root = tmp_path / "root"
    write(root, "a/1.png", "b/2.png")
    with pytest.raises(discover.Undetermined, match="got 1 .png of none") as caught:
        check(by_folders(routes=(Route("fundus", ("a/*",)),)), root)
    assert caught.value.patterns == ["**/*.png"] and not caught.value.unnamed
    (root / "t.csv").write_text("path,modality\na/1.png,fundus\nb/2.png,\n")
    (source,) = resolve(root / "t.csv", modality="from-folders")
    with pytest.raises(discover.Undetermined, match="got 1 .png of none") as caught:
        check(source, root)
    assert caught.value.patterns == ["**/*.png"] and not caught.value.unnamed


def test_no_pattern_is_suggested_that_takes_an_image_named_like_a_mask_from_its_folder(tmp_path):
    root = tmp_path / "root"
    write(root, "fundus/a_mask.png", "other/b.png")
    with pytest.raises(discover.Undetermined, match="got 1 .png of none") as caught:
        check(by_folders(), root)
    assert not caught.value.patterns and caught.value.unnamed == [".png"]


def test_files_of_no_known_format_by_a_suffix_that_is_no_part_of_a_name(tmp_path):
    names = (
        "a.png",
        "b.txt",
        "c.TXT",
        "d.svs",
        "README",
        "1.2.840.17",
        "e.averylongsuffix",
        "scan.smith_john",
        "x.Smith",
    )
    for name in (*names, "y.SMITHJO", "in.zip", "in.TAR.GZ"):
        (tmp_path / name).write_bytes(b"x")
    listing = discover.discover(resolve(tmp_path, modality="X-ray")[0], tmp_path)
    counts = {".svs": 1, ".txt": 2, "other suffixes": 4, "without a suffix": 2}
    assert passed_over_counts(listing) == counts | {"archives, to be unpacked first": 2}
