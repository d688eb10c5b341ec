"""The kernels of csrc/, as nvcc compiles them for sm_80 and sm_90a, on the emulator."""

import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from ptx_emulator.launch import GlobalMemory, Launch, Program
from ptx_emulator.ptx import PTXError

CSRC = Path(__file__).resolve().parents[2] / "csrc"
THREADS, TILE, SMALL, LARGE = 256, 2048, 60, 500


@pytest.fixture(scope="module", params=["sm_80", "sm_90a"])
def ptx(request, tmp_path_factory) -> str:
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    file = tmp_path_factory.mktemp("ptx") / "group_ema.ptx"
    options = ["-O3", "-std=c++17", f"-arch={request.param}", f"-I{CSRC}"]
    subprocess.run(
        [nvcc, "-ptx", *options, CSRC / "group_ema/group_ema.cu", "-o", file], check=True, capture_output=True
    )
    return file.read_text()


def entry(ptx: str, capacity: int) -> str:
    """The mangled name of the kernel whose table holds ``capacity`` tensors."""
    return next(
        line.split("(")[0].split()[-1] for line in ptx.split("\n") if ".entry" in line and f"ILi{capacity}E" in line
    )


class Groups(NamedTuple):
    """The tensors of each group."""

    directors: list
    experts: list
    weights: list
    shadows: list | None = None


def launch(ptx, groups, momentum, *, skip=None, capacity=SMALL, seed=None, blocks=3, hidden=0):
    """What the launcher does: a table of the tensors by value, the scalars behind it.

    hidden: bytes at the end of every director that do not exist.
    """
    shadows = groups.shadows or [None] * len(groups.directors)
    memory, rows, tiles = GlobalMemory(), [], 0
    for i, (d, e, w, s) in enumerate(zip(groups.directors, groups.experts, groups.weights, shadows, strict=True)):
        for name, t in (("director", d), ("experts", e), ("weights", w), ("shadow", s)):
            if t is not None and t.numel():
                last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
                size = (last + 1) * t.element_size() - (hidden if name == "director" else 0)
                memory.add(t.data_ptr(), size, t.element_size(), f"{name} {i}")
        aligned = d.data_ptr() % 16 == e.data_ptr() % 16 == 0 and (e.shape[0] <= 1 or e.stride(0) % 4 == 0)
        shadow = 0 if s is None else s.data_ptr()
        addresses = d.data_ptr(), e.data_ptr(), w.data_ptr(), shadow
        rows.append(
            struct.pack("<7q2i", *addresses, d.numel(), e.stride(0), tiles, e.shape[0], aligned and shadow % 8 == 0)
        )
        tiles += -(-d.numel() // TILE)
    table = struct.pack("<2q", tiles, len(rows)) + b"".join(rows)
    on_device = isinstance(momentum, torch.Tensor)
    for name, t in (("momentum", momentum if on_device else None), ("skip", skip)):
        if t is not None:
            memory.add(t.data_ptr(), t.element_size(), t.element_size(), name)
    value, address = (0.0, momentum.data_ptr()) if on_device else (momentum, 0)
    is_double = on_device and momentum.dtype == torch.float64
    scalars = struct.pack("<dqq?", value, address, 0 if skip is None else skip.data_ptr(), is_double)
    program = Program(ptx, entry(ptx, capacity))
    return Launch(program, memory, (min(tiles, blocks),), THREADS, [table, scalars], seed).run()


def make(shapes, experts=(4, 3, 1, 6)):
    generator = torch.Generator().manual_seed(0)
    counts = [experts[i % len(experts)] for i in range(len(shapes))]
    directors = [torch.randn(shape, generator=generator) for shape in shapes]
    stacks = [torch.randn((E, *shape), generator=generator) for E, shape in zip(counts, shapes, strict=True)]
    return directors, stacks, [torch.rand(E, generator=generator) for E in counts]


def want(directors, stacks, weights, m):
    """``acc = fma((1 - m) a_e, expert_e, acc)``, e rising, each rounded once: the order that the library promises."""
    results = []
    keep, rest = np.float32(m), np.float32(1 - m)
    for d, stack, w in zip(directors, stacks, weights, strict=True):
        acc = keep * d.numpy()
        for e, a in enumerate(w.numpy()):
            if a != 0:
                acc = (np.float64(rest * a) * stack[e].numpy() + acc).astype(np.float32)
        results.append(torch.from_numpy(acc) if w.any() else d.clone())
    return results


SHAPES = [(5, 3), (4100,), (1,), (64, 8), (2048,)]


@pytest.mark.parametrize("momentum", [0.999, torch.tensor(0.75), torch.tensor(0.75, dtype=torch.float64)], ids=str)
def test_results_are_the_promised_bits(ptx, momentum):
    directors, stacks, weights = make(SHAPES)
    weights[1][1], stacks[1][1] = 0, float("nan")  # not read
    weights[3].zero_()  # nothing is written
    shadows = [torch.full(d.shape, -1.0, dtype=torch.bfloat16) for d in directors]
    exact = want(directors, stacks, weights, float(momentum))
    launch(ptx, Groups(directors, stacks, weights, shadows), momentum)
    for i, (got, expected, shadow) in enumerate(zip(directors, exact, shadows, strict=True)):
        assert torch.equal(got, expected)
        assert torch.equal(shadow, torch.full_like(shadow, -1) if i == 3 else got.bfloat16())


def test_addresses_that_are_not_aligned(ptx):
    directors, stacks, weights = make([(70,), (4100,)])
    odd = [torch.empty(d.numel() + 1)[1:].copy_(d) for d in directors]
    exact = want(directors, stacks, weights, 0.9)
    launch(ptx, Groups(odd, stacks, weights), 0.9, seed=1)
    assert all(torch.equal(got, expected) for got, expected in zip(odd, exact, strict=True))


@pytest.mark.parametrize("skip", [True, False])
def test_skip_is_read_where_it_lies(ptx, skip):
    directors, stacks, weights = make([(70,)])
    expected = directors[0].clone() if skip else want(directors, stacks, weights, 0.9)[0]
    launch(ptx, Groups(directors, stacks, weights), 0.9, skip=torch.tensor(skip))
    assert torch.equal(directors[0], expected)


@pytest.mark.slow
def test_the_large_table(ptx):
    directors, stacks, weights = make([(9,)] * 200)
    exact = want(directors, stacks, weights, 0.9)
    launch(ptx, Groups(directors, stacks, weights), 0.9, capacity=LARGE, blocks=64)
    assert all(torch.equal(got, expected) for got, expected in zip(directors, exact, strict=True))


def test_an_entry_that_says_more_than_there_is(ptx):
    directors, stacks, weights = make([(70,)])
    with pytest.raises(PTXError, match="outside of every allocation: .* past the end of director 0"):
        launch(ptx, Groups(directors, stacks, weights), 0.9, hidden=4)
