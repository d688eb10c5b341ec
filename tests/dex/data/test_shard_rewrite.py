"""Samples out of a shard set: what is left fits its hashes, at whatever step the process is killed."""

import errno
import io
import json
import os
import shutil
import stat

import numpy as np
import pytest
from killing import killed_at
from PIL import Image

from dex.data import SampleError, ShardDataset, ShardWriter, shard_rewrite, verify
from dex.data.shard_format import read_manifest

DATE = "2026-01-02T03:04:05+00:00"


def encoded(seed):
    image = np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def write(tmp_path):
    """A set of 12 samples of four patients in three shards."""

    def call(name, without=frozenset()):
        root = tmp_path / name
        with ShardWriter(
            root, name="set", modalities=("CT", "MR", "PET"), image_size=16, samples_per_shard=4
        ) as writer:
            for n in range(12):
                if f"s{n}" not in without:
                    side = {"modality": "MR" if n < 8 else "CT", "split": "val" if n % 3 == 0 else "train"}
                    writer.add(f"s{n}", encoded(n), kind="png", group=f"p{n // 3}", meta={"n": n}, **side)
            writer.add_document("card.json", b"old")
            writer.add_document("licences/a.txt", b"free")
        return root

    return call


def withdraw(root, ids, card=b"new"):
    change = shard_rewrite.plan(root, frozenset(ids), {"card.json": card}, DATE)
    shard_rewrite.carry_out(root, change)
    return change


def held(root):
    """id -> image of every sample."""
    dataset = ShardDataset(root)
    return {dataset.sample_id(n): dataset.image_bytes(n) for n in range(len(dataset))}


def test_what_is_left_is_what_it_was(write):
    root = write("set")
    old, names = ShardDataset(root), sorted(path.name for path in root.rglob("*"))
    untouched = (root / "shard-00002.tar").stat()
    os.chmod(root / "shard-00000.tar", 0o640)
    change = withdraw(root, ["s1", "s5", "s6", "s7", "s4", "elsewhere"])
    assert verify(root) == [] and sorted(path.name for path in root.rglob("*")) == names
    assert held(root) == {f"s{n}": encoded(n) for n in (0, 2, 3, 8, 9, 10, 11)}
    new = ShardDataset(root)
    assert (change.before, change.after) == (old.fingerprint, new.fingerprint) and old.fingerprint != new.fingerprint
    assert new.modality_counts() == {"CT": 4, "MR": 3} and len(new.split("val")) == 3
    assert new.withdrawals == ((DATE, 5, old.fingerprint),)
    assert new.withdrawn_since(old.fingerprint) == [*new.withdrawals]
    assert new.withdrawn_since(new.fingerprint) == []
    assert (root / "card.json").read_bytes() == b"new" and (root / "licences" / "a.txt").read_bytes() == b"free"
    after = (root / "shard-00002.tar").stat()
    assert (after.st_ino, after.st_mtime_ns) == (untouched.st_ino, untouched.st_mtime_ns)
    assert stat.S_IMODE((root / "shard-00000.tar").stat().st_mode) == 0o640
    manifest, _ = read_manifest(root)
    assert manifest["shards"][1]["samples"] == 0  # an empty tar, so that the numbers of the others stay
    for n in (1, 4, 5, 6, 7):
        assert not any(encoded(n) in path.read_bytes() for path in root.rglob("*") if path.is_file())
    second = withdraw(root, ["s0"])
    assert verify(root) == [] and [entry.images for entry in ShardDataset(root).withdrawals] == [5, 1]
    assert [entry.images for entry in ShardDataset(root).withdrawn_since(second.before)] == [1]


def test_a_modality_that_loses_all_is_empty(write):
    root = write("set")
    withdraw(root, [f"s{n}" for n in range(8, 12)])
    assert ShardDataset(root).modalities == ("MR",) and ShardDataset(root).empty_modalities == ("CT", "PET")


