"""Predictions on new files: what is written where, what is refused, and what a kill leaves."""

import csv
import json
import os

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from dex.tasks import predict
from dex.tasks.finetune import finetune
from dex.tasks.load import load_task_model
from dex.tasks.predict import Options


@pytest.fixture(scope="module")
def loaded(finetuned):
    return load_task_model(finetuned)


@pytest.fixture
def pictures(discs):
    return sorted((discs / "images").iterdir())[:3]


def table(path):
    return list(csv.DictReader(path.open(newline="", encoding="utf-8")))


def go(loaded, files, options, series=()):
    items = predict.parted(files, loaded.task, series)
    ids = predict.begin(loaded, items, options)
    return ids, predict.run(loaded, items, ids, options)


def test_masks_probabilities_and_overlays_of_pictures(loaded, pictures, tmp_path):
    out = tmp_path / "a b é"
    ids, summary = go(loaded, pictures, Options(out, probabilities=True, overlays=True, workers=1))
    assert summary == predict.Summary(3, {})
    for id, path in zip(ids, pictures, strict=True):
        mask = np.asarray(Image.open(out / f"{id}.png"))
        assert mask.shape == (40, 56) and mask.dtype == np.uint8
        shares = np.load(out / f"{id}.probabilities.npy")
        assert shares.shape == (1, 2, 40, 56) and shares.dtype == np.float32
        assert np.abs(shares.sum(1) - 1).max() < 0.01
        sure = np.abs(shares[0, 1] - 0.5) > 0.01
        assert np.array_equal(mask[sure], (shares[0, 1] > 0.5)[sure])
        assert Image.open(out / f"{id}.overlay.png").size[0] > 300
        assert path.stem not in id
    rows = {row["id"]: row for row in table(out / predict.TABLE)}
    assert set(rows) == set(ids) and all(row["outcome"] == "done" for row in rows.values())
    counts = [int((np.asarray(Image.open(out / f"{id}.png")) == 1).sum()) for id in ids]
    assert [int(rows[id]["pixels disc"]) for id in ids] == counts and max(counts) > 0
    private = predict.private_folder(out)
    assert private.stat().st_mode & 0o77 == 0
    assert {row["id"]: row["file"] for row in table(private / predict.FILES)} == dict(
        zip(ids, map(str, pictures), strict=True)
    )
    everything = b"".join(path.read_bytes() for path in out.iterdir())
    assert not any(os.fsencode(path.name) in everything for path in pictures)


