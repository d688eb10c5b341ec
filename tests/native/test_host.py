"""csrc's host code: scalar maths, tile arithmetic, and group_ema_'s whole kernel body run thread by thread on a CPU.

`python test_host.py LIBRARY` runs the random cases alone: what the sanitizers watch.
"""

import ctypes
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from host_code import check_memory, compiled
from hypothesis import given, settings
from hypothesis import strategies as st

EPS = 2.0**-24

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


def load(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    lib.host_grid_size.restype = lib.host_group_ema.restype = ctypes.c_int64
    lib.host_grid_size.argtypes = [ctypes.c_int64] * 3
    lib.host_locate_tile.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
    pointer, i64, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    lib.host_group_ema.argtypes = [pointer, i64, ctypes.c_double, pointer, integer, pointer, i64, pointer]
    lib.host_split_momentum.argtypes = [ctypes.c_double, pointer]
    return lib


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    return load(compiled("host.cpp", tmp_path_factory.mktemp("host"), "-O2", "-Wno-maybe-uninitialized"))


def ptr(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


# ---- scalar maths


def arguments() -> np.ndarray:
    near = np.linspace(-12, 12, 24001)
    wide = np.concatenate([np.geomspace(1e-38, 1e38, 2000), [0.0]])
    return np.concatenate([near, wide, -wide]).astype(np.float32)


def gelu_of(host: ctypes.CDLL, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    value, grad = np.full_like(x, np.nan), np.full_like(x, np.nan)
    host.host_gelu(ptr(x), ptr(value), ptr(grad), ctypes.c_int64(x.size))
    return value, grad


def exact_gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float64)
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])
    return x * cdf, cdf + x * np.exp(-0.5 * np.minimum(x * x, 1400)) / math.sqrt(2 * math.pi)


def test_gelu_and_its_derivative_are_as_accurate_as_torch(host):
    import torch

    x = arguments()
    t = torch.from_numpy(x).requires_grad_()
    of_torch = torch.nn.functional.gelu(t)
    of_torch.sum().backward()
    ours = gelu_of(host, x)
    for got, plain, want in zip(ours, (of_torch.detach().numpy(), t.grad.numpy()), exact_gelu(x), strict=True):
        scale = np.maximum(np.abs(want), 1)
        assert np.isfinite(got).all()
        assert (np.abs(got - want) / scale).max() <= 2 * (np.abs(plain - want) / scale).max()
        assert (np.abs(got - want) / scale).max() < 4e-7


def test_gelu_at_special_values(host):
    value, grad = gelu_of(host, np.array([0.0, -0.0, np.inf, np.nan, -100], np.float32))
    assert value[0] == 0 and not np.signbit(value[0]) and value[1] == 0 and np.signbit(value[1])
    assert value[2] == np.inf and np.isnan(value[3]) and np.isnan(grad[3]) and value[4] == 0 == grad[4]
    assert grad[0] == 0.5 == grad[1]


def test_derivative_is_the_slope(host):
    x = np.linspace(-6, 6, 481)
    step = 1e-5
    slope = (exact_gelu(x + step)[0] - exact_gelu(x - step)[0]) / (2 * step)
    assert np.abs(gelu_of(host, x.astype(np.float32))[1] - slope).max() < 1e-6


def test_ema_add_rounds_once(host):
    rng = np.random.default_rng(0)
    acc, scale, value = (rng.standard_normal(10000).astype(np.float32) for _ in range(3))
    # Nearly cancelling: where a product that is rounded on its own shows.
    acc[:5000] = -(scale * value)[:5000]
    out = np.full_like(acc, np.nan)
    host.host_ema_add(ptr(acc), ptr(scale), ptr(value), ptr(out), ctypes.c_int64(acc.size))
    # The float64 product is exact; longdouble holds the sum exactly enough to round to float32 once.
    want = (acc.astype(np.longdouble) + scale.astype(np.longdouble) * value.astype(np.longdouble)).astype(np.float32)
    assert (out == want).all()
    assert (out[:5000] != 0).mean() > 0.9


@pytest.mark.parametrize("m", [0.0, 0.5, 0.99, 0.999, 0.9999, 1.0])
def test_momentum_is_split_in_double(host, m):
    both = np.full(2, np.nan, np.float32)
    host.host_split_momentum(m, ptr(both))
    assert both[0] == np.float32(m) and both[1] == np.float32(1 - m)


