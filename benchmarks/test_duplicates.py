"""Finding duplicates among millions of hashes: seconds, memory, and comparison with checking every pair.

The images: 10 % nearly empty hashes (few ones, in the first half), 10 % of one anatomy (four views, 10 to 50 bits
around each), 10 % near copies and 5 % exact copies of any earlier or later image, the rest at random.
"""

import resource
import time
from typing import NamedTuple

import numpy as np
import pytest

from dex.prepare.duplicates import KEEP, NEAR, find

from .timing import apart

SECONDS_PER_MILLION = 120
"""Limit for `dex prepare`: 10 minutes for the whole corpus."""


def images(count: int, seed: int = 0):
    """The arguments of `find`: pixels, hashes, unit, volume."""
    rng = np.random.default_rng(seed)
    pixels, hashes = (rng.integers(0, 256, (count, 32), np.uint8) for _ in range(2))
    kind = rng.random(count)

    def flip(rows: np.ndarray, low: int, high: int, places: int = 256) -> None:
        for start in range(0, len(rows), 100_000):
            part = rows[start : start + 100_000]
            bits, times = np.unpackbits(hashes[part], axis=1), rng.integers(low, high + 1, len(part))
            for turn in range(high):
                flipped = np.flatnonzero(turn < times)
                bits[flipped, rng.integers(places, size=len(flipped))] ^= 1
            hashes[part] = np.packbits(bits, axis=1)

    empty, alike, near, exact = (
        np.flatnonzero((low <= kind) & (kind < high)) for low, high in ((0, 0.1), (0.1, 0.2), (0.2, 0.3), (0.95, 1))
    )
    hashes[empty] = 0
    flip(empty, 0, 40, 120)
    hashes[alike] = hashes[alike[rng.integers(0, 4, len(alike))]]
    flip(alike, 10, 50)
    hashes[near] = hashes[rng.integers(0, count, len(near))]
    flip(near, 0, 8)
    origin = rng.integers(0, count, len(exact))
    hashes[exact], pixels[exact] = hashes[origin], pixels[origin]
    unit = np.arange(count) // 100
    return pixels, hashes, unit, unit % 2 == 0


def every_pair(pixels, hashes, unit, volume) -> np.ndarray:
    """int8 [n], the first result of `find`, by comparing each image with all images kept before it."""
    words = hashes.view(np.uint64)
    kept, kind = np.empty(len(words), np.int64), np.zeros(len(words), np.int8)
    count = 0
    for i in range(len(words)):
        others = kept[:count]
        distance = np.bitwise_count(words[others] ^ words[i]).sum(axis=1, dtype=np.int64)
        ones = np.bitwise_count(words[others] | words[i]).sum(axis=1, dtype=np.int64)
        near = (distance <= 10) & (10 * distance <= ones) & ~((unit[others] == unit[i]) & volume[others] & volume[i])
        same = (pixels[others[distance == 0]] == pixels[i]).all(axis=1).any()  # Equal pixels have equal hashes here.
        kind[i] = 1 if same else NEAR if near.any() else KEEP
        if kind[i] == KEEP:
            kept[count] = i
            count += 1
    return kind


class Search(NamedTuple):
    """Costs and results of `find`: megabytes beyond its arguments, number of images of each kind."""

    seconds: float
    megabytes: float
    keep: int
    exact: int
    near: int


def search(pixels, hashes, unit, volume) -> Search:
    """Run `find`; call it in a separate process, whose peak memory is then that of the search."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    kind, _ = find(pixels, hashes, unit, volume)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return Search(seconds, peak / 1024, *np.bincount(kind, minlength=3).tolist())


@pytest.mark.parametrize("millions", [1, 5])
def test_millions(millions, tiny, report):
    count = 3_000 * millions if tiny else 1_000_000 * millions
    arguments = images(count)
    result = apart(search, *arguments)
    assert result.exact > 0.04 * count and result.near > 0.06 * count
    assert result.keep + result.exact + result.near == count
    limit = SECONDS_PER_MILLION * count / 1e6
    cost = f"{result.seconds:.1f} s, {result.megabytes:,.0f} MB beyond the hashes"
    detail = f"{cost}; {result.exact:,} exact, {result.near:,} near"
    report(f"duplicates among {count:,}", f"{limit:.0f} s", limit / result.seconds, 1, detail)


def test_against_every_pair(tiny, report):
    arguments = images(1_000 if tiny else 20_000)
    start = time.perf_counter()
    expected = every_pair(*arguments)
    middle = time.perf_counter()
    kind, _ = find(*arguments)
    seconds = time.perf_counter() - middle
    assert (kind == expected).all()
    ratio = (middle - start) / seconds
    detail = f"{seconds:.2f} s, every pair {middle - start:.2f} s"
    report(f"duplicates among {len(kind):,}", "every pair", ratio, 10, detail)
