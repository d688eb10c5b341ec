"""The cases of a task."""

import numpy as np

from dex.tasks.cases import Frames, Grid


def test_pictures_have_no_affine_and_volumes_that_of_their_file():
    affine = np.diag([-1.0, 2.0, 3.0, 1.0])
    grid = Grid(affine, (4, 3, 2), "axial", (0, 1, 2), (-1, 1, 1), ())
    images = np.zeros((2, 3, 4), np.uint8)
    assert Frames(images, None, None, None, None).affine is None
    assert Frames(images, None, None, (3.0, 2.0, 1.0), grid).affine is affine
