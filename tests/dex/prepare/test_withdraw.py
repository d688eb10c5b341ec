"""A patient out of a set: gone from every file, for good, at whatever step the process is killed."""

import base64
import fcntl
import io
import json
import os
import shutil

import numpy as np
import pytest
from killing import killed_at
from PIL import Image
from small_runs import SETTINGS, lines, make_older, picture, save, save_series, source, start

from dex.data import ShardDataset, verify
from dex.prepare import lookup, withdraw
from dex.prepare.run import private_folder
from dex.prepare.splits import hints
from dex.prepare.summary import notes

CT = "1.2.840.10008.5.1.4.1.1.2"


@pytest.fixture
def inputs(tmp_path):
    """CT series of three patients, pictures of five; one of them has a picture of another's."""
    root = tmp_path / "root"
    for number in (1, 2, 3):
        save_series(root / "ct" / f"f{number}", number, 3, iter(f"{k}.dcm" for k in range(3)), SOPClassUID=CT)
    for number in range(8):
        save(root, f"photos/p{number // 2}/{number}.png", picture(700 + number))
    save(root, "photos/p4/copy.png", picture(704))
    save(root, "photos/p4/own.png", picture(750))
    return [source(root / "ct", "ct", "CT"), source(root / "photos", "photos")]


@pytest.fixture
def whole(here, inputs, tmp_path):
    start(inputs, tmp_path / "out")
    return tmp_path / "out"


def take(out, *texts):
    return withdraw.withdraw(out, private_folder(out), texts)


def card_of(out):
    return json.loads((out / "card.json").read_text())


def held(out):
    dataset = ShardDataset(out)
    return {dataset.sample_id(n): dataset.image_bytes(n) for n in range(len(dataset))}


def everything(out):
    """All bytes of the set and of its private folder; pictures of the card as the bytes that they are."""
    data = b""
    for folder in (out, private_folder(out)):
        for path in sorted(folder.rglob("*")):
            data += path.read_bytes() if path.is_file() else b""
    for part in (out / "card.html").read_text().split("base64,")[1:]:
        data += base64.b64decode(part.split('"')[0])
    return data


def test_nothing_of_the_patient_is_left(whole):
    before, fingerprint = held(whole), ShardDataset(whole).fingerprint
    theirs = {place.id for place in lookup.Private(private_folder(whole)).places() if place.file.startswith("f2/")}
    assert len(theirs) == 3 and theirs < set(before)
    outcome = take(whole, "MRN-2")
    assert (outcome.images, outcome.patients, outcome.copies, outcome.others) == (3, 1, 0, 0)
    assert (outcome.before, outcome.after) == (fingerprint, ShardDataset(whole).fingerprint)
    assert outcome.seen_by == (fingerprint,)
    assert verify(whole) == [] and held(whole) == {name: data for name, data in before.items() if name not in theirs}
    left = everything(whole)
    for name in theirs:
        assert before[name] not in left
        assert name.encode() not in (whole / "card.html").read_bytes() + (whole / "card.json").read_bytes()
    for path in [*(private_folder(whole) / "ids").iterdir(), private_folder(whole) / "duplicates.jsonl"]:
        assert not any(name in path.read_text() for name in theirs)
    public = b"".join(path.read_bytes() for path in whole.rglob("*"))
    assert b"MRN-2" not in public and b"MRN-2" not in left


def test_counts_and_histograms_are_those_of_a_set_without_the_patient(whole, inputs, tmp_path):
    take(whole, "MRN-2", "p0")
    shutil.rmtree(tmp_path / "root" / "ct" / "f2")
    shutil.rmtree(tmp_path / "root" / "photos" / "p0")
    start(inputs, tmp_path / "other")
    got, want = card_of(whole), card_of(tmp_path / "other")
    assert got["images"] == want["images"] and got["train"] + got["val"] == got["images"]
    for mine, theirs in zip(got["modalities"], want["modalities"], strict=True):
        assert mine["histogram"] == theirs["histogram"] and mine["sources"] == theirs["sources"]
    for mine, theirs in zip(got["sources"], want["sources"], strict=True):
        assert (mine["kept"], mine["patients"]) == (theirs["kept"], theirs["patients"])
        assert mine["text_suspected"] == theirs["text_suspected"]
    assert [row["dropped"]["withdrawn"] for row in got["sources"]] == [3, 2]
    ((date, images),) = (row.values() for row in got["withdrawn"])
    assert images == 5 and len(date) == 25 and "Withdrawn" in (whole / "card.html").read_text()
    assert len(got["examples"]) == len(want["examples"])
    sides = ("train", "val")
    assert [sum(row["images"][side] for row in got["split"]) for side in sides] == [got[side] for side in sides]


