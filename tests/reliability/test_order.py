"""Rows 13 and 14: which images a run takes, in which order, however often it is resumed and on however many ranks."""

import random

import pytest

pytestmark = pytest.mark.slow

STEPS = 42
"""Three epochs of 14 batches of 8, of 113 images."""


def ids_by_step(entries):
    """Global batches in the order in which they were taken; entries: of every rank, in their order."""
    steps = sorted({e["step"] for rank in entries for e in rank})
    taken = [[i for rank in entries for e in rank if e["step"] == step for i in e["ids"]] for step in steps]
    assert steps == list(range(len(steps)))
    return taken


@pytest.fixture(scope="module")
def whole(fleet, tiny, change, traced, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("order")
    c = change(tiny, schedule__steps=STEPS)
    fleet.run(c, tmp_path / "whole", trace=str(tmp_path / "whole.trace"))
    order = ids_by_step(traced(tmp_path / "whole.trace", "ids"))
    for epoch in range(3):
        of_epoch = [i for batch in order[14 * epoch : 14 * (epoch + 1)] for i in batch]
        assert len(of_epoch) == len(set(of_epoch)) == 112
    return c, order


def cuts(seed, count):
    inside = [step for step in range(1, STEPS) if step % 14]
    return [*sorted(random.Random(seed).sample(inside, count)), STEPS]


@pytest.mark.parametrize("workers", [0, 2])
def test_mid_epoch_resumes(workers, whole, fleet, change, tmp_path, traced, record, full):
    c, order = whole
    resumes = 20 if full else 1
    trace = tmp_path / "cut.trace"
    for stop in cuts(f"row 13 {workers}", resumes):
        cut = change(c, run__stop_at=stop, data__num_workers=workers)
        fleet.run(cut, tmp_path / "out", trace=str(trace))
    again = ids_by_step(traced(trace, "ids")) == order
    promise = f"random mid-epoch resumes, {workers} workers: the same ordered sample ids, each once an epoch"
    record(13, promise, resumes * again, resumes, images=8 * STEPS)


def test_other_numbers_of_ranks(whole, fleet, change, tmp_path, traced, record, full):
    c, order = whole
    changes = 8 if full else 2
    taken = []
    for number, stop in enumerate(cuts("row 14", changes)):
        count, trace = 2 - number % 2, tmp_path / f"{number}.trace"
        fleet.run(change(c, run__stop_at=stop), tmp_path / "out", count, trace=str(trace))
        entries = traced(trace, "ids", count)
        taken += [[i for rank in entries for i in rank[k]["ids"]] for k in range(len(entries[0]))]
    record(
        14, "changes of the number of ranks, 2 -> 1 -> 2: the same global order", changes * (taken == order), changes
    )
