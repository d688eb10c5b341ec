"""Exact and near duplicates among millions of images, found by two hashes of each.

Two images are exact duplicates if the SHA-256 of their pixels is equal. They are near duplicates if their 256-bit
difference hashes a, b (``normalise.difference_hash``) satisfy

    |a xor b| <= 10    and    |a xor b| <= 0.1 |a or b|

The second condition is for nearly empty images, whose hashes have few ones and are close to each other whatever the
images show. It follows that a hash with p ones has neighbours only within min(10, p // 9) bits: its reach.

If two hashes differ in at most r bits, at least one of r + 1 disjoint bands of bits is equal in both. So the index
stores every hash under each of its reach + 1 bands (the fewer ones, the longer the bands), and only hashes that share a
band are compared. The assignment of bits to bands affects only the time, not the result.

Shape letters: n, m images; Q entries: pairs of an image and one of its bands.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .normalise import NEAR_DUPLICATE_BITS

KEEP, EXACT, NEAR = 0, 1, 2
HASH_BITS = 256
ONES_PER_BIT = 10  # Least number of ones in a or b per differing bit

_BLOCK = 4096
_PAIRS = 2**18  # Compared at a time: fits in a cache
_OPEN_PAIRS = 2**19  # Most pairs within a block before it is halved
_REACH = 9  # Ones in a hash per bit of its reach: d <= (p + d) / 10 means d <= p / 9
_MIX = np.random.default_rng(0).integers(1, 2**63, 4, np.uint64) * np.uint64(2) + np.uint64(1)


def find(pixels: np.ndarray, hashes: np.ndarray, unit: np.ndarray, volume: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find which of n images repeat an earlier kept one.

    pixels: uint8 [n, 32], SHA-256 of each image's pixels; hashes: uint8 [n, 32], difference hashes, first bit first;
    unit: int64 [n], number of each image's volume, series or file; volume: bool [n], whether neighbours in that unit
    are neighbours in space. Two images of the same volume are never near duplicates, only exact ones.

    Returns kind, int8 [n]: KEEP, EXACT or NEAR, and of, int64 [n]: the (first) kept image that is repeated, -1 for kept
    images. The images are processed in order; each is compared with those kept before it, and EXACT takes precedence
    over NEAR. Memory: about 300 bytes per image.
    """
    pixels, hashes = _table("pixels", pixels), _table("hashes", hashes)
    unit, volume = np.asarray(unit), np.asarray(volume)
    for name, array, kinds in (("hashes", hashes, "u"), ("unit", unit, "iu"), ("volume", volume, "b")):
        if len(array) != len(pixels) or array.dtype.kind not in kinds or (array is not hashes and array.ndim != 1):
            raise ValueError(f"{name}: expected {len(pixels)} rows, one per image, got {array.dtype} {array.shape}")
    return _Greedy(pixels, hashes, unit.astype(np.int64), volume).run()