def test_what_prepare_wrote_is_what_is_left_to_read(whole):
    take(whole, "p1")
    manifest = json.loads((whole / "manifest.json").read_text())
    assert [(row["name"], row["train"] + row["val"]) for row in manifest["modalities"]] == [("CT", 9), ("X-ray", 7)]
    by_id = {row["id"]: row for row in lines(whole)}
    assert len(by_id) == 16 == sum(entry["samples"] for entry in manifest["shards"])


def test_a_histogram_of_jpeg_stays_one(here, inputs, tmp_path):
    start(inputs, tmp_path / "out", settings=SETTINGS.__class__(size=64, encoding="jpg"))
    take(tmp_path / "out", "MRN-2", "p1", "p3", "p0")
    for row in card_of(tmp_path / "out")["modalities"]:
        assert sum(row["histogram"]) == 64 * 64 * (row["train"] + row["val"]) and min(row["histogram"]) >= 0


def test_copies_of_the_patients_images_go_too(whole):
    """p4's copy of p2's picture was left out; the picture is p4's as well, wherever it is filed."""
    row = next(place for place in lookup.Private(private_folder(whole)).places() if place.file == "p2/4.png")
    outcome = take(whole, "p4")
    assert (outcome.images, outcome.copies, outcome.patients) == (2, 1, 1) and row.id not in held(whole)
    assert verify(whole) == []


def test_of_a_picture_that_is_withdrawn_no_copy_comes_back(whole, inputs):
    """The one that was kept is withdrawn; that which was left out for it must not take its place."""
    take(whole, "p2/4.png")
    want = held(whole)
    shutil.rmtree(whole)
    facts, _ = start(inputs, whole)
    assert held(whole) == want
    assert [row["dropped"].get("withdrawn", 0) for row in facts["sources"]] == [0, 2]


def test_single_images_leave_the_others_of_the_patient(whole):
    name = lines(whole)[0]["id"]
    outcome = take(whole, name)
    assert (outcome.images, outcome.others) == (1, 2) and name not in held(whole)
    card = card_of(whole)["sources"][0]
    assert (card["kept"], card["patients"]) == (8, 3)
    take(whole, *(row["id"].split("/")[1] for row in lines(whole)[:2]))
    assert card_of(whole)["sources"][0]["patients"] == 2


def test_the_card_still_says_that_patients_were_too_few(here, tmp_path):
    for number in range(40):
        save(tmp_path / "root", f"p{number % 2}/{number}.png", picture(number))
    start([source(tmp_path / "root")], tmp_path / "out")
    (before,) = hints(card_of(tmp_path / "out"))
    assert "split by file, so that a patient may be on both sides" in before
    take(tmp_path / "out", lines(tmp_path / "out")[0]["id"])
    (after,) = hints(card_of(tmp_path / "out"))
    assert after == before.replace("split by file", "split by study or file")


def test_the_card_still_says_that_nothing_names_the_patients(here, tmp_path):
    """After one withdrawal and after a second, in what is said and in the page."""
    for number in range(60):
        save(tmp_path / "root", f"{number:02d}.png", picture(number))
    out = tmp_path / "out"
    start([source(tmp_path / "root")], out)
    (before,) = hints(card_of(out))
    assert "nothing names the patients of 60 files; each counts as one" in before
    for _ in range(2):
        take(out, lines(out)[0]["id"])
        (after,) = hints(card_of(out))
        assert after == before.replace("60 files", "some files")
        assert "nothing names the patients of some files" in " ".join((out / "card.html").read_text().split())
    assert sum(row["images"]["train"] + row["images"]["val"] for row in card_of(out)["split"]) == 58


def test_prepare_does_not_bring_the_patient_back(whole, inputs):
    before = ShardDataset(whole).fingerprint
    take(whole, "MRN-2")
    want, manifest = held(whole), (whole / "manifest.json").read_bytes()
    start(inputs, whole)
    assert (whole / "manifest.json").read_bytes() == manifest
    shutil.rmtree(whole)  # and when the set is made anew
    facts, _ = start(inputs, whole)
    assert held(whole) == want and verify(whole) == []
    assert facts["sources"][0]["dropped"] == {"withdrawn": 3}
    assert any(note.startswith("3 images are left out: they were withdrawn") for note in notes(facts))
    assert [entry.images for entry in ShardDataset(whole).withdrawn_since(before)] == [3]
    assert card_of(whole)["withdrawn"][0]["images"] == 3
    take(whole, "MRN-3")  # goes on from there
    assert verify(whole) == [] and len(held(whole)) == len(want) - 3


KILL_AT = ("fsync", "replace", "link", "unlink", "rmdir")


