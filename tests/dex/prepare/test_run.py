"""`dex.prepare.run` on small real files; most tests work in this process, those of processes are in test_workers.py
and tests/dex/test_cli_data.py."""

import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import stat
import sys
import textwrap

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset

from dex.data import ShardDataset, verify
from dex.prepare import chunks, discover, filters, join, readers, scan, summary, workers
from dex.prepare import run as prepare
from dex.prepare.ids import split_of
from dex.prepare.run import Failed, Options
from dex.prepare.sources import Source
from dex.prepare.summary import Progress, notes, table

SETTINGS = chunks.Settings(size=64, encoding="png")
SALT = bytes(range(32))


@pytest.fixture
def here(inline_workers, monkeypatch):
    """Work in this process, four units to a chunk."""
    monkeypatch.setattr(discover, "CHUNK_UNITS", 4)


def picture(seed, side=64):
    """uint8 [side, side]: blobs on a slope, no two seeds alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    image = 20 + 30 * x
    for _ in range(6):
        cy, cx, r = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.3)
        image = image + rng.uniform(20, 60) * ((x - cx) ** 2 + (y - cy) ** 2 < r * r)
    return image.clip(0, 255).astype(np.uint8)


def save(root, name, image):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / name)


def save_volume(path, seed, frames=6, side=40):
    """CT numbers, right-front-up axes: frame k is picture(seed + k), 0..255 -> -200..310 HU."""
    values = np.stack([picture(seed + k, side).astype(np.int16) * 2 - 200 for k in range(frames)], axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


def save_dicom(path, image, **tags):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(path)])
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(path), "series"])
    data.Modality, data.PhotometricInterpretation, data.SamplesPerPixel = "US", "MONOCHROME2", 1
    data.Rows, data.Columns = image.shape
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.PixelData = image.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def source(root, name="pictures", modality="X-ray", **fields):
    rule = {"CT": "ct"}.get(modality, "display")
    return Source(
        **{"name": name, "modality": modality, "normalisation": rule, "files": ("**/*",), **fields, "root": str(root)}
    )


@pytest.fixture
def two(tmp_path):
    """14 pictures of 7 patients, and two CT volumes of one each."""
    for i in range(14):
        save(tmp_path / "pictures", f"p{i // 2}/{i:02d}.png", picture(i))
    for v in range(2):
        save_volume(tmp_path / "volumes" / f"v{v}" / "ct.nii.gz", 100 + 10 * v)
    return [source(tmp_path / "pictures"), source(tmp_path / "volumes", "volumes", "CT")]


def start(sources, out, salt=SALT, **options):
    private = prepare.private_folder(out)
    if salt is not None and not private.exists():
        private.mkdir(parents=True)
        (private / "salt").write_bytes(salt)
    said = []
    run = prepare.prepare(sources, Options(out, **{"settings": SETTINGS, **options}), said.append)
    facts = run.run(Progress())
    return facts, said


def digest(out):
    return hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()


def lines(out):
    rows = []
    for path in sorted(out.glob("*.index.jsonl")):
        rows += map(json.loads, path.read_text().splitlines())
    return rows


def test_pixels_ids_splits_and_facts(here, two, tmp_path):
    out = tmp_path / "out"
    facts, _ = start(two, out)
    assert verify(out) == []
    dataset = ShardDataset(out)
    rows = lines(out)
    assert len(dataset) == len(rows) == facts["images"] == 14 + 12
    assert dataset.modality_counts() == {"CT": 12, "X-ray": 14}

    # a 64 x 64 picture comes through unchanged, in the order of the files' names; a volume is clipped and scaled
    for i in range(14):
        assert np.array_equal(dataset[i].image.numpy(), np.repeat(picture(i)[None], 3, 0))
    assert [row["id"].split("/")[0] for row in rows] == ["pictures"] * 14 + ["volumes"] * 12
    assert all(len(row["id"].split("/")[1]) == 32 for row in rows) and len({row["id"] for row in rows}) == 26
    groups = [row["group"] for row in rows]
    assert groups[:14] == [g for g in groups[:14:2] for _ in range(2)] and len(set(groups)) == 7 + 2
    by_group = {}
    for row in rows:
        by_group.setdefault(row["group"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in by_group.values())

    pictures, volumes = facts["sources"]
    assert (
        pictures
        | {"name": "pictures", "units": 14, "seen": 14, "kept": 14, "dropped": {}, "refused": {}, "patients": 7}
        == pictures
    )
    assert volumes["units"] == 2 and volumes["seen"] == volumes["kept"] == 12 and volumes["patients"] == 2
    assert facts["train"] == sum(row["split"] == "train" for row in rows) == 26 - facts["val"]
    card = json.loads((out / "card.json").read_text())
    assert {key: card[key] for key in facts} == json.loads(json.dumps(facts))
    want = sum(np.bincount(picture(i).ravel(), minlength=256) for i in range(14))
    assert facts["modalities"][1]["name"] == "X-ray" and facts["modalities"][1]["histogram"] == want.tolist()
    assert b"<html" in (out / "card.html").read_bytes()


def test_private_folder(here, two, tmp_path):
    out = tmp_path / "out"
    start(two, out, salt=None)
    private = tmp_path / "out.private"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700 and stat.S_IMODE(out.stat().st_mode) & 0o500 == 0o500
    ids = {}
    for path in (private / "ids").iterdir():
        ids |= {row["id"]: (row["path"], row["label"]) for row in map(json.loads, path.read_text().splitlines())}
    assert {row["id"] for row in lines(out)} == set(ids)
    assert ("p0/00.png", "image") in ids.values() and ("v1/ct.nii.gz", "axial-005") in ids.values()
    assert not (private / "chunks").exists() and [
        json.loads(line)["event"] for line in open(private / "log.jsonl")
    ] == [
        "started",
        "done",
    ]
    other, _ = tmp_path / "other", start(two, tmp_path / "other", salt=None)
    assert digest(other) != digest(out)  # another salt


def test_the_same_bytes_from_any_parts_in_any_order(here, two, tmp_path):
    want = start(two, tmp_path / "whole")[0] and digest(tmp_path / "whole")
    for number, order in enumerate(itertools.permutations(range(3))):
        out = tmp_path / f"o{number}"
        for done, part in enumerate(order):
            facts, said = start(two[:: 1 if done % 2 else -1], out, shard=(part, 3))
            assert (facts is None) == (done < 2) and out.exists() == (done == 2)
            assert done == 2 or "are left to other parts" in said[-1]
        assert digest(out) == want
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    for shard in ((0, 3), (0, 1)):  # started again when all is done
        assert start(two, out, shard=shard)[0]["images"] == 26
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


KILL_AT = ("fsync", "replace", "rename", "ftruncate", "mkdir", "unlink", "open")


def killed_after(count, sources, out):
    """Whether a process that starts a run is dead before its end: killed at its `count`-th call of KILL_AT."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    try:
        calls = itertools.count()

        def call(real, *args, **kwargs):
            if next(calls) == count:
                os.kill(os.getpid(), 9)
            return real(*args, **kwargs)

        for name in KILL_AT:
            setattr(os, name, functools.partial(call, getattr(os, name)))
        start(sources, out)
    finally:
        os._exit(0)