def bfloat16_of(host: ctypes.CDLL, x: np.ndarray) -> np.ndarray:
    bits = np.zeros(x.size, np.uint16)
    host.host_bfloat16(ptr(x), ptr(bits), ctypes.c_int64(x.size))
    return bits


def test_bfloat16_is_torchs(host):
    import torch

    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**32, 200000, dtype=np.uint32)
    ties = (rng.integers(0, 2**16, 20000, dtype=np.uint32) << 16) | 0x8000
    special = np.array([0, 0x80000000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 1], np.uint32)
    x = np.concatenate([words, ties, special]).view(np.float32)
    want = torch.from_numpy(x).to(torch.bfloat16)
    got = torch.from_numpy(bfloat16_of(host, x).view(np.int16)).view(torch.bfloat16)
    nan = want.isnan()
    assert (got.isnan() == nan).all()
    assert torch.equal(got[~nan].view(torch.int16), want[~nan].view(torch.int16))
    assert set(bfloat16_of(host, x)[nan.numpy()]) == {0x7FC0}


# ---- tile arithmetic

SIZES = st.lists(st.one_of(st.integers(0, 5000), st.integers(0, 2**40)), min_size=1, max_size=40)


@settings(deadline=None, max_examples=300)
@given(SIZES, st.sampled_from([128, 2048]), st.data())
def test_tiles_partition_every_tensor(host, sizes, tile_size, data):
    tiles = [-(-n // tile_size) for n in sizes]
    firsts = np.concatenate([[0], np.cumsum(tiles)[:-1]]).astype(np.int64)
    items = np.ascontiguousarray(np.stack([firsts, np.array(sizes, np.int64)], 1))
    piece = np.zeros(3, np.int64)

    def locate(tile):
        host.host_locate_tile(ptr(items), len(sizes), tile, tile_size, ptr(piece))
        return tuple(int(v) for v in piece)

    for i, n in enumerate(sizes):
        if n == 0:
            continue
        first, last = int(firsts[i]), int(firsts[i]) + tiles[i] - 1
        some = data.draw(st.integers(first, last))
        assert locate(first) == (i, min(n, tile_size), 0)
        assert locate(some) == (i, min(n - (some - first) * tile_size, tile_size), (some - first) * tile_size)
        # The last piece ends where the tensor does; with equal steps of tile_size before it, nothing is left out.
        item, size, start = locate(last)
        assert (item, start + size) == (i, n) and 1 <= size <= tile_size


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 3000), st.integers(1, 200), st.integers(1, 8))
def test_grid_does_every_tile_once(host, tiles, multiprocessors, blocks_each):
    grid = host.host_grid_size(tiles, multiprocessors, blocks_each)
    assert 0 <= grid <= min(tiles, multiprocessors * blocks_each)
    done = [tile for block in range(grid) for tile in range(block, tiles, grid)]
    assert sorted(done) == list(range(tiles))


# ---- group_ema_


class Buffer:
    """malloc of exactly ``offset`` bytes and the values: a sanitizer sees the first byte too far."""

    def __init__(self, values: np.ndarray, offset: int):
        self.base = libc.malloc(offset + values.nbytes)
        self.address = self.base + offset
        whole = np.frombuffer((ctypes.c_char * (offset + values.nbytes)).from_address(self.base), np.uint8)
        self.before, self.at = whole[:offset], whole[offset:].view(values.dtype)
        self.before[:] = 0xA5
        self.at[:] = values

    def untouched_before(self) -> bool:
        return bool((self.before == 0xA5).all())

    def free(self):
        del self.before, self.at
        libc.free(self.base)


