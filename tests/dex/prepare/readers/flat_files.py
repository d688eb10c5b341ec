"""Pixels, and what a reader makes of a file that holds them."""

import numpy as np

from dex.prepare import readers

DRAW = np.random.default_rng(4)


GREY = DRAW.integers(0, 256, (20, 30), dtype=np.uint8)


COLOUR = DRAW.integers(0, 256, (20, 30, 3), dtype=np.uint8)


DEEP = DRAW.integers(0, 65536, (20, 30), dtype=np.uint16)


def read(path, **more):
    return list(readers.read([path], readers.format_of(path), **more))


def frames(path):
    (stack,) = read(path)
    return stack, [frame.pixels for frame in stack.frames(("axial",), 1)]
