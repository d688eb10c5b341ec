"""Row 25: bytes of a prepared set that were edited, one at a time. Row 22: what stands in a source and is no file."""

import json
import os
import random
import stat
import sys

import numpy as np
import pytest
import seeds
from test_fuzz import dex_prepare

from dex.data import ShardDataset, verify
from dex.prepare import run as prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("edits")
    (root / "scans").mkdir()
    for i in range(12):
        (root / "scans" / f"{i}.png").write_bytes(seeds.pillow(seeds.picture(i, 64), "PNG"))
    done = dex_prepare(root / "scans", root / "set")
    assert done.returncode == 0, done.stderr
    return root / "set"


def flip(path, at, bits):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bits]))


def test_every_edit_of_one_byte_is_found(prepared, full, figures):
    assert verify(prepared) == []
    files = sorted(path for path in prepared.rglob("*") if path.is_file())
    assert {"manifest.json", "card.html", "card.json", "shard-00000.tar", "shard-00000.index.jsonl"} == {
        path.name for path in files
    }
    edits, found, draw = 1000 if full else 60, 0, random.Random(25)
    for number in range(edits):
        path = files[number % len(files)]
        at, bits = draw.randrange(path.stat().st_size), draw.randrange(1, 256)
        flip(path, at, bits)
        found += path.name in " ".join(verify(prepared))
        flip(path, at, bits)
    assert verify(prepared) == []
    figures["row 25"] = {"edits of one byte": edits, "found": found}
    assert found == edits


@pytest.mark.skipif(sys.platform != "linux", reason="makes pipes and devices")
def test_pipes_devices_and_links_are_passed_over(tmp_path, figures):
    """Under every suffix, as files and as folders: nothing hangs, and nothing outside is read."""
    root, outside = tmp_path / "scans", tmp_path / "outside"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    for i in range(3):
        (root / "a" / f"{i}.png").write_bytes(seeds.pillow(seeds.picture(i, 64), "PNG"))
    for i, (suffix, files) in enumerate(seeds.seeds().items()):
        (outside / f"{i}{suffix}").write_bytes(files[0])
        os.symlink(outside / f"{i}{suffix}", root / "a" / f"link{suffix}")
        os.symlink(f"../../outside/{i}{suffix}", root / "a" / f"relative{suffix}")
        os.mkfifo(root / "a" / f"pipe{suffix}")
        if os.geteuid() == 0:
            try:
                os.mknod(root / "a" / f"zero{suffix}", stat.S_IFCHR | 0o666, os.makedev(1, 5))
            except PermissionError:  # root of a container
                pass
    os.mkfifo(root / "pipe")
    os.symlink(outside, root / "folder")
    os.symlink("..", root / "a" / "round")
    os.symlink("/dev/zero", root / "a" / "endless.dcm")
    done = dex_prepare(root, tmp_path / "set", timeout=60)
    assert done.returncode == 0, done.stderr
    dataset = ShardDataset(tmp_path / "set")
    assert len(dataset) == 3
    for i in range(3):
        difference = dataset[i].image.numpy()[0].astype(int) - seeds.picture(i, 64)
        assert np.abs(difference).mean() < 3
    links = 2 * len(seeds.seeds()) + 3
    assert f"passed over symbolic links: {links:,}" in done.stdout
    (plan,) = json.loads((prepare.private_folder(tmp_path / "set") / "plan.json").read_text())["sources"]
    others = sum(not path.is_file() and not path.is_dir() for path in root.rglob("*") if not path.is_symlink())
    assert plan["files"] == 3 and f"passed over pipes, sockets and devices: {others:,}" in done.stdout
    figures["row 22"] = {"links": links, "pipes and devices": others, "followed": plan["files"] - 3}
