"""Readers describe themselves: what they say is found, and a new one works end to end when its module is there."""

import ast
import importlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from dex.data import ShardDataset
from dex.prepare import chunks, readers
from dex.prepare import run as prepare
from dex.prepare.readers.reader import Reader
from dex.prepare.run import Options
from dex.prepare.sources import read_source
from dex.prepare.summary import Progress

NEW = """
    import numpy as np

    from dex.prepare.readers.files import only, opened, quietly
    from dex.prepare.readers.reader import Reader
    from dex.prepare.readers.stack import Refused, Stack


    @quietly("grid")
    def read(files, limits, beat):
        with opened(only(files)) as file:
            if file.read(4) != b"GRID":
                raise Refused("unreadable", "no grid")
            frames = np.frombuffer(file.read(), np.uint8).reshape(-1, 64, 64)
        yield Stack(
            quantity="display8",
            length=len(frames),
            shape=(64, 64),
            dtype=frames.dtype,
            load=lambda wanted: iter(()),
            holds=lambda stored: True,
            whole=frames,
        )


    READER = Reader(
        suffixes=(".grid",),
        read=read,
        recognises=lambda file: file.read(4) == b"GRID",
        frame_stride=2,
        passed_over={"INDEX.GRID": "indices of grids"},
    )
"""


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """The package with one module more."""
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "grid.py").write_text(textwrap.dedent(NEW))
    monkeypatch.setattr(readers, "__path__", [*readers.__path__, str(folder)])
    importlib.invalidate_caches()
    yield
    sys.modules.pop("dex.prepare.readers.grid", None)


def frames(seed, count=4):
    """uint8 [count, 64, 64], no two alike."""
    blocks = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), np.uint8)
    return np.kron(blocks, np.ones((1, 8, 8), np.uint8))


def test_a_new_reader_is_one_module(grid, inline_workers, tmp_path):
    """Nothing else names it: it is discovered, described in YAML, listed, read and made into a set."""
    assert "grid" in readers.formats() and readers.format_of("x/A.GRID") == "grid"
    root = tmp_path / "root"
    for number, name in enumerate(("p1/a.grid", "p2/b", "p3/index.grid")):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(b"GRID" + frames(number + 1).tobytes())
    (root / "p1" / "broken.grid").write_bytes(b"rubbish")
    description = "name: grids\nmodality: OCT\nnormalisation: display\nfiles: ['**/*']\nframe_stride: 0\nroot: root\n"
    (tmp_path / "grids.yaml").write_text(description)
    options = Options(tmp_path / "out", chunks.Settings(size=64, encoding="png"))
    said = []
    facts = prepare.prepare([read_source(tmp_path / "grids.yaml")], options, said.append).run(Progress())
    (source,) = facts["sources"]
    assert (source["units"], source["kept"], source["refused"]) == (3, 4, {"unreadable": 1})
    assert "grids: passed over indices of grids: 1" in said
    dataset = ShardDataset(tmp_path / "out")
    for place, (number, frame) in enumerate(((1, 0), (1, 2), (2, 0), (2, 2))):  # every second one, as the reader says
        assert np.array_equal(dataset[place].image.numpy()[0], frames(number)[frame])


def test_without_its_module_there_is_no_such_format():
    assert "grid" not in readers.formats() and readers.format_of("a.grid") is None
    with pytest.raises(ValueError, match="format: expected one of array, dicom, .*, got 'grid'"):
        readers.reader_of("grid")


def test_two_readers_of_one_suffix_are_refused(grid, tmp_path, monkeypatch):
    (tmp_path / "more" / "again.py").write_text(textwrap.dedent(NEW))
    monkeypatch.setattr(readers, "__path__", [*readers.__path__, str(tmp_path)])  # a path that was not looked at yet
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"suffixes: expected \.grid in one reader, got it in again and grid"):
        readers.formats()
    sys.modules.pop("dex.prepare.readers.again", None)