class Group:
    """One director with its experts, float32, and what must come out, in float64."""

    def __init__(self, rng, numel, num_experts, *, offsets=(0, 0, 0), padding=0, shadow=True, zeros=0.3):
        stride = numel + padding
        weights = (rng.random(num_experts) * (rng.random(num_experts) >= zeros)).astype(np.float32)
        total = weights.sum()
        weights = weights / total if total else weights
        experts = np.full((num_experts, stride), np.nan, np.float32)
        experts[:, :numel] = rng.standard_normal((num_experts, numel))
        experts[weights == 0] = np.nan
        self.start = rng.standard_normal(numel).astype(np.float32)
        self.numel, self.stride, self.weights, self.values = numel, stride, weights, experts[:, :numel]
        self.director = Buffer(self.start, offsets[0])
        # The last expert ends where its elements do: no padding behind it.
        self.experts = Buffer(experts.reshape(-1)[: max(experts.size - padding, 0)], offsets[1])
        self.weight_buffer = Buffer(weights, 0)
        self.shadow = Buffer(np.full(numel, 0x1234, np.uint16), offsets[2]) if shadow else None
        self.buffers = [b for b in (self.director, self.experts, self.weight_buffer, self.shadow) if b is not None]

    def row(self) -> list[int]:
        shadow = 0 if self.shadow is None else self.shadow.address
        addresses = [self.director.address, self.experts.address, self.weight_buffer.address, shadow]
        return [*addresses, self.numel, self.stride, len(self.weights)]

    def wide(self) -> bool:
        row = self.row()
        strided = len(self.weights) > 1 and self.stride % 4
        return not (row[0] % 16 or row[1] % 16 or row[3] % 8 or strided)

    def check(self, m: float, moves: bool):
        assert all(b.untouched_before() for b in self.buffers)
        used = self.weights != 0
        if not (moves and used.any()):
            assert (self.director.at.view(np.uint32) == self.start.view(np.uint32)).all()
            assert self.shadow is None or (self.shadow.at == 0x1234).all()
            return
        parts = (1 - m) * self.weights[used, None].astype(np.float64) * self.values[used].astype(np.float64)
        kept = m * self.start.astype(np.float64)
        bound = (used.sum() + 4) * EPS * (np.abs(kept) + np.abs(parts).sum(0)) + 1e-44
        assert (np.abs(self.director.at - (kept + parts.sum(0))) <= bound).all()
        if self.shadow is not None:
            half = (self.shadow.at.astype(np.uint32) << 16).view(np.float32)
            assert (np.abs(half - self.director.at) <= np.abs(self.director.at) * 2.0**-8 + 1e-40).all()

    def free(self):
        for b in self.buffers:
            b.free()


def update(host, groups, momentum, *, at=None, skip=None, multiprocessors=2) -> np.ndarray:
    """Runs the launch; ``at``: the momentum as a float32 or float64 in memory. Returns ``[groups, (tile, wide)]``."""
    rows = np.array([g.row() for g in groups], np.int64).reshape(-1, 7)
    placed = np.full((len(groups), 2), -1, np.int64)
    is_double = int(at is not None and at.dtype == np.float64)
    skip = None if skip is None else np.array([skip])
    addresses = [None if a is None else ptr(a) for a in (at, skip)]
    value = np.nan if at is not None else momentum
    host.host_group_ema(
        ptr(rows), len(groups), value, addresses[0], is_double, addresses[1], multiprocessors, ptr(placed)
    )
    return placed


