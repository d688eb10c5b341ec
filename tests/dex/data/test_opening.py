"""From a path to a data set, or to the word for what is wrong with it."""

import operator

import pytest
from picture_files import GREY, png, put

import dex.data
from dex.data import FolderDataset, ShardDataset, open_dataset
from dex.data.dataset import EMBEDDED
from dex.data.opening import locate


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="path: expected a folder"):
        open_dataset(tmp_path / "absent")
    put(tmp_path, m__notes_dot_txt=b"x")
    with pytest.raises(ValueError, match=r"path: expected PNG, JPEG or NPY .* found none \(ignored: \{'.txt': 1\}\)"):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match="path: expected a folder .* got the file"):
        open_dataset(tmp_path / "m" / "notes.txt")


@pytest.mark.parametrize("inside", ["images", "shards"])
def test_an_empty_path_is_not_the_current_folder(inside, tmp_path, monkeypatch):
    put(tmp_path, **({"1_dot_png": png(GREY)} if inside == "images" else {"manifest_dot_json": b"{}"}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^path: expected a folder .* got ''"):
        open_dataset("")


def test_what_lies_there_decides(tmp_path):
    assert type(open_dataset(put(tmp_path / "images", m__1_dot_png=png(GREY)))) is FolderDataset
    assert type(open_dataset(None)) is type(open_dataset(open_dataset(None).root)) is ShardDataset


def test_the_place_of_a_data_set_is_checked_under_the_name_of_the_option(tmp_path):
    assert locate(None) == EMBEDDED and locate(tmp_path, "data.path") == tmp_path
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match="^data.path: expected a folder of images or shards, found nothing at "):
        locate(tmp_path / "absent", "data.path")
    with pytest.raises(ValueError, match="^data.path: expected a folder of images or shards, got the file "):
        locate(tmp_path / "file", "data.path")


def test_every_public_name_of_the_package_is_there():
    assert all(getattr(dex.data, name).__module__.startswith("dex.") for name in dex.data.__all__ if name[0] != "I")
    assert len(dex.data.IMAGENET_MEAN) == len(dex.data.IMAGENET_STD) == 3
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        operator.attrgetter("absent")(dex.data)