def test_a_mask_is_what_evaluation_scores(loaded, pictures, tmp_path):
    from dex.tasks.evaluate import Options as EvaluateOptions
    from dex.tasks.evaluate import predict_case
    from dex.tasks.task import Case

    ids, _ = go(loaded, pictures[:1], Options(tmp_path / "out"))
    target = pictures[0].parent.parent / "masks" / pictures[0].name
    expected = predict_case(loaded, Case("x", "y", "test", pictures[0], target), EvaluateOptions()).masks[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{ids[0]}.png")), expected)


def test_a_volume_gets_its_mask_in_its_space(loaded, tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (24, 20, 6)).astype(np.uint8)
    affine = np.array([[0, 0, -4.0, 9], [-1.5, 0, 0, 3], [0, 1.5, 0, -7], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(values, affine), path := tmp_path / "v.nii.gz")
    task = loaded.task.__class__(**{**loaded.task.__dict__, "modality": "MR"})
    ids, summary = go(loaded._replace(task=task), [path], Options(tmp_path / "out", probabilities=True))
    assert summary.done == 1
    mask = nibabel.load(tmp_path / "out" / f"{ids[0]}.nii.gz")
    assert mask.shape == values.shape and np.array_equal(mask.affine, affine)
    shares = nibabel.load(tmp_path / "out" / f"{ids[0]}.probabilities.nii.gz")
    assert shares.shape == (*values.shape, 2) and np.array_equal(shares.affine, affine)
    (row,) = table(tmp_path / "out" / predict.TABLE)
    volume = float((np.asarray(mask.dataobj) == 1).sum()) * 9 / 1000
    assert float(row["ml disc"]) == pytest.approx(volume, abs=1e-3)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_used_is_refused_by_name_and_the_others_go_on(loaded, pictures, tmp_path, workers):
    bad = {"cut.png": pictures[0].read_bytes()[:60], "empty.png": b"", "text.png": b"no picture", "n\r.npy": b"x"}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    files = [*(tmp_path / name for name in bad), pictures[0]]
    out = tmp_path / "out"
    ids, summary = go(loaded, files, Options(out, workers=workers))
    assert summary.done == 1 and sum(summary.refused.values()) == len(bad)
    rows = {row["id"]: row for row in table(out / predict.TABLE)}
    assert all(rows[id]["outcome"].startswith("refused: ") for id in ids[:-1]) and rows[ids[-1]]["outcome"] == "done"
    private = table(predict.private_folder(out) / predict.FILES)
    assert [row["file"] for row in private] == list(map(str, files))  # Also the name with a carriage return
    reasons = {row["id"]: row["refused"] for row in private}
    assert "empty" in reasons[ids[1]] and all(len(reasons[id]) > 10 for id in ids[:-1]) and reasons[ids[-1]] == ""
    assert len(list(out.iterdir())) == 3  # the mask, the table, the plan
    (tmp_path / "cut.png").write_bytes(pictures[0].read_bytes())  # mended: the next start takes it
    ids, summary = go(loaded, files, Options(out, workers=workers))
    assert summary.done == 2 and (out / f"{ids[0]}.png").is_file()


def test_a_second_start_makes_what_is_missing_alone(loaded, pictures, tmp_path, monkeypatch):
    options = Options(tmp_path / "out", overlays=True)
    written, write = [], predict._write_case

    def stops(loaded, unit, frames, options):
        if written:
            raise predict.Stopped
        written.append(unit.id)
        return write(loaded, unit, frames, options)

    monkeypatch.setattr(predict, "_write_case", stops)
    with pytest.raises(predict.Stopped):
        go(loaded, pictures, options)
    monkeypatch.setattr(predict, "_write_case", lambda *given: written.append(given[1].id) or write(*given))
    (options.out / f"x.{os.getpid()}.partial").write_bytes(b"left by a kill")
    ids, summary = go(loaded, pictures, options)
    assert summary.done == 3 and written == ids
    before = {path: path.stat().st_mtime_ns for path in options.out.glob("*.png")}
    go(loaded, pictures, options)
    assert written == ids and before == {path: path.stat().st_mtime_ns for path in options.out.glob("*.png")}
    assert not list(options.out.glob("*.partial"))


def test_another_model_or_other_options_are_refused(loaded, pictures, tmp_path):
    options = Options(tmp_path / "out")
    predict.begin(loaded, [predict.Item(path) for path in pictures], options)
    with pytest.raises(ValueError, match="out: .* was begun with overlays False, now it is True"):
        predict.begin(loaded, [predict.Item(path) for path in pictures], options._replace(overlays=True))
    with pytest.raises(ValueError, match="was begun with checkpoint"):
        predict.begin(loaded._replace(sha256="other"), [predict.Item(path) for path in pictures], options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for out in (tmp_path / "full", tmp_path / "full/file"):
        with pytest.raises(ValueError, match="out: expected a new or empty folder"):
            predict.begin(loaded, [predict.Item(path) for path in pictures], Options(out))
    (tmp_path / "out" / predict.PLAN).write_text("no plan")
    with pytest.raises(ValueError, match="out: expected the plan"):
        predict.begin(loaded, [predict.Item(path) for path in pictures], options)


def test_public_ids_are_the_files_names(loaded, pictures, tmp_path):
    (tmp_path / "more").mkdir()
    copy = tmp_path / "more" / pictures[0].name
    copy.write_bytes(pictures[0].read_bytes())
    ids, _ = go(loaded, [*pictures, copy], Options(tmp_path / "out", public=True))
    assert ids == ["p00-0", "p01", "p02", "p00-1"]
    assert (tmp_path / "out/p01.png").is_file()


def test_which_files_arguments_name(discs, tmp_path, save_series):
    folder = tmp_path / "all of it"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/a.png").write_bytes((discs / "images/p00.png").read_bytes())
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").touch()
    (folder / "link.png").symlink_to(folder / "deep/a.png")
    found = predict.inputs([folder, folder / "deep/a.png", str(folder)])
    assert found == [folder / "deep/a.png"]
    for name in ("out", "out.private", "outlook"):  # Earlier predictions are no input, other folders are
        (folder / name).mkdir()
        (folder / name / "b.png").write_bytes((folder / "deep/a.png").read_bytes())
    assert predict.inputs([folder], folder / "out") == [folder / "deep/a.png", folder / "outlook/b.png"]
    with pytest.raises(FileNotFoundError, match="nothing at .*absent"):
        predict.inputs([tmp_path / "absent"])
    (tmp_path / "nothing").mkdir()
    for arguments in ([tmp_path / "nothing"], [], [""]):
        with pytest.raises(ValueError, match="file: expected files, DICOM folders"):
            predict.inputs(arguments)


def test_options_that_a_classification_does_not_have(loaded, pictures, tmp_path):
    task = loaded.task.__class__(**{**loaded.task.__dict__, "kind": "classification", "metric": "accuracy"})
    for name in ("probabilities", "overlays"):
        with pytest.raises(ValueError, match=f"{name}: expected a segmentation"):
            predict.begin(
                loaded._replace(task=task),
                [predict.Item(path) for path in pictures],
                Options(tmp_path / "out", **{name: True}),
            )
    for given, name in ((Options(tmp_path, batch_size=0), "batch-size"), (Options(tmp_path, workers=-1), "workers")):
        with pytest.raises(ValueError, match=name):
            predict.begin(loaded, [predict.Item(path) for path in pictures], given)
    with pytest.raises(ValueError, match="out: expected a folder apart from the files"):
        predict.begin(loaded, [predict.Item(path) for path in pictures], Options(pictures[0].parent))


def test_a_classification_is_a_table(pretrained, shade_data, shades, quick, tmp_path):
    assert finetune(pretrained, shade_data, quick, tmp_path / "tuned") == 0
    files = predict.inputs([shades / "bright", shades / "dark/d00.png"])
    ids, summary = go(load_task_model(tmp_path / "tuned"), files, Options(tmp_path / "out"))
    assert summary.done == len(files) == 25
    rows = {row["id"]: row for row in table(tmp_path / "out" / predict.TABLE)}
    for id in ids:
        shares = {name: float(rows[id][f"p {name}"]) for name in ("bright", "dark")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert rows[id]["class"] == max(shares, key=shares.get)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [predict.PLAN, predict.TABLE]


def test_weights_that_are_not_finite_end_the_job(loaded, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "of_frames", lambda *_, **keywords: iter([torch.full((1, 2, 40, 56), float("nan"))]))
    with pytest.raises(FloatingPointError, match="model: expected finite"):
        go(loaded, pictures, Options(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.png"))


def test_unevenly_spaced_slices_are_refused(loaded, tmp_path):
    from dex.tasks.frames import Frames, Grid

    grid = Grid(np.eye(4), (8, 8, 2), "axial", (0, 1, 2), (1, 1, 1), (), even=False)
    frames = Frames(np.zeros((2, 8, 8), np.uint8), None, None, (1.0, 1.0, 1.0), grid)
    unit = predict._Unit("a", tmp_path / "a.nii")
    reason = predict._write_case(loaded, unit, frames, Options(tmp_path))
    assert reason.startswith("inconsistent: its slices are unevenly spaced")
    assert not list(tmp_path.iterdir())


def test_the_plan_says_what_was_asked(loaded, pictures, tmp_path):
    predict.begin(loaded, [predict.Item(path) for path in pictures], Options(tmp_path / "out", window=1.5))
    plan = json.loads((tmp_path / "out" / predict.PLAN).read_text())
    assert plan["checkpoint"] == loaded.sha256 and plan["window"] == 1.5 and plan["classes"] == ["disc"]


@pytest.fixture
def of_ct(loaded):
    return loaded._replace(task=loaded.task.__class__(**{**loaded.task.__dict__, "modality": "CT"}))


@pytest.fixture
def export(save_series, tmp_path):
    """A folder with three series, as an archive exports an examination: numbers 2 and 4, and one without a number."""
    import pydicom

    rng, folder = np.random.default_rng(0), tmp_path / "Müller 1"
    folder.mkdir()
    for number, frames in ((2, 3), (4, 5), (None, 4)):
        save_series(tmp_path / f"s{number}", rng.integers(-500, 500, (frames, 12, 10)).astype(np.int16))
        for path in sorted((tmp_path / f"s{number}").iterdir()):
            head = pydicom.dcmread(path)
            if number is not None:
                head.SeriesNumber = number
            head.save_as(folder / f"{number}-{path.name}", enforce_file_format=True)
    return folder


def test_every_series_of_a_folder_gets_its_own_mask(of_ct, export, tmp_path):
    ids, summary = go(of_ct, [export], Options(tmp_path / "out"))
    assert summary == predict.Summary(3, {}) and len(set(ids)) == 3
    depths = {id: nibabel.load(tmp_path / "out" / f"{id}.nii.gz").shape for id in ids}
    series = {row["id"]: row["series"] for row in table(predict.private_folder(tmp_path / "out") / predict.FILES)}
    assert {series[id]: shape for id, shape in depths.items()} == {
        "2": (10, 12, 3),
        "4": (10, 12, 5),
        "": (10, 12, 4),
    }
    again = go(of_ct, [export], Options(tmp_path / "out"))
    assert again == (ids, summary)
    ids, _ = go(of_ct, [export], Options(tmp_path / "named", public=True))
    assert sorted(id.partition("-series-")[2] for id in ids) == ["2", "4", "x"]


def test_a_series_is_chosen_by_number_or_uid(of_ct, export, tmp_path):
    import pydicom

    uid = str(pydicom.dcmread(export / "4-000.dcm").SeriesInstanceUID)
    for number, wanted in enumerate((["4"], [uid])):
        ids, summary = go(of_ct, [export], Options(tmp_path / f"out{number}"), wanted)
        assert summary.done == len(ids) == 1
        assert nibabel.load(tmp_path / f"out{number}" / f"{ids[0]}.nii.gz").shape == (10, 12, 5)
    with pytest.raises(ValueError, match="series: expected the Series Number or .* of a file, got 9"):
        go(of_ct, [export], Options(tmp_path / "none"), ["9"])
    assert not (tmp_path / "none").exists()
    files = [export, tmp_path / "s2"]  # s2 was saved without a number
    ids, summary = go(of_ct, files, Options(tmp_path / "some"), ["4"])
    assert (summary.done, summary.refused) == (1, {"inconsistent": 1})
    assert "0 of them match" in summary.example
    rows = table(predict.private_folder(tmp_path / "some") / predict.FILES)
    (reason,) = [row["refused"] for row in rows if row["refused"]]
    assert "it holds 1 series or volumes, by Series Number ? (3 images)" in reason and "0 of them match" in reason


def test_the_id_of_a_folder_with_one_series_is_that_of_the_folder(of_ct, tmp_path):
    names = predict._ids([predict.Item(tmp_path)], Options(tmp_path / "out"))
    assert names == predict._ids([predict.Item(tmp_path, None, "3")], Options(tmp_path / "out"))
    assert names != predict._ids([predict.Item(tmp_path, "key", "3")], Options(tmp_path / "out"))
