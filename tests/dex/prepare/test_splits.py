"""Sides: whole patients where there are enough, less where there are not, and what is said of it."""

import random

import numpy as np
import pytest
from small_runs import lines, picture, save, save_series, source, start

from dex.prepare.ids import place_of
from dex.prepare.splits import BothSides, Stacks, draw, hints, name_of, side_of, sides
from dex.prepare.summary import notes


def line(group, by="patient", split="", **parts):
    return {"group": group, "by": by, "split": split, **parts}


def drawn(rows, images=None, share=0.05, **fields):
    """Of lines of one source, a stack each: the split, and the side and name of each stack."""
    stacks = Stacks()
    for row in rows:
        stacks.add(0, side_of(row, {}, ""))
    images = np.full(len(rows), 10) if images is None else np.asarray(images)
    split = draw(stacks.columns(), images, [source("/", val_share=share, **fields)])
    names = [name_of(row, int(level)) for row, level in zip(rows, split.level, strict=True)]
    return split, [(name, bool(val)) for name, val in zip(names, split.val, strict=True)]


def whole(named):
    """Whether no name is on both sides."""
    return len({name for name, _ in named}) == len(set(named))


def facts_of(split):
    images = {side: sum(row["images"][side] for row in split.rows) for side in ("train", "val")}
    rows = [{"sure": True, **row} for row in split.rows]
    return {"split": rows, **images, "images": sum(images.values())}


def test_many_patients_are_drawn_by_their_names():
    rows = [line(f"{i:032x}", series=f"series-{i}-{k}") for i in range(2000) for k in range(2)]
    split, named = drawn(rows)
    assert whole(named) and split.rows[0]["by"] == "patient"
    assert {name for name, val in named if val} == {
        f"{i:032x}" for i in range(2000) if place_of(f"{i:032x}") < 0.05 * 2**64
    }
    assert 70 < split.rows[0]["groups"]["patient"]["val"] < 130 and hints(facts_of(split)) == []
    shuffled = random.Random(1).sample(rows, len(rows))
    assert set(drawn(shuffled)[1]) == set(named)  # the order does not matter


@pytest.mark.parametrize("patients", range(7, 40))
def test_a_share_of_few_patients_is_held_out_whole(patients):
    """Where chance would hold out none, or half of them."""
    for turn in range(5):
        rows = [
            line(f"p{turn}-{i}", by=("patient", "folder")[turn % 2], file=f"{turn}-{i}-{k}")
            for i in range(patients)
            for k in range(9)
        ]
        split, named = drawn(rows)
        assert whole(named) and split.rows[0]["by"] == "patient" and split.rows[0]["fits"]
        held = sum(val for _, val in named) / len(named)
        assert 0.025 <= held <= 0.15


@pytest.mark.parametrize("folders", [1, 2, 3, 6])
def test_too_few_folders_are_parted_by_file_and_said(folders):
    rows = [line(f"folder-{i % folders}", by="folder", file=f"file-{i}") for i in range(500)]
    split, named = drawn(rows, [1] * 500)
    assert whole(named) and 12 <= sum(val for _, val in named) <= 75
    assert all(name.startswith("file-") for name, _ in named)
    (hint,) = hints(facts_of(split))
    assert "too few to hold out 5 %" in hint and "split by file" in hint and "--patient" in hint and "--split" in hint


@pytest.mark.parametrize("patients", [2, 3, 5])
def test_named_patients_are_never_torn_however_few(patients):
    rows = [line(f"p{i}", series=f"s{i}-{k}", study=f"t{i}", folder=f"f{i}") for i in range(patients) for k in range(4)]
    split, named = drawn(rows)
    assert whole(named) and {name for name, _ in named} == {f"p{i}" for i in range(patients)}
    assert split.rows[0]["groups"] == {"patient": {"train": patients - 1, "val": 1}}
    (hint,) = hints(facts_of(split))
    assert f"{100 / patients:.0f} % of the images are held out: 5 % cannot be met" in hint
    # beside them files of nobody can be held out instead
    more = [line("folder", by="folder", file=f"x{k}") for k in range(4)]
    split, named = drawn(rows + more, [10] * len(rows) + [2] * 4)
    assert whole(named) and not any(val for name, val in named if name.startswith("p"))


def test_one_patient_is_parted_by_study_then_by_series():
    studies = [line("p", study=f"t{k // 3}", series=f"s{k}", folder="f") for k in range(60)]
    split, named = drawn(studies)
    assert {name for name, _ in named} == {"p"}  # who is on both sides
    assert whole([(row["study"], val) for row, (_, val) in zip(studies, named, strict=True)])
    assert split.rows[0]["groups"]["study"]["train"] + split.rows[0]["groups"]["study"]["val"] == 20
    assert split.rows[0]["by"] == "study" and "split by study" in hints(facts_of(split))[0]
    series = [line("p", study=f"t{k // 30}", series=f"s{k // 2}", folder="f") for k in range(60)]
    split, named = drawn(series)
    assert whole([(row["series"], val) for row, (_, val) in zip(series, named, strict=True)])
    assert split.rows[0]["groups"]["series"]["train"] + split.rows[0]["groups"]["series"]["val"] == 30
    assert split.rows[0]["by"] == "series" and "split by series" in hints(facts_of(split))[0]


