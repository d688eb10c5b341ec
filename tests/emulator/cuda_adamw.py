"""A launch of csrc/adamw_ema: its parameters as bytes, as a CUDA graph keeps them, and the bits that it promises."""

import struct

import numpy as np
import torch
from cuda_library import entry
from ptx_emulator.launch import GlobalMemory, Launch, Program

THREADS, TILE, SMALL, LARGE = 256, 1024, 40, 300
RULE = (0.9, 0.99, 1e-6)
"""beta1, beta2, eps."""


class Captured:
    """``run`` replays the launch. updates: records of `adamw_ema_`; clip: None, or a float32 tensor.

    hidden: bytes at the end of every parameter that do not exist. rule: beta1, beta2, eps.
    """

    def __init__(
        self, ptx, updates, rates, momentum, *, clip=None, skip=None, capacity=SMALL, blocks=3, hidden=0, rule=RULE
    ):
        self.memory, rows, tiles = GlobalMemory(), [], 0
        for i, u in enumerate(updates):
            tensors = (*u[:4], u.director, u.copy, u.group_weights, rates[i])
            for name, t in zip((*u._fields[:4], "director", "copy", "weights", "rates"), tensors, strict=True):
                if t is not None and t.numel():
                    self._reach(t, f"{name} {i}", hidden if name == "parameter" else 0)
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
            size = u.parameter.numel() // u.num_experts
            rows_fit = (u.num_experts <= 1 and u.copy is None) or size % 4 == 0
            wide = not (any(a % 16 for a in addresses[:5]) or addresses[5] % 8) and rows_fit
            rows.append(struct.pack("<10q2i", *addresses, size, tiles, u.num_experts, wide))
            tiles += -(-size // TILE)
        for name, t in (("momentum", momentum), ("clip", clip), ("skip", skip)):
            if t is not None:
                self._reach(t, name)
        first, second, eps = rule
        at = (0 if t is None else t.data_ptr() for t in (momentum, clip, skip))
        scalars = struct.pack("<3q5f4x", *at, first, 1 - first, second, 1 - second, eps)
        self.arguments = [struct.pack("<2q", tiles, len(rows)) + b"".join(rows), scalars]
        self.program = Program(ptx, entry(ptx, capacity))
        self.grid = (min(tiles, blocks),)
        self.alive = updates, rates, momentum, clip, skip

    def _reach(self, t, name, hidden=0):
        self.memory.add(t.data_ptr(), t.numel() * t.element_size() - hidden, t.element_size(), name)

    def run(self, seed=None, count=False):
        """What was counted."""
        return Launch(self.program, self.memory, self.grid, THREADS, self.arguments, seed, count).run()


def promised(update, rates, momentum: float, clip: float = 1.0):
    """The update after a step: every operation rounded once, fma where csrc/adamw_ema says so."""

    def fma(a, b, c):
        return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)

    p, g, m, v = (t.numpy() for t in update[:4])
    keep, rate, root = rates.numpy()
    (beta1, beta2, eps), m_keep = np.float32(RULE), np.float32(momentum)
    rest1, rest2, m_rest = (np.float32(1 - x) for x in (*RULE[:2], momentum))
    d = None if update.director is None else update.director.numpy()
    if d is not None and update.group_weights.any():
        d = m_keep * d
        for e, a in enumerate(update.group_weights.numpy()):
            if a != 0:
                d = fma(m_rest * a, p[e], d)
    g = np.float32(clip) * g
    m = fma(beta1, m, rest1 * g)
    v = fma(beta2, v, rest2 * g * g)
    p = fma(-rate, m / fma(np.sqrt(v), root, eps), keep * p)
    copy = None
    p, m, v = (torch.from_numpy(np.asarray(t)) for t in (p, m, v))
    if d is not None:
        d = torch.from_numpy(np.asarray(d))
        copy = None if update.copy is None else torch.cat((p, d[None])).bfloat16()
    return update._replace(parameter=p, exp_avg=m, exp_avg_sq=v, director=d, copy=copy)
