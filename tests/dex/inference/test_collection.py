import pickle
import shutil

import numpy as np
import pydicom.data
import pytest
import torch

from dex.data import ShardWriter
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


def test_an_error_of_a_library_is_a_sentence(images, private, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("Jane")

    monkeypatch.setattr(collections.preprocess, "read_stacks", fail)
    found = collection(images / "us", private, modality="CT")
    reasons = {note.refused for item in decoded(found) for note in item.notes}
    assert reasons == {"unreadable: it is damaged, cut off or of another format; copy the file again, or leave it out"}


def test_pictures_are_taken_as_they_are(images, private):
    found = collection(images / "us", private, public=True)
    items = decoded(found)
    assert [len(item.rows) for item in items] == [16, 16, 8] and found.items == 3  # 40 files, some at a time
    want = preprocess(images / "us" / "002.png").images
    assert torch.equal(torch.from_numpy(items[0].images[2]).expand(-1, 3, -1, -1), want)
    assert items[0].rows[2] == ("folder/002.png/image", "folder/002.png", "", "image", "")
    assert items[0].notes[2] == ("folder/002.png/image", "002.png", "image", "", False, "")
    assert decoded(collection(images / "us", private, modality="CT"))[2].rows[0].modality == "CT"


def test_a_dicom_says_what_it_is_and_whose(tmp_path, private):
    folder = tmp_path / "study"
    (folder / "somebody").mkdir(parents=True)
    file = folder / "somebody" / "a.dcm"
    shutil.copy(pydicom.data.get_testdata_file("CT_small.dcm", download=False), file)
    (item,) = decoded(collection(folder, private))
    (row,) = item.rows
    (stored,) = item.images
    assert stored.shape == (1, 1, 256, 256) and row.modality == "CT"  # grey travels as one channel
    assert torch.equal(torch.from_numpy(stored).expand(-1, 3, -1, -1), preprocess(file).images)
    patient = pydicom.dcmread(file).PatientID
    assert not any(word in f"{row.id} {row.group}" for word in (patient, "somebody"))
    assert item.notes[0].patient and item.notes[0].path == "somebody" and item.notes[0].file == "somebody/a.dcm"
    (alone,) = decoded(collection(file, private))
    assert alone.rows[0].group == row.group  # of the header's patient, wherever the file lies


def test_folders_may_name_the_modalities(images, tmp_path, private):
    found = decoded(collection(images, private, modality="from-folders"))
    rows = [row for item in found for row in item.rows]
    assert [row.modality for row in rows] == ["CT"] * 40 + ["MR"] * 40 + ["ultrasound"] * 40
    want = preprocess(images / "mr" / "000.png", "MR").images[0]
    got = [torch.from_numpy(array) for item in found for array in item.images]
    assert torch.equal(got[40][0].expand(3, -1, -1), want)
    shutil.copytree(images / "ct", tmp_path / "scans" / "first patient")
    (item, *_) = decoded(collection(tmp_path / "scans", private, modality="from-folders"))
    assert not item.rows and item.notes[0].refused == "unknown modality: nothing states its modality"


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


def test_a_reader_goes_to_other_processes(images, private):
    found = collection(images / "ct", private, modality="CT", normalisation="display")
    unit = found.units(1)[3]
    copied = pickle.loads(pickle.dumps(found.reader))
    got, want = copied.read(unit, lambda: None), found.reader.read(unit, lambda: None)
    assert np.array_equal(got.images[0], want.images[0]) and got.rows == want.rows
    assert copied.names(unit) == ["019.png"] and found.reading["normalisation"] == "display"


def test_options_of_files_are_refused_for_a_shard_set(images, tmp_path, private):
    data = (images / "ct" / "000.png").read_bytes()
    with ShardWriter(tmp_path / "set", name="little", modalities=("CT",), image_size=64) as writer:
        writer.add("p/0", data, kind="png", modality="CT", split="train", group="p")
    for options in ({"modality": "CT"}, {"slope": 2.0}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}: expected none for a shard set"):
            collection(tmp_path / "set", private, **options)
