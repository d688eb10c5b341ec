import shutil

import pydicom.data
import pytest
import torch

from dex.inference import collection as collections
from dex.inference.collection import collection, cut
from dex.inference.preprocess import preprocess


@pytest.fixture
def private(tmp_path):
    return tmp_path / "private"


def decoded(found):
    return [found.read(item) for part in found.parts for item in part]


def test_parts_hold_every_item_once():
    assert cut([], 3, 10) == []
    assert cut([1] * 7, 3, 100) == [range(0, 3), range(3, 6), range(6, 7)]
    assert cut([6, 5, 5, 1, 30, 1], 9, 10) == [range(0, 1), range(1, 3), range(3, 4), range(4, 5), range(5, 6)]


def test_pictures_are_taken_as_they_are(images, private):
    found = collection(images / "us", private, public=True)
    items = decoded(found)
    assert [len(item.rows) for item in items] == [16, 16, 8] and found.items == 3  # 40 files, some at a time
    assert torch.equal(items[0].images[2:3], preprocess(images / "us" / "002.png").images)
    assert items[0].rows[2] == ("folder/002.png/image", "folder/002.png", "", "image", "")
    assert items[0].notes[2] == ("folder/002.png/image", "002.png", "image", "", False)
    assert decoded(collection(images / "us", private, modality="CT"))[2].rows[0].modality == "CT"


def test_a_dicom_says_what_it_is_and_whose(tmp_path, private):
    folder = tmp_path / "study"
    (folder / "somebody").mkdir(parents=True)
    file = folder / "somebody" / "a.dcm"
    shutil.copy(pydicom.data.get_testdata_file("CT_small.dcm", download=False), file)
    (item,) = decoded(collection(folder, private))
    (row,) = item.rows
    assert torch.equal(item.images, preprocess(file).images) and row.modality == "CT"
    patient = pydicom.dcmread(file).PatientID
    assert not any(word in f"{row.id} {row.group}" for word in (patient, "somebody"))
    assert item.notes[0].patient
    (alone,) = decoded(collection(file, private))
    assert alone.rows[0].group == row.group  # of the header's patient, wherever the file lies


def test_folders_may_name_the_modalities(images, tmp_path, private):
    found = decoded(collection(images, private, modality="from-folders"))
    rows = [row for item in found for row in item.rows]
    assert [row.modality for row in rows] == ["CT"] * 40 + ["MR"] * 40 + ["ultrasound"] * 40
    want = preprocess(images / "mr" / "000.png", "MR").images[0]
    assert torch.equal(torch.cat([item.images for item in found])[40], want)
    shutil.copytree(images / "ct", tmp_path / "scans" / "first patient")
    (item, *_) = decoded(collection(tmp_path / "scans", private, modality="from-folders"))
    assert not item.rows and item.notes[0].refused == "unknown modality: nothing says of which modality it is"


def test_one_salt_serves_all_processes(private):
    assert collections._salt(private) == collections._salt(private)
    assert (private / "salt").read_bytes() == collections._salt(private)


def test_a_file_with_odd_letters_is_itself(images, tmp_path, private):
    for name in ("a[1].png", "a1.png", "a*.png"):
        shutil.copy(images / "ct" / "000.png", tmp_path / name)
    for name in ("a[1].png", "a*.png"):
        (item,) = decoded(collection(tmp_path / name, private))
        assert item.notes[0].path == name


def test_the_fingerprint_follows_the_files(images, tmp_path, private):
    folder = shutil.copytree(images / "ct", tmp_path / "ct")
    before = collection(folder, private).fingerprint
    assert collection(folder, private).fingerprint == before
    (folder / "000.png").unlink()
    assert collection(folder, private).fingerprint != before
