"""Random numbers that are a pure function of a key and a column, made on the device that needs them.

What happens to an image then depends on the seed and on its place in the run alone: not on the number of ranks, on how
a batch is cut into micro-batches, or on what was drawn before. No generator, no state, no wait for the host.

Letters: B keys, C columns.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64 words read as unsigned: a bijection; every output bit depends on every input."""
    x = x + _GOLDEN  # int64 wraps around on every device
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def keys(seed: int, places: Tensor) -> Tensor:
    """int64 [B]: one key for each of ``places`` (int64 [B], positions counted over the whole run) under ``seed``."""
    return mix(mix(torch.full_like(places, seed)) ^ places)


def uniform(keys: Tensor, stream: int, columns: int) -> Tensor:
    """float32 [B, C] in [0, 1), multiples of 2^-24. ``stream`` keeps apart what one key is used for."""
    column = torch.arange(columns, dtype=torch.int64, device=keys.device)
    words = mix(mix(keys ^ mix(torch.full_like(keys, stream)))[:, None] ^ column)
    return _shift(words, 40).float() * 2.0**-24


def normal(keys: Tensor, stream: int, columns: int) -> Tensor:
    """float32 [B, C] from N(0, 1), by Box and Muller; the largest magnitude is 5.8."""
    both = uniform(keys, stream, 2 * columns)
    radius = (-2 * torch.log1p(-both[:, :columns])).sqrt()
    return radius * torch.cos(2 * torch.pi * both[:, columns:])


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
