"""Sets are written whole or not at all, and the same calls give the same bytes."""

import json
import os
import tarfile

import numpy as np
import pytest
from small_set import IMAGES, MODALITIES, fill, png, write

from dex.data import ShardWriter, verify


def test_other_readers_take_the_tar(root):
    with tarfile.open(root / "shard-00000.tar", "r:") as tar:
        names = tar.getnames()
        assert names == [f"0000000{n}.{end}" for n in range(3) for end in ("png", "json")]
        for member in tar:
            assert member.isreg() and (member.mtime, member.uid, member.gid, member.uname, member.mode) == (
                0,
                0,
                0,
                "",
                0o644,
            )
        assert tar.extractfile("00000001.png").read() == png(IMAGES[1])
        assert json.load(tar.extractfile("00000001.json")) == {
            "id": "s1",
            "modality": "MR",
            "split": "train",
            "group": "g0",
            "note": "é",
        }


def test_same_bytes_every_time(root, tmp_path):
    other = write(tmp_path / "other")
    files = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    assert len(files) == 9
    for file in files:
        assert (root / file).read_bytes() == (other / file).read_bytes()


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"sample_id": "s0"}, "sample_id"),
        ({"sample_id": ""}, "sample_id"),
        ({"modality": "OCT"}, "modality"),
        ({"split": "test"}, "split"),
        ({"kind": "pkl"}, "kind"),
        ({"data": png(np.zeros((20, 16, 3), np.uint8))}, "data"),
        ({"data": b"x"}, "not a readable png"),
    ],
)
def test_writer_refuses_and_leaves_nothing(tmp_path, arguments, name):
    good = {"data": png(IMAGES[0]), "kind": "png", "modality": "CT", "split": "train", "group": "g"}
    with pytest.raises(ValueError, match=f"^{name}"):
        with ShardWriter(tmp_path, name="x", modalities=MODALITIES, image_size=16, samples_per_shard=1) as writer:
            writer.add("s0", **good)
            writer.add("s1", **good)
            writer.add_document("CARD.md", b"x")
            writer.add(**{"sample_id": "s2", **good, **arguments})
    assert list(tmp_path.iterdir()) == []


def test_writer_arguments(root, tmp_path):
    with pytest.raises(ValueError, match="^root: expected a folder without manifest.json"):
        ShardWriter(root, name="x", modalities=MODALITIES)
    with pytest.raises(ValueError, match="^modalities: "):
        ShardWriter(tmp_path / "a", name="x", modalities=("CT", "CT"))
    with (
        pytest.raises(ValueError, match="at least one sample"),
        ShardWriter(tmp_path / "b", name="x", modalities=("CT",)),
    ):
        pass
    with ShardWriter(tmp_path / "c", name="x", modalities=MODALITIES, image_size=16) as writer:
        with pytest.raises(ValueError, match="^file: expected a plain name"):
            writer.add_document("../x", b"")
        fill(writer)
    assert verify(root) == []


def test_a_writer_stopped_at_any_write_leaves_no_set(tmp_path, monkeypatch):
    # disk full, or a kill, at every rename and every fsync: there is no manifest, and the next writer succeeds
    for function in ("fsync", "replace"):
        for fails_at in range(1, 30):
            calls = 0
            real = getattr(os, function)

            def failing(*arguments, real=real, fails_at=fails_at):
                nonlocal calls
                calls += 1
                if calls == fails_at:
                    raise OSError(28, "No space left on device")
                return real(*arguments)

            folder = tmp_path / f"{function}{fails_at}"
            monkeypatch.setattr(os, function, failing)
            try:
                write(folder)
            except OSError:
                monkeypatch.undo()
                assert not (folder / "manifest.json").exists()
                assert not [path for path in folder.rglob("*") if path.is_file()]
            else:
                monkeypatch.undo()
                assert calls < fails_at
                break
            write(folder)
            assert verify(folder) == []
        assert fails_at > 8


def test_leftovers_of_a_killed_writer_go(tmp_path):
    (tmp_path / "shard-00000.tar.partial").write_bytes(b"half")
    write(tmp_path)
    assert not list(tmp_path.glob("*.partial")) and verify(tmp_path) == []
