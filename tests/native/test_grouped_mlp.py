"""csrc/grouped_mlp's launch arithmetic, exhaustively for small sizes, and its GELU at every 16-bit number.

`python test_grouped_mlp.py LIBRARY` runs the arithmetic alone: what the sanitizers watch.
"""

import ctypes
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from host_code import check_memory, compiled

LARGEST = 2**31 - 1
TILE = 128


class Host:
    """The C functions on numpy arrays. Every array is exactly as long as it must be."""

    def __init__(self, path: Path):
        self.lib = ctypes.CDLL(str(path))
        self.lib.host_pieces.restype = self.lib.host_rows.restype = ctypes.c_int64

    def divide(self, n, divisor):
        n = np.asarray(n, np.int32)
        out = np.empty_like(n)
        self.lib.host_divide(at(n), ctypes.c_int64(len(n)), divisor, at(out))
        return out

    def pieces(self, offsets, rows_each, size, lanes=1):
        """``[numbers, 4]``: expert, first row, end row, number within the expert."""
        experts = len(offsets) - 1
        pieces = np.full((int(offsets[-1]) * rows_each // size + experts, 4), -1, np.int32)
        count = self.lib.host_pieces(at(offsets), experts, rows_each, ctypes.c_int64(size), lanes, at(pieces))
        assert count == len(pieces)
        return pieces

    def parts(self, offsets, most, lanes=1):
        first = np.full(len(offsets) - 1, -1, np.int64)
        self.lib.host_parts(at(offsets), len(first), most, lanes, at(first))
        return first

    def places(self, tiles, columns):
        places = np.empty((tiles * columns, 2), np.uint32)
        self.lib.host_places(tiles, columns, at(places))
        return places

    def rows(self, order, offsets, images, tokens, top_k):
        """Slot, image and token of each row; expert, first and end of each tile of the director; tiles of a launch."""
        sizes = np.array([len(offsets) - 1, len(order), images, tokens, top_k], np.int64)
        rows = np.full(((len(order) + images) * tokens, 3), -1, np.int32)
        director = np.full((-(-images * tokens // TILE), 3), -1, np.int32)
        count = self.lib.host_rows(at(order), at(offsets), at(sizes), at(rows), at(director))
        return rows, director, count

    def normal(self, z):
        cdf, pdf = np.empty((2, len(z)), np.float32)
        self.lib.host_normal(at(z), at(cdf), at(pdf), ctypes.c_int64(len(z)))
        return cdf, pdf


def at(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return array.ctypes.data_as(ctypes.c_void_p)


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Host:
    return Host(compiled("grouped_mlp.cpp", tmp_path_factory.mktemp("host")))


def splits(slots: int, experts: int):
    """The offsets of every way to share out the slots."""
    for ends in itertools.combinations_with_replacement(range(slots + 1), experts - 1):
        yield np.array([0, *ends, slots], np.int64)


# ---- tiles


def check_pieces(host, offsets, rows_each, size, lanes):
    pieces = host.pieces(offsets, rows_each, size, lanes)
    covered = np.zeros(int(offsets[-1]) * rows_each, np.int32)
    idle = np.zeros(len(offsets) - 1, np.int32)
    for expert, first, stop, number in pieces:
        begin, end = offsets[expert] * rows_each, offsets[expert + 1] * rows_each
        idle[expert] += first == stop
        if first < stop:
            assert first == begin + number * size and stop == min(first + size, end)
        covered[first:stop] += 1
    assert (covered == 1).all() and (idle <= 1).all()
    starts = [0 if i == 0 else pieces[i][0] - pieces[i - 1][0] for i in range(len(pieces))]
    assert min(starts) >= 0, "numbers rise with the experts"


@pytest.mark.parametrize("experts", [1, 2, 3, 4])
def test_every_row_is_in_one_tile_of_its_expert(host, experts):
    for slots, rows_each, size in itertools.product(range(6), (1, 2, 5), (1, 2, 3, 4, 7)):
        for offsets in splits(slots, experts):
            check_pieces(host, offsets, rows_each, size, 32)


@pytest.mark.parametrize("lanes", [1, 3, 32])
def test_many_experts_and_sizes_of_real_tiles(host, lanes):
    rng = np.random.default_rng(lanes)
    for tokens in (1, 5, 17, 64, 65, 130, 257):
        counts = rng.integers(0, 9, int(rng.integers(1, 130))) * rng.integers(0, 2)
        check_pieces(host, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), tokens, TILE, lanes)


def test_numbers_at_the_limit_of_rows(host):
    """2^31 - 2^16 rows, as many as Python lets through: the last pieces, and no overflow."""
    rows = 2**31 - 2**16
    for offsets in ([0, rows], [0, 0, rows - 1, rows], [0, rows - 130, rows - 130, rows]):
        offsets = np.array(offsets, np.int64)
        size = 2**24
        pieces = host.pieces(offsets, 1, size)
        used = pieces[pieces[:, 1] < pieces[:, 2]]
        assert used[:, 2].max() == rows and (used[:, 2].astype(np.int64) - used[:, 1]).sum() == rows


# ---- parts of weight gradients


def test_parts_of_experts_that_are_cut_do_not_overlap(host):
    for experts, slots, most in itertools.product((1, 2, 3, 4), range(9), (1, 2, 3, 5)):
        room = slots // most + slots // (most + 1)
        for offsets in splits(slots, experts):
            sizes, first, taken = np.diff(offsets), host.parts(offsets, most, 32), set()
            for e in np.flatnonzero(sizes > most):
                own = range(first[e], first[e] + -(-sizes[e] // most))
                assert own.stop <= room and taken.isdisjoint(own)
                taken |= set(own)


# ---- blocks, rows and quotients


def test_blocks_cover_all_tiles_and_columns_once(host):
    for tiles, columns in itertools.product((1, 2, 7, 8, 9, 16, 17, 40), (1, 2, 3, 24)):
        places = host.places(tiles, columns)
        assert len({tuple(p) for p in places}) == tiles * columns
        assert (places < [tiles, columns]).all()
        # Eight row tiles finish all of their columns before the next ones begin.
        groups = places[:, 0] // 8
        assert (np.diff(groups.astype(np.int64)) >= 0).all()


@pytest.mark.parametrize("images, tokens, top_k", [(0, 5, 2), (3, 5, 2), (4, 1, 3), (2, 130, 1), (3, 257, 2)])
def test_rows_are_tokens_of_the_images_of_slots(host, images, tokens, top_k):
    rng, B, experts = np.random.default_rng(tokens), 4, 5
    chosen = np.stack([rng.permutation(experts)[:top_k] for _ in range(B)]).reshape(-1)
    order = np.argsort(chosen, kind="stable").astype(np.int64)
    offsets = np.searchsorted(np.sort(chosen), np.arange(experts + 1)).astype(np.int64)
    rows, director, tiles = host.rows(order, offsets, images, tokens, top_k)
    slots = np.concatenate([order, len(order) + np.arange(images)]).repeat(tokens)
    of_images = np.concatenate([order // top_k, np.arange(images)]).repeat(tokens)
    assert (rows == np.stack([slots, of_images, np.tile(np.arange(tokens), len(order) + images)], 1)).all()
    begin, end = len(order) * tokens, (len(order) + images) * tokens
    first = begin + np.arange(len(director)) * TILE
    right = np.stack([np.full(len(director), experts), first, np.minimum(first + TILE, end)], 1)
    assert (director == right).all()
    assert tiles == len(director) + begin // TILE + experts


def test_quotients_are_exact(host):
    divisors = {1, 2, 3, 5, 7, 17, 64, 65, 130, 257, 641, 2**16 - 1, 2**16 + 1, 2**30, 2**30 + 1, LARGEST - 1, LARGEST}
    divisors |= {int(d) for d in np.random.default_rng(0).integers(1, LARGEST, 300)}
    for d in divisors:
        near = np.arange(0, LARGEST, max(d, LARGEST // 1000), dtype=np.int64) // d * d
        n = np.unique(np.concatenate([near - 1, near, near + d - 1, [0, LARGEST]]).clip(0, LARGEST))
        assert (host.divide(n, d) == n // d).all(), d


# ---- GELU


def sixteen_bits() -> np.ndarray:
    """Every finite number of bfloat16 and of float16."""
    words = np.arange(2**16, dtype=np.uint16)
    both = np.concatenate([(words.astype(np.uint32) << 16).view(np.float32), words.view(np.float16).astype(np.float32)])
    return both[np.isfinite(both)]


def test_gelu_and_its_slope_at_every_number_of_16_bits(host):
    z = sixteen_bits()
    cdf, pdf = (t.astype(np.float64) for t in host.normal(z))
    wide = z.astype(np.float64)
    exact = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in wide.clip(-40, 40)])
    bell = np.exp(-0.5 * wide.clip(-40, 40) ** 2) / math.sqrt(2 * math.pi)
    # Where exp(-z^2 / 2) is a normal number: its argument is rounded, and with it its relative error grows.
    normal = np.abs(z) < 12
    bound = 1.5e-6 + 6e-8 * wide**2
    assert (np.abs(cdf - exact)[normal] <= (bound * exact)[normal]).all()
    assert (np.abs(pdf - bell)[normal] <= (bound * bell)[normal]).all()
    assert (np.abs(cdf - exact)[~normal] < 1e-32).all() and (np.abs(pdf - bell)[~normal] < 1e-31).all()
    slope, right = cdf + wide * pdf, exact + wide * bell
    assert (np.abs(slope - right)[normal] <= (bound * (exact + np.abs(wide) * bell))[normal]).all()


def test_gelu_of_nan_and_infinity(host):
    cdf, _ = host.normal(np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32))
    assert np.isnan(cdf[0]) and cdf[1] == 1 and cdf[2] == 0 and (np.abs(cdf[3:] - 0.5) < 1e-6).all()


# ---- sanitizers


def test_nothing_is_read_or_written_out_of_bounds(tmp_path):
    check_memory("grouped_mlp.cpp", __file__, tmp_path, "all cases")


def main(library: str, mode: str = "cases") -> None:
    host = Host(Path(library))
    if mode == "overrun":
        # One expert more than there are offsets: the sanitizer must see it.
        host.lib.host_parts(at(np.arange(500, dtype=np.int64)), 501, 1, 1, at(np.empty(501, np.int64)))
        return
    test_many_experts_and_sizes_of_real_tiles(host, 32)
    test_numbers_at_the_limit_of_rows(host)
    test_parts_of_experts_that_are_cut_do_not_overlap(host)
    test_blocks_cover_all_tiles_and_columns_once(host)
    test_quotients_are_exact(host)
    test_rows_are_tokens_of_the_images_of_slots(host, 3, 257, 2)
    host.normal(sixteen_bits())
    print("all cases")


if __name__ == "__main__":
    main(*sys.argv[1:])
