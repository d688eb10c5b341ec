"""The order of samples in an epoch, computed from seed, epoch and place.

It uses no generator or shuffle of a library, so the order is the same with any ranks and workers, and in any version.
"""

from __future__ import annotations

import functools
from decimal import Context, Decimal

import numpy as np

from dex.common.random import mix

_PRECISE = Context(prec=50)


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """int64 ``[count]``: a permutation for epoch ``epoch``."""
    keys = mix(np.arange(count, dtype=np.uint64) + _stream(seed, epoch))
    return np.argsort(keys)  # All keys differ, since `mix` is a bijection: any sort gives the same order


def epoch_order(seed: int, epoch: int, modality: np.ndarray, temperature: float) -> np.ndarray:
    """int64 ``[count]``: the samples of epoch ``epoch`` in order; ``modality``, int64 ``[count]``, is that of each
    sample.

    ``permutation`` assigns the places of the epoch to modalities, each repeated or cut to its share. A modality's
    samples fill its places in the order of their keys in pass 0, then in pass 1, ...; epoch 1 continues where epoch 0
    ended. At temperature 1 a pass is an epoch, and the order is ``permutation``.
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
            drawn = samples[np.argsort(keys, axis=1)].ravel()
            order[place_modality == number] = drawn[skipped : skipped + share]
    return order


def quotas(counts: np.ndarray, temperature: float) -> np.ndarray:
    """int64 ``[M]``: samples of each of M modalities in an epoch of sum(counts) samples.

    Proportional to counts ** temperature, and 0 for a count of 0. Shares are rounded down, and the rest goes to the
    largest remainders, the first of equal ones. Computed in decimal arithmetic, since powers of floats may differ
    between machines.
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
    """Replacement for an unreadable sample at ``place`` of epoch ``epoch``, for attempt 0, 1, ..."""
    key = mix(_stream(seed, epoch) ^ mix(np.uint64(place)) ^ mix(np.uint64(attempt) + np.uint64(1 << 40)))
    return int(key % np.uint64(count))


def _stream(seed: int, epoch: int | np.ndarray) -> np.ndarray | np.uint64:
    return mix(mix(np.uint64(seed)) ^ np.asarray(epoch, np.uint64)[()])
