"""Row 15: what is not finite on one rank changes nothing anywhere; and images that one rank cannot read."""

import itertools
import re

import pytest

from dex.train import checkpoint
from dex.train.runlog import read_rows

pytestmark = pytest.mark.slow

BAD = [2, 5, 6, 7]
"""Step numbers from 0: one alone, then three in a row."""


def test_nonfinite_changes_nothing(fleet, tiny, change, tmp_path, traced, record, full):
    kinds = list(itertools.product(("pixel", "loss", "gradient"), (0, 1), ("ddp", "fsdp")))
    if not full:
        kinds = [("pixel", 0, "ddp"), ("gradient", 1, "fsdp")]
    good = 0
    for kind, rank, strategy in kinds:
        trace, out = tmp_path / f"{kind}{rank}{strategy}", tmp_path / f"out{kind}{rank}{strategy}"
        c = change(tiny, parallel__strategy=strategy)
        ranks = fleet.start(c, out, trace=str(trace), rank=rank, kind=kind, bad_steps=BAD)
        codes = fleet.end(ranks)
        before, after = traced(trace, "before"), traced(trace, "after")
        still = [[e["hash"] for e in r] for r in before] == [[e["hash"] for e in r] for r in after]
        met = all([e["after"] for e in r] == BAD for r in after)
        moved = len({e["hash"] for e in before[0]}) == 2  # from the first to the three, but not between those
        ids = [{e["step"]: e["ids"] for e in r}[7] for r in traced(trace, "ids")]
        guilty = [ids[rank][0]] if kind != "gradient" else ids[0] + ids[1]
        named = all(re.search(rf"samples of the last: {re.escape(', '.join(guilty))}$", r.said(), re.M) for r in ranks)
        events = [e for e in read_rows(out / "events.jsonl") if e["event"] == "non-finite step"]
        told = [e["step"] - 1 for e in events] == BAD and events[-1]["samples"] == guilty
        saved, _ = checkpoint.newest_good(out / "checkpoints")
        goes_on = saved.state["step"] == 8 and saved.state["nonfinite_in_a_row"] == 0
        parts = {"codes": codes == [3, 3], "still": still, "met": met, "moved": moved, "named": named, "told": told}
        if not all(parts.values()) or not goes_on:
            print(kind, rank, strategy, parts, goes_on, codes, *(r.said() for r in ranks))
        good += all(parts.values()) and goes_on
    record(
        15,
        "non-finite pixel, loss or gradient on one rank: no bit changes on any, skipped together, exit 3 after 3 in a "
        "row with the samples",
        good,
        len(kinds),
        named="the image, for pixel and loss; the whole batch for a gradient, which was averaged before it is seen",
    )


def test_unreadable_images_on_one_rank(fleet, tiny, change, tmp_path, traced, record, full):
    good, kinds = 0, [(0, "ddp"), (1, "ddp"), (0, "fsdp"), (1, "fsdp")] if full else [(1, "ddp")]
    for rank, strategy in kinds:
        out, trace = tmp_path / f"{rank}{strategy}", str(tmp_path / f"{rank}{strategy}.trace")
        c = change(tiny, parallel__strategy=strategy)
        ranks = fleet.start(c, out, rank=rank, unreadable_from=5)
        codes = fleet.end(ranks)
        named = all(f"step 6: rank {rank}: " in r.said() and "broken-" in r.said() for r in ranks)
        saved, _ = checkpoint.newest_good(out / "checkpoints")
        fleet.run(c, out, trace=trace)  # the files were mended: the batch that was not read comes now
        first = {r[0]["step"] for r in traced(trace, "ids")}
        sound = codes == [1, 1] and named and saved.state["step"] == 5 and first == {5}
        if not sound:
            print(rank, strategy, codes, named, saved.state["step"], first, *(r.said() for r in ranks))
        good += sound
    promise = "too many unreadable images on one rank: all save and end with 1, naming it; a resume reads them again"
    record(15, promise, good, len(kinds))
