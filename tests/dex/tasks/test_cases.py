"""The cases of a task, and what is refused before anything trains."""

import numpy as np
import pytest

from dex.tasks.cases import SPLITS, Frames, Grid, check_targets, open_task, read

MASK = np.zeros((16, 20), np.uint8)
MASK[2:6, 3:9], MASK[9:13, 10:17] = 1, 2


def test_pictures_have_no_affine_and_volumes_that_of_their_file():
    affine = np.diag([-1.0, 2.0, 3.0, 1.0])
    grid = Grid(affine, (4, 3, 2), "axial", (0, 1, 2), (-1, 1, 1), ())
    images = np.zeros((2, 3, 4), np.uint8)
    assert Frames(images, None, None, None, None).affine is None
    assert Frames(images, None, None, (3.0, 2.0, 1.0), grid).affine is affine


@pytest.fixture
def pairs(tmp_path, save_png):
    """30 images with masks, of 15 patients."""
    root = tmp_path / "my päirs"
    for i in range(30):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        save_png(root / f"images/p{i % 15}-{i}.png", pixels)
        save_png(root / f"masks/p{i % 15}-{i}.png", MASK)
    return root


@pytest.fixture
def folders(tmp_path, save_png):
    """40 images of 2 classes, of 20 patients."""
    root = tmp_path / "classes"
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 20, 3), dtype=np.uint8)
        save_png(root / f"{'ab'[i % 2]}/p{i % 20}/{i}.png", pixels)
    return root


def test_pairs_of_ones_own(pairs):
    data = open_task(pairs, classes=["one", "two"], patient=r"(p\d+)-", modality="endo" and "endoscopy")
    assert (data.task.kind, data.task.classes, data.task.modality) == ("segmentation", ("one", "two"), "endoscopy")
    assert sum(len(data.of(side)) for side in SPLITS) == 30 and all(len(data.of(side)) for side in SPLITS)
    patients = [{case.patient for case in data.of(side)} for side in SPLITS]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 15
    counts = check_targets(data)
    assert sum(count.cases for count in counts.values()) == 30
    assert counts["train"].pixels == (24 * counts["train"].cases, 28 * counts["train"].cases)
    frames = read(data.cases[0], data.task)
    assert frames.images.shape == (1, 16, 20, 3) and np.array_equal(frames.masks[0], MASK)


def test_ids_say_nothing_and_stay(pairs, tmp_path):
    first = open_task(pairs, classes=["one", "two"], patient=r"(p\d+)-")
    again = open_task(pairs, classes=["one", "two"], patient=r"(p\d+)-", seed=3)
    assert [(case.id, case.patient) for case in first.cases] == [(case.id, case.patient) for case in again.cases]
    assert [case.split for case in first.cases] != [case.split for case in again.cases]
    text = " ".join(case.id + case.patient for case in first.cases)
    assert "p1" not in text and "png" not in text
    other = open_task(pairs, classes=["one", "two"], patient=r"(p\d+)-", private=tmp_path / "private")
    assert {case.id for case in other.cases}.isdisjoint(case.id for case in first.cases)
    assert [case.split for case in other.cases] == [case.split for case in first.cases]


def test_folders_of_classes(folders):
    data = open_task(folders)
    assert (data.task.kind, data.task.classes, data.task.metric) == ("classification", ("a", "b"), "auc")
    assert {case.target for case in data.cases} == {0, 1}
    assert all(case.target == "ab".index(case.image.parts[-3]) for case in data.cases)
    assert open_task(folders, classes=["b", "a"]).task.classes == ("b", "a")
    renamed = open_task(folders, classes=["healthy=b", "ill=a"])
    assert renamed.task.classes == ("healthy", "ill")
    assert all(case.target == "ba".index(case.image.parts[-3]) for case in renamed.cases)
    assert check_targets(data)["train"].present == tuple(
        sum(case.target == number for case in data.of("train")) for number in (0, 1)
    )


def test_shots(folders, pairs):
    data = open_task(folders, shots=3)
    assert sorted(case.target for case in data.of("train")) == [0, 0, 0, 1, 1, 1]
    assert data.of("test") == open_task(folders).of("test")
    assert len(open_task(pairs, classes=["one", "two"], shots=4).of("train")) == 4
    with pytest.raises(ValueError, match=r"shots: expected at most \d+, the training images of class 'a'"):
        open_task(folders, shots=30)


def test_everything_on_one_side(folders):
    data = open_task(folders, split="test")
    assert len(data.of("test")) == 40
    with pytest.raises(ValueError, match="split: expected draw, train, val or test, got 'all'"):
        open_task(folders, split="all")


