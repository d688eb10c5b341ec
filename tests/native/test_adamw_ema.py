"""csrc/adamw_ema's whole kernel body, run thread by thread on a CPU, against AdamW and GEMA in float64.

`python test_adamw_ema.py LIBRARY` runs the random cases alone: what the sanitizers watch.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest
from host_code import check_memory, compiled

BETA1, BETA2, EPS = 0.9, 0.99, 1e-6
RULE = np.array([BETA1, 1 - BETA1, BETA2, 1 - BETA2, EPS])


def load(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    lib.host_adamw_ema.restype = i64
    lib.host_adamw_ema.argtypes = [pointer, i64, pointer, pointer, pointer, pointer, i64, pointer]
    return lib


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    return load(compiled("adamw_ema.cpp", tmp_path_factory.mktemp("host")))


class Group:
    """One parameter, its moments and what follows it; experts = 0: nothing does. offset: in elements, of them all."""

    def __init__(self, rng, numel, experts, *, offset=0, copy=True, zeros=0.3, step=3):
        rows = max(experts, 1)

        def draw(*shape):
            # Exactly as long as it must be: a sanitizer sees the first byte too far.
            buffer = np.empty(offset + int(np.prod(shape)), np.float32)
            buffer[offset:] = rng.standard_normal(buffer.size - offset)
            return buffer[offset:].reshape(shape)

        self.experts, self.numel = experts, numel
        self.p, self.g, self.m, self.v = (draw(rows, numel) for _ in range(4))
        np.square(self.v, out=self.v)
        self.d = draw(numel) if experts else None
        self.weights = (rng.random(rows) * (rng.random(rows) >= zeros)).astype(np.float32)
        self.copy = np.full((rows + 1, numel), 0x1234, np.uint16) if experts and copy else None
        lr, decay = 1e-2, 0.1
        self.rates = np.array([1 - lr * decay, lr / (1 - BETA1**step), (1 - BETA2**step) ** -0.5], np.float32)
        self.before = [None if t is None else t.copy() for t in (self.p, self.m, self.v, self.d)]

    def row(self) -> list[int]:
        tensors = (
            self.p,
            self.g,
            self.m,
            self.v,
            self.d,
            self.copy,
            self.weights if self.experts else None,
            self.rates,
        )
        return [*(0 if t is None else t.ctypes.data for t in tensors), self.numel, max(self.experts, 1)]

    def check(self, momentum: float, clip: float, moves: bool) -> None:
        got = (self.p, self.m, self.v, self.d)
        if not moves:
            assert all(a is None or a.tobytes() == b.tobytes() for a, b in zip(got, self.before, strict=True))
            assert self.copy is None or (self.copy == 0x1234).all()
            return
        p, m, v, d = (None if t is None else t.astype(np.float64) for t in self.before)
        g, (keep, rate, root) = clip * self.g.astype(np.float64), self.rates.astype(np.float64)
        if self.experts:
            used = self.weights.astype(np.float64)
            right = momentum * d + (1 - momentum) * (used[:, None] * p).sum(0)
            if used.any():
                np.testing.assert_allclose(self.d, right, rtol=2e-6, atol=1e-6 * max(self.experts, 1))
            else:
                assert self.d.tobytes() == self.before[3].tobytes()
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * g**2
        p = keep * p - rate * m / (np.sqrt(v) * root + EPS)
        for value, right in ((self.m, m), (self.v, v), (self.p, p)):
            np.testing.assert_allclose(value, right, rtol=2e-6, atol=1e-6)
        if self.copy is not None:
            half = (self.copy.astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_allclose(half, np.concatenate([self.p, self.d[None]]), rtol=2.0**-8, atol=1e-38)

    def bits(self) -> bytes:
        return b"".join(t.tobytes() for t in (self.p, self.m, self.v, self.d, self.copy) if t is not None)


def update(host, groups, momentum, *, clip=None, skip=None, blocks=3) -> np.ndarray:
    """Runs the launch; returns which groups have wide accesses."""
    rows = np.array([g.row() for g in groups], np.int64).reshape(-1, 10)
    wide, at = np.full(len(groups), -1, np.int64), np.array([momentum])
    clip = None if clip is None else np.array([clip], np.float32)
    skip = None if skip is None else np.array([skip])
    given = (RULE, at, clip, skip)
    addresses = [None if t is None else t.ctypes.data for t in given]
    host.host_adamw_ema(rows.ctypes.data, len(groups), *addresses, blocks, wide.ctypes.data)
    return wide


def random_case(host, rng: np.random.Generator) -> None:
    tile = host.host_adamw_tile()
    groups = []
    for _ in range(rng.integers(1, 6)):
        numel = int(rng.choice([0, 1, 2, 3, 4, 5, 7, 8, tile - 1, tile, tile + 1, tile + 4, 2 * tile + 3]))
        options = {"offset": int(rng.integers(0, 3)), "copy": bool(rng.random() < 0.5)}
        options["zeros"] = rng.choice([0.0, 0.3, 1.0])
        groups.append(Group(rng, numel, int(rng.choice([0, 1, 2, 3, 8])), **options))
    momentum, clip = float(rng.choice([0.0, 0.5, 0.999, 1.0])), rng.choice([None, 0.5])
    skip = [None, False, True][rng.integers(0, 3)]
    update(host, groups, momentum, clip=clip, skip=skip, blocks=int(rng.integers(1, 5)))
    for g in groups:
        g.check(momentum, 1.0 if clip is None else clip, not skip)


@pytest.mark.parametrize("seed", range(40))
def test_random_groups(host, seed):
    random_case(host, np.random.default_rng(seed))


@pytest.mark.parametrize("numel", [4, 1024, 1028, 3072])
def test_wide_and_narrow_accesses_give_the_same_bits(host, numel):
    results, widths = set(), set()
    for offset in (0, 4, 1, 2):
        g = Group(np.random.default_rng(numel), numel, 5, offset=offset)
        widths.add(int(update(host, [g], 0.9)[0]))
        results.add(g.bits())
    assert len(results) == 1 and widths == {0, 1}


def test_result_does_not_depend_on_the_grid_or_the_company(host):
    results = set()
    for blocks, company in ((1, 0), (3, 2), (50, 5)):
        g = Group(np.random.default_rng(5), 5000, 8)
        others = [Group(np.random.default_rng(9), 100 * i, i % 4) for i in range(company)]
        update(host, [*others, g], 0.9, clip=0.25, blocks=blocks)
        results.add(g.bits())
    assert len(results) == 1


def test_an_expert_of_no_weight_has_no_part_in_the_director(host):
    g = Group(np.random.default_rng(0), 100, 3, zeros=0.0)
    g.weights[1], g.p[1] = 0, np.nan
    update(host, [g], 0.5)
    assert np.isfinite(g.d).all() and np.isnan(g.p[1]).all() and (g.copy[1] == 0x7FC0).all()


def test_nothing_is_read_or_written_out_of_bounds(tmp_path):
    check_memory("adamw_ema.cpp", __file__, tmp_path, "60 cases")


def main(library: str, mode: str = "cases") -> None:
    host = load(Path(library))
    if mode == "overrun":
        # One element less than the launch is told: the sanitizer must see it.
        g = Group(np.random.default_rng(0), 1021, 3)
        g.numel += 1
        update(host, [g], 0.5)
        return
    for seed in range(60):
        random_case(host, np.random.default_rng(1000 + seed))
    print("60 cases")


if __name__ == "__main__":
    main(*sys.argv[1:])
