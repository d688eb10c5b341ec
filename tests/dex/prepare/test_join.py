"""Chunks to a set: duplicates, sides, and chunks that are not what was written."""

import dataclasses

import nibabel
import numpy as np
import pytest
from small_runs import digest, lines, picture, save, save_dicom, save_series, save_volume, source, start

from dex.prepare.ids import place_of
from dex.prepare.run import Failed
from dex.prepare.summary import notes


@pytest.mark.parametrize("how", ["histogram", "image", "line", "cut"])
def test_a_damaged_chunk_is_found_and_made_anew(how, here, two, tmp_path):
    start(two, tmp_path / "whole")
    start(two, tmp_path / "out", shard=(0, 2))
    path = tmp_path / "out.private" / "chunks" / "000-000002"
    path = path.with_suffix(".bin" if how in ("histogram", "image") else ".jsonl")
    data = bytearray(path.read_bytes())
    if how == "line":
        place = data.index(b'"share":0.') + 11
        data[place] = ord("1") if data[place] != ord("1") else ord("2")
    elif how == "cut":
        del data[len(data) // 2 :]
    else:
        data[-9 if how == "histogram" else 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(Failed, match="chunk 000-000002 is damaged: .*start again"):
        start(two, tmp_path / "out", shard=(1, 2))
    assert not (tmp_path / "out").exists()
    start(two, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_duplicates_over_sources_keep_the_first_in_name_order(here, tmp_path):
    for i in range(3):
        save(tmp_path / "b", f"{i}.png", picture(i))
        save(tmp_path / "a", f"{i}.png", picture(i + 1))
    facts, _ = start([source(tmp_path / "b", "b"), source(tmp_path / "a", "a")], tmp_path / "out")
    assert [(one["name"], one["kept"]) for one in facts["sources"]] == [("a", 3), ("b", 1)]
    assert facts["duplicates"] == [{"source": "b", "of": "a", "exact": 2, "near": 0}]


def test_neighbours_in_a_volume_are_no_near_duplicates(here, tmp_path):
    values = np.repeat((picture(3, 40).astype(np.int16) * 2 - 200)[:, :, None], 4, 2)
    values[:2, :2] += np.arange(4, dtype=np.int16) * 4
    (tmp_path / "v").mkdir()
    for name in ("a", "b"):
        nibabel.save(nibabel.Nifti1Image(values + (name == "b"), np.eye(4)), tmp_path / "v" / f"{name}.nii.gz")
    facts, _ = start([source(tmp_path / "v", "v", "CT")], tmp_path / "out")
    assert facts["sources"][0]["kept"] == 4  # all of the first volume, none of the second


def test_a_patient_in_two_sources_stands_on_one_side(here, tmp_path):
    for name in ("a", "b"):
        for i in range(3):
            save_dicom(tmp_path / name / f"p{i}" / "1.dcm", picture(ord(name) + 10 * i), PatientID=f"MRN-{i + 1}")
    sources = [source(tmp_path / "a", "a", split="train"), source(tmp_path / "b", "b", split="", val_share=0.5)]
    start(sources, tmp_path / "out")
    splits = {}
    for row in lines(tmp_path / "out"):
        splits.setdefault(row["group"], []).append(row["split"])
    assert len(splits) == 3 and all(len(each) == 2 and len(set(each)) == 1 for each in splits.values())
    assert {each[0] for each in splits.values()} == {"train", "val"}  # with this salt both occur


def test_one_patient_is_there_to_train_on(here, tmp_path):
    """Whatever its hash says; unless all was to be held out."""
    save(tmp_path / "root", "1.png", picture(1))
    for number in range(200):
        name = f"lone-{number}"
        if place_of(f"{name}/1.png") < 0.05 * 2**64:
            break
    one = source(tmp_path / "root", name=name, public=True)
    facts, _ = start([one], tmp_path / "out")
    assert (facts["train"], facts["val"]) == (1, 0)
    facts, _ = start([dataclasses.replace(one, split="val")], tmp_path / "asked")
    assert (facts["train"], facts["val"]) == (0, 1) and any("to train on" in note for note in notes(facts))


def test_nothing_kept_says_why(here, tmp_path):
    save(tmp_path / "root", "a.png", np.full((64, 64), 90, np.uint8))
    with pytest.raises(Failed, match=r"no image was kept: 1 unit, 1 slice seen; blank 1\. .*log\.jsonl"):
        start([source(tmp_path / "root")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_slices_across_thick_ones_lead_to_the_option(here, tmp_path):
    save_volume(tmp_path / "root" / "ct.nii.gz", 3)
    with pytest.raises(Failed, match="too small 40; for thick slices, --planes stored"):
        start([source(tmp_path / "root", modality="CT", planes=("coronal",))], tmp_path / "none")
    facts, _ = start([source(tmp_path / "root", modality="CT", planes=("axial", "coronal"))], tmp_path / "out")
    assert facts["images"] == 6 and any(note.startswith("40 slices are too small") for note in notes(facts))
    facts, _ = start([source(tmp_path / "root", modality="CT")], tmp_path / "axial")
    assert not any("too small" in note for note in notes(facts))


def test_a_folder_of_another_modality_ends_with_the_way_out(here, tmp_path):
    save_series(tmp_path / "root", 1, 3, iter("123"), SOPClassUID="1.2.840.10008.5.1.4.1.1.2")
    wrong = source(tmp_path / "root", modality="MR", normalisation="mr", trusted=False)
    with pytest.raises(Failed, match=r"1 unit, 0 slices seen; another modality 3; without --modality each DICOM file"):
        start([wrong], tmp_path / "out")
