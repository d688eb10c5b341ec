"""One table of formats: the readers' own, and the documentation's."""

import re
from pathlib import Path

import pytest

from dex.common import formats

DOCS = Path(__file__).parents[3] / "docs"


def test_each_suffix_is_of_one_format_and_the_longest_counts():
    suffixes = [suffix for format in formats.FORMATS for suffix in format.suffixes]
    assert len(set(suffixes)) == len(suffixes) and all(s == s.lower() and s.startswith(".") for s in suffixes)
    assert formats.suffix_of("a/B.NII.GZ") == ".nii.gz" and formats.format_of(b"x.nii.gz").name == "nifti"
    assert formats.suffix_of("x.dcm.gz") == ".dcm.gz" and formats.suffix_of("x.tar.gz") == ""
    assert formats.format_of("notes.txt") is formats.format_of("gz") is None


def test_a_plain_folder_holds_files_of_one_image():
    assert all(
        formats.is_plain(f"x{s}") for s in (".PNG", ".jpg", ".tif", ".bmp", ".gif", ".webp", ".jp2", ".ppm", ".npy")
    )
    assert not any(formats.is_plain(f"x{s}") for s in (".npz", ".dcm", ".nii", ".mp4", ".mha", ".txt", ""))


def test_a_library_that_is_not_there_is_named():
    absent = formats.Format("x", "X", (".x",), {"json": "json", "no_such.module": "things", "no_such_two": "things"})
    assert absent.missing() == ["things"] and formats.of("mgh").missing() == []


def test_the_readers_are_of_this_table():
    readers = pytest.importorskip("dex.prepare.readers")
    assert sorted(format.name for format in formats.FORMATS) == list(readers.formats())
    for format in formats.FORMATS:
        reader = readers.reader_of(format.name)
        assert (reader.suffixes, dict(reader.needs)) == (format.suffixes, dict(format.needs))


def rows(page):
    """The cells after the first of each row of the page's table of formats, by the first."""
    text = (DOCS / page).read_text(encoding="utf-8")
    table = re.search(r"\| format \| suffixes \|.*\n.*\n((?:\|.*\n)+)", text).group(1)
    cells = [[cell.strip() for cell in line.rstrip("\n")[1:-1].split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in cells}


def test_the_documentation_has_the_same_table():
    listed = rows("data.md")
    assert list(listed) == [format.title for format in formats.FORMATS]
    for format in formats.FORMATS:
        suffixes, libraries, plain = listed[format.title]
        assert tuple(suffixes.strip("`").split()) == format.suffixes
        assert re.findall(r"[\w-]+", libraries) == list(dict.fromkeys(format.needs.values()))
        assert (format.suffixes if plain == "each" else tuple(plain.strip("`").split())) == format.plain
