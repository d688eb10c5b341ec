"""Random numbers that are a pure function of a key and a column, made on the device that needs them.

What happens to an image then depends on the seed and on its place in the run alone: not on the number of ranks, on how
a batch is cut into micro-batches, or on what was drawn before. No generator, no state, no wait for the host; whole
numbers that are the same on every device.

Shape letters: B keys.
"""

import torch


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - 2**64 if word >= 2**63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)


def sample_keys(seed: int, places: torch.Tensor) -> torch.Tensor:
    """Keys, int64 [B], of the run's seed, 0 <= seed < 2^63, and `Batch.places`, int64 [B].

    Different places of one seed have different keys; keys of different seeds coincide by chance only.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected a whole number >= 0 and < {2**63}, got {seed!r}")
    if not isinstance(places, torch.Tensor) or places.ndim != 1 or places.dtype != torch.int64:
        got = f"{places.dtype} {list(places.shape)}" if isinstance(places, torch.Tensor) else type(places).__name__
        raise ValueError(f"places: expected int64 [B], got {got}")
    stream = _mix_(torch.full_like(places, seed))
    return _mix_(stream.bitwise_xor_(places))


def uniform(keys: torch.Tensor, columns: int, stream: int = 0) -> torch.Tensor:
    """float32 [B, columns], uniform on the multiples of 2^-24 in [0, 1): for each of keys, int64 [B], the first
    numbers of splitmix64 seeded with the hash of the key, their upper 24 bits. The same on every device.

    stream: a small number for what they are used for; other streams of one key are other numbers.
    """
    counters = torch.arange(columns, device=keys.device).mul_(_GOLDEN)
    words = _mix_(_mix_(keys ^ _signed(stream * 0xD1342543DE82EF95 % 2**64))[:, None] + counters)
    return (words >> 40).bitwise_and_(2**24 - 1).float().mul_(2**-24)


def normal(keys: torch.Tensor, columns: int, stream: int = 0) -> torch.Tensor:
    """float32 [B, columns] from N(0, 1) by Box and Muller, of at most 5.8; keys and stream as in `uniform`."""
    radius, angle = uniform(keys, 2 * columns, stream).split(columns, dim=1)
    return (-2 * torch.log1p(-radius)).sqrt_() * torch.cos(2 * torch.pi * angle)


def _mix_(words: torch.Tensor) -> torch.Tensor:
    """One step of splitmix64 on each of int64 `words`, in place: a bijection whose every output bit depends on every
    input bit. Products and sums wrap around; a right shift copies the sign, so what it brings in is masked away."""
    words += _GOLDEN
    words ^= (words >> 30) & (2**34 - 1)
    words *= _signed(0xBF58476D1CE4E5B9)
    words ^= (words >> 27) & (2**37 - 1)
    words *= _signed(0x94D049BB133111EB)
    words ^= (words >> 31) & (2**33 - 1)
    return words