def test_descriptions_import_no_library():
    """They are read for every listing, and in processes that decode nothing."""
    code = (
        "import sys\n"
        "from dex.prepare import readers\n"
        "needs = {name for format in readers.formats() for name in readers.reader_of(format).needs}\n"
        "print(len(needs), sorted(needs & set(sys.modules)), 'torch' in sys.modules)\n"
        "for format in readers.formats(): readers.load(format)\n"
        "print(sorted(needs - set(sys.modules)))\n"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == ["9 [] False", "[]"]


@pytest.mark.parametrize("format", readers.formats())
def test_rubbish_is_refused_by_each(format, tmp_path):
    reader = readers.reader_of(format)
    path = tmp_path / f"x{reader.suffixes[0]}"
    path.write_bytes(b"rubbish" * 100)
    assert readers.format_of(path) == format
    with pytest.raises(readers.Refused):
        for stack in readers.read([path], format):
            list(stack.frames(("stored",), 1))


def test_formats_by_suffix():
    cases = {
        "a.dcm": "dicom",
        "A.IMA": "dicom",
        "x/b.nii": "nifti",
        "b.NII.gz": "nifti",
        "c.mha": "metaimage",
        "c.nrrd": "metaimage",
        "d.JPEG": "picture",
        "d.tif": "picture",
        "e.npz": "array",
        "f.webm": "video",
        "g": None,
        "h.gz": None,
        "x.dcm/h.txt": None,
        "1.2.840.10008": None,
    }
    assert {name: readers.format_of(name) for name in cases} == cases
    assert readers.format_of(b"/x/\xff.png") == "picture"


def test_the_longest_suffix_decides(monkeypatch):
    described = {"general": Reader((".gz",), iter), "special": Reader((".scan.gz",), iter), "z": Reader((".z",), iter)}
    for order in (described, dict(reversed(described.items()))):
        monkeypatch.setattr(readers, "_described", lambda folders, order=order: order)
        assert [readers.format_of(name) for name in ("a.gz", "a.scan.gz", "a.scan")] == ["general", "special", None]


@pytest.mark.parametrize("error", [readers.Refused("too large"), OSError(5, "I/O")])
def test_a_reader_that_refuses_a_file_leaves_it_to_the_others(error, tmp_path, monkeypatch):
    def refuse(file):
        raise error

    def begins(file):
        return file.read(4) == b"GRID"

    described = {"first": Reader((), iter, recognises=refuse), "second": Reader((), iter, recognises=begins)}
    monkeypatch.setattr(readers, "_described", lambda folders: described)
    (tmp_path / "a").write_bytes(b"GRID...")
    (tmp_path / "b").write_bytes(b"rubbish")
    assert [readers.recognised(tmp_path / name) for name in ("a", "b", "absent")] == ["second", None, None]


def test_an_absent_library_is_named():
    code = (
        "import sys; sys.modules['SimpleITK'] = None; sys.modules['cv2'] = None\n"
        "from dex.prepare import readers\n"
        "for name in ('metaimage', 'video'):\n"
        "    try: readers.load(name)\n"
        "    except readers.Refused as error: print(error)\n"
        "print(sorted({'torch', 'pydicom', 'nibabel'} & set(sys.modules) - {'torch'}))"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [
        "unsupported: SimpleITK is not installed (extra 'data')",
        "unsupported: opencv-python-headless is not installed (extra 'data')",
        "[]",
    ]
    with pytest.raises(ValueError, match="format"):
        readers.load("docx")
    with pytest.raises(ValueError, match="files"):
        next(readers.read([], "nifti"))


def test_what_is_not_supported_says_what_would_help():
    """The sentence of each refusal in the sources of readers has a second part, such as "convert it". That of SUV
    gets one from `normalise`."""
    lacking = []
    for path in sorted(Path(readers.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refused" and len(node.args) == 2:
                reason, detail = map(ast.unparse, node.args)
                if reason == "'unsupported'" and "'" in detail and not re.search(r"; |\(extra|SUV: ", detail):
                    lacking.append(f"{path.name}:{node.lineno} {detail}")
    assert lacking == []
