"""Numbers that depend on a key alone, against the published generator and against chance."""

import math

import numpy as np
import pytest
import torch

from dex.common.random import mix, normal, sample_keys, step_seed, uniform


def keys(count, seed=0, first=0):
    return sample_keys(seed, torch.arange(first, first + count))


def splitmix64(seed, count):
    """The published generator, in Python's whole numbers."""
    full = 2**64 - 1
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & full
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & full
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & full
        yield z ^ (z >> 31)


def test_numbers_are_those_of_splitmix64():
    # the first outputs of the published C code for seed 1234567
    assert list(splitmix64(1234567, 3)) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    for seed in (0, 1, 2**63 - 1):
        places = torch.tensor([0, 1, 17, 2**40, 2**63 - 1])
        for key, place in zip(sample_keys(seed, places).tolist(), places.tolist(), strict=True):
            (stream,) = splitmix64(seed, 1)
            (expected,) = splitmix64(stream ^ place, 1)
            assert key % 2**64 == expected
            (start,) = splitmix64(expected, 1)
            numbers = [word >> 40 for word in splitmix64(start, 42)]
            assert (uniform(torch.tensor([key]), 42)[0].double() * 2**24).tolist() == numbers


def chi_square(counts):
    """Of equally likely cells, in standard deviations from its mean."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("seed, first", [(0, 0), (1, 0), (0, 10**9), (2**62, 4096)])
def test_numbers_are_uniform_and_independent(seed, first):
    numbers = uniform(keys(20_000, seed, first), 42).double().numpy()
    assert numbers.min() >= 0 and numbers.max() < 1
    # Kolmogorov and Smirnov: sqrt(n) * D is above 2.2 once in 8,000 times; the draw is fixed
    ordered = np.sort(numbers, axis=0)
    steps = np.arange(1, len(ordered) + 1)[:, None] / len(ordered)
    distance = np.maximum(steps - ordered, ordered - (steps - 1 / len(ordered))).max(0)
    assert (distance * math.sqrt(len(ordered)) < 2.2).all()
    cells = (numbers * 16).astype(int)

    def joint(a, b):
        return chi_square(np.bincount(a.ravel() * 16 + b.ravel(), minlength=256))

    # pairs: neighbouring columns of a key, distant ones, neighbouring keys, keys a batch apart, seeds
    assert abs(joint(cells[:, :-1], cells[:, 1:])) < 4.5
    assert abs(joint(cells[:, :21], cells[:, 21:])) < 4.5
    assert abs(joint(cells[:-1], cells[1:])) < 4.5
    assert abs(joint(cells[:-896], cells[896:])) < 4.5
    assert abs(joint(cells[:-1, 1:], cells[1:, :-1])) < 4.5  # a stream that is its neighbour's, one number later
    other = (uniform(keys(20_000, seed + 1, first), 42).double().numpy() * 16).astype(int)
    assert abs(joint(cells, other)) < 4.5
    # every pair of columns; 861 of them, of which a normal variable passes 5 once in 2,000 times
    correlation = np.corrcoef(numbers.T) * math.sqrt(len(numbers))
    assert np.abs(correlation[np.triu_indices(42, 1)]).max() < 5
    # every bit that is given
    bits = (numbers * 2**24).astype(np.int64)
    for bit in range(24):
        ones = ((bits >> bit) & 1).sum()
        assert abs(ones - bits.size / 2) / math.sqrt(bits.size / 4) < 4.5


def test_keys_are_different():
    here, there = keys(200_000), keys(200_000, seed=1)
    assert len(torch.cat([here, there]).unique()) == 400_000
    # one bit of the place changes half of the key's
    places = torch.arange(1000)
    changed = sample_keys(0, places) ^ sample_keys(0, places ^ 1)
    ones = sum(bin(word % 2**64).count("1") for word in changed.tolist())
    assert abs(ones - 32_000) / math.sqrt(64_000 / 4) < 4.5


@pytest.mark.parametrize("number", [torch.tensor([0]), 1.0, True, -1, 2**63])
def test_seeds(number):
    with pytest.raises(ValueError, match="^seed: expected a whole number"):
        sample_keys(number, torch.arange(3))


@pytest.mark.parametrize(
    "places", [[1, 2], torch.zeros(3), torch.zeros(3, dtype=torch.int32), torch.zeros(2, 2).long()]
)
def test_places(places):
    with pytest.raises(ValueError, match=r"^places: expected int64 \[B\]"):
        sample_keys(0, places)


def test_mix_of_arrays_is_one_step_of_splitmix64():
    words = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert mix(words).tolist() == [next(splitmix64(word, 1)) for word in words.tolist()]
    assert int(mix(np.uint64(7))) == next(splitmix64(7, 1))


def test_normal_numbers_have_the_moments_of_a_bell():
    numbers = normal(keys(50_000), 4, stream=16).double()
    count = numbers.numel()
    assert numbers.shape == (50_000, 4) and numbers.abs().max() < 5.8
    assert abs(numbers.mean()) * math.sqrt(count) < 4.5
    assert abs(numbers.square().mean() - 1) * math.sqrt(count / 2) < 4.5
    assert abs(numbers.pow(4).mean() - 3) * math.sqrt(count / 96) < 4.5
    inside = (numbers.abs() < 1).double().mean()
    assert abs(inside - math.erf(math.sqrt(0.5))) * math.sqrt(count) < 4.5 * 0.47
    correlation = np.corrcoef(numbers.T.numpy()) * math.sqrt(len(numbers))
    assert np.abs(correlation[np.triu_indices(4, 1)]).max() < 4.5


def test_streams_of_one_key_are_other_numbers():
    streams = [uniform(keys(1000), 3, stream) for stream in (0, 1, 16, 17)]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert (one == other).double().mean() < 0.01
    assert torch.equal(uniform(keys(1000), 5, 16)[:, :3], streams[2])  # more columns are more of the same


def test_step_seeds_differ_and_fit_torch():
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(-1, 500)}
    assert len(seeds) == 20 * 501
    assert all(0 <= s < 2**63 for s in seeds)
    assert step_seed(0, 0) == step_seed(0, 0)
