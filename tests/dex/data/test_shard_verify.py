"""Every damaged byte is found."""

import random
import shutil

import pytest

from dex.data import open_dataset, verify


def test_every_one_byte_edit_is_found(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    draw = random.Random(1)
    for trial in range(200):
        path = files[trial % len(files)]
        data = path.read_bytes()
        at = draw.randrange(len(data))
        edited = bytearray(data)
        edited[at] ^= draw.randrange(1, 256)
        path.write_bytes(edited)
        problems = verify(root)
        assert problems and path.name in " ".join(problems), (path.name, at)
        path.write_bytes(data)
    assert verify(root) == []


def test_edits_of_the_embedded_set_are_found(tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(open_dataset(None).root, root)
    assert verify(root) == []
    files = sorted(path for path in root.rglob("*") if path.is_file())
    draw = random.Random(2)
    weights = [path.stat().st_size for path in files]
    for path in draw.choices(files, weights, k=45) + [root / "manifest.json"] * 5:
        at, flip = draw.randrange(path.stat().st_size), draw.randrange(1, 256)
        _flip(path, at, flip)
        assert path.name in " ".join(verify(root)), (path.name, at)
        _flip(path, at, flip)
    assert verify(root) == []


def _flip(path, at, bits):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bits]))


def test_verify_needs_a_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: expected a folder with manifest.json"):
        verify(tmp_path)
