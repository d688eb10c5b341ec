"""Faults that somebody could make in csrc/: for `test_sabotages.py`."""

from typing import NamedTuple


class Change(NamedTuple):
    """Of every match of ``before`` in a file of csrc/."""

    name: str
    file: str
    before: str
    after: str
    caught: str


BITS = "^(director|shadow)"

CUDA = [
    Change(
        "a pack that is cut off is taken whole",
        "group_ema/group_ema.h",
        r"k \* step \+ WIDTH > left",
        "k * step > left",
        "outside of every",
    ),
    Change(
        "one expert too many",
        "group_ema/group_ema.h",
        r"e \+ j < t\.num_experts",
        "e + j <= t.num_experts",
        "outside of every",
    ),
    Change(
        "what is left after whole packs is left out", "group_ema/group_ema.h", r"piece\.size & ~3", "piece.size", BITS
    ),
    Change("a tile is done by every block", "group_ema/group_ema.h", r"tile \+= blocks", "tile += 1", "race on global"),
    Change(
        "all threads begin at the tile's first pack",
        "group_ema/group_ema.h",
        r"4 \* thread",
        "4 * (thread / 2)",
        "race on global|" + BITS,
    ),
    Change(
        "wide accesses of what is not aligned", "group_ema/group_ema.h", r"if \(t\.wide\)", "if (true)", "misaligned"
    ),
    Change("what nobody follows is written", "group_ema/group_ema.h", r"if \(!moved\) return;", "", BITS),
    Change(
        "an expert of weight 0 is added",
        "group_ema/group_ema.h",
        r"weight\[j\] == 0\.0f",
        "weight[j] < 0.0f",
        "outside of every|" + BITS,
    ),
    Change(
        "skip is not heeded", "group_ema/group_ema.h", r"\*scalars\.skip_at\) return", "!*scalars.skip_at) return", BITS
    ),
    Change("halves of a word overlap", "group_ema/group_ema.h", r"<< 16 \* i", "<< 8 * i", BITS),
    Change(
        "a float momentum is read as a double",
        "group_ema/group_ema.h",
        r"s\.momentum_is_double \?",
        "!s.momentum_is_double ?",
        "misaligned|outside of every|" + BITS,
    ),
    Change(
        "a tile belongs to the tensor before",
        "common/launch.h",
        r"items\[middle\]\.first_tile <= tile",
        "items[middle].first_tile < tile",
        "race on global|outside of every|" + BITS,
    ),
    Change(
        "the last tile is as long as the others",
        "common/launch.h",
        r"left < tile_size \?",
        "left < 0 ?",
        "outside of every",
    ),
    Change(
        "1 - m is taken in float32",
        "common/math.h",
        r"static_cast<float>\(1\.0 - m\)",
        "1.0f - static_cast<float>(m)",
        BITS,
    ),
    Change(
        "a product is rounded before it is added",
        "common/math.h",
        r"fmaf\(scale, value, acc\)",
        "__fadd_rn(__fmul_rn(scale, value), acc)",
        BITS,
    ),
]
