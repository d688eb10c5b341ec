"""The private table: which file and frame each image and each refusal is of."""

import json
import shutil
from collections import Counter

import nibabel
import numpy as np
import pydicom
import pytest
from small_runs import picture, save, save_dicom, save_series, save_volume, source, start

from dex.data import ShardDataset
from dex.prepare import trace, withdraw

CT = "1.2.840.10008.5.1.4.1.1.2"


def rows(private):
    return [json.loads(line) for path in sorted((private / "ids").iterdir()) for line in open(path)]


def test_pixels_lead_to_the_file_that_holds_them(here, tmp_path):
    """Files are in no order of their names."""
    names = ["z", "b", "y", "a", "x"]
    save_series(tmp_path / "root" / "p1", 1, 5, iter(f"{name}.dcm" for name in names), SOPClassUID=CT)
    start([source(tmp_path / "root", modality="CT")], tmp_path / "out")
    dataset = ShardDataset(tmp_path / "out")
    assert all(row["path"] == "p1" and row["frame"] == 0 for row in rows(tmp_path / "out.private"))
    file_of = {row["id"]: row["file"] for row in rows(tmp_path / "out.private")}
    for number in range(len(dataset)):
        seed = 100 + names.index(file_of[dataset.sample_id(number)].removesuffix(".dcm"))
        got, want = dataset[number].image.numpy()[0].astype(float), picture(seed).astype(float)
        others = [picture(100 + k).astype(float) for k in range(5) if 100 + k != seed]
        best = max(np.corrcoef(got.ravel(), other.ravel())[0, 1] for other in others)
        assert np.corrcoef(got.ravel(), want.ravel())[0, 1] > max(0.99, best)


def test_slices_across_a_series_name_its_files_once(here, tmp_path):
    save_series(tmp_path / "root" / "p1", 1, 40, iter(f"{k:02d}.dcm" for k in range(40)), SOPClassUID=CT)
    start([source(tmp_path / "root", modality="CT", planes=("coronal", "axial"))], tmp_path / "out")
    table = rows(tmp_path / "out.private")
    (files,) = (row for row in table if "id" not in row)
    assert files == {"path": "p1", "stack": 0, "files": [f"{k:02d}.dcm" for k in range(40)]}
    across = [row for row in table if row.get("label", "").startswith("coronal")]
    assert across and all(row["stack"] == 0 and not {"file", "frame"} & set(row) for row in across)
    assert all("file" in row for row in table if row.get("label", "").startswith("axial"))


def test_frames_pages_and_volumes(here, tmp_path):
    root = tmp_path / "root"
    film = np.stack([picture(k) for k in range(3)])
    save_dicom(root / "us" / "film.dcm", film[0], NumberOfFrames=3, PixelData=film.tobytes())
    save_volume(root / "ct" / "v.nii.gz", 50, frames=4)
    save(root, "one/a.png", picture(9))
    start([source(root / "us", "us"), source(root / "ct", "ct", "CT"), source(root / "one", "one")], tmp_path / "out")
    table = {row["path"]: [] for row in rows(tmp_path / "out.private")}
    for row in rows(tmp_path / "out.private"):
        table[row["path"]].append((row.get("file"), row.get("frame"), row["label"]))
    assert table["v.nii.gz"] == [(None, k, f"axial-{k:03d}") for k in range(4)]
    assert table["a.png"] == [(None, None, "image")]
    assert table[""] == [("film.dcm", k, f"frame-{k:04d}") for k in range(3)]


def test_the_volume_of_a_file_that_holds_several(here, tmp_path):
    import nibabel

    values = np.stack(
        [np.stack([picture(10 * v + k, 40).astype(np.int16) for k in range(3)], axis=2) for v in range(4)], axis=3
    )
    (tmp_path / "root").mkdir()
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "root" / "f.nii.gz")
    start([source(tmp_path / "root", modality="MR", normalisation="mr", volumes="2")], tmp_path / "out")
    got = [(row["label"], row["volume"], row["frame"]) for row in rows(tmp_path / "out.private") if "label" in row]
    assert got == [
        *((f"axial-{k:03d}", 0, k) for k in range(3)),
        *((f"s01-axial-{k:03d}", 2, k) for k in range(3)),
    ]