def test_killed_at_every_step_of_the_way(here, two, tmp_path):
    """After a kill nothing, or all of it, is in OUT; the next start ends in the same bytes, with nothing left over."""
    start(two, tmp_path / "whole")
    want, first, n = digest(tmp_path / "whole"), set(map(str, (tmp_path / "whole.private").rglob("*"))), 0
    step = 0
    while True:
        out = tmp_path / "out"
        dead = killed_after(step, two, out)
        assert not out.exists() or digest(out) == want
        start(two, out)
        assert digest(out) == want and verify(out) == []
        left = {str(path).replace("out.private", "whole.private") for path in (tmp_path / "out.private").rglob("*")}
        assert left == first
        shutil.rmtree(out)
        shutil.rmtree(tmp_path / "out.private")
        if not dead:
            break
        n += 1
        step += 1 + step // 8
    assert n > 15


def test_killed_again_and_again(here, two, tmp_path):
    """Each start gets a little further; none loses what was done before."""
    start(two, tmp_path / "whole")
    out, done, starts = tmp_path / "out", 0, 0
    while killed_after(45, two, out):
        starts += 1
        now = len(list((tmp_path / "out.private" / "chunks").glob("*.jsonl")))
        assert (now >= done or out.exists()) and starts < 40  # with the set there they are cleared away
        done = now
    assert starts > 1 and digest(out) == digest(tmp_path / "whole")


@pytest.mark.parametrize("what", ["touched", "grown", "added", "removed"])
def test_an_input_that_changed_is_refused(what, here, two, tmp_path):
    out, path = tmp_path / "out", tmp_path / "pictures" / "p0" / "00.png"
    start(two, out, shard=(0, 2))
    if what == "touched":
        os.utime(path, ns=(0, 1))
    elif what == "grown":
        with open(path, "ab") as file:
            file.write(b"x")
    elif what == "added":
        save(tmp_path / "pictures", "p0/new.png", picture(99))
    else:
        path.unlink()
    for shard in ((0, 2), (1, 2)):
        with pytest.raises(ValueError, match="pictures: the files have changed since the first start") as error:
            start(two, out, shard=shard)
    assert "00.png" not in str(error.value) and not out.exists()


