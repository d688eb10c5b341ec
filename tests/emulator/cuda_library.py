"""The kernel of csrc/ as PTX, and its launcher: a table of tensors by value, the scalars behind it."""

import os
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ptx_emulator.launch import GlobalMemory, Launch, Program

CSRC = Path(__file__).resolve().parents[2] / "csrc"
THREADS, TILE = 256, 2048
SMALL, LARGE = 60, 500
"""Tensors of the two tables."""

TARGETS = {80: "sm_80", 90: "sm_90a"}


def nvcc() -> str | None:
    return shutil.which(os.environ.get("CUDACXX") or "nvcc")


def version(compiler: str) -> str:
    """Of nvcc, such as ``"13.0"``."""
    text = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]


def compiled(compiler: str, target: str, folder: Path, csrc: Path = CSRC, operator: str = "group_ema") -> str:
    """The PTX of an operator for ``target``; ``folder``: where a file may lie. csrc: of which sources."""
    file = folder / f"{operator}-{target}.ptx"
    options = ["-O3", "-std=c++17", f"-arch={target}", f"-I{csrc}"]
    source = csrc / f"{operator}/{operator}.cu"
    subprocess.run([compiler, "-ptx", *options, source, "-o", file], check=True, capture_output=True)
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


class Captured:
    """A launch with its parameters as bytes, as a CUDA graph keeps it: ``run`` replays it.

    hidden: bytes at the end of every director that do not exist.
    """

    def __init__(self, ptx, groups, momentum, *, skip=None, capacity=SMALL, blocks=3, hidden=0):
        shadows = groups.shadows or [None] * len(groups.directors)
        self.memory, rows, tiles = GlobalMemory(), [], 0
        for i, (d, e, w, s) in enumerate(zip(groups.directors, groups.experts, groups.weights, shadows, strict=True)):
            for name, t in (("director", d), ("experts", e), ("weights", w), ("shadow", s)):
                if t is not None and t.numel():
                    self._reach(t, f"{name} {i}", hidden if name == "director" else 0)
            aligned = d.data_ptr() % 16 == e.data_ptr() % 16 == 0 and (e.shape[0] <= 1 or e.stride(0) % 4 == 0)
            shadow = 0 if s is None else s.data_ptr()
            addresses = d.data_ptr(), e.data_ptr(), w.data_ptr(), shadow
            wide = aligned and shadow % 8 == 0
            rows.append(struct.pack("<7q2i", *addresses, d.numel(), e.stride(0), tiles, e.shape[0], wide))
            tiles += -(-d.numel() // TILE)
        on_device = isinstance(momentum, torch.Tensor)
        for name, t in (("momentum", momentum if on_device else None), ("skip", skip)):
            if t is not None:
                self._reach(t, name)
        value, address = (0.0, momentum.data_ptr()) if on_device else (momentum, 0)
        is_double = on_device and momentum.dtype == torch.float64
        scalars = struct.pack("<dqq?", value, address, 0 if skip is None else skip.data_ptr(), is_double)
        self.arguments = [struct.pack("<2q", tiles, len(rows)) + b"".join(rows), scalars]
        self.program = Program(ptx, entry(ptx, capacity))
        self.grid = (min(tiles, blocks),)

    def _reach(self, t, name, hidden=0):
        last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        self.memory.add(t.data_ptr(), (last + 1) * t.element_size() - hidden, t.element_size(), name)

    def run(self, seed=None, count=False):
        """What was counted."""
        return Launch(self.program, self.memory, self.grid, THREADS, self.arguments, seed, count).run()


def launch(ptx, groups, momentum, *, seed=None, **options):
    return Captured(ptx, groups, momentum, **options).run(seed)


def make(shapes, experts=(4, 3, 1, 6)) -> Groups:
    generator = torch.Generator().manual_seed(0)
    counts = [experts[i % len(experts)] for i in range(len(shapes))]
    directors = [torch.randn(shape, generator=generator) for shape in shapes]
    stacks = [torch.randn((E, *shape), generator=generator) for E, shape in zip(counts, shapes, strict=True)]
    return Groups(directors, stacks, [torch.rand(E, generator=generator) for E in counts])


def want(groups, m) -> list[torch.Tensor]:
    """``acc = fma((1 - m) a_e, expert_e, acc)``, e rising, each rounded once: the order that the library promises."""
    results = []
    keep, rest = np.float32(m), np.float32(1 - m)
    for d, stack, w in zip(groups.directors, groups.experts, groups.weights, strict=True):
        acc = keep * d.numpy()
        for e, a in enumerate(w.numpy()):
            if a != 0:
                acc = (np.float64(rest * a) * stack[e].numpy() + acc).astype(np.float32)
        results.append(torch.from_numpy(acc) if w.any() else d.clone())
    return results