def test_the_members_are_those_of_a_writer(write):
    """Tar for tar the bytes that a writer without these samples makes, the numbers of the samples aside."""
    root, other = write("set"), write("other", without={"s3"})
    withdraw(root, ["s3"])
    assert (root / "shard-00000.tar").read_bytes()[:1024] == (other / "shard-00000.tar").read_bytes()[:1024]
    line = json.loads((root / "shard-00000.index.jsonl").read_text().splitlines()[2])
    assert shard_rewrite.meta(root, read_manifest(root)[0]["shards"][0], line)["n"] == 2


KILL_AT = ("fsync", "replace", "link", "unlink", "open")


def killed_after(count, root, ids):
    """Whether a process that takes samples out was killed, at its `count`-th call of KILL_AT."""

    def take_out():
        shard_rewrite.settle(root)
        if "s1" in held(root):
            withdraw(root, ids)

    return killed_at(count, KILL_AT, take_out)


@pytest.mark.slow
def test_killed_at_every_step(write, tmp_path):
    whole = write("whole")
    ids, old = ["s1", "s5", "s11"], held(whole)
    withdraw(whole, ids)
    want = (whole / "manifest.json").read_bytes()
    fresh, outcomes, step = write("fresh"), set(), 0
    while True:
        root = tmp_path / "set"
        shutil.copytree(fresh, root)
        dead = killed_after(step, root, ids)
        now, problems = held(root), [problem for problem in verify(root) if "interrupted" not in problem]
        assert problems == [] and now in (old, {name: data for name, data in old.items() if name not in ids})
        outcomes.add(len(now))
        if shard_rewrite.settle(root) or now != old:
            assert held(root) == {name: data for name, data in old.items() if name not in ids}
        else:
            assert held(root) == old
            withdraw(root, ids)
        assert (root / "manifest.json").read_bytes() == want and verify(root) == []
        assert sorted(p.name for p in root.rglob("*")) == sorted(p.name for p in whole.rglob("*"))
        shutil.rmtree(root)
        if not dead:
            break
        step += 1
    assert step > 30 and outcomes == {12, 9}


def test_whoever_reads_meanwhile_gets_no_wrong_image(write):
    root = write("set")
    open_before = ShardDataset(root)
    withdraw(root, ["s1", "s5"])
    read, unreadable = 0, 0
    for number in range(12):
        try:
            assert open_before.image_bytes(number) == encoded(number)
            read += 1
        except SampleError as error:
            assert error.sample_id == f"s{number}"
            unreadable += 1
    assert read >= 4 and unreadable >= 2  # the shard that stayed; what was withdrawn


def test_check_says_that_bytes_are_left(write, monkeypatch):
    root = write("set")
    monkeypatch.setattr(shard_rewrite, "settle", lambda root: None)
    withdraw(root, ["s1"])
    assert "s1" not in held(root)
    (problem,) = verify(root)
    assert problem == "manifest.json: a withdrawal was interrupted; `dex data withdraw DIR` finishes it"


def test_without_links(write, monkeypatch):
    root = write("set")

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    withdraw(root, ["s1"])
    assert verify(root) == [] and len(held(root)) == 11


def test_a_full_disk_leaves_the_old_set(write, monkeypatch):
    root = write("set")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    real = shard_rewrite._write

    def full(path, data, old):
        if path.name == "card.json.next":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, data, old)

    monkeypatch.setattr(shard_rewrite, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        withdraw(root, ["s1"])
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_damaged_shard_is_named_and_nothing_changes(write):
    root = write("set")
    data = bytearray((root / "shard-00000.tar").read_bytes())
    data[600] ^= 1
    (root / "shard-00000.tar").write_bytes(data)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"shard-00000.tar: sample 's0': sha256 of its bytes differs"):
        withdraw(root, ["s1"])
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_all_of_a_set_is_refused(write):
    root = write("set")
    with pytest.raises(ValueError, match="expected to keep at least one image"):
        withdraw(root, [f"s{n}" for n in range(12)])
    assert len(held(root)) == 12 and verify(root) == []
