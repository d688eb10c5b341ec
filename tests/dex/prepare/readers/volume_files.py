"""Volumes through nibabel's own writer, and what a reader makes of one."""

from pathlib import Path

import nibabel
import numpy as np

from dex.prepare import readers

DATA = Path(nibabel.__file__).parent / "tests" / "data"


DRAW = np.random.default_rng(3)


VALUES = DRAW.integers(-1000, 1000, (6, 5, 4), dtype=np.int16)


def save(path, values, affine=None, kind=nibabel.Nifti1Image, slope=None, intercept=None):
    image = kind(values, np.diag([1.5, 2, 3, 1]) if affine is None else affine)
    if slope is not None:
        image.header.set_slope_inter(slope, intercept)
    nibabel.save(image, path)
    return path


def read(path, **more):
    format = readers.format_of(path)
    others = [path.with_name(name) for name in readers.beside(path, format)]
    (stack,) = readers.read([path, *(other for other in others if other.exists())][:2], format, **more)
    return stack


def shown(stack, plane="axial"):
    return np.stack([frame.pixels for frame in stack.frames((plane,), 1)])