def test_an_identity_that_all_headers_share_leaves_it_to_the_folders():
    rows = [line("SITE-7", study=f"t{k}", series=f"s{k}", folder=f"f{k // 5}") for k in range(100)]
    split, named = drawn(rows)
    assert whole([(row["folder"], val) for row, (_, val) in zip(rows, named, strict=True)])
    assert split.rows[0]["groups"] == {"folder": {"train": 19, "val": 1}}
    (hint,) = hints(facts_of(split))
    assert "1 patient, by headers and folders, is too few" in hint and "split by folder" in hint


def test_one_file_is_trained_on_and_two_are_parted():
    split, named = drawn([line("a", by="file")])
    assert named == [("a", False)] and "no image is held out" in hints(facts_of(split))[0]
    split, named = drawn([line("a", by="file"), line("b", by="file")])
    assert sorted(val for _, val in named) == [False, True]
    assert any("50 % of the images" in hint for hint in hints(facts_of(split)))


def test_files_without_a_patient_are_said_to_be():
    split, named = drawn([line(f"{i}.png", by="file") for i in range(400)])
    (hint,) = hints(facts_of(split))
    assert whole(named) and "nothing names the patients of 400 files" in hint and "--patient" in hint
    assert sides(facts_of(split))[0][1] == f"{split.rows[0]['groups']['file']['train']} files"


def test_shares_of_nothing_and_of_all():
    rows = [line(f"p{i}") for i in range(20)]
    for share, want in ((0.0, {False}), (1.0, {True})):
        split, named = drawn(rows, share=share)
        assert {val for _, val in named} == want and hints(facts_of(split)) == []


def test_what_is_given_is_not_drawn():
    given = [line(f"p{i}", split="val" if i < 3 else "train") for i in range(40)]
    split, named = drawn(given)
    assert [val for _, val in named] == [i < 3 for i in range(40)] and split.rows[0]["by"] == "stated"
    rows = [line(f"p{i}") for i in range(40)]
    stacks = Stacks()
    for row in rows:
        stacks.add(0, side_of(row, {"p7": "val"}, "train"))
    split = draw(stacks.columns(), np.full(40, 5), [source("/")])
    assert np.flatnonzero(split.val).tolist() == [7]
    with pytest.raises(BothSides, match="split: expected each patient on one side, got 1 patients on both"):
        drawn([line("p", split="val"), line("p", split="train"), line("q", split="train")])
    with pytest.raises(BothSides, match="1 files or series on both"):
        drawn([line("f", by="folder", file="x", split="val"), line("f", by="folder", file="x", split="train")])
    # a folder is no patient where the user tears it
    split, named = drawn([line("f", by="folder", file=f"{k}", split=("train", "val")[k]) for k in range(2)])
    assert named == [("0", False), ("1", True)]


def test_a_patient_of_two_sources_is_on_the_side_of_the_first():
    stacks, rows = Stacks(), [line(f"p{i}", folder=f"f{i}", series=f"{i}") for i in range(30)]
    for number in range(2):
        for row in rows:
            stacks.add(number, side_of(row | {"folder": f"{number}"}, {}, ""))
    images = np.array([1] * 30 + [50] * 15 + [1] * 15)
    split = draw(stacks.columns(), images, [source("/", "a"), source("/", "b")])
    assert (split.val[:30] == split.val[30:]).all() and 0 < split.val[:30].sum() < 10


def test_a_study_in_several_folders_is_no_less_than_a_study():
    """A folder for each series, and no name of a patient in the headers."""
    rows = [line(f"f{k}", by="folder", study=f"t{k // 4}", series=f"s{k}") for k in range(400)]
    split, named = drawn(rows)
    assert whole(named) and {name for name, _ in named} == {f"t{k}" for k in range(100)}
    (hint,) = hints(facts_of(split))
    assert "nothing names the patients of 100 studies" in hint


def test_pictures_of_two_folders_are_held_out(here, tmp_path):
    """Labels are folders, not patients."""
    for i in range(40):
        save(tmp_path / "root", f"{('benign', 'malignant')[i % 2]}/{i:03d}.png", picture(i))
    facts, _ = start([source(tmp_path / "root")], tmp_path / "out")
    rows = lines(tmp_path / "out")
    assert facts["val"] == sum(row["split"] == "val" for row in rows) and 1 <= facts["val"] <= 6
    assert len({row["group"] for row in rows}) == facts["images"] == 40
    assert facts["sources"][0]["patients"] == 0 and any("split by file" in note for note in notes(facts))


def test_series_of_many_patients_with_nobody_in_the_header(here, tmp_path):
    """Studies are of one patient each, whatever an anonymiser wrote."""
    for patient in range(10):
        for series in range(2):
            names = (f"all/{patient}-{series}-{k}.dcm" for k in range(9))
            study = {"StudyInstanceUID": f"1.3.{patient}", "SeriesInstanceUID": f"1.3.{patient}.{series}"}
            save_series(tmp_path / "root", patient * 2 + series, 2, names, **{**study, "PatientID": "ANON"})
    facts, _ = start([source(tmp_path / "root", "ct", "CT")], tmp_path / "out")
    rows = lines(tmp_path / "out")
    assert facts["split"][0]["by"] == "study" and len({row["group"] for row in rows}) == 10
    assert len({(row["group"], row["split"]) for row in rows}) == 10 and facts["val"] == 4
