"""A run on small real files, mostly in this process: killed at any step it ends in the same bytes. Those of processes
are in test_workers.py and tests/dex/cli/test_prepare.py."""

import dataclasses
import errno
import fcntl
import itertools
import json
import os
import shutil
import stat

import numpy as np
import pytest
from killing import killed_at
from small_runs import SETTINGS, digest, lines, picture, save, source, start

from dex.data import ShardDataset, verify
from dex.prepare import chunk_files, chunks, join, readers
from dex.prepare import run as prepare
from dex.prepare.run import Failed, Options
from dex.prepare.summary import Progress


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
    return killed_at(count, KILL_AT, lambda: start(sources, out))


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
    while killed_after(52, two, out):
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
    with pytest.raises(Failed, match="pictures: a file has changed") as error:
        run.run(Progress())
    assert "13.png" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": dataclasses.replace(SETTINGS, size=32)}, "started with size 64, now it is 32"),
        ({"settings": dataclasses.replace(SETTINGS, bits=16)}, "started with bits 8, now it is 16"),
        ({"sources": slice(1)}, "started with the sources pictures, volumes, got pictures"),
        ({"description": {"frame_stride": 2}}, "started with another description of pictures"),
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
    with pytest.raises(ValueError, match="started with dexkernels .*, now it is 0.1"):
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
        with pytest.raises(Failed, match="another process is preparing the same files"):
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
    real, written = chunk_files.ChunkFiles._write, []

    def write(self, number, data):
        written.append(len(data))
        if len(written) > 20:
            raise chunk_files.CannotWrite(OSError(errno.ENOSPC, "No space left on device"))
        real(self, number, data)

    with monkeypatch.context() as patch:
        patch.setattr(chunk_files.ChunkFiles, "_write", write)
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
        ({"settings": chunks.Settings(bits=12)}, "bits: expected 8 or 16, got 12"),
        ({"settings": chunks.Settings(bits=16, encoding="jpg")}, "encoding: expected png for 16 bits"),
        ({"settings": chunks.Settings(encoding="gif")}, "encoding: expected jpg or png, got 'gif'"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"shard": (3, 3)}, "shard: expected i/n with 0 <= i < n, got 3/3"),
        ({"limits": readers.Limits.within(64)}, "memory: expected at least 128 MB, got 64"),
        ({"max_unreadable": -1}, "max-unreadable: expected at least 0, got -1"),
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
    with pytest.raises(ValueError, match="sources of different names, got 'pictures' 2 times"):
        start([two[0], two[0]], tmp_path / "new", salt=None)
    assert not (tmp_path / "out.private").exists() and not (tmp_path / "new.private").exists()
