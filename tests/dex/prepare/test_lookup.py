"""Images by id, by patient and by file, in sets of this version and of earlier ones."""

import json
import shutil

import pytest
from small_runs import lines, make_older, picture, save, save_dicom, save_series, save_volume, source, start

from dex.prepare import discover, lookup
from dex.prepare.run import private_folder

CT = "1.2.840.10008.5.1.4.1.1.2"


@pytest.fixture
def mixed(here, tmp_path):
    """Two CT series of one patient each, with the id in the headers; pictures by folders, one of them a copy."""
    root = tmp_path / "root"
    for number in (1, 2):
        save_series(root / "ct" / f"f{number}", number, 4, iter(f"{k}.dcm" for k in range(4)), SOPClassUID=CT)
    save_series(root / "ct" / "f3", 1, 3, iter(f"{k}.dcm" for k in range(3)), SOPClassUID=CT)
    for number in range(6):
        save(root, f"photos/p{number // 2}/{number}.png", picture(700 + number))
    save(root, "photos/p9/copy.png", picture(700))
    (root / "photos" / "p0" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (root / "photos" / "p0" / "notes.txt").write_text("x")
    out = tmp_path / "out"
    start([source(root / "ct", "ct", "CT"), source(root / "photos", "photos")], out)
    return out


def private_of(out):
    return lookup.Private(private_folder(out))


def one(out, text):
    (found,) = lookup.find(out, private_of(out), [text])
    return found


def files(found):
    return sorted((image.place.source, image.place.file) for image in found.images.values())


def test_every_image_and_refusal_leads_to_a_file_that_is_there(mixed, tmp_path):
    private = private_of(mixed)
    places = list(private.places())
    assert {row["id"] for row in lines(mixed)} <= {place.id for place in places}
    assert len(places) == 8 + 3 + 7 + 1 and all(place.exact for place in places)
    for place in (*places, *private.passed_over()):
        assert place.root == str(tmp_path / "root" / place.source)
        assert (tmp_path / "root" / place.source / place.file).is_file()


def test_ids_of_images_units_and_groups(mixed):
    row = lines(mixed)[0]
    for text in (row["id"], row["id"].split("/")[1], f" {row['id']} "):
        found = one(mixed, text)
        assert list(found.images) == [row["id"]] and found.ways == ["the id of an image"] and not found.groups
        assert found.images[row["id"]].line["key"] == row["key"]
    found = one(mixed, row["group"])
    assert set(found.images) >= {line["id"] for line in lines(mixed) if line["group"] == row["group"]}
    assert found.groups == {row["group"]}
    log = [json.loads(text) for text in open(private_folder(mixed) / "log.jsonl")]
    (unit,) = (entry["id"] for entry in log if entry["event"] == "refused")
    found = one(mixed, unit)
    assert not found.images and [place.file for place in found.refused] == ["p0/bad.png"]
    assert found.refused[0].refused == "unreadable" and found.refused[0].detail


def test_a_patient_as_the_hospital_calls_it(mixed, tmp_path):
    found = one(mixed, "MRN-1")
    assert files(found) == [("ct", f"f{f}/{k}.dcm") for f, count in ((1, 4), (3, 3)) for k in range(count)]
    assert len(found.groups) == 1
    # three slices of the other series are copies of the first one's
    assert sum(image.line is None for image in found.images.values()) == 3
    assert files(one(mixed, "p1")) == [("photos", "p1/2.png"), ("photos", "p1/3.png")]
    assert not one(mixed, "MRN-7") and not one(mixed, "mrn-1") and not one(mixed, "p")


def test_a_patient_without_an_id(here, tmp_path):
    who = {"PatientName": "Doe^Jane", "PatientBirthDate": "19010203"}
    save_dicom(tmp_path / "root" / "a" / "1.dcm", picture(1), **who)
    save_dicom(tmp_path / "root" / "b" / "2.dcm", picture(2), PatientName="Roe^Rick")
    start([source(tmp_path / "root")], tmp_path / "out")
    assert files(one(tmp_path / "out", "Doe^Jane 19010203")) == [("pictures", "a/1.dcm")]
    assert files(one(tmp_path / "out", "Roe^Rick")) == [("pictures", "b/2.dcm")]
    assert not one(tmp_path / "out", "Doe^Jane")


def test_patients_that_paths_name(here, tmp_path):
    for number in range(4):
        save(tmp_path / "root", f"deep/sub-{number // 2}_{number}.png", picture(number))
    pattern = r"(sub-\d+)"
    start(
        [source(tmp_path / "root", patient=pattern), source(tmp_path / "root", "open", public=True)], tmp_path / "out"
    )
    found = one(tmp_path / "out", "sub-1")
    assert [file for name, file in files(found) if name == "pictures"] == ["deep/sub-1_2.png", "deep/sub-1_3.png"]


def test_paths_of_files_and_folders(mixed, tmp_path, monkeypatch):
    for text in ("f1/2.dcm", str(tmp_path / "root" / "ct" / "f1" / "2.dcm")):
        found = one(mixed, text)
        assert files(found) == [("ct", "f1/2.dcm")] and found.ways == ["a path"] and not found.groups
    monkeypatch.chdir(tmp_path / "root")
    assert files(one(mixed, "ct/f1/")) == [("ct", f"f1/{k}.dcm") for k in range(4)]
    assert [place.file for place in one(mixed, "photos/p0/bad.png").refused] == ["p0/bad.png"]
    for text in ("", " ", ".", "/", "../"):
        with pytest.raises(ValueError, match="ID: expected an id, a patient or a path"):
            one(mixed, text)


def test_a_copy_says_of_which_image(mixed):
    (image,) = one(mixed, "p9/copy.png").images.values()
    (first,) = one(mixed, "p0/0.png").images.values()
    assert image.line is None and image.duplicate["near"] is False and image.copy_of == first.id
    assert one(mixed, "p9").groups and list(one(mixed, "p9").images) == [image.id]


def test_a_series_across_many_files(here, tmp_path):
    save_series(tmp_path / "root" / "p1", 1, 40, iter(f"{k:02d}.dcm" for k in range(40)), SOPClassUID=CT)
    start([source(tmp_path / "root", modality="CT", planes=("coronal",))], tmp_path / "out")
    place = next(private_of(tmp_path / "out").places())
    assert place.files == tuple(f"p1/{k:02d}.dcm" for k in range(40))
    assert one(tmp_path / "out", "p1/17.dcm").images == one(tmp_path / "out", "p1/03.dcm").images != {}


def test_the_files_of_a_large_folder_are_beside_their_units_name(here, tmp_path, monkeypatch):
    monkeypatch.setattr(discover, "LARGE", 5)
    for number in (1, 2):
        save_series(tmp_path / "root" / "flat", number, 4, iter(f"{number}{k}.dcm" for k in range(4)), SOPClassUID=CT)
    start([source(tmp_path / "root", modality="CT")], tmp_path / "out")
    assert {place.unit for place in private_of(tmp_path / "out").places()} == {"flat/10.dcm", "flat/20.dcm"}
    assert files(one(tmp_path / "out", "MRN-2")) == [("pictures", f"flat/2{k}.dcm") for k in range(4)]


def test_a_set_of_an_earlier_version(mixed):
    make_older(mixed)
    private = private_of(mixed)
    assert not private.knows_duplicates and list(private.passed_over()) == []
    places = {place.file: place for place in private.places()}
    assert places["f1"].exact is False and places["p1/2.png"].exact is True and places["p0/bad.png"].refused
    assert len(one(mixed, "MRN-1").images) == 4 and len(one(mixed, "p1").images) == 2
    assert one(mixed, "f1").images and not one(mixed, "f1/2.dcm")


def test_ids_that_begin_so_are_suggested(mixed):
    row = lines(mixed)[3]
    found = one(mixed, row["id"].split("/")[1][:9])
    assert not found and found.alike == [row["id"]]


def test_without_a_private_folder(mixed, tmp_path):
    row = lines(mixed)[0]
    (found,) = lookup.find(mixed, None, [row["group"]])
    assert row["id"] in found.images
    (found,) = lookup.find(mixed, None, ["MRN-1"])
    assert not found
    with pytest.raises(lookup.NoPrivateFolder, match="none.private beside it"):
        lookup.Private(tmp_path / "none.private")


def test_a_private_folder_of_something_else(mixed, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "plan.json").write_text('{"sources": [{}]}')
    with pytest.raises(ValueError, match="plan.json: expected a plan of dex prepare"):
        lookup.Private(tmp_path / "x")


def test_without_its_salt_ids_and_paths_still_lead_on(mixed):
    (private_folder(mixed) / "salt").unlink()
    assert files(one(mixed, "p1/2.png")) == [("photos", "p1/2.png")] and not one(mixed, "MRN-1")


def test_several_sources_of_volumes_and_folders_with_a_common_start(here, tmp_path):
    for patient in range(3):
        save_volume(tmp_path / "root" / "study" / "data" / f"v{patient}" / "ct.nii.gz", 100 + 10 * patient)
    start([source(tmp_path / "root", modality="CT")], tmp_path / "out")
    for text in ("v1", "study/data/v1", str(tmp_path / "root" / "study" / "data" / "v1")):
        found = one(tmp_path / "out", text)
        assert len(found.images) == 6 and len(found.groups) == 1
    shutil.rmtree(tmp_path / "root")  # the files may be gone long since
    assert len(one(tmp_path / "out", "v2").images) == 6