def test_refusals_name_their_files_reasons_and_details(here, tmp_path):
    root = tmp_path / "root"
    for series in (1, 2):
        names = iter(f"{series}-{k}.dcm" for k in range(4))
        burned = {"BurnedInAnnotation": "YES"} if series == 2 else {}
        save_series(root / "p1", series, 4, names, SOPClassUID=CT, **burned)
    (root / "p1" / "bad.dcm").write_bytes(b"no image")
    (root / "p2").mkdir()
    (root / "p2" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    facts, _ = start([source(root, modality="CT")], tmp_path / "out")
    refused = [row for row in rows(tmp_path / "out.private") if "refused" in row]
    assert Counter(row["refused"] for row in refused) == facts["sources"][0]["refused"]
    by_reason = {row["refused"]: row for row in refused}
    burned = by_reason["burned-in"]
    assert burned["path"] == "p1" and burned["files"] == [f"2-{k}.dcm" for k in range(4)]
    assert burned["detail"].startswith("the header declares burned-in annotation")
    assert {row.get("file", row["path"]) for row in refused if row["refused"] == "unreadable"} == {
        "bad.dcm",
        "p2/broken.png",
    }
    assert all(row["detail"] for row in refused)


def test_files_whose_images_are_all_dropped_are_named(here, tmp_path):
    root = tmp_path / "root"
    save(root, "p1/small.png", picture(1, 20))
    save(root, "p1/good.png", picture(2))
    save_series(root / "ct", 3, 4, iter(f"{k}.dcm" for k in range(4)), SOPClassUID=CT)
    air = pydicom.dcmread(root / "ct" / "0.dcm")
    air.PixelData = np.full((64, 64), -1000, np.int16).tobytes()
    air.save_as(root / "ct" / "0.dcm")
    facts, _ = start([source(root, modality="CT")], tmp_path / "out")
    assert facts["sources"][0]["dropped"] == {"blank": 1, "too small": 1} and not facts["sources"][0]["refused"]
    named = {
        (row["path"], row.get("file"), row["refused"]) for row in rows(tmp_path / "out.private") if "refused" in row
    }
    assert named == {("p1/small.png", None, "too small"), ("ct", "0.dcm", "blank")}
    left = json.loads((tmp_path / "out.private" / "left_out.json").read_text())
    assert left["counts"] == {"blank": 1, "too small": 1}  # Each once


def test_a_file_with_some_kept_images_is_not_named(here, tmp_path):
    values = np.stack([picture(k, 40).astype(np.int16) * 2 - 200 for k in range(3)], axis=2)
    values[..., 0] = -1000
    (tmp_path / "root").mkdir()
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / "root" / "a.nii.gz")
    facts, _ = start([source(tmp_path / "root", modality="CT")], tmp_path / "out")
    assert facts["sources"][0]["dropped"] == {"blank": 1}
    assert not [row for row in rows(tmp_path / "out.private") if "refused" in row]


def test_a_file_of_a_withdrawn_patient_is_not_named(here, tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    for patient in ("gone", "stays"):
        save(root, f"{patient}/small.png", picture(1, 20))
        save(root, f"{patient}/good.png", picture(len(patient)))
    start([source(root, patient="^(.*?)/")], out)
    withdraw.withdraw(out, tmp_path / "out.private", ["gone"])
    shutil.rmtree(out)
    facts, _ = start([source(root, patient="^(.*?)/")], out)
    assert facts["sources"][0]["dropped"] == {"too small": 2, "withdrawn": 1}
    assert [row["path"] for row in rows(tmp_path / "out.private") if "refused" in row] == ["stays/small.png"]


def test_a_table_without_some_images(tmp_path):
    table = tmp_path / "t.jsonl"
    lines = [
        {"path": "a", "stack": 0, "files": ["x", "y"]},
        {"id": "1", "path": "a", "label": "coronal-000", "stack": 0},
        {"id": "2", "path": "a", "label": "axial-000", "file": "x"},
        {"id": "3", "path": "a", "label": "coronal-001", "stack": 0},
        {"path": "b", "stack": 0, "files": ["n"]},
        {"id": "4", "path": "b", "label": "coronal-000", "stack": 0},
        {"id": "u", "path": "c", "refused": "unreadable"},
    ]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = table.stat()
    assert trace.remove(table, frozenset(["nobody"])) is False and table.stat() == before
    assert trace.remove(table, frozenset(["1", "4"])) is True
    assert [json.loads(line) for line in open(table)] == [lines[2], lines[0], lines[3], lines[6]]


@pytest.mark.parametrize("name", ["sound", "line\nbreak", "caf\udce9"])
def test_what_was_passed_over_is_kept(name, tmp_path):
    path = tmp_path / "p.jsonl"
    trace.write_passed_over(
        path, {f"a/{name}": "of no known format", "a/b": "of no known format", "c": "symbolic links"}
    )
    assert [json.loads(line) for line in open(path)] == [
        {"reason": "of no known format", "folder": "a", "names": sorted([name, "b"])},
        {"reason": "symbolic links", "folder": "", "names": ["c"]},
    ]
    trace.write_passed_over(tmp_path / "none", {})
    assert not (tmp_path / "none").exists()