def killed_after(count, out, texts):
    """Whether a process that withdraws was killed, at its `count`-th call of KILL_AT."""
    return killed_at(count, KILL_AT, lambda: take(out, *texts))


@pytest.mark.slow
def test_killed_at_every_step(whole, tmp_path):
    """After each kill the set is the old or the new one; the same command finishes, with nothing left over."""
    private_folder(whole).joinpath("chunks").mkdir()  # of a prepare that was killed at its end
    (private_folder(whole) / "chunks" / "000-000000.bin").write_bytes(b"pixels")
    done = tmp_path / "done"
    shutil.copytree(whole, done)
    shutil.copytree(private_folder(whole), private_folder(done))
    old = held(whole)
    take(done, "MRN-2", "p4")
    new, names = held(done), {str(p.relative_to(tmp_path)) for p in private_folder(done).rglob("*")}
    step, dead, seen = 0, True, set()
    while dead:
        out = tmp_path / "set" / "done"
        shutil.copytree(whole, out)
        shutil.copytree(private_folder(whole), private_folder(out))
        dead = killed_after(step, out, ["MRN-2", "p4"])
        assert held(out) in (old, new) and [one for one in verify(out) if "interrupted" not in one] == []
        seen.add(len(held(out)))
        take(out, "MRN-2", "p4")
        assert held(out) == new and verify(out) == [] and len(ShardDataset(out).withdrawals) == 1
        assert {str(p.relative_to(tmp_path / "set")) for p in private_folder(out).rglob("*")} == names
        assert len(open(private_folder(out) / "withdrawn.jsonl").readlines()) == 1
        left = everything(out)
        assert not any(old[name] in left for name in old.keys() - new.keys())
        shutil.rmtree(tmp_path / "set")
        step += 1 + step // 12
    assert step > 20 and seen == {len(old), len(new)}


def test_the_same_again_changes_nothing(whole):
    first = take(whole, "MRN-2")
    again = take(whole, "MRN-2")
    assert (again.images, again.after, len(again.earlier)) == (0, first.after, 1) and not again.finished


def test_finishing_without_a_name(whole, monkeypatch):
    with pytest.raises(withdraw.Impossible, match="no interrupted withdrawal to complete"):
        take(whole)
    with monkeypatch.context() as patch:
        patch.setattr(withdraw, "_clear", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take(whole, "MRN-2")
    assert take(whole).finished
    assert not any('"f2"' in path.read_text() for path in (private_folder(whole) / "ids").iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "nobody",
            "got nobody, searched among ids of images, units and patient groups, PatientIDs, folders .* of ct, p",
        ),
        ("", "expected an id, a patient or a path"),
    ],
)
def test_names_that_lead_to_nothing(text, message, whole):
    before = everything(whole)
    with pytest.raises(ValueError, match=message):
        take(whole, "MRN-2", text)
    assert everything(whole) == before


def test_all_of_a_set_is_not_withdrawn(whole):
    before = everything(whole)
    groups = {row["group"] for row in lines(whole)}
    with pytest.raises(withdraw.Impossible, match="got all 18"):
        take(whole, *groups)
    assert everything(whole) == before


def test_two_at_once(whole):
    descriptor = os.open(whole, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="another process is withdrawing"):
            take(whole, "MRN-2")
    finally:
        os.close(descriptor)
    assert take(whole, "MRN-2").images == 3


def test_a_set_that_was_given_away_alone(whole):
    row = lines(whole)[0]
    shutil.rmtree(private_folder(whole))
    with pytest.raises(withdraw.Impossible, match="only the private folder knows patients and paths"):
        take(whole, "MRN-2")
    assert take(whole, row["group"]).images == 3 and verify(whole) == []
    assert not private_folder(whole).exists()


def test_a_set_of_an_earlier_version(whole):
    """It does not know copies, and says so; the rest is as ever."""
    make_older(whole)
    outcome = take(whole, "MRN-2", "p0")
    assert outcome.images == 5 and not outcome.knows_copies and verify(whole) == []
    with pytest.raises(withdraw.Impossible, match="left out as copies .* an earlier version made it"):
        take(whole, "p4/copy.png")


def test_a_set_of_colour_pictures(here, tmp_path):
    for number in range(4):
        colour = np.stack([picture(3 * number + c) for c in range(3)], axis=2)
        (tmp_path / "root" / f"p{number}").mkdir(parents=True)
        Image.fromarray(colour).save(tmp_path / "root" / f"p{number}" / "a.png")
    start([source(tmp_path / "root")], tmp_path / "out")
    take(tmp_path / "out", "p1")
    (row,) = card_of(tmp_path / "out")["modalities"]
    pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in held(tmp_path / "out").values()]
    assert row["histogram"] == np.bincount(np.concatenate(pixels).ravel(), minlength=256).tolist()
