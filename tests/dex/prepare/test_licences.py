"""Licence texts go with a set: those of its packages, and the notices of its sources."""

import dataclasses
import hashlib
import json
import zipfile

import pytest
from small_runs import picture, save, source, start

from dex.data import verify
from dex.prepare import licences
from dex.prepare.packages import Package


@pytest.fixture
def package(tmp_path):
    """A package in a cache, with one picture and a licence."""
    path = tmp_path / "cache" / "sample-1.0-py3-none-any.whl"
    path.parent.mkdir()
    save(tmp_path, "a.png", picture(0))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tmp_path / "a.png", "sample/a.png")
        archive.writestr("sample-1.0.dist-info/LICENSE", "Permission is granted\n")
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package("sample", "1.0", "pypi", path.name, sha, licence_file="sample-1.0.dist-info/LICENSE")


def packaged(tmp_path, package, **changes):
    about = {"files": ("sample/*.png",), "package": package, "public": True, "licence": "MIT"}
    return dataclasses.replace(source(tmp_path, "one"), root=None, **{**about, **changes})


def test_texts(tmp_path, package):
    plain = packaged(tmp_path, package)
    noted = dataclasses.replace(plain, name="two", notice="(c) ü\n")
    other = dataclasses.replace(plain, name="three", package=dataclasses.replace(package, licence_file=""))
    assert licences.texts([plain, noted, other], tmp_path / "cache") == {
        "licences/sample-1.0.txt": b"Permission is granted\n",
        "licences/two.txt": "(c) ü\n".encode(),
    }
    assert licences.texts([source(tmp_path)], tmp_path / "cache") == {}
    lost = dataclasses.replace(plain, package=dataclasses.replace(package, licence_file="nowhere"))
    with pytest.raises(ValueError, match="expected members that match 'nowhere'"):
        licences.texts([lost], tmp_path / "cache")


def test_a_set_holds_them_and_bears_its_name(tmp_path, package, here):
    out = tmp_path / "set ü"
    one = packaged(tmp_path, package, notice="mine", collection="my-set", split="train")
    start([one], out, cache=tmp_path / "cache")
    assert (out / "licences" / "sample-1.0.txt").read_text() == "Permission is granted\n"
    assert (out / "licences" / "one.txt").read_text() == "mine"
    assert json.loads((out / "manifest.json").read_text())["name"] == "my-set"
    assert verify(out) == []
    (out / "licences" / "one.txt").write_text("other")
    assert any("licences/one.txt" in problem for problem in verify(out))