def between(
    hashes_a: np.ndarray, pixels_a: np.ndarray, hashes_b: np.ndarray, pixels_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find which of the m images of b occur among the n images of a.

    hashes_a, pixels_a: uint8 [n, 32]; hashes_b, pixels_b: uint8 [m, 32]; as in ``find``. Returns kind, int8 [m]: KEEP
    (not in a), EXACT or NEAR, and of, int64 [m]: the first image of a that is repeated, or -1.
    """
    tables = {"hashes_a": hashes_a, "pixels_a": pixels_a, "hashes_b": hashes_b, "pixels_b": pixels_b}
    hashes_a, pixels_a, hashes_b, pixels_b = (_table(name, table) for name, table in tables.items())
    for side, hashes, pixels in (("a", hashes_a, pixels_a), ("b", hashes_b, pixels_b)):
        if len(hashes) != len(pixels):
            raise ValueError(f"pixels_{side}: expected {len(hashes)} rows, one per image, got {len(pixels)}")
    kind, of = np.zeros(len(hashes_b), np.int8), np.full(len(hashes_b), -1, np.int64)
    if not len(hashes_a) or not len(hashes_b):
        return kind, of

    index = _Index(hashes_a)
    same = _groups(hashes_a)
    _, first = np.unique(same, return_index=True)
    distinct = np.concatenate([np.flatnonzero(same < 0), first[same[first] >= 0]])
    for start in range(0, len(distinct), _BLOCK):
        index.insert(distinct[start : start + _BLOCK])
    for start in range(0, len(hashes_b), _BLOCK):
        words, ones = _words(hashes_b[start : start + _BLOCK])
        row, slot = _entries(words, ones, index.bits, all_levels=True)
        begin, end = index.span(slot)
        best = np.full(len(words), len(hashes_a), np.int64)
        for i, j, _ in index.near(words, row, begin, end):
            np.minimum.at(best, i, j)
        here = np.flatnonzero(best < len(hashes_a))
        kind[start + here], of[start + here] = NEAR, best[here]

    same = _groups(np.concatenate([pixels_a, pixels_b]))
    first = np.full(same.max(initial=-1) + 1, -1, np.int64)
    rows = np.flatnonzero(same[: len(pixels_a)] >= 0)[::-1]
    first[same[rows]] = rows  # In reverse order, so that the earliest row is written last
    repeated = np.flatnonzero(same[len(pixels_a) :] >= 0)
    repeated = repeated[first[same[len(pixels_a) + repeated]] >= 0]
    kind[repeated], of[repeated] = EXACT, first[same[len(pixels_a) + repeated]]
    return kind, of


class _Greedy:
    """The state of one ``find``: the kept images in an index, and the decisions so far."""

    def __init__(self, pixels: np.ndarray, hashes: np.ndarray, unit: np.ndarray, volume: np.ndarray):
        self.unit, self.volume = unit, volume
        self.same = _groups(pixels)
        self.kept_of_same = np.full(self.same.max(initial=-1) + 1, -1, np.int64)
        self.index = _Index(hashes)
        self.kind = np.zeros(len(hashes), np.int8)
        self.of = np.full(len(hashes), -1, np.int64)

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        for start in range(0, len(self.kind), _BLOCK):
            self.decide(np.arange(start, min(start + _BLOCK, len(self.kind))))
        return self.kind, self.of

    def decide(self, rows: np.ndarray) -> None:
        """Decide on ``rows``, which are ascending, once all earlier rows are decided."""
        kept = np.where(self.same[rows] >= 0, self.kept_of_same[self.same[rows]] if len(self.kept_of_same) else -1, -1)
        known = kept >= 0
        self.kind[rows[known]], self.of[rows[known]] = EXACT, kept[known]
        rows = rows[~known]
        if not len(rows):
            return

        index, none = self.index, len(self.kind)
        words = index.words[rows]
        row, slot = _entries(words, index.ones[rows], index.bits, all_levels=True)
        begin, end = index.span(slot)
        best = np.full(len(rows), none, np.int64)
        filed = np.zeros(len(rows), bool)  # A kept slice of the same volume has the same hash and stands for both
        for i, j, distance in index.near(words, row, begin, end):
            own = self.one_volume(rows[i], j)
            np.minimum.at(best, i[~own], j[~own])
            filed[i[own & (distance == 0)]] = True

        # Compare the others with each other: insert them at the end of their slots, and remove them afterwards.
        left = (best == none) & ~filed
        index.insert(rows[left])
        open_entries = left[row]
        row, begin, end = row[open_entries], end[open_entries], index.span(slot[open_entries])[1]
        count = int((end - begin).sum())
        edges: dict[int, list[tuple[int, bool]]] = {}
        if count <= _OPEN_PAIRS:
            pairs = [np.stack([i, j, self.one_volume(rows[i], j), d]) for i, j, d in index.near(words, row, begin, end)]
            i, j, own, distance = np.unique(np.concatenate(pairs, axis=1), axis=1) if pairs else np.empty((4, 0), int)
            matters = (j < rows[i]) & ((own == 0) | (distance == 0))
            for a, b, o in zip(i[matters].tolist(), j[matters].tolist(), own[matters].tolist(), strict=True):
                edges.setdefault(a, []).append((b, bool(o)))
        index.remove(rows[left])
        if count > _OPEN_PAIRS and len(rows) > 1:  # Many are similar: the first half decides most of the second
            self.decide(rows[: len(rows) // 2])
            self.decide(rows[len(rows) // 2 :])
            return

        same = self.same[rows]
        beside = np.isin(np.arange(len(rows)), list(edges))
        for i in np.flatnonzero((same >= 0) | (best < none) | beside).tolist():
            place, group = int(rows[i]), int(same[i])
            kept_before = [(j, own) for j, own in edges.get(i, ()) if self.kind[j] == KEEP]
            near = min([j for j, own in kept_before if not own], default=int(best[i]))
            if group >= 0 and self.kept_of_same[group] >= 0:
                self.kind[place], self.of[place] = EXACT, self.kept_of_same[group]
            elif near < none:
                self.kind[place], self.of[place] = NEAR, near
            elif group >= 0:
                self.kept_of_same[group] = place
            filed[i] |= any(own for _, own in kept_before)
        index.insert(rows[(self.kind[rows] == KEEP) & ~filed])

    def one_volume(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """bool [Q]: whether both images of a pair are of the same volume."""
        return (self.unit[i] == self.unit[j]) & self.volume[i] & self.volume[j]


class _Index:
    """An index of hashes by their bands. The entries of one slot are contiguous, in the order of insertion; space for
    all of them is allocated at the start.

    words: uint64 [n, 4], the hashes with permuted bits; ones: int64 [n], number of set bits; bits: number of bits of a
    slot's number within a band.
    """

    def __init__(self, hashes: np.ndarray):
        self.words, self.ones = _words(hashes)
        self._quarters = np.ascontiguousarray(self.words.T)
        self.bits = max(8, (len(hashes) - 1).bit_length())
        bands = NEAR_DUPLICATE_BITS + 1
        count = np.zeros(bands << self.bits, np.int32)
        for start in range(0, len(hashes), _BLOCK):
            _, slot = self._own(np.arange(start, min(start + _BLOCK, len(hashes))))
            np.add.at(count, slot, 1)
        self._spans = np.empty((bands << self.bits, 2), np.int32)  # Begin and end, in the same cache line
        np.cumsum(count, out=self._spans[:, 1])
        total = int(self._spans[-1, 1])
        self._spans[:, 1] -= count
        self._spans[:, 0] = self._spans[:, 1]
        self._rows = np.empty(total, np.int32)

    def insert(self, rows: np.ndarray) -> None:
        """Insert ``rows`` at the end of their slots."""
        row, slot = self._own(rows)
        order = np.argsort(slot, kind="stable")
        row, slot = row[order], slot[order]
        fresh = np.flatnonzero(np.diff(slot, prepend=-1))
        length = np.diff(fresh, append=len(slot))
        rank = np.arange(len(slot)) - np.repeat(fresh, length)
        self._rows[self._spans[slot, 1] + rank] = rows[row]
        self._spans[slot[fresh], 1] += length.astype(np.int32)

    def remove(self, rows: np.ndarray) -> None:
        """Remove ``rows``, which must be the last ones inserted."""
        np.subtract.at(self._spans[:, 1], self._own(rows)[1], 1)

    def span(self, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 begin [Q], end [Q] of the current entries of each slot."""
        spans = self._spans[slot].astype(np.int64)
        return spans[:, 0], spans[:, 1]

    def near(
        self, words: np.ndarray, row: np.ndarray, begin: np.ndarray, end: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Near pairs (row of ``words``, inserted row, distance) among the entries begin .. end - 1, in batches.

        A pair comes once for each band that its hashes share.
        """
        filled = np.flatnonzero(end > begin)
        row, begin, length = row[filled], begin[filled], (end - begin)[filled]
        ends = np.cumsum(length)
        start = 0
        while start < len(row):
            done = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS, "right")))
            part = length[start:stop]
            # One arange runs through all slots; ``shift`` moves each part of it to the slot's own range.
            shift = begin[start:stop] - (ends[start:stop] - part - done)
            j = self._rows[np.arange(ends[stop - 1] - done) + np.repeat(shift, part)]
            i = np.repeat(row[start:stop], part)
            # Most pairs already differ too much in a quarter or a half of their bits.
            distance = np.bitwise_count(np.repeat(words[row[start:stop], 0], part) ^ self._quarters[0][j])
            for quarter in range(1, 4):
                some = np.flatnonzero(distance <= NEAR_DUPLICATE_BITS)
                i, j = i[some], j[some]
                distance = distance[some] + np.bitwise_count(words[i, quarter] ^ self._quarters[quarter][j])
            ones = np.bitwise_count(words[i] | self.words[j]).sum(axis=1, dtype=np.int64)
            close = (distance <= NEAR_DUPLICATE_BITS) & (ONES_PER_BIT * distance.astype(np.int64) <= ones)
            yield i[close], j[close].astype(np.int64), distance[close]
            start = stop

    def _own(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _entries(self.words[rows], self.ones[rows], self.bits, all_levels=False)


def _entries(words: np.ndarray, ones: np.ndarray, bits: int, all_levels: bool) -> tuple[np.ndarray, np.ndarray]:
    """row int64 [Q], slot int64 [Q]: the slots where the hashes ``words`` [n, 4] are stored or looked up.

    A hash is stored with the bands of its own level, which is its reach. It is looked up on every level where it can
    have a neighbour: a pair differs by at most the smaller reach, so the bands are short enough for it.
    """
    own = np.minimum(ones // _REACH, NEAR_DUPLICATE_BITS)
    unpacked = np.zeros((len(words), HASH_BITS + 1), np.uint8)
    unpacked[:, :HASH_BITS] = np.unpackbits(words.view(np.uint8), axis=1)
    rows, slots = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for level, places in enumerate(_PLACES):
        here = own == level
        if all_levels:
            low, high = _REACH * level, (_REACH * (level + 1) - 1 if level < NEAR_DUPLICATE_BITS else HASH_BITS)
            here |= (own == level + 1) & (ones <= high + level)
            here |= (own == level - 1) & (ones >= low - own)
        here = np.flatnonzero(here)
        if not len(here):
            continue
        bands = np.packbits(unpacked[here].take(places.ravel(), axis=1).reshape(len(here), *places.shape), axis=2)
        key = np.full(bands.shape[:2], level, np.uint64)
        for word, mix in zip(np.moveaxis(bands.view(np.uint64), 2, 0), _MIX, strict=False):
            key = (key ^ word) * mix
            key ^= key >> np.uint64(29)
        key = (key * _MIX[0]) >> np.uint64(64 - bits)
        slots.append((key.astype(np.int64) + (np.arange(level + 1) << bits)).ravel())
        rows.append(np.repeat(here, level + 1))
    return np.concatenate(rows), np.concatenate(slots)


def _bands(count: int) -> np.ndarray:
    """int64 [count, 64 w]: the places of each band's bits, padded with HASH_BITS, the place of a bit that is never
    set."""
    parts = np.array_split(np.arange(HASH_BITS), count)
    places = np.full((count, -(-len(parts[0]) // 64) * 64), HASH_BITS)
    for band, part in zip(places, parts, strict=True):
        band[: len(part)] = part
    return places


_PLACES = [_bands(level + 1) for level in range(NEAR_DUPLICATE_BITS + 1)]
# Bits are assigned at random: neighbours in the image tend to be equal, so a band of neighbours would say little.
_DEAL = np.random.default_rng(1).permutation(HASH_BITS)


def _words(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [n, 4], the hashes (uint8 [n, 32]) with permuted bits, and int64 [n], their numbers of set bits."""
    words = np.empty((len(hashes), HASH_BITS // 64), np.uint64)
    for start in range(0, len(hashes), _BLOCK):
        bits = np.unpackbits(hashes[start : start + _BLOCK], axis=1).take(_DEAL, axis=1)
        words[start : start + _BLOCK] = np.packbits(bits, axis=1).view(np.uint64)
    return words, np.bitwise_count(words).sum(axis=1, dtype=np.int64)


def _groups(digests: np.ndarray) -> np.ndarray:
    """int64 [n]: a number 0, 1, ... for each digest (uint8 [n, 32]) that occurs more than once, -1 for the others."""
    words = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort(words.T)
    fresh = np.ones(len(words), bool)
    for start in range(1, len(words), 2**20):  # In parts: a sorted copy of all would be as large as the digests
        part = order[start - 1 : start + 2**20]
        fresh[start : start + 2**20] = (words[part[1:]] != words[part[:-1]]).any(axis=1)
    number = np.cumsum(fresh) - 1
    several = np.bincount(number, minlength=1)[number] > 1 if len(words) else np.zeros(0, bool)
    out = np.full(len(words), -1, np.int64)
    out[order[several]] = np.unique(number[several], return_inverse=True)[1]
    return out


def _table(name: str, table: np.ndarray) -> np.ndarray:
    table = np.asarray(table)
    if table.ndim != 2 or table.shape[1] != HASH_BITS // 8 or table.dtype != np.uint8:
        raise ValueError(f"{name}: expected uint8 [n, {HASH_BITS // 8}], got {table.dtype} {list(table.shape)}")
    return table