def random_case(host, rng: np.random.Generator) -> None:
    tile = host.host_tile_size()
    sizes = [0, 1, 2, 3, 4, 5, 1023, 1024, 1028, tile - 1, tile, tile + 1, tile + 4, 2 * tile + 3, 3 * tile]
    groups = []
    for _ in range(rng.integers(1, 6)):
        numel = int(rng.choice(sizes)) if rng.random() < 0.7 else int(rng.integers(1, 3 * tile))
        num_experts = int(rng.choice([1, 2, 3, 4, 5, 8, 9, 64])) if rng.random() < 0.7 else int(rng.integers(1, 65))
        aligned = rng.random() < 0.5
        # Half of the tensors take 16-byte accesses and, where their size is no multiple of 4, padding that allows it.
        padding = -numel % 4 + 4 * int(rng.integers(0, 2)) if aligned else int(rng.integers(0, 6))
        offsets = (0, 0, 0) if aligned else (4 * rng.integers(0, 5), 4 * rng.integers(0, 5), 2 * rng.integers(0, 9))
        zeros = rng.choice([0.0, 0.3, 0.9, 1.0])
        shadow = bool(rng.random() < 0.5)
        groups.append(Group(rng, numel, num_experts, offsets=offsets, padding=padding, shadow=shadow, zeros=zeros))
    m = float(rng.choice([0.0, 0.5, 0.99, 0.999, 1.0]))
    how = rng.integers(0, 3)
    at = None if how == 0 else np.array([m], np.float32 if how == 1 else np.float64)
    skip = [None, False, True][rng.integers(0, 3)]
    placed = update(host, groups, m, at=at, skip=skip, multiprocessors=int(rng.integers(1, 5)))
    tiles = 0
    for g, (first, wide) in zip(groups, placed, strict=True):
        assert first == tiles and bool(wide) == g.wide()
        tiles += -(-g.numel // tile)
        g.check(m if at is None else float(at[0]), not skip)
        g.free()


@pytest.mark.parametrize("seed", range(60))
def test_group_ema_on_random_groups(host, seed):
    random_case(host, np.random.default_rng(seed))


@pytest.mark.parametrize("num_experts", range(1, 65))
def test_every_number_of_experts(host, num_experts):
    rng = np.random.default_rng(num_experts)
    g = Group(rng, 2 * host.host_tile_size() + 7, num_experts, padding=1)
    update(host, [g], 0.99)
    g.check(0.99, True)
    g.free()


@pytest.mark.parametrize("numel", [1, 3, 4, 7, 2047, 2048, 2053, 6144])
def test_wide_and_narrow_accesses_give_the_same_bits(host, numel):
    results = []
    for offsets in ((0, 0, 0), (4, 0, 0), (0, 8, 0), (0, 0, 2), (12, 4, 6)):
        g = Group(np.random.default_rng(numel), numel, 9, offsets=offsets, padding=-numel % 4)
        ((_, wide),) = update(host, [g], 0.999)
        assert bool(wide) == (offsets == (0, 0, 0))
        results.append((g.director.at.tobytes(), g.shadow.at.tobytes()))
        g.free()
    assert len(set(results)) == 1


def test_result_does_not_depend_on_the_grid_or_the_company(host):
    results = []
    for multiprocessors, company in ((1, 0), (3, 2), (200, 5)):
        g = Group(np.random.default_rng(5), 5000, 8)
        others = [Group(np.random.default_rng(9), 100 * i, 3) for i in range(company)]
        update(host, [*others, g], 0.9, multiprocessors=multiprocessors)
        results.append(g.director.at.tobytes())
        for each in (*others, g):
            each.free()
    assert len(set(results)) == 1


def test_momentum_as_a_number_and_in_memory_give_the_same_bits(host):
    results = []
    for at in (None, np.array([0.999])):
        g = Group(np.random.default_rng(3), 1000, 4)
        update(host, [g], 0.999, at=at)
        results.append(g.director.at.tobytes())
        g.free()
    assert results[0] == results[1]


def test_experts_of_no_weight_are_not_read(host):
    # In its own process: if it were read, that would crash.
    done = subprocess.run([sys.executable, __file__, host._name, "unread"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_weights_that_are_not_finite_are_not_hidden(host):
    g = Group(np.random.default_rng(0), 100, 3, zeros=0.0)
    g.weight_buffer.at[1] = np.nan
    update(host, [g], 0.5)
    assert np.isnan(g.director.at).all() and (g.shadow.at == 0x7FC0).all()
    g.free()


def test_nothing_is_read_or_written_out_of_bounds(tmp_path):
    check_memory("host.cpp", __file__, tmp_path, "60 cases", "-Wno-maybe-uninitialized")


def main(library: str, mode: str = "cases") -> None:
    host = load(Path(library))
    if mode == "overrun":
        # One element less than the launch is told: the sanitizer must see it.
        g = Group(np.random.default_rng(0), 100, 3, zeros=0.0, shadow=False)
        g.numel += 1
        update(host, [g], 0.5)
        return
    if mode == "unread":
        # The second expert, of weight 0, lies outside of anything allocated.
        g = Group(np.random.default_rng(0), 4096, 2, zeros=0.0)
        g.weights = g.weight_buffer.at[:] = np.array([1, 0], np.float32)
        row = g.row()
        row[5] = 1 << 45
        placed = np.zeros((1, 2), np.int64)
        host.host_group_ema(ptr(np.array([row], np.int64)), 1, 0.5, None, 0, None, 1, ptr(placed))
        assert placed[0, 1] == 1
        g.check(0.5, True)
        return
    for seed in range(60):
        random_case(host, np.random.default_rng(1000 + seed))
    print("60 cases")


if __name__ == "__main__":
    main(*sys.argv[1:])
