"""Rows 8 and 9: kill -9 at any moment of a run, and at any operation of a save."""

import random
import shutil
import time

import pytest

from dex.train import checkpoint
from dex.train.runlog import read_rows

pytestmark = pytest.mark.slow

STEPS = 24


def losses(out):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in read_rows(out / "metrics.jsonl")]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_killed_at_random(strategy, fleet, tiny, change, tmp_path, state_of, record, full):
    trials = {"ddp": 40, "fsdp": 10}[strategy] if full else {"ddp": 2, "fsdp": 1}[strategy]
    c = change(tiny, schedule__steps=STEPS, run__checkpoint_every=4, parallel__strategy=strategy)
    fleet.run(c, tmp_path / "whole")
    want = state_of(tmp_path / "whole" / "checkpoints" / f"step-{STEPS:08d}"), losses(tmp_path / "whole")
    draw, kills, same, alone, places = random.Random(f"row 8 {strategy}"), 0, 0, 0, []
    while kills < trials:
        out = tmp_path / f"{kills}"
        shutil.rmtree(out, ignore_errors=True)
        ranks = fleet.start(c, out)
        victims = draw.choice([[0, 1], [0], [1]])
        after = draw.randrange(STEPS)
        while not all(rank.wait(0) is not None for rank in ranks) and len(losses(out)) < after:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05) if after else draw.uniform(0, 1))
        if any(rank.wait(0) is not None for rank in ranks):
            continue
        for victim in victims:
            ranks[victim].send(9)
        if [ranks[v].wait(10) for v in victims] != [-9] * len(victims):
            continue
        others = [rank for rank in ranks if rank.code is None]
        if others and kills % 5 == 4:  # the others end by themselves; elsewhere a launcher ends them
            alone += 1
            limit = c.parallel.timeout + 15  # of one that never joined the others nothing is known but that
            assert all(rank.wait(limit) in (1, 2) for rank in others), [rank.said() for rank in others]
        time.sleep(draw.uniform(0, 0.1))
        for rank in others:
            rank.send(9)
            rank.wait(10)
        kills += 1
        places.append(len(losses(out)))
        ends = fleet.start(c, out)
        if fleet.end(ends) != [0, 0]:
            print(f"kill {kills}, of {victims} after {places[-1]} steps:", *(rank.said() for rank in ends))
            continue
        same += (state_of(out / "checkpoints" / f"step-{STEPS:08d}"), losses(out)) == want
        shutil.rmtree(out)
    record(
        8,
        f"kill -9 at random ({strategy}): resumed to the same weights, moments, counters, place in the data, losses",
        same,
        trials,
        steps_done_when_killed=f"{min(places)} to {max(places)} of {STEPS}",
        survivors_ended_by_themselves=alone,
    )


def test_killed_at_each_operation_of_a_start(fleet, tiny, change, tmp_path, record, full):
    """Before the first step: what stays of the run folder must not keep the next start from it."""
    c = change(tiny, schedule__steps=2)
    log = tmp_path / "operations.0"
    until = ("config.yaml", "run.json", "metrics.jsonl", "events.jsonl")
    fleet.run(c, tmp_path / "count", 1, thread="MainThread", operation=None, operations=str(log.with_suffix("")))
    count = len(log.read_text().splitlines())
    points = list(range(1, count + 1)) if full else [2, 3, 4]
    good = 0
    for number in points:
        out = tmp_path / f"{number}"
        rank = fleet.start(c, out, 1, thread="MainThread", operation=number, how="torn")[0]
        assert rank.wait(60) == -9, rank.said()
        end = fleet.start(c, out, 1)
        if fleet.end(end) == [0] and all((out / name).is_file() for name in until):
            good += 1
        else:
            print(f"operation {number}:", log.read_text().splitlines()[number - 1], end[0].said())
    record(
        8,
        "one rank killed at a file operation of the main thread, start to end: the next start works",
        good,
        len(points),
    )


def test_killed_in_a_save(base, fleet, tmp_path, state_of, record, full):
    """Each write, fsync, rename, ... of a save and of the removal of the old checkpoint, on each of two ranks."""
    points = []
    for rank, number, name in base.operations:
        kinds = ("before", "torn", "after") if name == "write" else ("before", "after")
        points += [(rank, number, name, how) for how in kinds]
    names = sorted({name for _, _, name, _ in points})
    every = len(points)
    assert {"write", "fsync", "rename"} <= set(names)
    draw = random.Random("row 9")
    if full:
        points += draw.sample(points, max(0, 100 - every))
    else:
        points = draw.sample([p for p in points if p[2] in ("write", "rename", "fsync")], 3)
    good, found = 0, {8: 0, 12: 0}
    for rank, number, name, how in points:
        out = tmp_path / "out"
        shutil.copytree(base.folder, out)
        ranks = fleet.start(base.config, out, rank=rank, operation=number, how=how)
        assert ranks[rank].wait(60) == -9, (ranks[rank].code, ranks[rank].said())
        ranks[1 - rank].send(9)
        ranks[1 - rank].wait(10)
        saved, _ = checkpoint.newest_good(out / "checkpoints")
        step = saved.state["step"]
        found[step] += 1
        sound = state_of(saved.folder) == base.whole[step]
        ends = fleet.start(base.config, out)
        sound = fleet.end(ends) == [0, 0] and sound
        left = sorted(p.name for p in (out / "checkpoints").iterdir())
        sound = sound and left == ["step-00000016"] and state_of(out / "checkpoints" / left[0]) == base.whole[16]
        if not sound:
            print(f"rank {rank}, operation {number} {name}, {how}:", left, *(r.said() for r in ends))
        good += sound
        shutil.rmtree(out)
    record(
        9,
        "kill at an operation of a save: the old or the new state loads, the next save works",
        good,
        len(points),
        operations=names,
        different_points=min(every, len(points)),
        old_state=found[8],
        new_state=found[12],
    )
