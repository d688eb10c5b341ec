"""Patients stand on one side."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dex.tasks import splits
from dex.tasks.splits import Sample, sides_of


def samples(count=60, patients=20, labels=("a", "b"), side=lambda i: ""):
    return [Sample(f"p{i % patients}", labels[i % patients % len(labels)], side(i), f"f{i}") for i in range(count)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc")), min_size=40, max_size=120), st.integers(0, 9))
def test_drawn_sides_never_tear_a_patient_and_do_not_depend_on_the_order(pairs, seed):
    several = [Sample(str(patient), label, "", str(i)) for i, (patient, label) in enumerate(pairs)]
    try:
        sides, _ = sides_of(several, seed)
    except ValueError as error:
        assert "expected images" in str(error)
        return
    of = defaultdict(set)
    for sample, side in zip(several, sides, strict=True):
        of[sample.patient].add(side)
    assert all(len(found) == 1 for found in of.values())
    again, _ = sides_of(several[::-1], seed)
    assert again[::-1] == sides


def test_shares_and_classes_of_a_draw():
    several = samples(1000, 200)
    sides, notes = sides_of(several, 0)
    assert [sides.count(side) for side in ("train", "val", "test")] == pytest.approx([700, 150, 150], abs=10)
    for side in ("train", "val", "test"):
        own = [s.label for s, on in zip(several, sides, strict=True) if on == side]
        assert own.count("a") == pytest.approx(own.count("b"), abs=10)
    assert sides != sides_of(several, 1)[0]
    assert notes == ["the split is drawn by patient, with seed 0: the files state none"]


def test_sides_of_the_files_are_kept():
    stated = samples(60, 20, side=lambda i: ("train", "val", "test", "train")[i % 20 // 2 % 4])
    sides, notes = sides_of(stated, 0)
    assert sides == [sample.side for sample in stated]
    assert notes == [
        f"{s} has only {n} patients: intervals over patients are unreliable" for s, n in (("val", 6), ("test", 4))
    ]
    assert sides_of(stated, 0, redraw=True)[0] != sides


def test_val_is_drawn_from_train_where_the_files_name_train_and_test():
    stated = samples(200, 40, side=lambda i: "test" if i % 40 < 10 else "train")
    sides, notes = sides_of(stated, 0)
    assert [side == "test" for side in sides] == [sample.side == "test" for sample in stated]
    assert sides.count("val") == pytest.approx(0.15 / 0.85 * 150, abs=5)
    assert "val is drawn by patient from train, with seed 0" in notes[0]


def test_a_patient_on_several_sides_is_named():
    torn = samples(side=lambda i: "train" if i < 50 else "test")
    with pytest.raises(ValueError, match=r"10 in several: p10 \(test: f50, train: f10\).*--split draw"):
        sides_of(torn, 0)
    assert set(sides_of(torn, 0, redraw=True)[0]) == {"train", "val", "test"}


def test_sides_that_cannot_be():
    with pytest.raises(ValueError, match="got none for f3"):
        sides_of(samples(side=lambda i: "" if i == 3 else "train"), 0)
    with pytest.raises(ValueError, match="none in val"):
        sides_of(samples(side=lambda i: "train"), 0)
    with pytest.raises(ValueError, match="2 images of 1 patients; --patient"):
        sides_of([Sample("p", "", "", "1"), Sample("p", "", "", "2")], 0)
    lacking = [Sample(f"p{i}", "ab"[i == 0], "", f"f{i}") for i in range(20)]
    with pytest.raises(ValueError, match=r"each class in val, got none of 'b' \(1 patients in all\)"):
        sides_of(lacking, 0)


def test_shots_are_drawn_per_class_from_train_alone():
    several = samples(200, 50)
    sides, _ = sides_of(several, 0)
    kept = splits.shots(several, sides, 4, 0)
    train = [several[i].label for i in kept if sides[i] == "train"]
    assert sorted(train) == ["a"] * 4 + ["b"] * 4
    assert len(kept) - 8 == sum(side != "train" for side in sides)
    assert splits.shots(several, sides, 4, 1) != kept
    with pytest.raises(ValueError, match="shots: expected at most"):
        splits.shots(several, sides, 4000, 0)
    with pytest.raises(ValueError, match="at least 1"):
        splits.shots(several, sides, 0, 0)