def test_a_file_that_changes_while_it_waits_is_refused(here, two, tmp_path):
    run = prepare.prepare(two, Options(tmp_path / "out", SETTINGS), str)
    os.utime(tmp_path / "pictures" / "p6" / "13.png", ns=(0, 1))
    with pytest.raises(Failed, match="pictures: a file is not what it was") as error:
        run.run(Progress())
    assert "13.png" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": dataclasses.replace(SETTINGS, size=32)}, "begun with size 64, now it is 32"),
        ({"settings": dataclasses.replace(SETTINGS, bits=16)}, "begun with bits 8, now it is 16"),
        ({"sources": slice(1)}, "begun with the sources pictures, volumes; got pictures"),
        ({"description": {"frame_stride": 2}}, "begun with another description of pictures"),
    ],
)
def test_an_output_of_another_run_is_refused(change, message, here, two, tmp_path):
    start(two, tmp_path / "out", shard=(0, 2))
    sources = two[change.pop("sources", slice(None))]
    sources = [dataclasses.replace(sources[0], **change.pop("description", {})), *sources[1:]]
    with pytest.raises(ValueError, match=message):
        start(sources, tmp_path / "out", **change)


def test_other_versions_of_the_decoders_are_refused(here, two, tmp_path, monkeypatch):
    start(two, tmp_path / "out", shard=(0, 2))
    monkeypatch.setattr(prepare, "_version", lambda name: "0.1")
    with pytest.raises(ValueError, match="begun with dexkernels .*, now it is 0.1"):
        start(two, tmp_path / "out")


def test_the_same_part_twice_at_once_is_refused(here, two, tmp_path):
    first = prepare.prepare(two, Options(tmp_path / "out", SETTINGS, shard=(1, 2)), str)
    with pytest.raises(BlockingIOError, match="part 1/2 of .* is being prepared by another process"):
        prepare.prepare(two, Options(tmp_path / "out", SETTINGS, shard=(1, 2)), str)
    assert start(two, tmp_path / "out", shard=(0, 2))[0] is None
    assert first.run(Progress())["images"] == 26


