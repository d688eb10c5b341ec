"""The order of samples in an epoch."""

import itertools
import math

import numpy as np
import pytest

from dex.data.order import epoch_order, permutation, quotas, replacement


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_permutation_is_one(count):
    for seed, epoch in ((0, 0), (2**63 - 1, 5), (1, 2**40)):
        assert sorted(permutation(seed, epoch, count).tolist()) == list(range(count))


def test_permutation_is_uniform():
    firsts = np.bincount([permutation(0, epoch, 8)[0] for epoch in range(4000)], minlength=8)
    # 7 degrees of freedom: 24.3 is passed by chance once in a thousand, and the draw is fixed
    assert ((firsts - 500) ** 2 / 500).sum() < 24.3
    replaced = np.bincount([replacement(0, 0, place, 0, 8) for place in range(4000)], minlength=8)
    assert ((replaced - 500) ** 2 / 500).sum() < 24.3


def slow_order(seed, epoch, modality, temperature):
    """The definition in Python's own numbers, for quotas that are no near tie."""
    full = 2**64 - 1

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) & full
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & full
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & full
        return x ^ (x >> 31)

    def shuffled(items, number):
        return sorted(items, key=lambda item: (mix((item + mix(mix(seed) ^ number)) & full), item))

    count, kinds = len(modality), sorted(set(modality))
    members = {kind: [index for index in range(count) if modality[index] == kind] for kind in kinds}
    weights = {kind: len(members[kind]) ** temperature for kind in kinds}
    exact = {kind: count * weights[kind] / sum(weights.values()) for kind in kinds}
    share = {kind: math.floor(exact[kind] + 1e-9) for kind in kinds}
    while sum(share.values()) < count:
        share[max(kinds, key=lambda kind: exact[kind] - share[kind])] += 1
    # the modalities that the data set's rows stand for, each as often as its share says
    rows = []
    for index in range(count):
        own = members[modality[index]]
        turns = range(own.index(index), share[modality[index]], len(own))
        rows += [modality[index]] * len(turns)

    def stream(kind):
        for turn in itertools.count():
            yield from shuffled(members[kind], turn)

    streams = {kind: itertools.islice(stream(kind), epoch * share[kind], None) for kind in kinds}
    return [next(streams[rows[place]]) for place in shuffled(range(count), epoch)]


LOPSIDED = np.random.default_rng(3).permutation(np.repeat([0, 1, 2, 4], [70, 37, 11, 2]))


@pytest.mark.parametrize("temperature", [1, 0.99, 0.7, 0.5, 0.2, 0.0])
def test_order_is_the_definition(temperature):
    for seed, epoch in ((0, 0), (5, 1), (2**63 - 1, 7)):
        got = epoch_order(seed, epoch, LOPSIDED, temperature)
        assert got.tolist() == slow_order(seed, epoch, LOPSIDED.tolist(), temperature)


def test_order_at_temperature_one_is_the_permutation():
    for seed, epoch in ((0, 0), (5, 3)):
        assert (epoch_order(seed, epoch, LOPSIDED, 1.0) == permutation(seed, epoch, 120)).all()
    # equal modalities too; and as it has been from the start
    assert (epoch_order(1, 2, np.arange(20) % 2, 0.5) == permutation(1, 2, 20)).all()
    assert permutation(0, 0, 10).tolist() == [4, 8, 0, 1, 7, 6, 2, 5, 3, 9]


@pytest.mark.parametrize("temperature", [0.8, 0.5, 0.0])
def test_each_sample_once_before_any_again(temperature):
    counts = np.bincount(LOPSIDED)
    seen = np.concatenate([epoch_order(9, epoch, LOPSIDED, temperature) for epoch in range(12)])
    for kind, count in enumerate(counts):
        if count == 0:
            continue
        mine = seen[LOPSIDED[seen] == kind]
        passes = [mine[start : start + count].tolist() for start in range(0, len(mine), count)]
        for one in passes[:-1]:
            assert sorted(one) == np.flatnonzero(LOPSIDED == kind).tolist()
        assert len(set(passes[-1])) == len(passes[-1])
        if count > 10:
            assert len({tuple(one) for one in passes[:-1]}) == len(passes) - 1  # in another order every time
    # shares hold in the course of an epoch too, not at its end only
    half = np.bincount(LOPSIDED[seen[:60]], minlength=5)
    assert (abs(half - quotas(counts, temperature) / 2) < 12).all()


@pytest.mark.parametrize("temperature", [1.0, 0.9, 0.5, 0.1, 0.0])
def test_quotas(temperature):
    counts = np.array([1_900_000, 1_200_000, 0, 140_000, 47_001, 3, 1])
    got = quotas(counts, temperature)
    weights = np.where(counts > 0, counts.astype(float) ** temperature, 0)
    assert got.sum() == counts.sum() and (abs(got - counts.sum() * weights / weights.sum()) < 1).all()
    assert got[2] == 0
    if temperature == 1:
        assert (got == counts).all()
    if temperature == 0:
        assert got[0] - got[6] in (0, 1) and (np.diff(got[got > 0]) <= 0).all()  # what is left over goes to the first
    # a billion to one: exact where a float is not
    assert quotas(np.array([2**53 + 1, 2**53 - 1, 7]), 1.0).tolist() == [2**53 + 1, 2**53 - 1, 7]
