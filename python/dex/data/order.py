"""The order of samples: which sample takes which place of an epoch, by arithmetic on seed, epoch and place alone.

No generator and no library's shuffle: the order is the same with any number of ranks and workers, and in every version.
"""

from __future__ import annotations

import functools
from decimal import Context, Decimal

import numpy as np

from dex.common.random import mix

_PRECISE = Context(prec=50)


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """int64 [count]: the order of epoch `epoch`. Defined by arithmetic alone, so no library's version changes it."""
    keys = mix(np.arange(count, dtype=np.uint64) + _stream(seed, epoch))
    return np.argsort(keys, kind="stable")


def epoch_order(seed: int, epoch: int, modality: np.ndarray, temperature: float) -> np.ndarray:
    """int64 [count]: the samples of epoch `epoch` in order; `modality` int64 [count] holds every sample's.

    `permutation` says which places of the epoch a modality gets, after the data set's modalities were repeated or
    cut to their shares. There its samples come in the order of their keys in pass 0, then in pass 1, ...: epoch 1
    goes on where epoch 0 ended. At temperature 1 a pass is an epoch, and the order is `permutation` itself.
    """
    modality_counts = np.bincount(modality)
    shares = quotas(modality_counts, temperature)
    places = permutation(seed, epoch, len(modality))
    if (shares == modality_counts).all():
        return places
    members = [np.flatnonzero(modality == number) for number in range(len(shares))]
    times = np.empty(len(modality), np.int64)
    for samples, share in zip(members, shares.tolist(), strict=True):
        times[samples] = (np.arange(len(samples)) < share % max(1, len(samples))) + share // max(1, len(samples))
    place_modality = np.repeat(modality, times)[places]
    order = np.empty(len(modality), np.int64)
    for number, (samples, share) in enumerate(zip(members, shares.tolist(), strict=True)):
        if share:
            first, skipped = divmod(epoch * share, len(samples))
            passes = np.arange(first, -((epoch + 1) * share // -len(samples)), dtype=np.uint64)
            keys = mix(samples.astype(np.uint64) + _stream(seed, passes)[:, None])
            drawn = samples[np.argsort(keys, axis=1, kind="stable")].ravel()
            order[place_modality == number] = drawn[skipped : skipped + share]
    return order


def quotas(counts: np.ndarray, temperature: float) -> np.ndarray:
    """int64 [M]: how often each of M modalities of `counts` samples comes in an epoch of sum(counts).

    Proportional to counts ** temperature, 0 where there is none; what rounding down leaves goes to the largest
    remainders, the first of equal ones. In decimal arithmetic: a float's power may differ between machines.
    """
    total = int(counts.sum())
    exponent = Decimal(temperature)
    weights = [_PRECISE.power(int(count), exponent) if count else Decimal(0) for count in counts]
    scale = functools.reduce(_PRECISE.add, weights)
    exact = [_PRECISE.divide(_PRECISE.multiply(weight, total), scale) for weight in weights]
    whole = np.array([int(share) for share in exact], np.int64)
    remainders = [share - int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda number: (-remainders[number], number))
    whole[by_remainder[: total - int(whole.sum())]] += 1
    return whole


def replacement(seed: int, epoch: int, place: int, attempt: int, count: int) -> int:
    """The sample that takes place `place` of epoch `epoch` in attempt 0, 1, ... when its own cannot be read."""
    key = mix(_stream(seed, epoch) ^ mix(np.uint64(place)) ^ mix(np.uint64(attempt) + np.uint64(1 << 40)))
    return int(key % np.uint64(count))


def _stream(seed: int, epoch: int | np.ndarray) -> np.ndarray | np.uint64:
    return mix(mix(np.uint64(seed)) ^ np.asarray(epoch, np.uint64)[()])