def test_another_split_into_parts_at_once_is_refused_at_the_chunk(here, two, tmp_path):
    run = prepare.prepare(two, Options(tmp_path / "out", SETTINGS), str)
    partial = tmp_path / "out.private" / "chunks" / "000-000002.bin.partial"
    with open(partial, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # so that only an exclusive one is refused
        with pytest.raises(Failed, match="another process prepares the same files"):
            run.run(Progress())
    assert start(two, tmp_path / "out")[0]["images"] == 26


def test_a_salt_that_is_lost_half_way_is_not_made_anew(here, two, tmp_path):
    """Ids of two salts would part a patient's images."""
    out, salt = tmp_path / "out", tmp_path / "out.private" / "salt"
    start(two, out, shard=(0, 2))
    salt.rename(tmp_path / "kept")
    with pytest.raises(ValueError, match="out: the salt in .* is gone"):
        start(two, out, shard=(1, 2))
    assert not salt.exists()
    (tmp_path / "kept").rename(salt)
    facts, _ = start(two, out, shard=(1, 2))
    salt.unlink()
    assert start(two, out)[0]["images"] == facts["images"]  # a finished set needs none


def test_a_full_disk_keeps_what_is_done(here, two, tmp_path, monkeypatch):
    start(two, tmp_path / "whole")
    real, written = chunks._Files._write, []

    def write(self, number, data):
        written.append(len(data))
        if len(written) > 20:
            raise chunks.CannotWrite(OSError(errno.ENOSPC, "No space left on device"))
        real(self, number, data)

    with monkeypatch.context() as patch:
        patch.setattr(chunks._Files, "_write", write)
        with pytest.raises(Failed, match="No space left on device: .* start the same command again"):
            start(two, tmp_path / "out")
    kept = sorted(path.name for path in (tmp_path / "out.private" / "chunks").iterdir())
    assert kept == ["000-000000.bin", "000-000000.jsonl"]  # and no partial file holds room

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:  # while the set is written
        patch.setattr("dex.data.shard_writer.ShardWriter._write", full)
        with pytest.raises(Failed, match="No space left on device"):
            start(two, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    start(two, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


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


def test_every_slice_and_file_is_accounted_for(here, tmp_path):
    root = tmp_path / "root"
    for i in range(4):
        save(root, f"a/{i}.png", picture(i))
    save(root, "b/same.png", picture(0))
    near = picture(1).copy()
    near[:2, :2] += 3
    save(root, "b/near.png", near)
    save(root, "b/blank.png", np.full((64, 64), 90, np.uint8))
    dot = np.zeros((64, 64), np.uint8)
    dot[20:30, 20:30] = 255
    save(root, "b/dot.png", dot)
    save(root, "b/small.png", picture(7, 20))
    (root / "b/broken.png").write_bytes((root / "b/near.png").read_bytes()[:200])
    (root / "b/empty.png").write_bytes(b"")
    save_dicom(root / "us/1.dcm", picture(8), BurnedInAnnotation="YES", PatientID="77-A")
    save_dicom(root / "us/2.dcm", picture(9), BurnedInAnnotation="NO", PatientID="77-A")
    facts, _ = start([source(root)], tmp_path / "out")
    (one,) = facts["sources"]
    assert one["dropped"] == {
        "foreground": 1,
        "blank": 1,
        "too small": 1,
        "exact duplicate": 1,
        "near duplicate": 1,
    }
    assert one["refused"] == {"unreadable": 2, "burned-in": 1} and one["burned_in_declared"] == 1
    assert one["units"] == 12 and one["seen"] == 10 and one["kept"] == 5
    assert facts["duplicates"] == [{"source": "pictures", "of": "pictures", "exact": 1, "near": 1}]
    log = [json.loads(line) for line in open(tmp_path / "out.private" / "log.jsonl")]
    assert sorted(row["reason"] for row in log if row["event"] == "refused") == [
        "burned-in",
        "unreadable",
        "unreadable",
    ]
    facts, _ = start([source(root)], tmp_path / "taken", settings=dataclasses.replace(SETTINGS, allow_burned_in=True))
    assert facts["sources"][0]["kept"] == 6 and facts["sources"][0]["refused"] == {"unreadable": 2}
    assert "near duplicate 1" in table(facts) and "unreadable 2" in table(facts)


def test_the_private_folder_says_which_file_of_a_folder_was_refused(here, tmp_path):
    root = tmp_path / "root"
    save_dicom(root / "us/1.dcm", picture(8), PatientID="77-A")
    (root / "us/broken.dcm").write_bytes(b"no image")
    (root / "us/short.dcm").write_bytes((root / "us/1.dcm").read_bytes()[:140])
    facts, _ = start([source(root)], tmp_path / "out")
    assert facts["sources"][0]["refused"] == {"no image": 1, "unreadable": 1}
    (ids,) = (tmp_path / "out.private" / "ids").iterdir()
    refused = [row for row in map(json.loads, ids.read_text().splitlines()) if "refused" in row]
    assert {row["file"]: row["refused"] for row in refused} == {"broken.dcm": "unreadable", "short.dcm": "no image"}
    assert {row["path"] for row in refused} == {"us"}
    assert "broken.dcm" not in (tmp_path / "out.private" / "log.jsonl").read_text()


def test_volumes_whose_data_are_in_a_file_of_their_own(here, tmp_path):
    values = [np.stack([picture(n + k, 40).astype(np.int16) * 2 - 200 for k in range(3)]) for n in (70, 80, 90)]
    for number, (name, patient) in enumerate((("a", "p1"), ("b", "p2"))):
        folder = tmp_path / "root" / patient
        folder.mkdir(parents=True)
        head = f"NDims = 3\nDimSize = 40 40 3\nElementType = MET_SHORT\nElementDataFile = {name}.raw\n"
        (folder / f"{name}.mhd").write_text(head)
        (folder / f"{name}.raw").write_bytes(values[number].astype("<i2").tobytes())
    nibabel.save(nibabel.Nifti1Pair(values[2].transpose(2, 1, 0), np.diag([-1, -1, 1, 1])), folder / "c.hdr")
    facts, said = start([source(tmp_path / "root", modality="CT")], tmp_path / "out")
    assert facts["images"] == 9 and facts["sources"][0]["refused"] == {} and facts["sources"][0]["patients"] == 2
    assert not any("passed over" in line for line in said) and "6 files in 3 units" in said[0]
    dataset = ShardDataset(tmp_path / "out")
    for number in range(9):  # identity of MHD is left, posterior, superior, as of the turned NIfTI: 40 pixels become 64
        want = Image.fromarray(picture((70, 80, 90)[number // 3] + number % 3, 40)).resize((64, 64), Image.BILINEAR)
        got = dataset[number].image.numpy()[0].astype(float)
        assert np.corrcoef(np.asarray(want).ravel(), got.ravel())[0, 1] > 0.98
    os.utime(folder / "b.raw", ns=(0, 1))
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ValueError, match="the files have changed"):
        start([source(tmp_path / "root", modality="CT")], tmp_path / "out")


def test_a_folder_has_time_for_each_of_its_files(here, tmp_path, monkeypatch):
    given = []

    class Report:
        begun = 0

        def begin(self, unit, silence, total):
            given.append((silence, total))

        def beat(self, done=None):
            pass

        save = beat

    def inline(work, jobs, **_):
        for job in jobs:
            yield job, work(workers.Task(job, None, {}), Report())

    monkeypatch.setattr(workers, "run", inline)
    save_series(tmp_path / "root" / "a", 1, 5, iter(f"{k}.dcm" for k in range(5)))
    save_series(tmp_path / "root" / "b", 2, 1, iter(["0.dcm"]))
    with open(tmp_path / "root" / "b" / "0.dcm", "ab") as file:
        file.write(bytes(2**20))
    start([source(tmp_path / "root", modality="CT")], tmp_path / "out", limits=readers.Limits(seconds=4.0))
    assert [silence for silence, _ in given] == [4.0, 4.0]
    assert 20.0 < given[0][1] < 21.0 and 8.0 < given[1][1] < 8.1  # five files of 9 kB, one of a MiB


def test_a_long_unit_says_how_far_it_is(here, two, tmp_path, monkeypatch, capsys):
    """Lines come while its slices are made, with their number and the rate, though no unit is done."""
    seen = []

    class Report:
        begun = 0

        def begin(self, *_):
            pass

        def save(self, state):
            pass

        def beat(self, done=None):
            seen.append(done)

    def inline(work, jobs, *, on_beat, **_):
        for job in jobs:
            result = work(workers.Task(job, None, {}), Report())
            on_beat(job, 1234)
            yield job, result

    monkeypatch.setattr(workers, "run", inline)
    monkeypatch.setattr(summary, "_EVERY", 0.0)
    start(two[1:], tmp_path / "out")  # two volumes of six slices
    assert [done for done in seen if done is not None] == [1, 2, 3, 4, 5, 6] * 2
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "under way" in line]
    assert re.match(r"units 0/2  kept 0  dropped 0  under way 1,234  [\d.]+ slices/s  left unknown", line)
    assert not line.endswith(" 0.0 slices/s  left unknown")


def test_duplicates_over_sources_keep_the_first_in_name_order(here, tmp_path):
    for i in range(3):
        save(tmp_path / "b", f"{i}.png", picture(i))
        save(tmp_path / "a", f"{i}.png", picture(i + 1))
    facts, _ = start([source(tmp_path / "b", "b"), source(tmp_path / "a", "a")], tmp_path / "out")
    assert [(one["name"], one["kept"]) for one in facts["sources"]] == [("a", 3), ("b", 1)]
    assert facts["duplicates"] == [{"source": "b", "of": "a", "exact": 2, "near": 0}]


def test_ct_as_pictures(here, tmp_path):
    """Windowed by whoever made them; sixteen bits could mean anything, and are refused."""
    save(tmp_path / "root", "a/1.png", picture(1))
    save(tmp_path / "root", "a/2.png", picture(2).astype(np.uint16) * 100)
    facts, _ = start([source(tmp_path / "root", modality="CT")], tmp_path / "out")
    assert facts["images"] == 1 and facts["sources"][0]["refused"] == {"inconsistent": 1}
    assert np.array_equal(ShardDataset(tmp_path / "out")[0].image.numpy()[0], picture(1))


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
        if split_of(f"{name}/1.png", 0.05) == "val":
            break
    one = source(tmp_path / "root", name=name, public=True)
    facts, _ = start([one], tmp_path / "out")
    assert (facts["train"], facts["val"]) == (1, 0)
    facts, _ = start([dataclasses.replace(one, split="val")], tmp_path / "asked")
    assert (facts["train"], facts["val"]) == (0, 1) and any("to train on" in note for note in notes(facts))


def save_series(root, patient, count, names, **tags):
    """CT slices at 2 mm; that at k is picture(100 * patient + k), 0..255 -> -200..310 HU."""
    for k in range(count):
        values = picture(100 * patient + k).astype(np.int16) * 2 - 200
        place = {"ImagePositionPatient": [0, 0, 2 * k], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
        scale = {"RescaleSlope": 1, "RescaleIntercept": 0, "PixelSpacing": [1, 1], "Modality": "CT"}
        deep = {"BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1}
        identity = {"SeriesInstanceUID": f"1.2.{patient}", "PatientID": f"MRN-{patient}"}
        save_dicom(root / next(names), values, **place, **scale, **deep, **identity, **tags)


@pytest.fixture
def flat(tmp_path, here, monkeypatch):
    """One folder with the slices of three patients in turn, a file without header and one of another folder's."""
    monkeypatch.setattr(discover, "LARGE", 12)
    monkeypatch.setattr(scan, "BLOCK", 5)
    root = tmp_path / "flat"
    for patient in range(3):
        names = (f"all/{number:03d}.dcm" for number in range(patient, 100, 3))
        save_series(root, patient, 6, names)
    (root / "all" / "900.dcm").write_bytes(b"no DICOM at all")
    save_series(root, 3, 1, iter(["other/1.dcm"]))
    return source(root, "flat", "CT")


def test_a_large_folder_is_parted_into_series(flat, tmp_path):
    out = tmp_path / "out"
    facts, said = start([flat], out)
    (one,) = facts["sources"]
    assert (one["units"], one["seen"], one["kept"], one["patients"]) == (5, 19, 19, 4)
    assert one["refused"] == {"unreadable": 1} and "flat: 20 files in 5 units, " in said[0]
    rows, dataset = lines(out), ShardDataset(out)
    for patient in range(3):  # by series, in the order of space
        for k in range(6):
            want = ((picture(100 * patient + k) * 2.0).clip(0, 600) / 600 * 255).round()
            assert np.abs(dataset[6 * patient + k].image.numpy()[0] - want).max() <= 1
        assert len({row["group"] for row in rows[6 * patient : 6 * patient + 6]}) == 1
    found = {}
    for text in sorted((tmp_path / "out.private" / "ids").iterdir()):
        for row in map(json.loads, text.read_text().splitlines()):
            found.setdefault(row["path"], []).append(row.get("file") or row["label"])
    assert list(found) == ["all/000.dcm", "all/001.dcm", "all/002.dcm", "all/900.dcm", "other"]
    assert found["all/001.dcm"] == [f"axial-{k:03d}" for k in range(6)] and found["all/900.dcm"] == ["900.dcm"]
    assert not (tmp_path / "out.private" / "headers").exists()


def test_parts_and_later_starts_do_not_read_the_headers_again(flat, tmp_path, monkeypatch):
    want = start([flat], tmp_path / "whole")[0] and digest(tmp_path / "whole")
    read, real = [], readers.series_of

    def series_of(path, format, limits):
        read.append(path.name)
        if len(read) == 8:  # the second block of five is not finished
            raise KeyboardInterrupt
        return real(path, format, limits)

    monkeypatch.setattr(readers, "series_of", series_of)
    with pytest.raises(KeyboardInterrupt):
        start([flat], tmp_path / "out", shard=(1, 2))
    files = [f"{number:03d}.dcm" for number in range(18)] + ["900.dcm"]
    assert read == files[10:18]  # the second machine begins in the middle
    (block,) = (tmp_path / "out.private" / "headers" / "flat").iterdir()
    block.with_suffix(".tmp").write_bytes(block.read_bytes()[:9])
    assert start([flat], tmp_path / "out", shard=(0, 2))[0] is None
    assert read[8:] == files[:10] + files[15:]
    start([flat], tmp_path / "out", shard=(1, 2))
    start([flat], tmp_path / "out")
    assert digest(tmp_path / "out") == want and len(read) == 8 + 14


def test_a_damaged_record_of_headers_is_made_anew(flat, tmp_path, monkeypatch):
    want = start([flat], tmp_path / "whole")[0] and digest(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "parted", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start([flat], tmp_path / "out")
    blocks = sorted((tmp_path / "out.private" / "headers" / "flat").iterdir())
    assert len(blocks) == 4
    for block, data in zip(blocks, (b"", b"[]", b"[1", blocks[3].read_bytes()), strict=True):
        block.write_bytes(data)
    start([flat], tmp_path / "out")
    assert digest(tmp_path / "out") == want


def test_unknown_patients_of_a_flat_folder_stay_together(flat, tmp_path):
    """Nobody knows whose the series are, so they may be one patient's."""
    root = tmp_path / "unknown"
    for series in range(3):
        save_series(root, series, 5, (f"{number:03d}.dcm" for number in range(series, 100, 3)))
    for path in root.iterdir():
        data = pydicom.dcmread(path)
        data.PatientID = "ANONYMOUS"
        data.save_as(path)
    start([source(root, "unknown", "CT")], tmp_path / "out")
    assert len(lines(tmp_path / "out")) == 15 and len({row["group"] for row in lines(tmp_path / "out")}) == 1


def test_a_header_that_crashes_or_hangs_costs_one_file(tmp_path, monkeypatch):
    """Real workers, as below; the file comes to its readers once more."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "misheader.py").write_text(textwrap.dedent(MISHEAD))
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.delitem(sys.modules, "misheader", raising=False)
    import misheader

    monkeypatch.setattr(discover, "LARGE", 12)
    names = iter(["hang.dcm", *(f"{number:03d}.dcm" for number in range(13)), "crash.dcm"])
    save_series(tmp_path / "root", 1, 15, names)
    with monkeypatch.context() as patch:
        patch.setattr(scan, "work", misheader.work)
        facts, said = start(
            [source(tmp_path / "root", modality="CT")], tmp_path / "out", limits=readers.Limits(seconds=3.0)
        )
    (one,) = facts["sources"]
    assert (one["units"], one["kept"], one["refused"]) == (2, 15, {})
    (ids,) = (tmp_path / "out.private" / "ids").iterdir()
    found = [json.loads(line)["path"] for line in ids.read_text().splitlines()]
    assert found == ["000.dcm"] * 13 + ["crash.dcm"] * 2


def test_too_many_unreadable_files_stop_the_run(here, tmp_path):
    root = tmp_path / "root"
    for i in range(8):
        save(root, f"a/{i}.png", picture(i))
    for i in range(11):
        (root / "a" / f"Jane{i:02d}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    for i in range(8):
        save(root, f"z/{i}.png", picture(20 + i))
    with pytest.raises(Failed, match="11 of 20 files or series cannot be read, more than 10: ") as error:
        start([source(root)], tmp_path / "out")
    assert str(error.value).count(" unreadable") == 11 and "Jane" not in str(error.value)
    done = sorted((tmp_path / "out.private" / "chunks").iterdir())
    with pytest.raises(Failed, match="11 of 20 files or series cannot be read"):  # nor does another start go on
        start([source(root)], tmp_path / "out")
    assert not (tmp_path / "out").exists() and sorted((tmp_path / "out.private" / "chunks").iterdir()) == done
    with pytest.raises(Failed, match="more than 3"):
        start([source(root)], tmp_path / "out", max_unreadable=3)
    facts, _ = start([source(root)], tmp_path / "out", max_unreadable=11)
    assert facts["images"] == 16 and facts["sources"][0]["refused"] == {"unreadable": 11}


def test_nothing_stays_of_a_stack_that_fails_half_way(here, two, tmp_path, monkeypatch):
    real = chunks.slices
    left = iter([2])  # slices of the first volume

    def failing(stack, *arguments):
        slices = real(stack, *arguments)
        if stack.volume and (count := next(left, 0)):
            yield from itertools.islice(slices, count)
            raise readers.Refused("not finite", "here")
        yield from slices

    monkeypatch.setattr(chunks, "slices", failing)
    facts, _ = start(two, tmp_path / "out")
    volumes = facts["sources"][1]
    assert volumes["refused"] == {"not finite": 1} and volumes["seen"] == volumes["kept"] == 6
    assert len(lines(tmp_path / "out")) == 14 + 6 and verify(tmp_path / "out") == []
    ids = [json.loads(text) for path in (tmp_path / "out.private" / "ids").iterdir() for text in open(path)]
    assert len(ids) == 14 + 6 + 1


def test_nothing_kept_says_why(here, tmp_path):
    save(tmp_path / "root", "a.png", np.full((64, 64), 90, np.uint8))
    with pytest.raises(Failed, match=r"no image was kept: 1 units, 1 slices seen; blank 1\. .*log\.jsonl"):
        start([source(tmp_path / "root")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_slices_across_thick_ones_lead_to_the_option(here, tmp_path):
    save_volume(tmp_path / "root" / "ct.nii.gz", 3)
    with pytest.raises(Failed, match="too small 40; of thick slices --planes stored"):
        start([source(tmp_path / "root", modality="CT", planes=("coronal",))], tmp_path / "none")
    facts, _ = start([source(tmp_path / "root", modality="CT", planes=("axial", "coronal"))], tmp_path / "out")
    assert facts["images"] == 6 and any(note.startswith("40 slices are too small") for note in notes(facts))
    facts, _ = start([source(tmp_path / "root", modality="CT")], tmp_path / "axial")
    assert not any("too small" in note for note in notes(facts))


def test_sixteen_bits(here, tmp_path):
    deep = (picture(1).astype(np.uint16) << 8) + 7
    save(tmp_path / "root", "a.png", deep)
    facts, _ = start([source(tmp_path / "root")], tmp_path / "out", settings=chunks.Settings(64, 16, "png"))
    assert facts["bits"] == 16
    image = Image.open(io.BytesIO(ShardDataset(tmp_path / "out").image_bytes(0)))
    low, high = np.percentile(deep, [1, 99])
    want = np.rint((deep.astype(np.float64).clip(low, high) - low) / (high - low) * 65535)
    assert image.mode.startswith("I;16") and np.abs(np.asarray(image).astype(int) - want).max() <= 1


MISBEHAVE = """
    import os, signal, time
    import numpy as np
    from dex.prepare import chunks
    from dex.prepare import readers

    real = readers.read
    heap = []  # what a library never gives back

    def read(files, format, **options):
        if "crash" in files[0].name:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in files[0].name:
            time.sleep(60)
        if "eat" in files[0].name:
            np.ones(2**40, np.uint8)
        if "grow" in files[0].name:
            try:
                heap.append(np.ones(400 * 2**20, np.uint8))
            except MemoryError:
                raise readers.Refused("too large") from None
        if "fault" in files[0].name:
            raise KeyError(files[0].name)
        if "slow" in files[0].name:
            for _ in range(40):  # for longer than the limit, but never silent for so long
                time.sleep(0.1)
                options["beat"]()
        if "late" in files[0].name:
            yield next(real(files, format, **options))
            raise readers.Refused("unreadable", "later")
        yield from real(files, format, **options)

    def work(task, report):
        readers.read = read
        return chunks.work(task, report)
"""


MISHEAD = """
    import os, signal, time
    from dex.prepare import readers
    from dex.prepare import scan

    real = readers.series_of

    def series_of(path, format, limits):
        if "crash" in path.name:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in path.name:
            time.sleep(60)
        return real(path, format, limits)

    def work(task, report):
        readers.series_of = series_of
        return scan.work(task, report)
"""


def test_a_reader_that_crashes_hangs_or_eats_memory_costs_one_unit(tmp_path, monkeypatch):
    """Real workers; what no file is known to do to a reader is done in its place."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "misreader.py").write_text(textwrap.dedent(MISBEHAVE))
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.delitem(sys.modules, "misreader", raising=False)
    import misreader

    for i, name in enumerate(["a", "crash", "c", "eat", "fault", "grow1", "grow2", "hang", "late", "slow"]):
        save(tmp_path / "root", f"{name}.png", picture(i))
    with open(tmp_path / "root" / "slow.png", "ab") as file:
        file.write(bytes(9 * 2**20))  # what it may take in all grows with its size
    with monkeypatch.context() as patch:
        patch.setattr(chunks, "work", misreader.work)
        facts, _ = start(
            [source(tmp_path / "root")], tmp_path / "out", limits=readers.Limits(seconds=3.0), max_unreadable=20
        )
    (one,) = facts["sources"]
    assert one["refused"] == {"crash": 1, "timeout": 1, "too large": 1, "unreadable": 2}
    assert one["units"] == 10 and one["seen"] == one["kept"] == 6
    dataset = ShardDataset(tmp_path / "out")
    for place, seed in enumerate([0, 2, 5, 6, 8, 9]):
        assert np.array_equal(dataset[place].image.numpy()[0], picture(seed))
    log = (tmp_path / "out.private" / "log.jsonl").read_text()
    assert "KeyError at misreader.py" in log and "fault.png" not in log


CANARIES = {
    "PatientName": "Canary^Name",
    "PatientID": "CANARY-ID-1",
    "PatientBirthDate": "19010203",
    "InstitutionName": "Canary Hospital",
    "StudyDescription": "canary study",
    "ImageComments": "canary comment",
    "AccessionNumber": "CANARYACC",
    "ReferringPhysicianName": "Canary^Doctor",
}


def test_no_patient_data_leaves_the_reader(here, tmp_path, capfd):
    root = tmp_path / "canaryroot"
    for i in range(6):
        save_dicom(root / "canaryfolder" / f"{i}" / f"canaryfile{i}.dcm", picture(i), **CANARIES)
    broken = root / "canaryfolder" / "9" / "canarybroken.dcm"
    save_dicom(broken, picture(9), **CANARIES)
    broken.write_bytes(broken.read_bytes()[:-3000])
    facts, said = start([source(root)], tmp_path / "out")
    assert facts["images"] == 6 and sum(facts["sources"][0]["refused"].values()) == 1
    texts = "\n".join([*said, table(facts), *notes(facts), *capfd.readouterr()]).encode()
    for path in (tmp_path / "out").rglob("*"):
        texts += path.read_bytes() if path.is_file() else b""
    texts += (tmp_path / "out.private" / "log.jsonl").read_bytes()
    for canary in (*CANARIES.values(), "canaryroot", "canaryfolder", "canaryfile", "canarybroken"):
        assert canary.lower().encode() not in texts.lower()
    assert b"canarybroken" not in texts and len(texts) > 10_000
    # and they can be found where they belong
    assert "canaryfolder" in "".join(path.read_text() for path in (tmp_path / "out.private" / "ids").iterdir())


def test_a_fault_of_our_own_shows_no_value(here, two, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("Jane Doe")

    monkeypatch.setattr(join, "_facts", fail)
    with pytest.raises(Failed, match="a fault in dex: KeyError at test_run.py:") as error:
        start(two, tmp_path / "out")
    assert "Jane" not in str(error.value) and error.value.__cause__ is None and error.value.__suppress_context__
    assert "Jane Doe" in (tmp_path / "out.private" / "log.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": chunks.Settings(size=8)}, "size: expected 32 to 4096"),
        ({"settings": chunks.Settings(bits=12)}, "bits: expected 8 or 16; got 12"),
        ({"settings": chunks.Settings(bits=16, encoding="jpg")}, "encoding: expected png for 16 bits"),
        ({"settings": chunks.Settings(encoding="gif")}, "encoding: expected jpg or png; got 'gif'"),
        ({"workers": 0}, "workers: expected at least 1; got 0"),
        ({"shard": (3, 3)}, "shard: expected i/n with 0 <= i < n; got 3/3"),
        ({"max_unreadable": -1}, "max-unreadable: expected at least 0; got -1"),
    ],
)
def test_wrong_options(options, message, two, tmp_path):
    with pytest.raises(ValueError, match=message):
        start(two, tmp_path / "out", salt=None, **options)
    assert not (tmp_path / "out.private").exists()


def test_an_out_that_holds_something_else_is_refused(two, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="out: expected a new or empty folder"):
        start(two, tmp_path / "out", salt=None)
    with pytest.raises(ValueError, match="out: expected a folder outside the root of pictures"):
        start(two, tmp_path / "pictures" / "set", salt=None)
    with pytest.raises(ValueError, match="sources of different names; 'pictures' comes 2 times"):
        start([two[0], two[0]], tmp_path / "new", salt=None)
    assert not (tmp_path / "out.private").exists() and not (tmp_path / "new.private").exists()


def test_counts_of_reasons_are_filters_own():
    assert set(chunks.UNREADABLE) <= set(readers.REASONS) and len(filters.DROPPED) == 5
