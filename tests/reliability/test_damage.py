"""Rows 10 and 11: checkpoints that were changed behind our back, and disks that are full."""

import os
import random
import shutil
import subprocess
import time

import pytest

from dex.train import checkpoint
from dex.train.runlog import read_rows

pytestmark = pytest.mark.slow


def test_damage_is_found_and_named(base, fleet, tmp_path, state_of, record, full):
    shutil.copytree(base.folder, tmp_path / "out")
    root = tmp_path / "out" / "checkpoints"
    newest, draw = root / "step-00000008", random.Random("row 10")
    files = sorted(newest.iterdir())
    assert [f.name for f in files][:2] == ["MANIFEST.json", "shard-00001-model-00001-of-00001.safetensors"]
    good = {"flip": 0, "cut": 0}
    for kind in ["flip"] * 200 + ["cut"] * 20:
        file = draw.choice(files)
        sound = file.read_bytes()
        if kind == "flip":
            damaged = bytearray(sound)
            damaged[draw.randrange(len(sound))] ^= 1 << draw.randrange(8)
        else:
            damaged = sound[: draw.choice([0, draw.randrange(len(sound))])]
        file.write_bytes(damaged)
        saved, notes = checkpoint.newest_good(root)
        good[kind] += saved.state["step"] == 4 and len(notes) == 1 and str(file) in notes[0]
        file.write_bytes(sound)
    record(10, "bit flips of a checkpoint found and named, the one before is used", good["flip"], 200)
    record(10, "truncations of a checkpoint found and named, the one before is used", good["cut"], 20)
    trials, same = 5 if full else 1, 0
    for trial in range(trials):
        folder = tmp_path / f"run{trial}"
        shutil.copytree(base.folder, folder)
        file = draw.choice(sorted((folder / "checkpoints" / newest.name).iterdir()))
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        ranks = fleet.run(base.config, folder)
        told = f"passed over {file}" in ranks[0].said() and "resumed from step-00000004" in ranks[0].said()
        same += told and state_of(folder / "checkpoints" / "step-00000016") == base.whole[16]
    record(10, "runs that meet a flipped bit say so, go on from the one before and end in the same bits", same, trials)


def ended_well(ranks, began):
    """Exit code 1 of all, by themselves, with the reason."""
    space = "No space left on device"
    return (
        [rank.code for rank in ranks] == [1, 1] and any(space in r.said() for r in ranks) and time.monotonic() - began
    )


def test_full_disk_at_each_operation(base, fleet, tmp_path, state_of, record, full):
    """ENOSPC from one operation of a save on, on one of two ranks."""
    points = [p for p in base.operations if p[2] in ("mkdir", "create", "write", "fsync", "rename")]
    if not full:
        points = random.Random("row 11").sample(points, 1)
    good, longest = 0, 0.0
    for rank, number, name in points:
        folder = tmp_path / "full"
        shutil.copytree(base.folder, folder)
        began = time.monotonic()
        ranks = fleet.start(base.config, folder, rank=rank, operation=number, how="full")
        fleet.end(ranks, 60)
        seconds = ended_well(ranks, began)
        saved, passed_over = checkpoint.newest_good(folder / "checkpoints")
        sound = bool(seconds) and not passed_over and state_of(saved.folder) == base.whole[saved.state["step"]]
        ends = fleet.start(base.config, folder)
        sound = fleet.end(ends) == [0, 0] and sound
        sound = sound and state_of(folder / "checkpoints" / "step-00000016") == base.whole[16]
        if not sound:
            print(
                f"rank {rank}, operation {number} {name}:", [r.code for r in ranks], *(r.said() for r in ranks + ends)
            )
        good, longest = good + sound, max(longest, seconds or 0)
        shutil.rmtree(folder)
    promise = (
        "ENOSPC at an operation of a save: both ranks end with 1, the last good state is there, the next start works"
    )
    record(11, promise, good, len(points), longest_seconds_of_a_run=round(longest, 1))


def test_full_disk_for_real(fleet, tiny, change, tmp_path, record, full):
    """A small file system, full because of checkpoints, or in the middle of a run because of somebody else."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mount]).returncode:
        pytest.skip("no right to mount a file system")
    subprocess.run(["umount", mount], check=True)
    good, sizes = 0, [3.0, 3.3, 3.7, 4.1, 4.6, 5.2] if full else [4.1]
    kinds = [(size, filler) for size in sizes for filler in ((False, True) if full else (False,))]
    longest = 0.0
    for size, filler in kinds:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * 1024)}k", "tmpfs", mount], check=True)
        try:
            out = mount / "out"
            c = change(
                tiny, schedule__steps=100_000, run__checkpoint_every=5, run__keep_checkpoints=1 if filler else 1000
            )
            began = time.monotonic()
            ranks = fleet.start(c, out)
            if filler:
                while len(checkpoint.list_checkpoints(out / "checkpoints")) < 1 and time.monotonic() - began < 30:
                    time.sleep(0.01)
                with (mount / "filler").open("wb", buffering=0) as file:
                    try:
                        while True:
                            file.write(bytes(4096))
                    except OSError:
                        pass
            fleet.end(ranks, 60)
            seconds = ended_well(ranks, began)
            saved, passed_over = checkpoint.newest_good(out / "checkpoints")
            sound = bool(seconds) and saved is not None and not passed_over
            if not sound:
                print(size, filler, [r.code for r in ranks], passed_over, *(r.said() for r in ranks))
            else:
                longest = max(longest, seconds)
            if filler and sound:
                (mount / "filler").unlink()
                last = saved.state["step"]
                fleet.run(change(c, run__stop_at=last + 10), out)
                sound = read_rows(out / "metrics.jsonl")[-1]["step"] == last + 10
            good += sound
        finally:
            subprocess.run(["umount", mount], check=True)
    promise = "a file system that is full: both ranks end with 1 and say so, the last checkpoint is good"
    record(11, promise, good, len(kinds), longest_seconds_of_a_run=round(longest, 1))