def test_a_table_of_ones_own(folders, tmp_path):
    files = sorted(path.relative_to(folders).as_posix() for path in folders.rglob("*.png"))
    lines = [f"{file},{'xy'[i % 2]},q{i},{SPLITS[i % 3]}" for i, file in enumerate(files)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label,patient,split", *lines]))
    data = open_task(folders, labels=tmp_path / "labels.csv")
    assert data.task.classes == ("x", "y") and [case.split for case in data.cases[:3]] == list(SPLITS)
    (folders / "labels.csv").write_text("\n".join(["file,label,patient,split", *lines]))
    assert [c.image for c in open_task(folders, labels=folders / "labels.csv").cases] == [c.image for c in data.cases]


def test_a_split_that_shares_patients(folders, tmp_path):
    files = sorted(path.relative_to(folders).as_posix() for path in folders.rglob("*.png"))
    lines = [f"{file},{'xy'[i % 2]},q{i // 4},{SPLITS[i % 3]}" for i, file in enumerate(files)]
    (tmp_path / "labels.csv").write_text("\n".join(["file,label,patient,split", *lines]))
    with pytest.raises(ValueError, match=r"each patient in one split, got 10 in several: q0 \(test: a/"):
        open_task(folders, labels=tmp_path / "labels.csv")


def test_labels_that_cannot_be_learned(folders, save_png):
    with pytest.raises(ValueError, match=r"labels: expected a, got 'b' for 20 images, such as b/p"):
        open_task(folders, classes=["a"])
    with pytest.raises(ValueError, match="none of c"):
        open_task(folders, classes=["a", "b", "c"])
    for path in (folders / "b").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="at least 2 classes, got 'a' only"):
        open_task(folders)


def test_masks_without_a_meaning_say_what_they_hold(pairs):
    with pytest.raises(ValueError, match="--classes NAME=VALUE .*the first 5 masks contain 0, 1, 2"):
        open_task(pairs)


def test_targets_are_checked_before_anything_trains(pairs, save_png):
    data = open_task(pairs, classes=["one", "two"], patient=r"(p\d+)-")
    last = data.of("test")[-1].target
    save_png(last, np.where(MASK == 2, 9, MASK).astype(np.uint8))
    with pytest.raises(ValueError, match=f"got 9 in 28 pixels of .*{last.name}"):
        check_targets(data)
    for case in data.of("test"):
        save_png(case.target, np.where(MASK == 2, 0, MASK).astype(np.uint8))
    with pytest.raises(ValueError, match="each class in test; none of its .* cases contains two"):
        check_targets(data)
    save_png(last, MASK[:-1])
    with pytest.raises(ValueError, match="size of its image, 16 x 20, got 15 x 20"):
        check_targets(data)


def test_patients_of_dicom_headers(tmp_path, save_series):
    labels = np.zeros((3, 16, 14), np.int16)
    labels[:, 3:8, 3:8] = 100
    for i in range(16):
        save_series(tmp_path / f"d/{'ab'[i % 2]}/s{i}", labels, patient=f"P{i % 8}")
    data = open_task(tmp_path / "d")
    assert len(data.cases) == 16 and len({case.patient for case in data.cases}) == 8
    assert read(data.cases[0], data.task).images.shape == (3, 16, 14)
    by_path = open_task(tmp_path / "d", patient=r"/(s\d+)")
    assert len({case.patient for case in by_path.cases}) == 16


def test_a_header_that_names_nobody(tmp_path, save_series):
    labels = np.zeros((3, 16, 14), np.int16)
    labels[:, 3:8, 3:8] = 100
    for i in range(20):
        save_series(tmp_path / f"d/{'ab'[i % 2]}/s{i}", labels, patient="Anonymous")
    data = open_task(tmp_path / "d")
    assert len({case.patient for case in data.cases}) == 20
    assert "the patients of the images are unknown" in data.notes[0]


def test_a_pattern_needs_a_group(folders):
    for pattern in ("(", "p1"):
        with pytest.raises(ValueError, match="patient: expected a regular expression"):
            open_task(folders, patient=pattern)


def test_arguments_of_another_type(folders):
    for name, value in (
        *(("data", 3), ("labels", 3), ("labels", ""), ("private", 3), ("seed", "x"), ("shots", "3"), ("shots", True)),
        *(("classes", "ab"), ("classes", [3]), ("modality", 3), ("patient", 3)),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            open_task(folders, **{name: value})


def test_volumes_need_a_modality_at_once(tmp_path, volume, save_nifti):
    for i in range(10):
        save_nifti(tmp_path / f"d/images/{i}.nii.gz", volume.values, volume.affine)
        save_nifti(tmp_path / f"d/masks/{i}.nii.gz", volume.labels, volume.affine)
    with pytest.raises(ValueError, match=r"modality: expected --modality, .*a nifti file.* images/0.nii.gz"):
        open_task(tmp_path / "d", classes=["one", "two"])
    data = open_task(tmp_path / "d", classes=["one", "two"], modality="ct")
    assert data.task.modality == "CT" and check_targets(data)["train"].frames == 9 * len(data.of("train"))


def test_a_table_with_masks_for_some(pairs):
    (pairs / "labels.csv").write_text("file,mask,label\nimages/p0-0.png,masks/p0-0.png,\nimages/p1-1.png,,x\n")
    with pytest.raises(ValueError, match=r"a mask for each file, or for none; .* has none for images/p1-1.png"):
        open_task(pairs, labels=pairs / "labels.csv", classes=["one", "two"])


def test_no_data(tmp_path, monkeypatch):
    monkeypatch.delenv("DEX_TASKS", raising=False)
    with pytest.raises(FileNotFoundError, match="nothing at"):
        open_task(tmp_path, tmp_path / "none")
    with pytest.raises(ValueError, match="task: expected a name"):
        open_task("")
