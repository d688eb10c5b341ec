"""Counter-based random numbers: pure functions of a key and a counter (splitmix64), computed on the device.

The random numbers of an image depend only on the seed and its place in the run, not on the number of ranks, on
micro-batches or on earlier draws. There is no generator, no state and no wait for the host; integers are the same on
every device.

Shape letters: B keys.
"""

from __future__ import annotations

import numpy as np
import torch


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - 2**64 if word >= 2**63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def sample_keys(seed: int, places: torch.Tensor) -> torch.Tensor:
    """Keys, int64 ``[B]``, from the run's seed, 0 <= seed < 2^63, and ``Batch.places``, int64 ``[B]``.

    Different places have different keys for one seed; keys of different seeds coincide only by chance.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected a whole number >= 0 and < {2**63}, got {seed!r}")
    if not isinstance(places, torch.Tensor) or places.ndim != 1 or places.dtype != torch.int64:
        got = f"{places.dtype} {list(places.shape)}" if isinstance(places, torch.Tensor) else type(places).__name__
        raise ValueError(f"places: expected int64 [B], got {got}")
    stream = _mix_(torch.full_like(places, seed))
    return _mix_(stream.bitwise_xor_(places))


def uniform(keys: torch.Tensor, columns: int, stream: int = 0) -> torch.Tensor:
    """float32 ``[B, columns]``, uniform on the multiples of 2^-24 in [0, 1), the same on every device.

    For each of keys, int64 ``[B]``, these are the upper 24 bits of the first numbers of splitmix64, seeded with a hash
    of the key. stream: a small integer for the purpose of the numbers; different streams give different numbers.
    """
    counters = torch.arange(columns, device=keys.device).mul_(_GOLDEN)
    words = _mix_(_mix_(keys ^ _signed(stream * 0xD1342543DE82EF95 % 2**64))[:, None] + counters)
    return (words >> 40).bitwise_and_(2**24 - 1).float().mul_(2**-24)


def normal(keys: torch.Tensor, columns: int, stream: int = 0) -> torch.Tensor:
    """float32 ``[B, columns]`` from N(0, 1) by Box-Muller, at most 5.8 in size; keys and stream as in ``uniform``."""
    radius, angle = uniform(keys, 2 * columns, stream).split(columns, dim=1)
    return (-2 * torch.log1p(-radius)).sqrt_() * torch.cos(2 * torch.pi * angle)


def step_seed(seed: int, step: int) -> int:
    """A seed, 0 <= seed < 2^63, for the random numbers of one step, from the run's seed and the step.

    A resumed run, or one with evaluations at other steps, thus draws the same numbers as an uninterrupted one.
    """
    word = mix(mix(np.uint64(seed)) ^ np.uint64(step % 2**64))
    return int(word) >> 1  # torch accepts 63 bits


def mix(words: np.ndarray | np.uint64) -> np.ndarray | np.uint64:
    """One step of splitmix64 on each of ``words``, uint64: a bijection in which every output bit depends on every input
    bit."""
    with np.errstate(over="ignore"):
        words = words + np.uint64(_GOLDEN % 2**64)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return words ^ (words >> np.uint64(31))


def _mix_(words: torch.Tensor) -> torch.Tensor:
    """``mix`` for int64 ``words``, in place; torch has no unsigned shifts, so shifted-in sign bits are masked."""
    words += _GOLDEN
    words ^= (words >> 30) & (2**34 - 1)
    words *= _signed(0xBF58476D1CE4E5B9)
    words ^= (words >> 27) & (2**37 - 1)
    words *= _signed(0x94D049BB133111EB)
    words ^= (words >> 31) & (2**33 - 1)
    return words
